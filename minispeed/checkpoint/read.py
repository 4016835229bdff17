"""Read a checkpoint: its state, and any elements of any tensor, whoever wrote them and however they were cut."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minispeed.checkpoint.across import Box, shape_of, shared, spans, strides
from minispeed.checkpoint.disk import standing
from minispeed.checkpoint.listed import Piece, Stored, read_index
from minispeed.checkpoint.tensors import Damaged, TensorFile, do_all, size_of
from minispeed.checkpoint.verify import newest_whole, problems
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.placement import WHOLE, Slice

BAND = 16  # blocks of rows at a time, where what lies between is read too


class Held(NamedTuple):
    """Where some elements of a slice are stored."""

    elements: Interval
    rank: int
    key: str


class Checkpoint:
    """A checkpoint on disk: its `state`, and any elements of any of its tensors."""

    def __init__(self, directory: Path) -> None:
        """Read and check the index and the lists of pieces, no tensors.

        Raises  UserError naming the file that is missing, cut short, altered or not a checkpoint's, and the newest
                checkpoint beside it that is whole
        """
        self.directory = standing(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, dict[Slice, list[Held]]] = {}
        self._lists: list[list[Stored]] = []
        self._files: dict[int, TensorFile] = {}
        with self._damage_named():
            self.index = read_index(self.directory)
            for rank in range(self.index.ranks):
                path = self.index.path(rank, "safetensors")
                size_of(path, self.index.files.get(path.name))
                self._lists.append(self.index.pieces(rank))
                for piece in self._lists[rank]:
                    self.shapes[piece.name] = piece.shape
                    held = self._pieces.setdefault(piece.name, {}).setdefault(piece.part, [])
                    held.append(Held(piece.elements, rank, piece.key))
        self.state: dict[str, Any] = self.index.state

    def read(self, name: str, elements: Interval, part: Slice = WHOLE) -> Tensor | None:
        """Return some elements of the flattened tensor `name`, or of a slice of it; None where there is no such tensor.

        Reads    the blocks that hold them; of a tensor that was cut otherwise those of the rows that hold them
        Returns  (elements.size,)
        Raises   UserError if a file is damaged, or no piece holds some of the elements
        """
        if name not in self._pieces:
            return None
        if part not in self._pieces[name]:
            return self._across(name, elements, part)
        out = torch.empty(elements.size, dtype=self._dtype(name))
        with self._damage_named():
            do_all(list(self._blocks(name, part, elements, out)))
        return out

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Put into each piece's tensor what it is a piece of: the bytes, once compared, are where they belong.

        Writes  the tensors; if it raises, any of them may hold what is not right
        Raises  UserError as `read`
        """
        straight, others = list[Callable[[], None]](), list[Piece]()
        with self._damage_named():
            for piece in pieces:
                if self._fits(piece):
                    straight += self._blocks(piece.name, piece.part, piece.elements, piece.tensor.detach().view(-1))
                else:
                    others.append(piece)
            do_all(straight)
        for piece in others:
            found = self.read(piece.name, piece.elements, piece.part)
            assert found is not None, piece.name
            piece.tensor.detach().copy_(found.view(piece.tensor.shape))

    def tensor(self, name: str) -> Tensor | None:
        """Return the whole tensor, in its shape."""
        found = self.read(name, Interval(0, prod(self.shapes.get(name, ()))))
        return None if found is None else found.view(self.shapes[name])

    def verify(self) -> list[str]:
        """Read every byte of every file; return a sentence for each thing that is not what was written."""
        return problems(self.directory)

    def _fits(self, piece: Piece) -> bool:
        """Whether a piece's bytes are those of the files."""
        x = piece.tensor
        is_plain = x.device.type == "cpu" and x.is_contiguous() and x.dtype == self._dtype(piece.name)
        return is_plain and piece.part in self._pieces[piece.name]

    def _across(self, name: str, elements: Interval, part: Slice) -> Tensor:
        """Read elements of a slice of a tensor that was cut otherwise: (elements.size,)."""
        shape = self.shapes[name] or (1,)
        local = shape_of(shape, part)
        width = prod(local[1:])
        rows = Interval(elements.start // max(width, 1), -(-elements.stop // max(width, 1)))
        found = torch.zeros((rows.size, *local[1:]), dtype=self._dtype(name))
        one = next(iter(self._pieces[name]))
        for stored in (replace(one, index=index) for index in range(one.count)):
            for wanted, box in shared(shape, part, stored, rows):
                here = found[tuple(slice(*span) for span in (wanted[0].shift(-rows.start), *wanted[1:]))]
                self._read_box(name, stored, shape_of(shape, stored), box, here)
        return found.flatten()[slice(*elements.shift(-rows.start * width))]

    def _read_box(self, name: str, stored: Slice, shape: tuple[int, ...], box: Box, out: Tensor) -> None:
        """Fill `out` with a box of a stored slice of that shape."""
        block = self.index.block // out.dtype.itemsize
        for rows, span in spans(shape, box, bridge=block, band=BAND * block):
            found = self.read(name, span, stored)
            assert found is not None
            sizes = (rows.size, *out.shape[1:])
            out[slice(*rows)] = found.as_strided(sizes, strides(shape))

    def _blocks(self, name: str, part: Slice, elements: Interval, out: Tensor) -> Iterator[Callable[[], None]]:
        """Yield what must be done to fill `out`, (elements.size,), with elements of a slice that was stored as such."""
        reached = elements.start
        for held in sorted(self._pieces[name].get(part, ())):
            wanted = held.elements.meet(Interval(reached, elements.stop))
            if wanted.size and wanted.start == reached:
                here = out[slice(*wanted.shift(-elements.start))]
                yield from self._file(held.rank).blocks(held.key, wanted.shift(-held.elements.start), here)
                reached = wanted.stop
        if reached != elements.stop:
            what = f"{self.directory} lacks elements {reached} to {elements.stop} of {name}"
            raise UserError(what, fix=self._another())

    def _dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
        held = next(held for of_slice in self._pieces[name].values() for held in of_slice)
        with self._damage_named():
            return self._file(held.rank).dtype(held.key)

    def _file(self, rank: int) -> TensorFile:
        """Open a rank's tensors at the first need."""
        if rank not in self._files:
            self._files[rank] = self.index.tensors(rank, self._lists[rank])
        return self._files[rank]

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        """Add to the name of what is damaged what to go on from."""
        try:
            yield
        except Damaged as error:
            raise UserError(error.what, fix=self._another()) from error

    def _another(self) -> str:
        found = newest_whole(self.directory.parent, besides=self.directory)
        return f"{found}, the newest beside it that is whole" if found else "another run's: none beside it is whole"
