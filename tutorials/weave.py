"""Keep the lessons true: cut their code anew from the source, their numbers from what the chapters measured.

    python tutorials/weave.py            write every excerpt, table and number anew, in seconds; redraw old figures
    python tutorials/weave.py --check    write nothing; fail on whatever is stale, broken or false

What is woven lies between comments that a page does not show:

    <!-- code minispeed.model.gpt:Block -->           a class, function, method or constant, at most 25 lines; of a
                                                      chapter's own file by its name alone: run:measure
    <!-- number peak.total MB -->12.3 MB<!-- end -->  a value of results.json, in a format of FORMATS
    <!-- table sweep -->                              a value that is a list of rows, with their keys as heads
    <!-- output -->                                   what run.py printed
    <!-- machine -->                                  where and when

each up to its `end` comment. A changed source that a chapter measured is no failure: a notice names the chapter.
"""

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from textwrap import dedent
from typing import Any

from book import BOOK, ROOT, Chapter, chapters, hashes
from experiment import stamp

LONGEST = 25  # lines of an excerpt
WOVEN = re.compile(r"<!-- (code|number|table|output|machine)((?: [^\s>]+)*) -->(.*?)<!-- end -->", re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FIGURE = re.compile(r"\d[\d.,]*\s?(?:[kMG]?B|m?s|%|GFLOPs?)(?![\w-])")
FORMATS: Mapping[str, Callable[[Any], str]] = {
    "int": lambda x: f"{x:,.0f}",
    "one": lambda x: f"{x:,.1f}",
    "text": str,
    "kB": lambda x: f"{x / 1e3:,.1f} kB",
    "MB": lambda x: f"{x / 1e6:,.1f} MB",
    "GFLOP": lambda x: f"{x / 1e9:,.1f} GFLOP",
    "ms": lambda x: f"{1e3 * x:,.1f} ms",
    "%": lambda x: f"{100 * x:.0f} %",
    "%%": lambda x: f"{100 * x:.1f} %",  # a percentage with a decimal
}


class Stale(Exception):
    """A lesson cannot be woven; the message says what is wrong."""


def main() -> int:
    """Weave or check every page.  Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on what is stale, broken or false")
    is_check = parser.parse_args().check
    if not is_check:
        for chapter in chapters():
            write(chapter)
    problems = [f"{where}: {what}" for where, what in check()]
    for chapter in chapters():
        for notice in changed(chapter):
            print(f"notice: {notice}")
    print(*problems, sep="\n", end="\n" if problems else "")
    print("the book is true" if not problems else f"{len(problems)} things in the book are not so")
    return 1 if problems else 0


def write(chapter: Chapter) -> None:
    """Weave a lesson, and draw its figures anew where they are not of these results."""
    try:
        chapter.lesson.write_text(weave(chapter.lesson.read_text(), chapter, chapter.results))
    except Stale:
        return  # the check says it
    if any(stale_figures(chapter)):
        chapter.module("run").EXPERIMENT.draw(chapter.results, chapter.folder / "figures")


def check() -> Iterator[tuple[str, str]]:
    """Yield (page, what is wrong with it)."""
    for chapter in chapters():
        yield from (
            (chapter.name, problem) for problem in problems(chapter, chapter.lesson.read_text(), chapter.results)
        )
        yield from ((chapter.name, f"{name} is not drawn from these results") for name in stale_figures(chapter))
    for page in sorted(BOOK.rglob("*.md")):
        if "mine" not in page.relative_to(BOOK).parts:
            links = broken_links(page.read_text(), page)
            yield from ((page.relative_to(ROOT).as_posix(), f"leads nowhere: {link}") for link in links)


def problems(chapter: Chapter, text: str, results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a lesson, given what was measured."""
    try:
        anew = weave(text, chapter, results)
    except Stale as problem:
        yield str(problem)
    else:
        if anew != text:
            yield f"stale: {first_difference(text, anew)} (make weave)"
    yield from unwoven(text)
    yield from false_claims(chapter, text, results)


def first_difference(old: str, new: str) -> str:
    """Return the first line that weaving changes."""
    pairs = zip_longest(old.splitlines(), new.splitlines(), fillvalue="")
    return next(repr(line) for line, other in pairs if line != other)


def weave(text: str, chapter: Chapter, results: Mapping[str, Any]) -> str:
    """Return a lesson with everything woven anew.  Raises Stale where that cannot be"""

    def anew(match: re.Match[str]) -> str:
        kind, words = match[1], match[2].split()
        made = {
            "code": lambda: _excerpt(chapter, *words),
            "number": lambda: number(results["values"], *words),
            "table": lambda: f"\n\n{table(value_of(results['values'], *words))}\n\n",
            "output": lambda: f"\n```text\n{results['output'].rstrip()}\n```\n",
            "machine": lambda: _machine(results),
        }[kind]()
        return f"<!-- {kind}{match[2]} -->{made}<!-- end -->"

    return WOVEN.sub(anew, text)


def excerpt(path: Path, symbol: str) -> str:
    """Return the source of a symbol: "Block.forward", "PRESETS".  Raises Stale if it is not there, or too long"""
    source = path.read_text()
    body: Any = ast.parse(source)
    for name in symbol.split("."):
        body = next((node for node in body.body if _name(node) == name), None)
        if body is None:
            raise Stale(f"{path.relative_to(ROOT)} has no {symbol}")
    first = min([body.lineno, *(one.lineno for one in getattr(body, "decorator_list", []))])
    lines = source.splitlines()[first - 1 : body.end_lineno]
    if len(lines) > LONGEST:
        raise Stale(f"{symbol} has {len(lines)} lines; an excerpt has at most {LONGEST}")
    return dedent("\n".join(lines))


def number(values: Mapping[str, Any], key: str, form: str) -> str:
    """Return a value in one of FORMATS."""
    if form not in FORMATS:
        raise Stale(f"no number is written as {form!r}: {', '.join(FORMATS)}")
    return FORMATS[form](value_of(values, key))


def value_of(values: Any, key: str) -> Any:
    """Return what a key with dots names; numbers count in lists."""
    for part in key.split("."):
        try:
            values = values[int(part)] if isinstance(values, list) else values[part]
        except (KeyError, IndexError, ValueError):
            raise Stale(f"results.json has no value {key}") from None
    return values


def table(rows: list[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table, numbers to the right."""
    heads = list(rows[0])
    right = [not isinstance(rows[0][head], str) for head in heads]
    cells = [[f"{row[head]:,}" if isinstance(row[head], (int, float)) else row[head] for head in heads] for row in rows]
    lines = [heads, ["---:" if is_right else "---" for is_right in right], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def unwoven(text: str) -> Iterator[str]:
    """Yield measured figures that stand in a lesson by hand, and comments that would spoil a page."""
    prose = FENCED.sub("", WOVEN.sub("", text)).partition("## Papers")[0]
    for found in FIGURE.finditer(prose):
        yield f"a figure that no run made: {found[0]!r}"
    for line in text.splitlines():
        if line.startswith("<!-- number"):
            yield f"a line that begins with a comment is taken for HTML: {line[:60]!r}"


def false_claims(chapter: Chapter, text: str, results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the claims that the results do not bear out, and those that the lesson does not make."""
    plain = " ".join(re.sub(r"<!--.*?-->|[*`]", "", text).split())
    for sentence, is_true in chapter.module("run").EXPERIMENT.claims(results):
        if not is_true:
            yield f"false: {sentence}"
        if " ".join(sentence.split()) not in plain:
            yield f"a claim that the lesson does not make: {sentence}"


def stale_figures(chapter: Chapter) -> Iterator[str]:
    """Yield the figures that are missing or were drawn from other results."""
    for name in chapter.module("run").EXPERIMENT.figures:
        path = chapter.folder / "figures" / name
        if not path.exists() or stamp(chapter.results) not in path.read_text()[-100:]:
            yield name


def changed(chapter: Chapter) -> Iterator[str]:
    """Yield a sentence for a chapter that measured files which have changed since, or were not there."""
    measured = chapter.results["measured"]
    there = hashes([path for path in measured if (ROOT / path).exists()])
    other = [path for path, digest in measured.items() if there.get(path) != digest]
    if other:
        yield f"measure {chapter.name} again (make book CHAPTER={chapter.name[:2]}): changed since: {', '.join(other)}"


def broken_links(text: str, page: Path) -> Iterator[str]:
    """Yield the links of a page that lead to no file of the repository, or to no heading of it."""
    for link in LINK.findall(FENCED.sub("", text)):
        target, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        path = (page.parent / target).resolve() if target else page
        is_inside = path.exists() and path.is_relative_to(ROOT)
        if not is_inside or (anchor and path.suffix == ".md" and anchor not in _anchors(path)):
            yield link


def _anchors(page: Path) -> set[str]:
    """Return what a page's headings are called in links."""
    heads = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def _name(node: ast.AST) -> str | None:
    """Return what a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return next((target.id for target in targets if isinstance(target, ast.Name)), None)


def _excerpt(chapter: Chapter, where: str) -> str:
    """Return an excerpt with its caption."""
    module, _, symbol = where.partition(":")
    own = chapter.folder / f"{module}.py"
    path = own if own.exists() else ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        raise Stale(f"there is no module {module}")
    link = path.name if path == own else f"../../{path.relative_to(ROOT).as_posix()}"
    caption = f"`{symbol}` in [{path.relative_to(ROOT).as_posix()}]({link}):"
    return f"\n{caption}\n\n```python\n{excerpt(path, symbol)}\n```\n"


def _machine(results: Mapping[str, Any]) -> str:
    cores, device, torch = results["cores"], results["device"], results["torch"]
    return f"{device} with {cores} cores, torch {torch}, {results['date']}, commit {results['commit']}"


if __name__ == "__main__":
    sys.exit(main())
