"""Be the main of every chapter's run.py: measure, say, write down, draw.

    python tutorials/00-one-step/run.py            measures, writes results.json, draws the figures
    python tutorials/00-one-step/run.py --quick    measures little, in seconds, and writes nothing
    python tutorials/00-one-step/run.py --mine     with your exercise.py in place of our solution.py
    python tutorials/00-one-step/run.py --draw     draws the figures anew from results.json

results.json holds `values` (what was measured), `output` (what was printed), `measured` (a hash of each file that the
values depend on), and date, command, commit, versions and machine.
"""

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from book import ROOT, Chapter, digest, hashes, load

from minispeed import launch
from minispeed.collective.launch import under_torchrun

Values = Mapping[str, Any]
GREY = "#8a8a8a"  # readable on light and on dark pages
LONG = re.compile(r"^L \S+ \S+", re.MULTILINE)  # a line's end, to a millionth of a point
LISTS = re.compile(r"\[\s+((?:-?[\d.e+-]+,\s+)*-?[\d.e+-]+)\s+\]")  # of numbers, which need no lines of their own


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a chapter measures.

    measure   (code, is_quick) -> values that JSON can hold; `code` is solution.py, or with --mine the reader's
    show      values -> the lines that the run prints
    claims    results -> the lesson's sentences, each with whether it is true
    figures   (results, path) -> draws one, by the file's name
    sources   the files that the values depend on, from the repository's root
    """

    measure: Callable[[ModuleType, bool], dict[str, Any]]
    show: Callable[[Values], str]
    claims: Callable[[Values], Iterable[tuple[str, bool]]]
    figures: Mapping[str, Callable[[Values, Path], None]] = field(default_factory=dict)
    sources: Sequence[str] = ()

    def main(self, file: str) -> None:
        """Do what the command line of run.py asks for."""
        chapter, options = Chapter(Path(file).resolve().parent), _options(file)
        if options.draw:
            self.draw(chapter.results, chapter.folder / "figures")
            return
        if options.mine and not chapter.mine.exists():
            raise SystemExit(f"there is nothing of yours yet: python tutorials/learn.py {chapter.name[:2]}")
        try:
            values = self.measure(load(chapter.mine) if options.mine else chapter.module("solution"), options.quick)
        except NotImplementedError as error:
            name = traceback.extract_tb(error.__traceback__)[-1].name
            raise SystemExit(f"{name} is not written yet: python tutorials/learn.py {chapter.name[:2]}") from None
        print(self.show(values))
        results = {"values": values, "output": self.show(values), "measured": hashes(self.sources), **_where(chapter)}
        if options.quick:
            return
        if not options.mine:
            (chapter.folder / "results.json").write_text(written(results))
        self.draw(results, chapter.mine.parent if options.mine else chapter.folder / "figures")
        if options.mine:
            self.judge(results)

    def draw(self, results: Values, folder: Path) -> None:
        """Draw every figure, and note in it what it was drawn from."""
        try:
            import matplotlib
        except ImportError:
            raise SystemExit('no figure is drawn: python -m pip install -e ".[figures]"') from None
        matplotlib.use("agg")
        matplotlib.rcParams["svg.hashsalt"] = "minispeed"  # the same ids each time
        folder.mkdir(exist_ok=True)
        for name, draw in self.figures.items():
            draw(results, folder / name)
            svg = LONG.sub(lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), (folder / name).read_text())
            (folder / name).write_text(f"{svg}<!-- drawn from {stamp(results)} -->\n")
            print(f"drawn: {(folder / name).relative_to(ROOT)}")

    def judge(self, results: Values) -> None:
        """Say which of the lesson's sentences are not true of the reader's run."""
        false = [sentence for sentence, is_true in self.claims(results) if not is_true]
        for sentence in false:
            print(f"not so with your code: {sentence}")
        if false:
            raise SystemExit(1)
        print("every sentence of the lesson that can be checked holds with your code.")


def written(results: Values) -> str:
    """Return the text of results.json, a list of numbers on a line."""
    return LISTS.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(results, indent=1)) + "\n"


def stamp(results: Values) -> str:
    """Return what a figure names the results by that it was drawn from."""
    return digest(json.dumps(results["values"]).encode())


def on_ranks(fn: Callable[..., Any], *args: Any, ranks: int, backend: str = "threads") -> list[Any]:
    """Run `fn(world, *args)` on so many ranks and return what each of them returned; see `minispeed.launch`."""
    if under_torchrun():
        raise SystemExit("this experiment starts ranks itself, several numbers of them: run it with python")
    return launch(fn, *args, ranks=ranks, backend=backend)


def finish(figure: Any, path: Path) -> None:
    """Make a figure readable on light and on dark pages, and save it."""
    for axes in figure.axes:
        axes.tick_params(colors=GREY, which="both", labelsize=8)
        for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
            part.set(color=GREY, fontsize=9)
        axes.spines[:].set_color(GREY)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


def _options(file: str) -> argparse.Namespace:
    module = sys.modules["__main__"]
    parser = argparse.ArgumentParser(prog=file, description=module.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="measure little, in seconds; nothing is written")
    parser.add_argument("--mine", action="store_true", help="with your exercise.py in place of solution.py")
    parser.add_argument("--draw", action="store_true", help="only the figures, from results.json")
    return parser.parse_args()


def _where(chapter: Chapter) -> dict[str, Any]:
    """Say what was run where, as the benchmarks do."""
    command = f"python tutorials/{chapter.name}/run.py"
    return {**load(ROOT / "benchmarks" / "report.py").where(), "command": command}
