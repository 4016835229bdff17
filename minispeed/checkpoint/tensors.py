"""Write tensors to a safetensors file, and read any range of them back, each block of bytes under a checksum.

    8 bytes, the header's length | header, JSON: name -> dtype, shape, place | the tensors' bytes, without a gap

Each tensor has a CRC-32 for every MiB, which reading compares: a little of it is known to be right without the rest, at
5 GB/s where blake2b makes 1, and no change of up to 32 neighbouring bits escapes. It also has a checksum of all its
bytes, which `problems` compares. The file's checksum is that of a list: of the header's checksum, and those of all
tensors. So a header is known to be whole before any tensor is read.

https://huggingface.co/docs/safetensors/index#format · blake2b: RFC 7693.  https://www.rfc-editor.org/rfc/rfc7693
What a CRC finds: Koopman 2002.  https://doi.org/10.1109/DSN.2002.1028931 · Trees of hashes: Merkle 1987.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minispeed.errors import UserError
from minispeed.layout import Interval

BLOCK = 1 << 20  # bytes of a tensor under one CRC, a multiple of every dtype's size
SYNCED = 1 << 24  # bytes after which a file that is being written is synced so far
CACHED = 1 << 18  # bytes that are summed while the processor still has them from reading
WORKERS = min(4, os.cpu_count() or 1)  # threads that read and hash, which both release the interpreter
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Damaged(UserError):
    """A file is not what was written, or not a checkpoint's; `what` says which, what was noted and what was found."""


class Promise(NamedTuple):
    """What a file must be: how many bytes, and their checksum."""

    bytes: int
    checksum: str


class Checks(NamedTuple):
    """What a tensor's bytes must be: the checksum of all, and the CRC-32 of each block."""

    checksum: str
    crc32: Sequence[int]


class Place(NamedTuple):
    """Where a tensor lies in its file, from byte `start` to byte `stop`."""

    dtype: torch.dtype
    start: int
    stop: int


def checksum(content: bytes | memoryview) -> str:
    """Return 16 bytes of blake2b as hexadecimal digits; `b2sum -l 128` prints the same."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Promise, list[Checks]]:
    """Write a file, synced, and return what it, and each tensor in it, must be from now on.

    tensors  wide dtypes first, so that each is aligned; they may lie on any device, and are written flattened
    Raises   OSError
    """
    header, unsynced = _header_of(tensors), 0
    hashing: list[Future[Checks]] = []
    syncing: list[Future[None]] = []
    with path.open("wb", buffering=BLOCK) as stream, ThreadPoolExecutor(WORKERS + 1) as pool:
        stream.write(header)
        for tensor in tensors.values():
            content = _bytes_of(tensor)
            hashing.append(pool.submit(_checks_of, content))
            for part in _split(content, SYNCED):
                unsynced += stream.write(part)
                if unsynced >= SYNCED:  # the disk begins now, and the last sync has less to wait for
                    syncing.append(pool.submit(os.fsync, stream.fileno()))
                    unsynced = 0
        stream.flush()
        for done in syncing:
            done.result()
        os.fsync(stream.fileno())
        checks = [one.result() for one in hashing]
        return Promise(stream.tell(), _root(header, checks)), checks


class TensorFile:
    """A safetensors file, of which any elements can be read; each block is compared with its checksum on the way."""

    def __init__(
        self, path: Path, block: int, promise: Promise | None = None, checks: Mapping[str, Checks] | None = None
    ) -> None:
        """Read the header.

        promise, checks  what was noted when it was written, in blocks of so many bytes; without, nothing is compared
        Raises           Damaged
        """
        self.path, self.block, self.checks = path, block, checks
        size = size_of(path, promise)
        length = int.from_bytes(read_bytes(path, Interval(0, min(8, size))), "little")
        if size < 8 or length > size - 8:
            raise Damaged(f"{path} cannot be read: a header of {length} bytes in a file of {size}")
        header = read_bytes(path, Interval(0, 8 + length))
        found = _root(header, (checks or {}).values())
        if promise and found != promise.checksum:
            raise Damaged(
                f"the header of {path}, or the list of its pieces, is not what was written: with it the file has the "
                f"checksum {found}, {promise.checksum} is noted"
            )
        self.places = _places_in(header, path, size)

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype.  Raises Damaged if there is no such tensor"""
        return self._place(key).dtype

    def read(self, key: str, elements: Interval) -> Tensor:
        """Return elements of a flattened tensor, (elements.size,).

        Reads   the blocks that hold them
        Raises  Damaged, naming the block that is not what was written
        """
        out = torch.empty(elements.size, dtype=self.dtype(key))
        do_all(list(self.blocks(key, elements, out)))
        return out

    def blocks(self, key: str, elements: Interval, out: Tensor) -> Iterator[Callable[[], None]]:
        """Yield what must be done, block by block and in any order, to read elements of a flattened tensor into `out`.

        out     (elements.size,), on the CPU; what it holds is right only once all is done
        Raises  Damaged, here or when it is done
        """
        dtype, start, stop = self._place(key)
        wanted = Interval(elements.start * dtype.itemsize, elements.stop * dtype.itemsize)
        if wanted.stop > stop - start or dtype != out.dtype:
            held = f"{(stop - start) // dtype.itemsize} elements of {key}, of {dtype}"
            raise Damaged(f"{self.path} holds {held}, not {elements.stop} of {out.dtype}")
        content = _bytes_of(out)
        for index in range(wanted.start // self.block, -(-wanted.stop // self.block)):
            here = Interval(index * self.block, (index + 1) * self.block).meet(Interval(0, stop - start))
            mine = here.meet(wanted)
            target = content[slice(*mine.shift(-wanted.start))]
            yield partial(self._read_block, key, index, here.shift(start), mine.shift(start), target)

    def _read_block(self, key: str, index: int, place: Interval, wanted: Interval, out: memoryview) -> None:
        """Read the block at `place` of the file, compare it, and put what is wanted of it in `out`."""
        block = out if wanted == place else memoryview(bytearray(place.size))
        found = read_into(self.path, place.start, block)
        if self.checks is not None and found != (noted := self.checks[key].crc32[index]):
            places = f"bytes {place.start} to {place.stop} of {self.path}, of {key},"
            raise Damaged(f"{places} have the CRC-32 {found}, {noted} is noted")
        if wanted != place:
            out[:] = block[slice(*wanted.shift(-place.start))]

    def problems(self) -> list[str]:
        """Read every byte; return a sentence for each tensor that is not what was written."""
        sentences = []
        for key in self.places if self.checks is None else self.checks:
            try:
                dtype, start, stop = self._place(key)
                x = self.read(key, Interval(0, (stop - start) // dtype.itemsize))
            except Damaged as error:
                sentences.append(error.what)
            else:
                noted = self.checks[key].checksum if self.checks is not None else ""
                if noted and (found := checksum(_bytes_of(x))) != noted:
                    sentences.append(f"{key} in {self.path} has the checksum {found}, {noted} is noted")
        return sentences

    def _place(self, key: str) -> Place:
        if key not in self.places:
            raise Damaged(f"{self.path} holds no {key}, which the list beside it names")
        return self.places[key]


def size_of(path: Path, promise: Promise | None = None) -> int:
    """Return how many bytes a file has.  Raises Damaged if it is missing, or has not as many as were written"""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise Damaged(f"{path} is missing" if not path.exists() else f"{path} cannot be read: {error}") from error
    if promise and size != promise.bytes:
        raise Damaged(f"{path} cannot be read: it has {size} bytes, {promise.bytes} were written")
    return size


def read_bytes(path: Path, place: Interval) -> bytes:
    """Return some bytes of a file.  Raises Damaged as `read_into`"""
    content = bytearray(place.size)
    read_into(path, place.start, memoryview(content))
    return bytes(content)


def read_into(path: Path, start: int, out: memoryview) -> int:
    """Fill `out` from byte `start` on, and return its CRC-32.

    Raises  Damaged if the file cannot be read, or ends before
    """
    crc = 0
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while len(out) and (count := stream.readinto(out[:CACHED])):
                crc = zlib.crc32(out[:count], crc)
                out = out[count:]
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    if len(out):
        raise Damaged(f"{path} cannot be read: it ends {len(out)} bytes too early")
    return crc


def do_all(work: Sequence[Callable[[], None]]) -> None:
    """Do all of some work, in several threads where there is more than one piece of it; raise what the first raises."""
    if len(work) < 2:
        for one in work:
            one()
        return
    with ThreadPoolExecutor(min(WORKERS, len(work))) as pool:
        list(pool.map(lambda one: one(), work))


def _header_of(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the header, with its length before it, of tensors that lie one after the other."""
    listed, reached = {}, 0
    for key, x in tensors.items():
        place = [reached, reached + x.numel() * x.dtype.itemsize]
        listed[key] = {"dtype": NAMES[x.dtype], "shape": [x.numel()], "data_offsets": place}
        reached = place[1]
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _places_in(header: bytes, path: Path, size: int) -> dict[str, Place]:
    """Read a header."""
    try:
        listed: dict[str, Any] = json.loads(header[8:])
        listed.pop("__metadata__", None)
        ranges = {key: Interval(*of["data_offsets"]).shift(len(header)) for key, of in listed.items()}
        found = {key: Place(DTYPES[listed[key]["dtype"]], *place) for key, place in ranges.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{path} cannot be read: its header is none, {error}") from error
    reached = max((place.stop for place in found.values()), default=len(header))
    if reached != size:
        raise Damaged(f"{path} cannot be read: its tensors end at byte {reached}, the file at {size}")
    return found


def _root(header: bytes, checks: Iterable[Checks]) -> str:
    """Return a whole file's checksum."""
    return checksum(" ".join([checksum(header), *(one.checksum for one in checks)]).encode())


def _checks_of(content: memoryview) -> Checks:
    return Checks(checksum(content), [zlib.crc32(block) for block in _split(content, BLOCK)])


def _split(content: memoryview, size: int) -> Iterator[memoryview]:
    return (content[start : start + size] for start in range(0, len(content), size))


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes; not a copy if it lies on the CPU in one piece."""
    return tensor.detach().flatten().contiguous().cpu().view(torch.uint8).numpy().data
