"""What one-bit gradients send is the closed form, whatever the sizes; who forgets what is owed has lost it."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings, strategies as st
from learning import small
from onebit import RANKS, WAYS, Forgetful, entry, num_blocks, one_bit_form, sent

from minispeed.collective.threads import run_threads
from minispeed.layout import FlatLayout
from minispeed.model.gpt import GPT
from minispeed.zero.onebit import OneBit
from minispeed.zero.summing import Wire


@pytest.fixture(scope="module")
def made():
    return entry(quick=True)


def test_every_counted_row_is_its_closed_form_exactly(made):
    counted = [row for row in made.rows if row.closed_form is not None]
    assert len(counted) == 7 and all(abs(row.difference) < 1e-12 * max(1, row.measured) for row in counted)


def test_what_was_said_and_is_owed_is_what_was_given(made):
    (row,) = [row for row in made.rows if "owed" in row.claim]
    assert float(row.measured) < 1e-12


def test_sent_is_the_form():
    assert sent(OneBit(), torch.float32) == one_bit_form(GPT(small()))
    assert one_bit_form(GPT(small())) % (2 * (RANKS - 1)) == 0


@given(st.lists(st.integers(1, 900), min_size=1, max_size=5), st.integers(1, 5))
def test_blocks_are_as_many_as_the_code_has(sizes, ranks):
    layout = FlatLayout({str(index): (size,) for index, size in enumerate(sizes)}, ranks)
    S = layout.shard_size
    assert S == ceil(sum(sizes) / ranks)

    def codes(group):
        exact = torch.float32
        wire = Wire(group=group, layout=layout, whole=False, reduce=exact, exact=exact, predivide=1.0)
        return [len(code.lengths) for code in OneBit().summing(wire).codes]

    assert run_threads(codes, ranks)[0] == [num_blocks(sizes, rank * S, S) for rank in range(ranks)]


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 100))
def test_who_forgets_has_lost_something(seed):
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def lost(group, how):
        layout, exact = FlatLayout({"x": (20,)}, 1), torch.float64
        wire = Wire(group=group, layout=layout, whole=True, reduce=exact, exact=exact, predivide=1.0)
        summing, said = how.summing(wire), torch.zeros(20, dtype=exact)
        for numbers in x:
            work, mine = summing.start(numbers)
            work.wait()
            summing.keep()
            said += mine
        owed = 0 if summing.owed is None else summing.owed + summing.owed_by_sum
        return (said + owed - x.sum(0)).abs().max().item()

    assert run_threads(lambda group: lost(group, OneBit()), 1)[0] < 1e-12
    assert run_threads(lambda group: lost(group, Forgetful()), 1)[0] > 0.1


def test_ways_differ_in_what_they_say():
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert [type(way.how(freeze_step=3)).__name__ for way in WAYS].count("OneBit") == 4
