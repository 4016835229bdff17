"""Lay many tensors into one flat buffer, and cut the buffer into one shard per rank.

One collective on one long buffer beats a hundred on short ones, and a buffer, unlike a list of tensors, can
be cut in N equal parts. The price is book-keeping: which slice of which tensor lies in shard r. It is
interval arithmetic, and all of it is here; ZeRO and the checkpoints both read it off the same object.

    flat:    | a a a a a | b b | c c c c . . |      . is padding, it belongs to nobody
    shards:  |   rank 0    |    rank 1       |      here b is cut in two

ZeRO, Rajbhandari et al. 2020, section 5.  https://arxiv.org/abs/1910.02054
Letters: N ranks, S elements of a shard, all positions in elements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from minispeed.errors import UserError


class Interval(NamedTuple):
    """The positions start, start + 1, ..., stop - 1."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many positions."""
        return self.stop - self.start

    def meet(self, other: "Interval") -> "Interval":
        """Return what both hold; where they are apart, an empty interval."""
        start = max(self.start, other.start)
        return Interval(start, max(start, min(self.stop, other.stop)))

    def shift(self, by: int) -> "Interval":
        """Return the same positions, each moved by `by`."""
        return Interval(self.start + by, self.stop + by)


class Piece(NamedTuple):
    """A slice of one tensor that lies in one shard: `flat_tensor[tensor]` is `that_shard[shard]`."""

    name: str
    tensor: Interval  # in the tensor, flattened
    shard: Interval  # in the shard


@dataclass(frozen=True)
class FlatLayout:
    """Where each of the named tensors lies in a flat buffer of N shards, in the order given.

    shapes     name -> shape; the order of the mapping is the order in the buffer
    ranks      N, the number of shards
    alignment  every tensor, and every shard, starts at a multiple of this many elements

    Raises  UserError if ranks or alignment is below 1
    """

    shapes: Mapping[str, tuple[int, ...]]
    ranks: int
    alignment: int = 1

    def __post_init__(self) -> None:
        for what, value in (("ranks", self.ranks), ("alignment", self.alignment)):
            if value < 1:
                raise UserError(f"a layout needs {what} >= 1, got {value}", fix=f"{what}=1")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], ranks: int, *, alignment: int = 1) -> "FlatLayout":
        """Return the layout of these tensors: only their names and shapes are kept."""
        return cls({name: tuple(x.shape) for name, x in tensors.items()}, ranks, alignment)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Where each tensor lies in the flat buffer."""
        intervals, start = {}, 0
        for name, shape in self.shapes.items():
            intervals[name] = Interval(start, start + prod(shape))
            start = _round_up(intervals[name].stop, self.alignment)
        return intervals

    @cached_property
    def total(self) -> int:
        """Elements of all tensors, the gaps that align them included, the padding at the end not."""
        return max((interval.stop for interval in self.intervals.values()), default=0)

    @property
    def shard_size(self) -> int:
        """S, elements of a shard: the same for every rank."""
        return _round_up(-(-self.total // self.ranks), self.alignment)

    @property
    def size(self) -> int:
        """Elements of the flat buffer, N S."""
        return self.ranks * self.shard_size

    def shard_interval(self, rank: int) -> Interval:
        """Return where shard `rank` lies in the flat buffer."""
        assert 0 <= rank < self.ranks, f"shard {rank} of {self.ranks}"
        return Interval(rank * self.shard_size, (rank + 1) * self.shard_size)

    def shard(self, flat: Tensor, rank: int) -> Tensor:
        """Return shard `rank` of the flat buffer, a view.  (N S,) -> (S,)"""
        start, stop = self.shard_interval(rank)
        return flat[start:stop]

    def span(self, names: Sequence[str]) -> Interval:
        """Return the interval from the first to the last of these tensors, neighbours in the layout's order.

        With `in_shard` this gives the window of a parameter group in my shard. No names: empty, at 0.
        """
        order = list(self.shapes)
        first = order.index(names[0]) if names else 0
        assert list(names) == order[first : first + len(names)], f"{list(names)} are not neighbours in {order}"
        return Interval(self.intervals[names[0]].start, self.intervals[names[-1]].stop) if names else Interval(0, 0)

    def in_shard(self, interval: Interval, rank: int) -> Interval:
        """Return what of a flat interval lies in shard `rank`, in positions of that shard."""
        mine = self.shard_interval(rank)
        held = interval.meet(mine)
        return held.shift(-mine.start) if held.size else Interval(0, 0)

    def pieces(self, rank: int) -> list[Piece]:
        """Return which slice of which tensor lies in shard `rank`, in buffer order, empty slices left out.

        Over all ranks, every element of every tensor is in exactly one piece.
        """
        mine, pieces = self.shard_interval(rank), []
        for name, interval in self.intervals.items():
            held = interval.meet(mine)
            if held.size:
                pieces.append(Piece(name, held.shift(-interval.start), held.shift(-mine.start)))
        return pieces

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return each tensor as a view of the flat buffer.  (N S,) -> {name: its shape}"""
        assert flat.shape == (self.size,), f"a buffer of {tuple(flat.shape)} for a layout of {self.size} elements"
        return {name: flat[slice(*self.intervals[name])].view(shape) for name, shape in self.shapes.items()}

    @torch.no_grad()
    def flatten(self, tensors: Mapping[str, Tensor], *, out: Tensor) -> Tensor:
        """Copy the tensors into the flat buffer `out`, cast to its dtype, zeros where nobody lives.  (N S,)

        Raises  UserError if the names or a shape are not the layout's
        """
        if tensors.keys() != self.shapes.keys():
            odd = sorted(tensors.keys() ^ self.shapes.keys())
            raise UserError(f"tensors and layout differ in {odd}", fix="the tensors that the layout was made of")
        out.zero_()
        for name, view in self.views(out).items():
            if tensors[name].shape != view.shape:
                shapes = f"{tuple(tensors[name].shape)}, its layout {tuple(view.shape)}"
                raise UserError(f"{name} has shape {shapes}", fix="a layout made anew with FlatLayout.of")
            view.copy_(tensors[name])
        return out


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
