"""What a page of docs/papers.md is made of: a paper's statements, and what became of each of them here.

A topic is one script, benchmarks/papers/TOPIC.py. It measures, prints its table, and writes

    benchmarks/results/papers/TOPIC.json     rows, notes, what the figure is drawn from; machine, versions, date
    docs/figures/papers-TOPIC.svg            where it draws one, from that file alone

    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent.parent))  # the other benchmarks, and report

    from entry import Entry, Row, run

    def entry(quick: bool) -> Entry: ...
    def draw(saved: Mapping[str, Any], path: Path) -> None: ...

    if __name__ == "__main__":
        run(entry, draw)

A script's folder comes first where Python looks for modules, so that no file here may be called like a module of
Python's own: 3.14 has one called `compression`, and that topic is `onebit`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from report import RESULTS, table, where

SAVED = RESULTS / "papers"
DOCS = Path(__file__).parents[2] / "docs"
Value = float | str | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One statement of a paper, and what became of it here.

    claim        the paper's statement, in our words
    section      where it stands: "section 5.1, figure 1"
    paper        the figure that the paper prints, if it prints one
    closed_form  ours: from minispeed's closed forms, or the formula written in the topic's file
    measured     counted or timed on real ranks
    unit         of all three
    """

    claim: str
    section: str
    paper: Value
    closed_form: Value
    measured: Value
    unit: str = ""

    @property
    def difference(self) -> float | None:
        """Measured less closed form, where both are numbers."""
        return difference(self.measured, self.closed_form)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A topic of the page.

    topic   the name of its files
    source  "ZeRO, Rajbhandari et al. 2020"; `link` leads there
    notes   sentences: what was measured on what, what differs and why
    series  numbers that the figure is drawn from; none where there is no figure
    """

    topic: str
    title: str
    source: str
    link: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    series: Mapping[str, Any] = field(default_factory=dict)


def difference(measured: Value, closed_form: Value) -> float | None:
    """Return one less the other where both are numbers, else None."""
    if isinstance(measured, (int, float)) and isinstance(closed_form, (int, float)):
        return measured - closed_form
    return None


def figure_path(topic: str) -> Path:
    """Return where a topic's figure is."""
    return DOCS / "figures" / f"papers-{topic}.svg"


def run(entry: Callable[[bool], Entry], draw: Callable[[Mapping[str, Any], Path], None] | None = None) -> None:
    """Be the main of a topic's script: measure, print the table, write the JSON file and draw the figure from it.

    --quick  measures little, in seconds, and writes nothing
    --draw   measures nothing: draws the figure anew from what is saved
    """
    parser = argparse.ArgumentParser(description=sys.modules[entry.__module__].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="seconds; nothing is written")
    parser.add_argument("--draw", action="store_true", help="only the figure, from the saved file")
    options = parser.parse_args()
    if options.draw:
        topic = Path(sys.argv[0]).stem
    else:
        made = entry(options.quick)
        topic = made.topic
        print(table([{**asdict(row), "difference": row.difference} for row in made.rows]), *made.notes, sep="\n")
        if options.quick:
            return
        SAVED.mkdir(parents=True, exist_ok=True)
        (SAVED / f"{topic}.json").write_text(json.dumps({**asdict(made), **where()}, indent=1) + "\n")
    if draw:
        figure_path(topic).parent.mkdir(parents=True, exist_ok=True)
        draw(json.loads((SAVED / f"{topic}.json").read_text()), figure_path(topic))
