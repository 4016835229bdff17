"""Work on a chapter's exercise, in a copy of your own.

python tutorials/learn.py             what is done, and what comes next
python tutorials/learn.py 00          copy the exercise, or try the copy: which laws does it keep?
python tutorials/learn.py 00 --hint   a nudge about the first law that it breaks; --hint 2 says more, --hint 3 most
python tutorials/learn.py 00 -v       with Python's own account of what went wrong
"""

import argparse
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch
from book import ROOT, Chapter, chapters, digest, find, load

try:
    from examiner import Law, Verdict, describe, laws_of
except ImportError:
    raise SystemExit('learn.py draws inputs with hypothesis, which is not here: python -m pip install -e ".[dev]"')

HINTS = 3


def main() -> int:
    """Do what the command line asks for.  Returns the exit code: 0 if every law holds, or nothing was tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapter", nargs="?", help="its number: 00")
    parser.add_argument("--hint", nargs="?", type=int, const=1, choices=range(1, HINTS + 1), help="1, 2 or 3")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    if options.chapter is None:
        print(draw_map())
        return 0
    chapter = find(options.chapter)
    if not chapter.mine.exists():
        begin(chapter)
    return give_hint(chapter, options.hint) if options.hint else try_laws(chapter, verbose=options.verbose)


def begin(chapter: Chapter) -> None:
    """Copy the exercise to where its reader may write."""
    chapter.mine.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(chapter.folder / "exercise.py", chapter.mine)
    print(f"Your copy is {_here(chapter.mine)}: fill in its functions, then run this command again.\n")


def verdicts(chapter: Chapter) -> list[Verdict]:
    """Try the laws on the reader's copy, up to the first that is broken: what comes after rests on it.

    Raises  SystemExit if Python cannot read the copy, saying why
    """
    try:
        code = load(chapter.mine)
    except Exception as error:
        raise SystemExit(f"{_here(chapter.mine)} does not run: {type(error).__name__}: {error}")
    torch.set_num_threads(1)  # small tensors gain nothing from more
    found: list[Verdict] = []
    for law in laws_of(chapter.module("test_exercise")):
        is_waiting = any(verdict.kind in ("broken", "raised") for verdict in found)
        found.append(Verdict("untried", law) if is_waiting else law.check(code))
    kept = sum(verdict.kind == "holds" for verdict in found)
    state = {"kept": kept, "of": len(found), "code": digest(chapter.mine.read_bytes())}
    (chapter.mine.parent / "laws.json").write_text(json.dumps(state) + "\n")
    return found


def try_laws(chapter: Chapter, *, verbose: bool) -> int:
    """Say which laws the reader's copy keeps, and what comes next."""
    found = verdicts(chapter)
    kept = sum(verdict.kind == "holds" for verdict in found)
    print(f"{chapter.name}: {kept} of {len(found)} laws hold")
    for verdict in found:
        print(describe(verdict, str(chapter.mine)))
        if verbose and verdict.error is not None:
            traceback.print_exception(verdict.error, file=sys.stdout)
    print(f"\n{_next(chapter, kept == len(found))}")
    return 0 if kept == len(found) else 1


def give_hint(chapter: Chapter, number: int) -> int:
    """Say one more thing about the first law that does not hold."""
    law = next((verdict.law for verdict in verdicts(chapter) if verdict.kind != "holds"), None)
    if law is None:
        print(f"{chapter.name}: every law holds; there is nothing to hint at.")
        return 0
    print(_hint(law, number))
    if number < HINTS:
        print(f"\nmore: python tutorials/learn.py {chapter.name[:2]} --hint {number + 1}")
    return 1


def draw_map() -> str:
    """Return the chapters, how far the reader is in each, and what comes next."""
    lines, following = ["The book, and where you are in it:", ""], None
    for chapter in chapters():
        state = _state(chapter)
        if following is None and state != "done":
            following = chapter
        lines.append(f"  {chapter.name:20} {state:20} {chapter.title}")
    if following is None:
        return "\n".join([*lines, "", "All that is written is done."])
    command = f"python tutorials/learn.py {following.name[:2]}"
    return "\n".join([*lines, "", f"next: read {_here(following.lesson)}, then {command}"])


def _state(chapter: Chapter) -> str:
    """Return how far the reader's copy is, as far as it was tried as it is now."""
    noted = chapter.mine.parent / "laws.json"
    if not chapter.mine.exists():
        return "not begun"
    state = json.loads(noted.read_text()) if noted.exists() else {}
    if state.get("code") != digest(chapter.mine.read_bytes()):
        return "changed, not tried"
    return "done" if state["kept"] == state["of"] else f"{state['kept']} of {state['of']} laws hold"


def _hint(law: Law, number: int) -> str:
    return f"about {law.of}: {law.sentence}\n  hint {number} of {HINTS}: {law.hints[number - 1]}"


def _next(chapter: Chapter, is_done: bool) -> str:
    """Return what to do now."""
    number = chapter.name[:2]
    if is_done:
        return f"next: python tutorials/{chapter.name}/run.py --mine   runs the experiment with your code"
    return f"stuck? python tutorials/learn.py {number} --hint"


def _here(path: Path) -> str:
    """Return a path as somebody would type it in the repository."""
    return Path(os.path.relpath(path, ROOT)).as_posix()


if __name__ == "__main__":
    sys.exit(main())
