"""Say where each rank stands: arithmetic between rank numbers and the axes of the mesh.

A world of W ranks is a box with four sides, W = pp x dp x sp x tp: pipeline, data, sequence and tensor
parallelism. Rank numbers run through it as the digits of a clock run, tp fastest: neighbours in tp, which
talk most, are neighbours in the machine. A line is the ranks that differ along the given axes only: one
group.

Megatron-LM, Narayanan et al. 2021, section 3.2.  https://arxiv.org/abs/2104.04473
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from minispeed.errors import UserError, nearest

AXES = ("pp", "dp", "sp", "tp")  # slow to fast


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The box of ranks; each number is the length of one axis.

    Raises  UserError if a length is below 1, or the product is not the number of ranks in `world`
    """

    world: int
    pp: int = 1
    dp: int = 1
    sp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis, length in self.sizes.items():
            if length < 1:
                raise UserError(f"mesh axis {axis} has length {length}", fix=f"{axis}=1 for an axis not in use")
        product = prod(self.sizes.values())
        if product != self.world:
            sides = " x ".join(f"{axis} {length}" for axis, length in self.sizes.items())
            raise UserError(f"{sides} = {product} ranks, but the world has {self.world}", fix=self._suggestion())

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The length of every axis, slow to fast."""
        return {axis: getattr(self, axis) for axis in AXES}

    def coords(self, rank: int) -> dict[str, int]:
        """Return the rank's position on every axis, the inverse of `rank`.

        Raises  UserError if there is no such rank
        """
        if not 0 <= rank < self.world:
            raise UserError(f"rank {rank} is outside a world of {self.world}", fix=f"a rank in 0..{self.world - 1}")
        position = {}
        for axis in reversed(AXES):
            rank, position[axis] = divmod(rank, self.sizes[axis])
        return {axis: position[axis] for axis in AXES}

    def rank(self, *, pp: int = 0, dp: int = 0, sp: int = 0, tp: int = 0) -> int:
        """Return the rank that stands at these coordinates.

        Raises  UserError if a coordinate is outside its axis
        """
        number = 0
        for (axis, length), place in zip(self.sizes.items(), (pp, dp, sp, tp), strict=True):
            if not 0 <= place < length:
                raise UserError(f"{axis}={place} is outside an axis of length {length}", fix=f"0..{length - 1}")
            number = number * length + place
        return number

    def lines(self, *axes: str) -> list[tuple[int, ...]]:
        """Return the groups along one axis, or along several merged into one: they partition the ranks.

        Each line is in rank order (slow to fast over its axes, however they are given), and the lines are in
        the order of their first ranks. No axes: every rank alone.

        Raises  UserError on an axis that the mesh does not have
        """
        for axis in axes:
            if axis not in AXES:
                raise UserError(f"the mesh has no axis {axis!r}", fix=nearest(axis, AXES) or ", ".join(AXES))
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            fixed = tuple(place for axis, place in self.coords(rank).items() if axis not in axes)
            lines.setdefault(fixed, []).append(rank)
        return [tuple(line) for line in lines.values()]

    def _suggestion(self) -> str:
        """Name the dp that would make the product right, or what the product must be."""
        rest = self.pp * self.sp * self.tp
        if self.world % rest == 0 and self.world > 0:
            return f"dp={self.world // rest}"
        return f"lengths whose product is {self.world}, or start {rest * self.dp} ranks"


def line_of(rank: int, lines: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the line that holds `rank`.

    Raises  UserError if no line, or more than one, holds it
    """
    mine = [tuple(line) for line in lines if rank in line]
    if len(mine) != 1 or len(set(mine[0])) != len(mine[0]):
        raise UserError(
            f"rank {rank} must stand in exactly one line, once, but {[list(line) for line in lines]} "
            f"has it in {len(mine)}",
            fix="mesh.lines(axis), or lists that hold every rank once",
        )
    return mine[0]
