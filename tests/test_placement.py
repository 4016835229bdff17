"""Laws of placement: slices join to the whole, and of equal copies one counts."""

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.errors import UserError
from minispeed.mesh import AXES
from minispeed.placement import Replicated, Shard, counts, cut, join, local_shape
from minispeed.testing.strategies import meshes, ranks


@given(ranks, st.integers(-2, 1), st.integers(0, 4), st.integers(0, 4))
def test_join_undoes_cut(size, dim, rows, columns):
    place = Shard("tp", dim)
    shape = [rows, columns]
    shape[dim] *= size
    x = torch.arange(shape[0] * shape[1]).view(shape)
    slices = [cut(x, place, rank=rank, size=size) for rank in range(size)]
    assert torch.equal(join(slices, place), x)
    assert {tuple(s.shape) for s in slices} == {local_shape(shape, place, {"tp": size})} == {(rows, columns)}


def test_replicated_is_whole_everywhere():
    x = torch.ones(3)
    assert cut(x, Replicated(), rank=1, size=2) is x
    assert local_shape((3,), Replicated(), {"tp": 2}) == (3,)


@given(meshes(), st.one_of(st.builds(Shard, st.sampled_from(AXES), st.just(0)), st.just(Replicated())))
def test_each_slice_counts_once(mesh, place):
    counting = [mesh.coords(r) for r in range(mesh.world) if counts(place, mesh.coords(r), over=AXES)]
    slices = mesh.sizes[place.axis] if isinstance(place, Shard) else 1
    assert len(counting) == slices
    if isinstance(place, Shard):
        assert sorted(coords[place.axis] for coords in counting) == list(range(slices))


def test_uneven_cut_names_both_numbers():
    with pytest.raises(UserError, match=r"dim 0 has 7 elements, which tp=2 does not divide; try: a size of 8"):
        cut(torch.ones(7), Shard("tp", 0), rank=0, size=2)
    with pytest.raises(UserError, match=r"dim 2 of a tensor of shape \(7, 1\)"):
        local_shape((7, 1), Shard("tp", 2), {"tp": 1})
