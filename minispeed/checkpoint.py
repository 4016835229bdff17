"""Write a run down so that nothing is ever half-written, and go on from it.

A checkpoint is logical: every tensor under its full name and shape, whatever layout wrote it. Each rank writes the
elements that it owns: `rank-K.safetensors` holds them, `rank-K.json` says which elements of which flattened tensor, or
slice of it, each piece is, and `index.json` holds the run's state. A reader takes from the pieces what it needs,
whoever wrote them, and however it was cut.

Nothing is ever half-written: all is written to a directory beside, synced, and renamed in one move.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.numbers import any_of
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.placement import WHOLE, Shard, Slice, join, local_shape

INDEX = "index.json"
FORMATS = (1, 2)  # that can be read; the last is written: since 2 a piece may be of a slice


class Piece(NamedTuple):
    """Some elements of the tensor `name` of that shape: which they are, and the tensor that holds them.

    elements  of the flattened `part`
    is_copy   another rank holds the same, and writes them
    part      the slice of the tensor that this is of
    """

    name: str
    shape: tuple[int, ...]
    elements: Interval
    tensor: Tensor
    is_copy: bool = False
    part: Slice = WHOLE


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a path beside `target` and move the result, file or directory, into its place.

    Raises  UserError naming the disk's free bytes when writing fails; what stood at `target` is then untouched
    """
    aside = _aside(target)
    with _sentence_for(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove(aside)
            write(aside)
            _move(aside, target)
        except BaseException:
            remove(aside)
            raise


def save(directory: Path, pieces: Sequence[Piece], state: Mapping[str, Any], group: Group | None = None) -> None:
    """Write a checkpoint together: every rank calls this with its pieces; ranks share the file system.

    Reads   the pieces, flattened; state, what JSON can hold (rank 0's is written)
    Writes  `directory`, replaced in one move if it was there
    Raises  UserError on every rank if any rank could not write; what stood there before is then untouched
    """
    group = group or SoloGroup()
    aside = _aside(directory)
    error: BaseException | None = None
    try:
        if group.rank == 0:
            with _sentence_for(directory):
                remove(aside)
                aside.mkdir(parents=True)
                index = {"format": FORMATS[-1], "ranks": group.size, "state": dict(state)}
                (aside / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    except BaseException as failure:
        error = failure
    _agree(error, group, directory, aside)
    try:
        with _sentence_for(directory):
            _write_pieces(aside, group.rank, pieces)
    except BaseException as failure:
        error = failure
    _agree(error, group, directory, aside)
    try:
        if group.rank == 0:
            with _sentence_for(directory):
                _move(aside, directory)
    except BaseException as failure:
        error = failure
    _agree(error, group, directory, aside)


def _write_pieces(folder: Path, rank: int, pieces: Sequence[Piece]) -> None:
    """Write what this rank owns."""
    name = f"rank-{rank:05d}"
    pieces = [piece for piece in pieces if not piece.is_copy]
    keys = [f"{piece.name}[{piece.elements.start}:{piece.elements.stop}]" for piece in pieces]
    tensors = {key: piece.tensor.detach().flatten().contiguous() for key, piece in zip(keys, pieces)}
    save_file(tensors, folder / f"{name}.safetensors")
    listed = [
        {"name": p.name, "shape": list(p.shape), "elements": list(p.elements), "key": key} | _described(p.part)
        for key, p in zip(keys, pieces)
    ]
    (folder / f"{name}.json").write_text(json.dumps(listed, indent=1) + "\n")


def _described(part: Slice) -> dict[str, Any]:
    """Return a slice as JSON; nothing for a whole tensor."""
    return {} if part == WHOLE else {"part": {**asdict(part), "place": asdict(part.place)}}


def _slice_of(entry: Mapping[str, Any]) -> Slice:
    """Return what `_described` wrote into a piece's entry."""
    if "part" not in entry:
        return WHOLE
    place = {**entry["part"]["place"], "chunks": tuple(entry["part"]["place"]["chunks"])}
    return Slice(Shard(**place), entry["part"]["index"], entry["part"]["count"])


def _agree(error: BaseException | None, group: Group, directory: Path, aside: Path) -> None:
    """Raise on every rank if one has failed, and leave nothing half-written."""
    if not any_of(group, error is not None):
        return
    if group.rank == 0:
        remove(aside)
    raise error or UserError(f"another rank could not write its part of {directory}", fix="see that rank's message")


class Checkpoint:
    """A checkpoint on disk: its `state`, and any elements of any of its tensors."""

    def __init__(self, directory: Path) -> None:
        """Read the lists of pieces, no tensors.

        Raises  UserError naming the file that is missing, cut short or not a checkpoint's
        """
        self.directory = directory
        index = self._json(INDEX)
        if not isinstance(index, dict) or index.get("format") not in FORMATS:
            found = index.get("format") if isinstance(index, dict) else "none"
            what = f"{directory / INDEX} is of format {found}, this version reads {FORMATS[0]} to {FORMATS[-1]}"
            raise UserError(what, fix="its version")
        self.state: dict[str, Any] = index["state"]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, dict[Slice, list[tuple[Interval, str, str]]]] = {}
        for rank in range(index["ranks"]):
            for piece in self._json(f"rank-{rank:05d}.json"):
                self.shapes[piece["name"]] = tuple(piece["shape"])
                entry = (Interval(*piece["elements"]), f"rank-{rank:05d}.safetensors", piece["key"])
                self._pieces.setdefault(piece["name"], {}).setdefault(_slice_of(piece), []).append(entry)

    def read(self, name: str, elements: Interval, part: Slice = WHOLE) -> Tensor | None:
        """Return some elements of the flattened tensor `name`, or of a slice of it; None where there is no such tensor.

        Reads    only the pieces that hold them; where the tensor was cut otherwise, all of it
        Returns  (elements.size,)
        Raises   UserError if a file is damaged, or no piece holds some of the elements
        """
        if name not in self._pieces:
            return None
        if part in self._pieces[name]:
            return self._elements(name, part, elements)
        return part.of(self._whole(name)).flatten()[slice(*elements)]

    def _whole(self, name: str) -> Tensor:
        """Join the slices of a tensor."""
        held, shape = next(iter(self._pieces[name])), self.shapes[name]
        sizes = {held.place.axis: held.count} if isinstance(held.place, Shard) else {}
        local = torch.Size(local_shape(shape, held.place, sizes))
        slices = [replace(held, index=index) for index in range(held.count)]
        whole = Interval(0, local.numel())
        return join([self._elements(name, one, whole).view(local) for one in slices], held.place)

    def _elements(self, name: str, part: Slice, elements: Interval) -> Tensor:
        parts, reached = [], elements.start
        for held, file, key in sorted(self._pieces[name].get(part, ())):
            wanted = held.meet(Interval(reached, elements.stop))
            if wanted.size and wanted.start == reached:
                parts.append(self._slice(file, key, wanted.shift(-held.start)))
                reached = wanted.stop
        if reached != elements.stop:
            what = f"{self.directory} lacks elements {reached} to {elements.stop} of {name}"
            raise UserError(what, fix="another checkpoint of the run")
        return torch.cat(parts) if parts else torch.zeros(0)

    def tensor(self, name: str) -> Tensor | None:
        """Return the whole tensor, in its shape."""
        return None if name not in self._pieces else self._whole(name)

    def _slice(self, file: str, key: str, part: Interval) -> Tensor:
        try:
            with safe_open(self.directory / file, framework="pt") as stored:
                piece: Tensor = stored.get_slice(key)[part.start : part.stop]
        except (OSError, SafetensorError) as error:
            what = f"{self.directory / file} cannot be read: {error}"
            raise UserError(what, fix="another checkpoint of the run") from error
        return piece

    def _json(self, name: str) -> Any:
        path = self.directory / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError as error:
            if name == INDEX:
                what = f"there is no checkpoint at {self.directory}"
                raise UserError(what, fix="--save-every N in the next run") from error
            raise UserError(f"{path} is missing", fix="another checkpoint of the run") from error
        except (OSError, ValueError) as error:
            what = f"{path} is not a checkpoint's: {error}"
            raise UserError(what, fix="another checkpoint of the run") from error


@contextmanager
def _sentence_for(target: Path) -> Iterator[None]:
    """Turn an error of the disk into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        there = next(path for path in (target, *target.parents) if path.exists())
        free = shutil.disk_usage(there).free
        raise UserError(
            f"could not write {target}: {error} ({free / 1e6:.0f} MB free); what stood there before is whole",
            fix="free some disk, or --out on another",
        ) from error


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.writing")


def _move(aside: Path, target: Path) -> None:
    """Put what was written aside into its place, once it is on the disk."""
    for file in aside.iterdir() if aside.is_dir() else [aside]:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    if not (aside.is_dir() and target.exists()):
        os.replace(aside, target)
        return
    old = target.with_name(f".{target.name}.old")
    remove(old)
    target.rename(old)
    aside.rename(target)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
