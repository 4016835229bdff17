"""Draw the awkward: worlds of 1 and of prime size, empty tensors, fewer elements than ranks.

Strategies return plain numbers, shapes and seeds, so that a parent can draw them and ship them to ranks.
"""

from math import prod

from hypothesis import strategies as st

from minispeed.mesh import AXES, Mesh

ranks = st.sampled_from([1, 2, 3, 4, 5, 7])
sizes = st.one_of(st.integers(0, 9), st.integers(10, 70))
seeds = st.integers(0, 2**31 - 1)
shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=5)


@st.composite
def meshes(draw: st.DrawFn, largest: int = 48) -> Mesh:
    """Draw a mesh of at most `largest` ranks, axes of length 1 to 4."""
    lengths = draw(
        st.lists(st.integers(1, 4), min_size=len(AXES), max_size=len(AXES)).filter(lambda n: prod(n) <= largest)
    )
    return Mesh(world=prod(lengths), **dict(zip(AXES, lengths, strict=True)))
