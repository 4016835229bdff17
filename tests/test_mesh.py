"""Laws of the mesh: coordinates name each rank once, and the lines of any axes partition the ranks."""

import pytest
from hypothesis import given, strategies as st

from minispeed.errors import UserError
from minispeed.mesh import AXES, Mesh, line_of
from minispeed.testing.strategies import meshes

some_axes = st.lists(st.sampled_from(AXES), unique=True)


@given(meshes())
def test_coordinates_and_ranks_are_inverse(mesh):
    seen = [mesh.coords(rank) for rank in range(mesh.world)]
    assert [mesh.rank(**coords) for coords in seen] == list(range(mesh.world))
    assert all(0 <= coords[axis] < mesh.sizes[axis] for coords in seen for axis in AXES)


@given(meshes(), some_axes)
def test_lines_partition_the_ranks(mesh, axes):
    lines = mesh.lines(*axes)
    assert sorted(rank for line in lines for rank in line) == list(range(mesh.world))
    length = 1
    for axis in axes:
        length *= mesh.sizes[axis]
    assert {len(line) for line in lines} == {length}
    assert lines == sorted(lines) == mesh.lines(*reversed(axes))
    for line in lines:
        fixed = [{a: p for a, p in mesh.coords(rank).items() if a not in axes} for rank in line]
        assert all(coords == fixed[0] for coords in fixed)
        assert line_of(line[-1], lines) == line


def test_tp_is_fastest_and_pp_slowest():
    mesh = Mesh(world=8, pp=2, dp=2, tp=2)
    assert mesh.lines("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert mesh.lines("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert mesh.lines("dp", "tp") == [(0, 1, 2, 3), (4, 5, 6, 7)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Mesh(world=8, pp=2, tp=2),
            r"pp 2 x dp 1 x sp 1 x tp 2 = 4 ranks, but the world has 8; try: dp=2",
        ),
        (lambda: Mesh(world=5, tp=2), r"= 2 ranks, but the world has 5; try: lengths whose product is 5"),
        (lambda: Mesh(world=1, dp=0), r"mesh axis dp has length 0"),
        (lambda: Mesh(world=2, dp=2).lines("ddp"), r"no axis 'ddp'; try: dp"),
        (lambda: Mesh(world=2, dp=2).coords(2), r"rank 2 is outside a world of 2"),
        (lambda: Mesh(world=2, dp=2).rank(dp=2), r"dp=2 is outside an axis of length 2"),
        (lambda: line_of(1, [(0,), (2,)]), r"rank 1 must stand in exactly one line, once, .* in 0"),
        (lambda: line_of(1, [(0, 1), (1, 2)]), r"in 2; try: mesh.lines"),
    ],
)
def test_mistakes_name_the_numbers(build, message):
    with pytest.raises(UserError, match=message):
        build()
