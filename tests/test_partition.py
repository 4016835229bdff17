"""The law of the cut: no other contiguous cut into as many stages has a faster slowest stage."""

from fractions import Fraction
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, strategies as st

from minispeed.errors import UserError
from minispeed.pipeline.partition import partition

times = st.one_of(st.integers(0, 9), st.fractions(0, 9, max_denominator=7))


def slowest(costs, boundaries):
    return max(sum(costs[begin:end]) for begin, end in pairwise(boundaries))


def check_best(costs, stages):
    boundaries = partition(costs, stages)
    assert len(boundaries) == stages + 1 and boundaries[0] == 0 and boundaries[-1] == len(costs)
    assert all(begin < end for begin, end in pairwise(boundaries))  # no stage is empty
    every_cut = ((0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), stages - 1))
    assert slowest(costs, boundaries) == min(slowest(costs, cut) for cut in every_cut)


def test_the_cut_is_the_best_of_all_on_every_small_case():
    for layers in range(1, 6):
        for costs in product((0, 1, 2, 5), repeat=layers):
            for stages in range(1, layers + 1):
                check_best(costs, stages)


@given(st.lists(times, min_size=1, max_size=9), st.data())
def test_the_cut_is_the_best_of_all_on_drawn_cases(costs, data):
    check_best(costs, data.draw(st.integers(1, len(costs))))


@given(st.integers(1, 12), st.integers(1, 12))
def test_equal_layers_are_cut_evenly(stages, each):
    assert (
        slowest([Fraction(1, 3)] * (stages * each), partition([Fraction(1, 3)] * (stages * each), stages)) * 3 == each
    )


def test_embedding_and_head_are_layers_too():
    assert partition([3, 1, 1, 1, 1, 1, 1, 3], 3) == [0, 2, 6, 8]


@pytest.mark.parametrize(
    ("costs", "stages", "message"),
    [
        ([1, 1, 1], 4, r"3 layers cannot fill 4 stages; try: 3 stages or fewer"),
        ([1], 0, r"a cut into 0 stages; try: 1 or more"),
        ([1, -2], 1, r"layer 1 has the cost -2; try: 0 or more"),
        ([], 1, r"0 layers cannot fill 1 stages"),
    ],
)
def test_mistakes_name_the_numbers(costs, stages, message):
    with pytest.raises(UserError, match=message):
        partition(costs, stages)
