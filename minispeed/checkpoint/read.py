"""Read a checkpoint: its state, and any elements of any tensor, whoever wrote them and however they were cut."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minispeed.checkpoint.disk import standing
from minispeed.checkpoint.listed import Stored, read_index
from minispeed.checkpoint.tensors import Damaged, TensorFile, size_of
from minispeed.checkpoint.verify import newest_whole, problems
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.placement import WHOLE, Shard, Slice, join, local_shape


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

        Reads    only the blocks of the pieces that hold them; where the tensor was cut otherwise, all of it
        Returns  (elements.size,)
        Raises   UserError if a file is damaged, or no piece holds some of the elements
        """
        if name not in self._pieces:
            return None
        if part in self._pieces[name]:
            return self._elements(name, part, elements)
        return part.of(self._whole(name)).flatten()[slice(*elements)]

    def tensor(self, name: str) -> Tensor | None:
        """Return the whole tensor, in its shape."""
        return None if name not in self._pieces else self._whole(name)

    def verify(self) -> list[str]:
        """Read every byte of every file; return a sentence for each thing that is not what was written."""
        return problems(self.directory)

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
        for held in sorted(self._pieces[name].get(part, ())):
            wanted = held.elements.meet(Interval(reached, elements.stop))
            if wanted.size and wanted.start == reached:
                with self._damage_named():
                    parts.append(self._file(held.rank).read(held.key, wanted.shift(-held.elements.start)))
                reached = wanted.stop
        if reached != elements.stop:
            what = f"{self.directory} lacks elements {reached} to {elements.stop} of {name}"
            raise UserError(what, fix=self._another())
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.zeros(0)

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
