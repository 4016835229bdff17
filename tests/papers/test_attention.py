"""What attention keeps, and its peaks, are the closed form to the byte: of order T T by the formula, of T in tiles."""

import attention
from attention import KINDS, Shape, closed_form, count
from hypothesis import example, given, settings, strategies as st


def test_every_counted_row_is_its_closed_form_exactly():
    rows = [row for row in attention.entry(quick=True).rows if row.closed_form is not None]
    assert len(rows) == 3 * 3 + 4 and all(row.difference == 0 for row in rows)


@st.composite
def shapes(draw):
    tile = draw(st.sampled_from([32, 64]))
    shape = Shape(draw(st.integers(2, 4)), draw(st.sampled_from([8, 12, 16])), tile)
    return shape, tile * draw(st.integers(3, 6))


@given(st.sampled_from(KINDS), shapes())
@settings(max_examples=30)
@example("formula", (Shape(2, 16, 32), 96))
def test_any_shape_needs_what_the_closed_form_says(kind, drawn):
    shape, tokens = drawn
    assert count(kind, tokens, shape) == closed_form(kind, tokens, shape)


def test_what_a_length_adds_is_of_its_order():
    """Second differences over equal steps: of the tiles and the kernel none, of the formula alone some."""
    for kind in KINDS:
        for a, b, c in zip(*(count(kind, tokens) for tokens in (384, 512, 640)), strict=True):
            assert (a + c - 2 * b > 0) == (kind == "formula")


def test_the_tiles_are_exact():
    assert attention.apart(256) < 1e-12
