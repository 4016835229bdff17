"""Where a slice of a tensor lies in the slices of another cut of it.

    wanted: columns 2 to 4 of 6         stored: rows in two halves          shared: a box of each half
    . . w w . .                         0 0 0 0 0 0                         . . w w . .    rows 0 to 1 of half 0
    . . w w . .                         1 1 1 1 1 1                         . . w w . .    rows 0 to 1 of half 1

A slice is cut along one dim, where it holds an interval of each chunk; of all other dims it holds all. So what two
slices share are boxes: an interval in every dim, in each slice counted from its own start.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, product
from math import prod
from typing import NamedTuple, TypeAlias

from minispeed.layout import Interval
from minispeed.placement import Shard, Slice, local_shape

Box: TypeAlias = tuple[Interval, ...]  # an interval in every dim


class Shared(NamedTuple):
    """The same elements in two slices."""

    wanted: Box
    stored: Box


class Range(NamedTuple):
    """Neighbouring positions along a dim: the first in the slice, and all in the whole."""

    begin: int
    whole: Interval


def shape_of(shape: Sequence[int], part: Slice) -> tuple[int, ...]:
    """Return the shape of a slice of a tensor.  Raises UserError as `local_shape`"""
    sizes = {part.place.axis: part.count} if isinstance(part.place, Shard) else {}
    return local_shape(shape, part.place, sizes)


def shared(shape: Sequence[int], wanted: Slice, stored: Slice, rows: Interval) -> Iterator[Shared]:
    """Yield the boxes that two slices of a tensor of that shape have in common.

    rows  of `wanted`, along dim 0: what lies outside is left out
    """
    ours, theirs = _ranges(shape, wanted), _ranges(shape, stored)
    ours[0] = [_within(one, rows) for one in ours[0]]
    pairs = [[met for a, b in product(*both) for met in _meet(a, b)] for both in zip(ours, theirs, strict=True)]
    for of_dims in product(*pairs):
        yield Shared(tuple(a for a, _ in of_dims), tuple(b for _, b in of_dims))


def spans(shape: Sequence[int], box: Box, *, bridge: int, band: int) -> Iterator[tuple[Interval, Interval]]:
    """Yield how to read a box of a flattened tensor: rows of the box, and the elements from their first to their last.

    bridge  elements between one row's and the next row's that are read along with them, if they are fewer
    band    elements at a time, where there are any between
    """
    width, rows = prod(shape[1:]), box[0]
    first = sum(span.start * step for span, step in zip(box, strides(shape)))
    size = 1 + sum((span.stop - 1 - span.start) * step for span, step in zip(box[1:], strides(shape)[1:]))
    between = width - size
    count = rows.size if not between else 1 if between >= bridge else max(1, band // width)
    for begin in range(0, rows.size, count):
        here = Interval(begin, min(begin + count, rows.size))
        yield here, Interval(first + here.start * width, first + (here.stop - 1) * width + size)


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return how many elements lie between neighbours along each dim."""
    return tuple(accumulate(reversed(shape[1:]), int.__mul__, initial=1))[::-1]


def _ranges(shape: Sequence[int], part: Slice) -> list[list[Range]]:
    """Return what a slice holds along each dim, one range a chunk; its padding is no part of the whole."""
    found = [[Range(0, Interval(0, length))] for length in shape]
    if isinstance(part.place, Shard):
        chunks = part.place.chunks or (shape[part.place.dim],)
        lengths = [-(-chunk // part.count) for chunk in chunks]
        begins, starts = accumulate(lengths, initial=0), accumulate(chunks, initial=0)
        found[part.place.dim] = [
            Range(begin, Interval(part.index * length, (part.index + 1) * length).meet(Interval(0, chunk)).shift(start))
            for begin, start, length, chunk in zip(begins, starts, lengths, chunks)
        ]
    return found


def _within(one: Range, rows: Interval) -> Range:
    """Return what of a range lies in some positions of its slice."""
    kept = Interval(one.begin, one.begin + one.whole.size).meet(rows)
    return Range(kept.start, kept.shift(one.whole.start - one.begin))


def _meet(ours: Range, theirs: Range) -> Iterator[tuple[Interval, Interval]]:
    both = ours.whole.meet(theirs.whole)
    if both.size:
        yield both.shift(ours.begin - ours.whole.start), both.shift(theirs.begin - theirs.whole.start)
