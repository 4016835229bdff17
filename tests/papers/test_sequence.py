"""What Ulysses and the ring send, and the pairs of tokens on each rank, are the closed forms exactly."""

from math import isclose

import sequence
from hypothesis import given, settings, strategies as st

from minispeed.sequence.ring import zigzag
from minispeed.sequence.ulysses import contiguous

h = sequence.h


def test_every_counted_row_is_its_closed_form_exactly():
    rows = [row for row in sequence.entry(quick=True).rows if row.measured is not None]
    assert len(rows) == 2 * 3 + 1 + 2 * 5 + 6
    for row in rows:
        assert isclose(row.measured, row.closed_form, rel_tol=1e-12), row.claim


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
@settings(max_examples=8)
def test_ulysses_messages_depend_on_the_tokens_of_a_rank_alone(ranks, runs):
    tokens = ranks * 2 * runs
    found = sequence.said("ulysses", ranks, tokens)
    assert found.held == 4 * tokens * h / ranks == 8 * runs * h
    assert found.sent == found.back == found.held * (ranks - 1) / ranks


@given(st.integers(1, 6), st.integers(1, 4), st.booleans())
@settings(max_examples=8)
def test_a_ring_passes_on_every_other_ranks_keys_and_values(ranks, chunk, causal):
    found = sequence.said("ring", ranks, 2 * ranks * chunk, causal=causal)
    assert found.sent == (ranks - 1) * 2 * (2 * chunk) * h
    assert found.back == 2 * found.sent


@given(st.integers(1, 9), st.integers(1, 8))
def test_all_pairs_are_on_some_rank_once_and_the_ring_shares_every_step_evenly(ranks, chunk):
    tokens = 2 * ranks * chunk
    ours, runs = sequence.pairs_of_the_ring(ranks, chunk), sequence.pairs(contiguous, ranks, 2 * chunk)
    assert ours == sequence.pairs(zigzag, ranks, chunk)
    assert sum(map(sum, ours)) == sum(map(sum, runs)) == tokens * (tokens + 1) // 2
    assert all(len(set(step)) == 1 for step in zip(*ours))
    assert sequence.waits(ours) == 1


@given(st.integers(2, 12))
def test_runs_take_nearly_twice_as_long(ranks):
    assert 1 < sequence.waits(sequence.pairs(contiguous, ranks, 8)) < 2
