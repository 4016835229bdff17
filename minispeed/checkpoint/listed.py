"""The two kinds of JSON files in a checkpoint: a list of each rank's pieces, and the index of the whole.

    rank-K.json   [{name, shape, elements, key, part?, checksum, crc32: [...]}, ...]   as in the file of tensors
    index.json    {checksum, format, ranks, block, versions, files: {name: {bytes, checksum}}, state}

The index stands under its own checksum: that of its bytes with zeros in the checksum's place. Format 1 knew no slices,
format 2 no checksums: both are read, and what is read of them is not checked.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minispeed.checkpoint.tensors import (
    BLOCK,
    Checks,
    Damaged,
    Promise,
    TensorFile,
    checksum,
    read_bytes,
    size_of,
)
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.placement import WHOLE, Shard, Slice
from minispeed.version import __version__

INDEX = "index.json"
FORMATS = (1, 2, 3)  # that can be read; the last is written
BEFORE, ZEROS = b'{\n "checksum": "', b"0" * 32  # how an index begins
AFTER = len(BEFORE) + len(ZEROS)


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

    @property
    def key(self) -> str:
        """The piece's name in its rank's file."""
        return f"{self.name}[{self.elements.start}:{self.elements.stop}]"


class Stored(NamedTuple):
    """A piece on the disk; `checks` is None where the format knew none."""

    name: str
    shape: tuple[int, ...]
    elements: Interval
    key: str
    part: Slice
    checks: Checks | None


@dataclass(frozen=True)
class Index:
    """What index.json says, once it is known to be what was written."""

    directory: Path
    format: int
    ranks: int
    block: int
    versions: Mapping[str, str]
    files: Mapping[str, Promise]
    state: dict[str, Any]

    def path(self, rank: int, kind: str) -> Path:
        """Return one of a rank's two files."""
        return self.directory / f"rank-{rank:05d}.{kind}"

    def pieces(self, rank: int) -> list[Stored]:
        """Read a rank's list.  Raises Damaged"""
        path = self.path(rank, "json")
        content = read_bytes(path, Interval(0, size_of(path, self.files.get(path.name))))
        _compare(path, checksum(content), self.files.get(path.name))
        try:
            return [_stored(one) for one in json.loads(content)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{path} is not a checkpoint's: {error!r}") from error

    def tensors(self, rank: int, pieces: Sequence[Stored]) -> TensorFile:
        """Open a rank's tensors, of which `pieces` is the list.  Raises Damaged"""
        path = self.path(rank, "safetensors")
        checks = {piece.key: piece.checks for piece in pieces if piece.checks is not None}
        return TensorFile(path, self.block, self.files.get(path.name), checks if self.format >= 3 else None)


def read_index(directory: Path) -> Index:
    """Read and check what stands in index.json.

    Raises  Damaged; UserError if there is no checkpoint, or it is of a later format
    """
    path = directory / INDEX
    if not directory.is_dir():
        raise UserError(f"there is no checkpoint at {directory}", fix="--save-every N in the next run")
    content = read_bytes(path, Interval(0, size_of(path)))
    try:
        said = json.loads(content)
        if "checksum" in said:
            _compare(path, checksum(content[: len(BEFORE)] + ZEROS + content[AFTER:]), Promise(0, said["checksum"]))
        if (format := said["format"]) not in FORMATS:
            what = f"{path} is of format {format}, this version reads {FORMATS[0]} to {FORMATS[-1]}"
            raise UserError(what, fix="its version")
        if format >= 3 and "checksum" not in said:
            raise Damaged(f"{path} is not what was written: it has no checksum")
        files = {name: Promise(**one) for name, one in said.get("files", {}).items()}
        block, versions = said.get("block", BLOCK), said.get("versions", {})
        return Index(directory, format, int(said["ranks"]), block, versions, files, dict(said["state"]))
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not a checkpoint's: {error!r}") from error


def index_bytes(ranks: int, files: Mapping[str, Promise], state: Mapping[str, Any]) -> bytes:
    """Return what index.json holds, its own checksum included."""
    versions = {"minispeed": __version__, "torch": torch.__version__}
    said = {"checksum": ZEROS.decode(), "format": FORMATS[-1], "ranks": ranks, "block": BLOCK, "versions": versions}
    said |= {"files": {name: promise._asdict() for name, promise in sorted(files.items())}, "state": dict(state)}
    text = json.dumps(said, indent=1).encode() + b"\n"
    return BEFORE + checksum(text).encode() + text[AFTER:]


def list_bytes(pieces: Sequence[Piece], checks: Sequence[Checks]) -> bytes:
    """Return what a rank's list holds."""
    listed = [
        {"name": p.name, "shape": list(p.shape), "elements": list(p.elements), "key": p.key}
        | _described(p.part)
        | one._asdict()
        for p, one in zip(pieces, checks, strict=True)
    ]
    return json.dumps(listed, indent=1).encode() + b"\n"


def _compare(path: Path, found: str, promise: Promise | None) -> None:
    if promise and found != promise.checksum:
        raise Damaged(f"{path} is not what was written: it has the checksum {found}, {promise.checksum} is noted")


def _described(part: Slice) -> dict[str, Any]:
    """Return a slice as JSON; nothing for a whole tensor."""
    return {} if part == WHOLE else {"part": {**asdict(part), "place": asdict(part.place)}}


def _stored(one: Mapping[str, Any]) -> Stored:
    """Read one piece of a list."""
    part = WHOLE
    if "part" in one:
        place = {**one["part"]["place"], "chunks": tuple(one["part"]["place"]["chunks"])}
        part = Slice(Shard(**place), one["part"]["index"], one["part"]["count"])
    start, stop = one["elements"]
    checks = Checks(one["checksum"], one["crc32"]) if "checksum" in one else None
    return Stored(one["name"], tuple(one["shape"]), Interval(start, stop), one["key"], part, checks)
