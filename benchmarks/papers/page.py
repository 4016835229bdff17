"""Write docs/papers.md from benchmarks/results/papers/*.json alone.

    python benchmarks/papers/page.py

A topic whose file is not there is left out; `make papers` measures them all first.
"""

import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from entry import DOCS, SAVED, Value, difference, figure_path

TOPICS = (
    "zero",
    "offload",
    "mixed_precision",
    "pipelines",
    "tensor",
    "attention",
    "sequence",
    "lora",
    "deep",
    "onebit",
)
INTRO = """# What the papers say, and what is measured here

The techniques in this repository come from papers, and papers state figures: bytes on a rank, elements sent, idle time.
A row below holds one such statement, the figure that the paper prints where it prints one, the closed form that
minispeed computes, what real ranks were counted or timed at, and the difference: measured less closed form; a cell is
empty where nothing is printed or nothing was run, and what differs is explained below its table. Bytes, counts and
ticks of a logical clock are the same on every machine; seconds are not, and stand only as ratios within one run.
`make papers` measures all of it anew and writes this page; `make papers TOPICS="zero"` does so for one topic, and
`make papers TOPICS=""` writes the page alone, from the saved results.
"""
HEADER = ("the paper says", "unit", "paper", "closed form", "measured", "difference")


def page(saved: Path = SAVED) -> str:
    """Return the page, from the topics' files in a folder."""
    files = [saved / f"{topic}.json" for topic in TOPICS]
    return "\n".join([INTRO, *(section(json.loads(file.read_text())) for file in files if file.exists())])


def section(entry: Mapping[str, Any]) -> str:
    """Return what the page says of one topic."""
    parts = [f"## {entry['title']}", f"[{entry['source']}]({entry['link']})"]
    parts.append("\n".join([_line(HEADER), "|---|---|" + "---:|" * 4, *map(_row, entry["rows"])]))
    if entry["series"]:
        parts.append(f"![{entry['title']}]({figure_path(entry['topic']).relative_to(DOCS).as_posix()})")
    parts.append("\n".join(_wrapped(f"- {note}", "  ") for note in entry["notes"]))
    parts.append(
        _wrapped(
            f"`{entry['command']}`, {entry['date']}, torch {entry['torch']}, Python {entry['python']}, "
            f"{entry['device']} with {entry['cores']} cores, commit {entry['commit']}"
        )
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def spell(value: Value) -> str:
    """Write a number so that it is read easily: thousands apart, four digits of a fraction, 0 only where it is 0."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def _row(row: Mapping[str, Any]) -> str:
    measured, closed_form = row["measured"], row["closed_form"]
    values = (row["paper"], closed_form, measured, difference(measured, closed_form))
    return _line([f"{spell(row['claim'])} ({row['section']})", row["unit"], *map(spell, values)])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    (DOCS / "papers.md").write_text(page())
    print("written: docs/papers.md")
