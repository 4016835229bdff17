"""Laws of the layout: there and back changes nothing, and every element lies in exactly one shard."""

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.errors import UserError
from minispeed.layout import FlatLayout, Interval
from minispeed.testing.strategies import ranks, shapes

alignments = st.sampled_from([1, 2, 8])


def numbered(shapes):
    """Tensors whose elements are 1, 2, 3, ... throughout: each can be told from all others, and from 0."""
    tensors, count = {}, 1
    for index, shape in enumerate(shapes):
        size = torch.Size(shape).numel()
        tensors[f"w{index}"] = torch.arange(count, count + size, dtype=torch.int64).view(shape)
        count += size
    return tensors


@given(shapes, ranks, alignments)
def test_flatten_and_views_are_inverse(shapes, ranks, alignment):
    tensors = numbered(shapes)
    layout = FlatLayout.of(tensors, ranks, alignment=alignment)
    flat = layout.flatten(tensors, out=torch.full((layout.size,), -1))
    assert list(layout.views(flat)) == list(tensors)
    assert all(torch.equal(view, tensors[name]) for name, view in layout.views(flat).items())
    assert flat[flat > 0].tolist() == list(range(1, 1 + sum(x.numel() for x in tensors.values())))
    assert (flat >= 0).all()  # gaps and padding are zeros, not what was there before


@given(shapes, ranks, alignments)
def test_every_element_is_owned_exactly_once(shapes, ranks, alignment):
    tensors = numbered(shapes)
    layout = FlatLayout.of(tensors, ranks, alignment=alignment)
    flat = layout.flatten(tensors, out=torch.empty(layout.size, dtype=torch.int64))
    owned = {name: torch.zeros(x.numel(), dtype=torch.int64) for name, x in tensors.items()}
    for rank in range(ranks):
        shard = layout.shard(flat, rank)
        assert shard.numel() == layout.shard_size
        for name, here, there in layout.pieces(rank):
            assert here.size == there.size > 0
            assert torch.equal(tensors[name].flatten()[slice(*here)], shard[slice(*there)])
            owned[name][slice(*here)] += 1
    assert all((count == 1).all() for count in owned.values())


@given(shapes, ranks, alignments)
def test_tensors_and_shards_start_aligned_and_padding_is_small(shapes, ranks, alignment):
    layout = FlatLayout({f"w{i}": shape for i, shape in enumerate(shapes)}, ranks, alignment)
    assert all(interval.start % alignment == 0 for interval in layout.intervals.values())
    assert layout.shard_size % alignment == 0
    assert 0 <= layout.size - layout.total < ranks * alignment


@given(shapes, ranks, st.integers(0, 5))
def test_windows_of_neighbouring_groups_fill_the_shards(shapes, ranks, split):
    layout = FlatLayout({f"w{i}": shape for i, shape in enumerate(shapes)}, ranks)
    names = list(layout.shapes)
    groups = [layout.span(names[:split]), layout.span(names[split:])]
    for rank in range(ranks):
        windows = [layout.in_shard(group, rank) for group in groups]
        held = sum(piece.shard.size for piece in layout.pieces(rank))
        assert sum(window.size for window in windows) == held  # alignment 1: no gaps between tensors


def test_more_ranks_than_elements_leaves_empty_shards_of_the_same_size():
    layout = FlatLayout({"w": (2,)}, ranks=5)
    assert [layout.pieces(rank) for rank in range(2, 5)] == [[], [], []]
    assert layout.shard_size == 1


def test_no_tensors_is_an_empty_buffer():
    layout = FlatLayout({}, ranks=3)
    assert (layout.size, layout.views(torch.empty(0)), layout.span([])) == (0, {}, Interval(0, 0))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": torch.ones(3)}, r"w has shape \(3,\), its layout \(2,\)"),
        ({"v": torch.ones(2)}, r"tensors and layout differ in \['v', 'w'\]"),
    ],
)
def test_other_tensors_than_the_layouts_are_named(tensors, message):
    layout = FlatLayout({"w": (2,)}, ranks=1)
    with pytest.raises(UserError, match=message):
        layout.flatten(tensors, out=torch.empty(layout.size))


def test_no_ranks_is_an_error():
    with pytest.raises(UserError, match="ranks >= 1, got 0"):
        FlatLayout({"w": (2,)}, ranks=0)
