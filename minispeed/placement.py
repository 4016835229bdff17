"""Say for each parameter whether the ranks along an axis hold slices of it, or equal copies.

A placement is a table, name -> Shard(axis, dim) | Replicated(). Tensor parallelism writes it; the norm, the
checkpoint and the initialisation read it: which slice is mine, how slices join again, whose copy counts.

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
    """The ranks along mesh axis `axis` hold equal slices of tensor dim `dim`; other axes hold copies."""

    axis: str
    dim: int


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor."""


Place: TypeAlias = Shard | Replicated
Placement: TypeAlias = Mapping[str, Place]


def local_shape(shape: Sequence[int], place: Place, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape that one rank holds; `sizes` is the length of each mesh axis.

    Raises  UserError if the tensor has no such dim, or the axis does not divide it
    """
    local = list(shape)
    if isinstance(place, Shard):
        if not -len(local) <= place.dim < len(local):
            raise UserError(f"dim {place.dim} of a tensor of shape {tuple(shape)}", fix=f"a dim below {len(local)}")
        whole, parts = local[place.dim], sizes[place.axis]
        if whole % parts:
            raise UserError(
                f"dim {place.dim} has {whole} elements, which {place.axis}={parts} does not divide",
                fix=f"a size of {-(-whole // parts) * parts}, or a {place.axis} that divides {whole}",
            )
        local[place.dim] = whole // parts
    return tuple(local)


def cut(x: Tensor, place: Place, *, rank: int, size: int) -> Tensor:
    """Return the slice of `x` that position `rank` of `size` along the axis holds, a view; `x` if replicated.

    Raises  UserError as `local_shape`
    """
    if isinstance(place, Replicated):
        return x
    length = local_shape(x.shape, place, {place.axis: size})[place.dim]
    return x.narrow(place.dim, rank * length, length)


def join(slices: Sequence[Tensor], place: Place) -> Tensor:
    """Return the whole tensor from what the ranks along the axis hold, in rank order: undoes `cut`."""
    return slices[0] if isinstance(place, Replicated) else torch.cat(list(slices), dim=place.dim)


def counts(place: Place, coords: Mapping[str, int], *, over: Sequence[str]) -> bool:
    """Return whether the copy at `coords` counts in norm and checkpoint: of equal copies, only the first.

    over  the axes along which copies may lie; a sharded tensor's own axis holds slices, which all count
    """
    own = place.axis if isinstance(place, Shard) else None
    return all(coords[axis] == 0 for axis in over if axis != own)
