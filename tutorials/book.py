"""Say where the book's chapters are, and read what lies in their folders.

tutorials/NN-topic/         README.md  run.py  results.json  figures/  exercise.py  solution.py  test_exercise.py
tutorials/mine/NN-topic/    exercise.py, the reader's copy, which git does not see
"""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

BOOK = Path(__file__).resolve().parent
ROOT = BOOK.parent
MINE = BOOK / "mine"


@dataclass(frozen=True)
class Chapter:
    """A folder of the book."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder's: "00-one-step"."""
        return self.folder.name

    @property
    def lesson(self) -> Path:
        return self.folder / "README.md"

    @property
    def results(self) -> dict[str, Any]:
        """What the last run wrote."""
        return json.loads((self.folder / "results.json").read_text())

    @property
    def title(self) -> str:
        """The lesson's heading, without the number."""
        return self.lesson.read_text().partition("\n")[0].lstrip("# ").partition(" ")[2]

    @property
    def mine(self) -> Path:
        """The reader's copy of the exercise."""
        return MINE / self.name / "exercise.py"

    def module(self, name: str) -> ModuleType:
        """Run one of the chapter's files as a module."""
        return load(self.folder / f"{name}.py")


def chapters() -> list[Chapter]:
    """Return those that are written, in the book's order."""
    return [Chapter(path.parent) for path in sorted(BOOK.glob("[0-9][0-9]-*/README.md"))]


def find(number: str) -> Chapter:
    """Return the chapter of a number or a name: "0", "00", "00-one-step".

    Raises  SystemExit, saying which there are
    """
    for chapter in chapters():
        if chapter.name == number or (number.isdecimal() and int(chapter.name[:2]) == int(number)):
            return chapter
    known = ", ".join(chapter.name for chapter in chapters())
    raise SystemExit(f"there is no chapter {number!r} yet; there are {known}")


def load(path: Path) -> ModuleType:
    """Run a file as a module of its own.

    Chapters call their files alike, and import their neighbours by name: so a folder is on the path, and what was
    imported from it known to Python, only as long as this takes.
    """
    name = f"{path.parent.name}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path[:0] = [str(path.parent), str(BOOK)]
    sys.modules[name] = module  # dataclasses look up their own module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
        _forget(path.parent)
    return module


def _forget(folder: Path) -> None:
    """Let modules of a chapter go that were imported by a name that other chapters use, too."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if "." not in name and name != "__main__" and file and Path(file).parent == folder:
            del sys.modules[name]


def hashes(paths: Sequence[str]) -> dict[str, str]:
    """Return a hash of each file; paths are the repository's."""
    return {path: digest((ROOT / path).read_bytes()) for path in paths}


def digest(content: bytes) -> str:
    """Return sixteen digits that change with the content."""
    return hashlib.sha256(content).hexdigest()[:16]
