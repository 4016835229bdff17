"""Write a checkpoint together: each rank its part, aside; then all agree, and the first moves it into its place.

What one rank could not do fails on all of them, with one sentence, and leaves nothing half-written. A part is written
without a word between ranks, so that a thread can do it beside the training; only `finish` is a collective.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minispeed.checkpoint.disk import aside_of, move, remove, sentence_for, sync
from minispeed.checkpoint.listed import INDEX, Piece, index_bytes, list_bytes
from minispeed.checkpoint.tensors import Promise, checksum, write_tensors
from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.numbers import barrier, texts_of
from minispeed.errors import UserError

OWN = re.compile(r"rank-\d{5,}\.(json|safetensors)")  # the names of ranks' files


@dataclass
class Part:
    """One rank's part of a checkpoint: the state, the files that it has written, and why it could not go on."""

    state: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Promise] = field(default_factory=dict)
    error: BaseException | None = None


def save(
    directory: Path,
    pieces: Sequence[Piece],
    state: Mapping[str, Any],
    group: Group | None = None,
    then: Callable[[], object] = lambda: None,
) -> None:
    """Write a checkpoint together: every rank calls this with its pieces; ranks share the file system.

    Reads   the pieces, flattened; state, what JSON can hold (rank 0's is written)
    Writes  `directory`, replaced in one move if it was there; files in it that are no checkpoint's stay
    then    what rank 0 does once it stands: move a pointer to it
    Raises  UserError on every rank if any rank could not write; what stood there before is then untouched
    """
    group = group or SoloGroup()
    part = part_of(state)
    write_part(part, directory, pieces, group.rank)
    finish(part, directory, group, then)


def part_of(state: Mapping[str, Any]) -> Part:
    """Return a part with the state as JSON will give it back, or with why JSON cannot hold it."""
    try:
        return Part(dict(json.loads(json.dumps(dict(state)))))
    except BaseException as error:
        return Part(error=error)


def write_part(part: Part, directory: Path, pieces: Sequence[Piece], rank: int) -> None:
    """Write, aside and synced, what this rank owns; what fails is noted in the part, not raised."""
    aside = aside_of(directory)
    try:
        with sentence_for(directory):
            aside.mkdir(parents=True, exist_ok=True)
            mine = [piece for piece in pieces if not piece.is_copy]
            mine.sort(key=lambda piece: -piece.tensor.dtype.itemsize)
            tensors, lists = f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"
            part.files[tensors], checks = write_tensors(aside / tensors, {p.key: p.tensor for p in mine})
            part.files[lists] = _write(aside / lists, list_bytes(mine, checks))
    except BaseException as error:
        part.error = part.error or error


def finish(part: Part, directory: Path, group: Group, then: Callable[[], object] = lambda: None) -> None:
    """Agree that all parts are written, and put the checkpoint in its place. Every rank calls this.

    Raises  UserError on every rank; of a rank's own mistake that is no user's, that rank raises itself
    """
    files = _agree(part, directory, group)
    last = Part()
    if group.rank == 0:
        try:
            with sentence_for(directory):
                _put_in_place(directory, index_bytes(group.size, files, part.state), files)
            then()
        except BaseException as error:
            last.error = error
    _agree(last, directory, group)


def _put_in_place(directory: Path, index: bytes, files: Mapping[str, Promise]) -> None:
    """Complete what lies aside, rid it of what a crash had left there, and move it; a user's own files come along."""
    aside = aside_of(directory)
    for path in aside.iterdir():
        if path.name not in files:
            remove(path)
    _write(aside / INDEX, index)
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name != INDEX and not OWN.fullmatch(path.name):
            _copy(path, aside / path.name)
    sync(aside)
    move(aside, directory)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, or a directory with all that is in it, synced."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        for path in source.iterdir():
            _copy(path, target / path.name)
    else:
        shutil.copy2(source, target, follow_symlinks=False)
    if not source.is_symlink():
        sync(target)


def _write(path: Path, content: bytes) -> Promise:
    path.write_bytes(content)
    sync(path)
    return Promise(len(content), checksum(content))


def _agree(part: Part, directory: Path, group: Group) -> dict[str, Promise]:
    """Return the files of all ranks; raise on every rank if one has failed, and leave nothing half-written."""
    mine = json.dumps({"files": part.files, "failed": _told(part.error, directory, group)})
    everyones = [json.loads(text) for text in texts_of(group, mine)]
    failures = [said["failed"] for said in everyones if said["failed"]]
    if not failures:
        return {name: Promise(*one) for said in everyones for name, one in said["files"].items()}
    if group.rank == 0:
        with suppress(OSError):
            remove(aside_of(directory))
    barrier(group)  # nobody writes there again before it is gone
    if part.error is not None and not isinstance(part.error, UserError):
        raise part.error
    what, fix = failures[0]
    raise UserError(what, fix=fix) from part.error


def _told(error: BaseException | None, directory: Path, group: Group) -> tuple[str, str] | None:
    """Return what and fix of the UserError that all ranks raise for one rank's error."""
    if error is None:
        return None
    if isinstance(error, UserError):
        return (f"rank {group.rank}: {error.what}" if group.size > 1 else error.what), error.fix
    what = f"another rank could not write its part of {directory}: on rank {group.rank} {error!r}"
    return what, f"see the message of rank {group.rank}"
