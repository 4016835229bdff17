"""A layer's messages, and what it keeps, are the closed forms exactly; from the papers they differ by named terms."""

from math import isclose

import tensor
from activation_memory import count
from hypothesis import given, settings, strategies as st


def test_every_counted_row_is_its_closed_form_exactly():
    rows = [row for row in tensor.entry(quick=True).rows if row.measured is not None]
    assert len(rows) == 7 + len(tensor.VARIANTS)
    for row in rows:
        assert isclose(row.measured, row.closed_form, rel_tol=1e-12), row.claim


def test_calls_are_the_papers():
    rows = [row for row in tensor.entry(quick=True).rows if row.unit in ("calls", "of theirs")]
    assert [row.measured for row in rows] == [row.paper for row in rows] == [4, 4, 4, 1]


@given(st.sampled_from(sorted(tensor.VARIANTS)), st.sampled_from([(48, 16), (96, 8), (48, 32)]))
@settings(max_examples=8)
def test_what_a_layer_keeps_is_the_papers_but_for_named_terms(name, shape):
    case = tensor.case_of(name, *shape)
    row = tensor.kept(name, case)
    assert isclose(row.paper + sum(tensor.terms(case).values()), row.measured, rel_tol=1e-12)
    assert len(set(count(case))) == 1


@given(st.sampled_from([2, 3, 4, 6, 8]))
@settings(max_examples=5)
def test_cutting_by_tokens_sends_as_much_on_any_number_of_ranks(ranks):
    whole = tensor.of_a_layer(ranks, False, "all_reduce")[1]
    cut = sum(tensor.of_a_layer(ranks, True, kind)[1] for kind in ("all_gather", "reduce_scatter"))
    assert isclose(whole, 8) and isclose(cut, whole)


def test_a_layer_of_the_papers_size_is_its_formula():
    plain, both = tensor.large()
    theirs = tensor.paper(both) / tensor.paper(plain)
    assert isclose(theirs, (34 / 8) / (10 + 24 / 8 + 5 * 64 * 2048 / 6144 / 8)) and theirs < 0.2
