"""Laws of the rings: for any number of ranks and elements they compute what the plain collectives do."""

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.collective import rings
from minispeed.collective.launch import launch
from minispeed.collective.trace import Trace, Traced
from minispeed.testing.strategies import ranks, seeds, sizes


def drawn(seed, rank, size):
    generator = torch.Generator().manual_seed(seed + rank)
    return torch.randint(-9, 9, (size,), generator=generator, dtype=torch.float32)  # small: sums are exact


def both(world, seed, size, root, op):
    """Each ring, and the plain collective, on the same input."""
    group, n = world.group, world.size
    small, large = drawn(seed, world.rank, size), drawn(seed, world.rank, n * size)
    ours, plain = [small.clone() for _ in range(3)], [small.clone() for _ in range(3)]
    rings.all_reduce(group, ours[0], op)
    rings.central_all_reduce(group, ours[1], op)
    rings.broadcast(group, ours[2], root)
    group.all_reduce(plain[0], op).wait()
    plain[1].copy_(plain[0])
    group.broadcast(plain[2], root).wait()
    gathered, scattered = torch.empty(2, n * size), torch.empty(2, size)
    mine = gathered[0, world.rank * size : (world.rank + 1) * size]
    mine.copy_(small)
    rings.all_gather(group, gathered[0], mine)  # inside its own output
    group.all_gather(gathered[1], small).wait()
    kept = large.clone()
    rings.reduce_scatter(group, scattered[0], large)
    group.reduce_scatter(scattered[1], large).wait()
    assert torch.equal(large, kept)
    return [*zip(ours, plain, strict=True), tuple(gathered), tuple(scattered)]


@given(ranks, sizes, seeds, st.integers(0, 6), st.sampled_from(["sum", "max", "min"]))
def test_rings_equal_the_plain_collectives(n, size, seed, root, op):
    for results in launch(both, seed, size, root % n, op, ranks=n):
        assert all(torch.equal(ours, plain) for ours, plain in results)


@given(st.integers(0, 100), st.integers(1, 9))
def test_parts_cover_the_buffer_and_differ_by_one_at_most(n, size):
    bounds = rings.part_bounds(n, size)
    assert [position for start, stop in bounds for position in range(start, stop)] == list(range(n))
    lengths = [stop - start for start, stop in bounds]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("size", range(1, 18))
@pytest.mark.parametrize("root", [0, 1, 5])
def test_the_tree_reaches_every_rank_once_and_is_shallow(size, root):
    root %= size
    depth, reached = {root: 0}, [root]
    for rank in reached:
        for child in rings.tree_children(rank, root, size):
            assert child not in depth
            depth[child] = depth[rank] + 1
            reached.append(child)
    assert sorted(reached) == list(range(size))
    assert max(depth.values()) <= (size - 1).bit_length()


def test_no_rank_of_a_ring_sends_more_than_its_share_where_the_root_sends_it_all():
    n, size = 4, 40

    def sent(world):
        figures = []
        for collective in (rings.all_reduce, rings.central_all_reduce):
            trace = Trace()
            collective(Traced(world.group, trace), torch.zeros(size))
            figures.append(trace.sent() // 4)  # elements of 4 bytes
        return figures

    assert launch(sent, ranks=n) == [[2 * size * (n - 1) // n, size * (n - 1) if r == 0 else size] for r in range(n)]
