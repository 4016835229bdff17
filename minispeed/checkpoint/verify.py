"""Say whether a checkpoint is what was written, byte by byte, and which of several is the newest that is."""

import re
from collections.abc import Iterator
from pathlib import Path

from minispeed.checkpoint.disk import standing
from minispeed.checkpoint.listed import INDEX, Index, read_index
from minispeed.errors import UserError


def problems(directory: Path) -> list[str]:
    """Read every byte of every file; return a sentence for each thing that is not what was written.

    Of formats 1 and 2, which hold no checksums: for each file that is missing, no checkpoint's, or cut short.
    """
    directory = standing(directory)
    try:
        index = read_index(directory)
    except UserError as error:
        return [error.what]
    found = [sentence for rank in range(index.ranks) for sentence in _of_rank(index, rank)]
    known = {INDEX, *(index.path(rank, kind).name for rank in range(index.ranks) for kind in ("json", "safetensors"))}
    strangers = sorted(path.name for path in directory.iterdir() if path.name not in known)
    return [*found, *(f"{directory / name} is no part of the checkpoint" for name in strangers)]


def _of_rank(index: Index, rank: int) -> Iterator[str]:
    try:
        yield from index.tensors(rank, index.pieces(rank)).problems()
    except UserError as error:
        yield error.what


def newest_whole(folder: Path, besides: Path | None = None) -> Path | None:
    """Return the checkpoint in a folder with the highest number at the end of its name of those that are whole.

    Reads  every byte of those that it tries, the highest numbers first
    """
    whole = (path for path in reversed(checkpoints_in(folder)) if path != besides and not problems(path))
    return next(whole, None)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, whole or not, in order of the number at the end of each name.

    What a crash left is not among them, except where `standing` finds nothing else.
    """
    inside = list(folder.iterdir()) if folder.is_dir() else []
    found = {path for path in inside if not path.name.startswith(".") and is_checkpoint(path)}
    moved = [path.with_name(path.name[1:].removesuffix(".old")) for path in inside if path.match(".*.old")]
    return sorted(found | {path for path in moved if not path.exists()}, key=_number_of)


def is_checkpoint(path: Path) -> bool:
    """Return whether this is a checkpoint, or what is left of one."""
    return path.is_dir() and ((path / INDEX).exists() or any(path.glob("rank-*.json")))


def _number_of(directory: Path) -> tuple[int, str]:
    found = re.search(r"\d+$", directory.name)
    return int(found[0]) if found else -1, directory.name
