"""What crosses a cut of a pipeline is the minimum cover, to the byte; what connections add is counted."""

from itertools import product

import pytest
from deep import MASKS, L, cover, entry, loss
from deep_masks import compare
from hypothesis import given, strategies as st

from minispeed.model.connections import Connections, crossing, learned_entries


@pytest.fixture(scope="module")
def made():
    return entry(quick=True)


def test_every_counted_row_is_its_closed_form_exactly(made):
    assert [row.difference for row in made.rows] == [0] * (4 + len(MASKS))


@given(st.sampled_from(MASKS), st.integers(1, 5), st.data())
def test_a_cover_has_every_entry_that_crosses_and_no_smaller_set_does(mask, layers, data):
    after = data.draw(st.integers(0, layers))
    columns, rows = cover(mask, after, layers)
    crossed = crossing(Connections(layers, learned_entries(mask, layers)).entries, after)
    assert all(j in columns or i in rows for i, j in crossed)
    names = sorted({("row", i) for i, _ in crossed} | {("column", j) for _, j in crossed})
    for chosen in product([False, True], repeat=len(names)):
        kept = {name for name, is_in in zip(names, chosen, strict=True) if is_in}
        if all(("row", i) in kept or ("column", j) in kept for i, j in crossed):
            assert len(kept) >= len(columns) + len(rows)


@given(st.integers(1, 40), st.data())
def test_densely_connected_a_cut_costs_the_shorter_side(layers, data):
    after = data.draw(st.integers(0, layers))
    assert len(sum(cover("dwa", after, layers), ())) == min(after + 1, max(1, layers - after + 1))
    assert len(sum(cover("none", after, layers), ())) == 1
    assert len(learned_entries("dwa", layers)) == layers * (layers + 3) // 2


def test_a_difference_below_two_spreads_is_said_to_be_none():
    rows = compare({"none": [2.0, 2.1], "dwa": [1.99, 2.09]})
    assert "no difference found" in loss(rows[1]).measured
    assert "learns better" in loss(compare({"none": [2.0, 2.1], "dwa": [1.0, 1.1]})[1]).measured


def test_the_figure_shows_every_cut(made):
    assert {len(tensors) for tensors in made.series["tensors"].values()} == {L + 1}
