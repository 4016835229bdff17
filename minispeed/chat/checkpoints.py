"""Say what the checkpoints of a run hold, which of them are whole, and which is the newest that is.

A folder may be a run's, its `checkpoints/`, one checkpoint, or the folder that a DeepSpeed-style script saves into,
with its file `latest`. Every byte of every checkpoint is read and compared with its checksum. Nothing is changed.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any, Protocol

from minispeed.checkpoint import (
    INDEX,
    LEFTOVERS,
    Index,
    checkpoints_in,
    is_checkpoint,
    newest_whole,
    problems,
    read_index,
    standing,
)
from minispeed.errors import UserError
from minispeed.precision import DTYPES

POINTERS = ("last", "best", "latest")
CHECKED = 3  # the first format with checksums
SPELLED = {dtype: name for name, dtype in DTYPES.items()}
STATE = {  # what is told of a state, and where it lies in it
    "step": ("step",),
    "steps": ("global_steps",),
    "updates": ("num_updates",),
    "epoch": ("progress", "epoch"),
    "steps into it": ("progress", "step_of_epoch"),
    "samples": ("global_samples",),
    "loss scale": ("scaler", "scale"),
    "best loss": ("progress", "best_loss"),
}


class Asked(Protocol):
    """What the command was told: where to look, and whether each tensor has a line."""

    @property
    def directory(self) -> Path: ...

    @property
    def tensors(self) -> bool: ...


def checkpoint(options: Asked) -> int:
    """Do `minispeed checkpoint`. Returns the exit code: 1 if anything is damaged."""
    found = found_in(options.directory)
    folder = found[0].parent
    names = pointers(folder)
    damaged = set()
    for directory in found:
        pointing = ", ".join(name for name, to in names.items() if to == directory.name)
        print(directory.name + (f"  ({pointing})" if pointing else ""))
        lines, is_whole = told(directory, with_tensors=options.tensors)
        print("".join(f"  {line}\n" for line in lines), end="")
        damaged |= set() if is_whole else {directory.name}
    lost = {name: to for name, to in names.items() if not standing(folder / to).exists()}
    for name, to in lost.items():
        print(f"{folder / name} names {to}, which is not there")
    for path in leftovers(folder):
        size = _megabytes(sum(file.stat().st_size for file in path.rglob("*")))
        print(f"{path} was left by a writing that did not end ({size}); it can be deleted")
    if not damaged and not lost:
        return 0
    whole = [directory for directory in found if directory.name not in damaged]
    best = whole[-1] if whole else newest_whole(folder, besides=found[0])
    if best is None:
        print(f"no checkpoint in {folder} is whole")
        return 1
    print(f"the newest that is whole: {best}")
    for name, to in names.items():
        if name != "best" and (to in damaged or name in lost):
            print(f"to go on from it: echo {best.name} > {folder / name}")
    return 1


def found_in(directory: Path) -> list[Path]:
    """Return the checkpoints that are meant, in order of their numbers.  Raises UserError if there is none"""
    if is_checkpoint(standing(directory)):
        return [directory]
    found = checkpoints_in(directory / "checkpoints") or checkpoints_in(directory)
    if not found:
        raise UserError(f"there is no checkpoint in {directory}", fix="the --out of a run that has saved one")
    return found


def pointers(folder: Path) -> dict[str, str]:
    """Return the names that the files `last`, `best` and `latest` hold, of those that are there."""
    return {name: (folder / name).read_text().strip() for name in POINTERS if (folder / name).is_file()}


def leftovers(folder: Path) -> list[Path]:
    """Return what a crash left half-written or half-deleted, and nothing reads."""
    found = [path for ending in LEFTOVERS for path in folder.glob(f".*{ending}")]
    return sorted(path for path in found if path != standing(folder / path.name[1:].removesuffix(".old")))


def told(directory: Path, *, with_tensors: bool) -> tuple[list[str], bool]:
    """Return lines about one checkpoint, and whether it is whole."""
    damage = [f"damaged: {sentence}" for sentence in problems(directory)]
    try:
        index = read_index(standing(directory))
        dtypes = _dtypes(index)
        lists = [piece for rank in range(index.ranks) for piece in index.pieces(rank)]
    except UserError:
        return damage, False
    shapes = {piece.name: piece.shape for piece in lists}
    lines = [_origin(index), _contents(shapes, dtypes), _state(index.state)]
    if with_tensors:
        lines += [f"{name}  {list(shape)}  {dtypes[name]}" for name, shape in sorted(shapes.items())]
    checked = "whole" if index.format >= CHECKED else "whole, as far as its format can tell: it has no checksums"
    return [*filter(None, lines), *(damage or [checked])], not damage


def _dtypes(index: Index) -> dict[str, str]:
    """Return the dtype of each tensor, as it is spelled here."""
    found: dict[str, str] = {}
    for rank in range(index.ranks):
        pieces = index.pieces(rank)
        places = index.tensors(rank, pieces).places
        found |= {piece.name: SPELLED.get(places[piece.key].dtype, str(places[piece.key].dtype)) for piece in pieces}
    return found


def _origin(index: Index) -> str:
    """Say how, when and by what it was written."""
    files = list(index.directory.iterdir())
    when = datetime.fromtimestamp((index.directory / INDEX).stat().st_mtime).isoformat(" ", "seconds")
    versions = ", ".join(f"{name} {version}" for name, version in index.versions.items())
    size = _megabytes(sum(path.stat().st_size for path in files))
    by = f", by {versions}" if versions else ""
    return f"format {index.format}, {index.ranks} rank{'s' * (index.ranks > 1)}, {size}, written {when}{by}"


def _contents(shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str]) -> str:
    """Say how many tensors there are of each kind, the part of the name before the first slash."""
    kinds: dict[str, list[str]] = {}
    for name in shapes:
        kinds.setdefault(name.partition("/")[0], []).append(name)
    said = []
    for kind, names in kinds.items():
        count = sum(prod(shapes[name]) for name in names)
        said.append(f"{kind}: {len(names)}, {count:,} numbers, {' '.join(sorted({dtypes[name] for name in names}))}")
    return "; ".join(said) or "no tensors"


def _state(state: Mapping[str, Any]) -> str:
    """Say what a state tells, of what one may tell."""
    found = {what: reduce(_inside, path, state) for what, path in STATE.items()}
    return ", ".join(f"{what} {value:,}" for what, value in found.items() if isinstance(value, (int, float)))


def _inside(state: Any, key: str) -> Any:
    return state.get(key) if isinstance(state, Mapping) else None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
