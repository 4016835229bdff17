"""What every benchmark ends with: a table on the screen, a JSON file beside the others.

benchmarks/results/NAME.json holds the rows, the machine, versions, commit, command and date.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def report(name: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
    """Print the rows, columns named by their keys, and write them to a file, which is returned."""
    print(table(rows))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"rows": list(rows), "settings": settings, **where()}, indent=1) + "\n")
    print(f"written: {path.relative_to(Path(__file__).parents[1])}")
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay rows out in columns, numbers to the right."""
    header = list(rows[0])
    cells = [[_spell(row[column]) for column in header] for row in rows]
    widths = [max(len(header[i]), *(len(line[i]) for line in cells)) for i in range(len(header))]
    numeric = [isinstance(rows[0][column], (int, float)) for column in header]
    lines = [header, *cells]
    return "\n".join(
        "  ".join(cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(line, widths, numeric)) for line in lines
    )


def where() -> dict[str, Any]:
    """Say what a figure depends on: machine, versions, commit, command, date."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "date": date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "commit": found.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "cores": os.cpu_count(),
    }


def _spell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
