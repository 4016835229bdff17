"""Remember what a run learns from, byte for byte, and refuse to go on from something else.

RUN/data.json   the names and SHA-256 of the data files and the tokenizer, and of every file of the prepared folder

The rows of a step follow from the prepared tokens: where a file was edited meanwhile, or the folder damaged, a resumed
run would see other rows, some of them twice and some never, and nothing would tell.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from minispeed import checkpoint
from minispeed.chat.prepared import Prepared
from minispeed.chat.sft_options import SftOptions
from minispeed.errors import UserError

SOURCES = "data.json"
REPORT = "report.json"  # of a prepared folder: it names the version that prepared it, and nothing is learnt from it


def write_sources(run: Path, options: SftOptions, prepared: Prepared) -> None:
    """Write down what a run begins with."""
    content = {
        "files": [{"option": flag, "name": path.name, "sha256": digest(path)} for flag, path in files_of(options)],
        "prepared": digests_in(prepared.folder),
    }
    text = json.dumps(content, indent=1) + "\n"
    checkpoint.write_whole(run / SOURCES, lambda path: path.write_text(text, encoding="utf-8"))


def check_files(run: Path, options: SftOptions) -> None:
    """Raise UserError unless the files that options name are those that the run began with, wherever they lie now."""
    began, here = _read(run)["files"], files_of(options)
    for flag in dict.fromkeys([entry["option"] for entry in began] + [flag for flag, _ in here]):
        named = [entry for entry in began if entry["option"] == flag]
        given = [path for other, path in here if other == flag]
        if [entry["name"] for entry in named] != [path.name for path in given]:
            then, now = (
                ", ".join(names) or "nothing" for names in ([e["name"] for e in named], [p.name for p in given])
            )
            raise UserError(f"{flag} is {now}, and the run in {run} began with {then}", fix=f"{flag} {then}")
        for entry, path in zip(named, given):
            _check_file(run, entry, path)


def check_prepared(run: Path, prepared: Prepared) -> None:
    """Raise UserError unless the prepared folder holds what the run began with."""
    began, here = _read(run)["prepared"], digests_in(prepared.folder)
    for name in sorted(began.keys() | here.keys()):
        if began.get(name) != here.get(name):
            what = f"{prepared.folder / name} is not what the run in {run} began with"
            raise UserError(what, fix=f"remove {prepared.folder}: it is prepared again from the data files")


def files_of(options: SftOptions) -> list[tuple[str, Path]]:
    """Return the files that a run reads, each with the option that names it."""
    named = {"--data": options.data, "--eval-data": options.eval_data}
    tokenizer = Path(options.model) / "tokenizer.json" if options.tokenizer is None else options.tokenizer
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if options.tokenizer is not None or tokenizer.exists():
        named["--tokenizer"] = [tokenizer]
    return [(flag, path) for flag, paths in named.items() for path in paths]


def digests_in(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, but for the report, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): digest(path) for path in files if path.name != REPORT}


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def _check_file(run: Path, entry: dict[str, str], path: Path) -> None:
    """Raise UserError unless a file is there and what it was."""
    way = f"the {path.name} of then in its place, or a new run: another --out"
    try:
        is_same = digest(path) == entry["sha256"]
    except OSError as error:
        what = f"{path} cannot be read, and the run in {run} learns from it: {error.strerror}"
        raise UserError(what, fix=way) from None
    if not is_same:
        raise UserError(f"{path} has changed since the run in {run} began", fix=way)


def _read(run: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((run / SOURCES).read_text(encoding="utf-8"))
        return {"files": list(content["files"]), "prepared": dict(content["prepared"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{run / SOURCES}, which tells what the run learns from, cannot be read: {error}"
        raise UserError(what, fix="a new run: another --out, and --model of this one") from None
