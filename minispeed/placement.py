"""Say for each parameter whether the ranks along an axis hold slices of it, or equal copies.

A placement is a table, name -> Shard(axis, dim) | Replicated(). Tensor parallelism writes it; the norm, the
checkpoint and the initialisation read it: which slice is mine, how slices join again, whose copy counts.

    one piece, 3 ranks    | a a | a a | a a |            fused chunks    | q q k v | q q k v | q q k v |
    padded, 5 elements    | a a | a a | a . |            . is zero, and no part of the whole

Megatron-LM, Shoeybi et al. 2019, section 3.  https://arxiv.org/abs/1909.08053
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from minispeed.errors import UserError


@dataclass(frozen=True)
class Shard:
    """The ranks along mesh axis `axis` hold equal slices of tensor dim `dim`; other axes hold copies.

    chunks  lengths of what is fused along the dim (query, key, value), each cut for itself; empty: it is one
    padded  a chunk that the axis does not divide is cut as if zeros followed it; `chunks` says where it ends
    """

    axis: str
    dim: int
    chunks: tuple[int, ...] = ()
    padded: bool = False

    def __post_init__(self) -> None:
        assert self.chunks or not self.padded, "without the length of the whole, padding cannot be told from it"


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor."""


Place: TypeAlias = Shard | Replicated
Placement: TypeAlias = Mapping[str, Place]


@dataclass(frozen=True)
class Slice:
    """One rank's part of a tensor: number `index` of the `count` that `place` cuts it into."""

    place: Place = Replicated()
    index: int = 0
    count: int = 1

    def of(self, x: Tensor) -> Tensor:
        """Return this part of a whole tensor: see `cut`."""
        return cut(x, self.place, rank=self.index, size=self.count)


WHOLE = Slice()


def local_shape(shape: Sequence[int], place: Place, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape that one rank holds; `sizes` is the length of each mesh axis.

    Raises  UserError if the tensor has no such dim, or the axis does not divide it
    """
    local = list(shape)
    if isinstance(place, Shard):
        if not -len(local) <= place.dim < len(local):
            raise UserError(f"dim {place.dim} of a tensor of shape {tuple(shape)}", fix=f"a dim below {len(local)}")
        local[place.dim] = sum(_slice_lengths(local[place.dim], place, sizes[place.axis]))
    return tuple(local)


def cut(x: Tensor, place: Place, *, rank: int, size: int) -> Tensor:
    """Return the slice of `x` that position `rank` of `size` along the axis holds; `x` if replicated.

    A view, unless it is padded or has several chunks.

    Raises  UserError as `local_shape`
    """
    if isinstance(place, Replicated):
        return x
    local_shape(x.shape, place, {place.axis: size})  # whether it can be cut
    whole = x.shape[place.dim]
    lengths = _slice_lengths(whole, place, size)
    chunks = x.split(place.chunks or (whole,), dim=place.dim)
    slices = [_slice(chunk, place.dim, rank * length, length) for chunk, length in zip(chunks, lengths, strict=True)]
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim=place.dim)


def join(slices: Sequence[Tensor], place: Place) -> Tensor:
    """Return the whole tensor from what the ranks along the axis hold, in rank order: undoes `cut`."""
    if isinstance(place, Replicated):
        return slices[0]
    dim, size = place.dim, len(slices)
    wholes = place.chunks or (size * slices[0].shape[dim],)
    lengths = [-(-whole // size) for whole in wholes]
    by_chunk = zip(*(held.split(lengths, dim=dim) for held in slices), strict=True)
    return torch.cat([torch.cat(c, dim=dim).narrow(dim, 0, whole) for c, whole in zip(by_chunk, wholes)], dim=dim)


def counts(place: Place, coords: Mapping[str, int], *, over: Sequence[str]) -> bool:
    """Return whether the copy at `coords` counts in norm and checkpoint: of equal copies, only the first.

    over  the axes along which copies may lie; a sharded tensor's own axis holds slices, which all count
    """
    own = place.axis if isinstance(place, Shard) else None
    return all(coords[axis] == 0 for axis in over if axis != own)


def _slice_lengths(whole: int, place: Shard, size: int) -> list[int]:
    """Return how long a slice of each chunk is, padding included."""
    chunks = place.chunks or (whole,)
    if sum(chunks) != whole:
        what = f"dim {place.dim} has {whole} elements, and its chunks {chunks} have {sum(chunks)}"
        raise UserError(what, fix="the lengths of what is fused along it")
    for length in chunks:
        if length % size and not place.padded:
            raise UserError(
                f"dim {place.dim} has {length} elements, which {place.axis}={size} does not divide",
                fix=f"a size of {-(-length // size) * size}, or a {place.axis} that divides {length}",
            )
    return [-(-length // size) for length in chunks]


def _slice(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """Return `length` elements along `dim` from `start` on, zeros where `x` has ended."""
    start = min(start, x.shape[dim])
    held = x.narrow(dim, start, min(length, x.shape[dim] - start))
    missing = length - held.shape[dim]
    if not missing:
        return held
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([held, x.new_zeros(shape)], dim=dim)
