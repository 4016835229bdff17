"""Laws of the schedules: each is the curve that its users know, drawn a second time in another way."""

import math
from dataclasses import MISSING, fields
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minispeed.errors import UserError
from minispeed.schedules import (
    SCHEDULES,
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    schedule_by_name,
    set_rates,
    warmup_then,
)

UPDATES = range(70)
rates = st.floats(0, 1)
lengths = st.integers(1, 20)
kinds = st.sampled_from(["log", "linear"])

NEEDED = MISSING
DEEPSPEEDS = {
    "WarmupLR": dict(warmup_min_lr=0.0, warmup_max_lr=0.001, warmup_num_steps=1000, warmup_type="log"),
    "WarmupDecayLR": dict(
        total_num_steps=NEEDED, warmup_min_lr=0.0, warmup_max_lr=0.001, warmup_num_steps=1000, warmup_type="log"
    ),
    "WarmupCosineLR": dict(
        total_num_steps=NEEDED, warmup_min_ratio=0.0, warmup_num_steps=1000, cos_min_ratio=0.0001, warmup_type="log"
    ),
    "OneCycle": dict(
        cycle_min_lr=NEEDED,
        cycle_max_lr=NEEDED,
        decay_lr_rate=0.0,
        cycle_first_step_size=2000,
        cycle_second_step_size=None,
        cycle_first_stair_count=0,
        cycle_second_stair_count=None,
        decay_step_size=0,
        cycle_momentum=True,
        cycle_min_mom=0.8,
        cycle_max_mom=0.9,
        decay_mom_rate=0.0,
    ),
    "LRRangeTest": dict(
        lr_range_test_min_lr=1e-3,
        lr_range_test_step_size=2000,
        lr_range_test_step_rate=1.0,
        lr_range_test_staircase=False,
    ),
}


def same(got, expected):
    return got == pytest.approx(expected, rel=1e-12, abs=1e-12)


def rising(kind, num_steps, update):
    """Say the warm-up by its corners: flat to update 1, flat from update num_steps (+ 1 in a line)."""
    if kind == "linear":
        return np.interp(update, [1, num_steps + 1], [0, 1])
    return np.interp(math.log(max(update, 1), num_steps), [0, 1], [0, 1])


def triangle(update, first, second, stairs):
    """Say a cycle's height as the lower of two lines, in exact fractions."""
    height = min(Fraction(update, first), Fraction(first + second - update, second))
    count = stairs[update > first]
    return math.floor(height * count) / count if count else float(height)


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(0, 9), st.integers(1, 50), st.floats(0, 1))
def test_a_schedule_rises_in_a_line_then_never_again(shape, warmup, total, final):
    factor = warmup_then(shape, warmup=warmup, total=total, final=final)
    assert [factor(step) for step in range(warmup)] == [(step + 1) / warmup for step in range(warmup)]
    after = [factor(step) for step in range(warmup, total + 3)]
    assert all(late <= early + 1e-12 for early, late in zip(after, after[1:]))
    assert total <= warmup or after[0] == 1.0
    if shape != "constant" and total > warmup:
        assert math.isclose(factor(total), final, abs_tol=1e-12)


def test_cosine_is_half_way_down_half_way():
    assert math.isclose(warmup_then("cosine", warmup=10, total=110)(60), 0.5)
    assert math.isclose(warmup_then("linear", warmup=10, total=110, final=0.1)(60), 0.55)


@given(rates, rates, lengths, kinds)
def test_warmup_rises_between_its_corners_and_stays(low, high, length, kind):
    schedule = WarmupLR(warmup_min_lr=low, warmup_max_lr=high, warmup_num_steps=length, warmup_type=kind)
    for update in UPDATES:
        assert same(schedule(update), low + (high - low) * rising(kind, max(2, length), update))


@given(rates, rates, lengths, kinds, st.integers(0, 40))
def test_warmup_decay_comes_back_in_a_line(low, high, length, kind, more):
    total, turn = length + more, max(2, length)
    schedule = WarmupDecayLR(
        total_num_steps=total, warmup_min_lr=low, warmup_max_lr=high, warmup_num_steps=length, warmup_type=kind
    )
    for update in UPDATES:
        if update <= turn:
            height = rising(kind, turn, update)
        else:
            height = np.interp(update, [turn + 1, total + 1], [1, 0]) if total > turn else 0.0
        assert same(schedule(update), low + (high - low) * height)


@given(rates, rates, lengths, kinds, st.integers(0, 40))
def test_warmup_cosine_is_a_ratio_that_starts_at_nothing(low, final, length, kind, more):
    total, turn = length + more, max(2, length)
    schedule = WarmupCosineLR(
        total_num_steps=total, warmup_min_ratio=low, warmup_num_steps=length, cos_min_ratio=final, warmup_type=kind
    )
    assert schedule(0) == 0
    for update in UPDATES[1:]:
        if update <= turn:
            expected = np.interp(rising(kind, turn, update), [0, 1], [low, 1])
        else:
            angle = np.interp(update, [turn, total], [0, math.pi / 2]) if total > turn else math.pi / 2
            expected = final + (1 - final) * math.cos(angle) ** 2
        assert same(schedule(update), expected)


@given(
    ends=st.tuples(rates, rates, rates, rates),
    first=lengths,
    second=lengths | st.none(),
    stairs=st.tuples(st.integers(0, 7), st.integers(0, 7) | st.none()),
    decay=st.tuples(rates, rates, st.integers(0, 5)),
)
def test_one_cycle_is_a_triangle_and_a_tail(ends, first, second, stairs, decay):
    (low, high, low_mom, high_mom), (lr_rate, mom_rate, interval) = ends, decay
    schedule = OneCycle(
        cycle_min_lr=low,
        cycle_max_lr=high,
        decay_lr_rate=lr_rate,
        cycle_first_step_size=first,
        cycle_second_step_size=second,
        cycle_first_stair_count=stairs[0],
        cycle_second_stair_count=stairs[1],
        decay_step_size=interval,
        cycle_min_mom=low_mom,
        cycle_max_mom=high_mom,
        decay_mom_rate=mom_rate,
    )
    second = first if second is None else second
    stairs = (stairs[0], stairs[0] if stairs[1] is None else stairs[1])
    assert (schedule(0), schedule.momentum(0)) == (low, low_mom)
    for update in UPDATES[1 : first + second + 1]:
        height = triangle(update, first, second, stairs)
        assert same(schedule(update), np.interp(height, [0, 1], [low, high]))
        assert same(schedule.momentum(update), np.interp(height, [0, 1], [high_mom, low_mom]))
    for late, update in enumerate(UPDATES[first + second :]):
        intervals = late / interval if interval else 0
        assert same(schedule(update) * (1 + lr_rate * intervals), low)
        assert same(schedule.momentum(update), high_mom + high_mom * mom_rate * intervals)


def test_momentum_that_is_not_cycled_is_none():
    schedule = OneCycle(cycle_min_lr=0.1, cycle_max_lr=1.0, cycle_first_step_size=2, cycle_momentum=False)
    assert [schedule.momentum(update) for update in range(7)] == [None] * 7


@given(rates, lengths, rates, st.booleans())
def test_a_range_test_adds_the_same_each_time(low, length, rate, stairs):
    schedule = LRRangeTest(
        lr_range_test_min_lr=low,
        lr_range_test_step_size=length,
        lr_range_test_step_rate=rate,
        lr_range_test_staircase=stairs,
    )
    assert schedule(0) == low
    for update in UPDATES:
        grows = (update + 1) % length == 0 if stairs else True
        expected = low * rate * (1 if stairs else 1 / length) if grows else 0.0
        assert same(schedule(update + 1) - schedule(update), expected)


def test_a_short_warmup_by_hand():
    """The counter before the first update is -1: the first two updates have the minimum."""
    schedule = WarmupLR(warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    assert [schedule(update) for update in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    falling = WarmupDecayLR(total_num_steps=6, warmup_max_lr=1.0, warmup_num_steps=2)
    assert [falling(update) for update in range(9)] == [0, 0, 1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_names_parameters_and_defaults_are_deepspeeds():
    assert {name: {field.name: field.default for field in fields(kind)} for name, kind in SCHEDULES.items()} == (
        DEEPSPEEDS
    )


@pytest.mark.parametrize("name", DEEPSPEEDS)
def test_a_name_with_all_its_parameters_is_that_schedule(name):
    params = {param: 7 if default is NEEDED else default for param, default in DEEPSPEEDS[name].items()}
    if "warmup_num_steps" in params:
        params["warmup_num_steps"] = 3
    schedule = schedule_by_name(name, **params)
    assert type(schedule).__name__ == name and schedule == SCHEDULES[name](**params)
    assert all(getattr(schedule, param) == value for param, value in params.items())


@pytest.mark.parametrize("kind", [WarmupDecayLR, WarmupCosineLR])
def test_a_warmup_longer_than_the_run_warns(kind):
    with pytest.warns(UserWarning, match="warm-up of 9 updates is longer than the 8"):
        kind(total_num_steps=8, warmup_num_steps=9)
    kind(total_num_steps=9, warmup_num_steps=9)


@pytest.mark.parametrize(
    "name, params, message",
    [
        ("WarmupLr", {}, "no schedule is called 'WarmupLr'; try: WarmupLR"),
        ("x", {}, "try: WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest"),
        ("WarmupLR", {"warmup_max": 1.0}, "WarmupLR has no parameter 'warmup_max'; try: warmup_max_lr"),
        ("WarmupLR", {"total_num_steps": 9}, "no parameter 'total_num_steps'; try: warmup_num_steps"),
        ("WarmupLR", {"warmup_max_lr": "auto"}, "warmup_max_lr is 'auto'; try: warmup_max_lr=NUMBER"),
        ("WarmupLR", {"warmup_min_lr": None}, "warmup_min_lr is None"),
        ("WarmupLR", {"warmup_num_steps": 0}, "warmup_num_steps is 0; try: warmup_num_steps=1 or more"),
        ("WarmupLR", {"warmup_type": "cosine"}, "type 'cosine'; try: log or linear"),
        ("WarmupDecayLR", {}, "WarmupDecayLR lacks total_num_steps; try: total_num_steps=NUMBER"),
        ("OneCycle", {}, "OneCycle lacks cycle_min_lr, cycle_max_lr"),
        ("OneCycle", dict(cycle_min_lr=0, cycle_max_lr=1, cycle_second_step_size=0), "2000 updates up and 0 down"),
        ("OneCycle", dict(cycle_min_lr=0, cycle_max_lr=1, decay_step_size=-1), "a decay every -1"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "lr_range_test_step_size is 0"),
    ],
)
def test_what_cannot_be_is_named(name, params, message):
    with pytest.raises(UserError) as caught:
        schedule_by_name(name, **params)
    assert message in str(caught.value)


def test_shapes_of_our_own_are_named():
    with pytest.raises(UserError, match="'cosin'.*cosine or linear or constant"):
        warmup_then("cosin", warmup=1, total=2)
    with pytest.raises(UserError, match="0 steps with 1 of warm-up"):
        warmup_then("linear", warmup=1, total=0)


def test_rates_and_momentum_reach_the_optimizer():
    schedule = OneCycle(cycle_min_lr=0.1, cycle_max_lr=1.0, cycle_first_step_size=2)
    for update in range(7):
        groups = [{"lr": 5.0, "betas": (0.5, 0.7)}, {"lr": 5.0, "momentum": 0.5}, {"lr": 5.0, "betas": (0.1, 0.2)}]
        assert set_rates(groups, schedule, 2.0, update) == 2 * schedule(update)
        assert {group["lr"] for group in groups} == {2 * schedule(update)}
        momentum = schedule.momentum(update)
        assert [groups[0]["betas"], groups[1]["momentum"], groups[2]["betas"]] == [
            (momentum, 0.7),
            momentum,
            (momentum, 0.2),
        ]
    set_rates(groups := [{"betas": (0.5, 0.7)}], warmup_then("linear", warmup=1, total=3), 1.0, 0)
    assert groups[0]["betas"] == (0.5, 0.7)
