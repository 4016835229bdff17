"""Laws of the clock: a time that is given is filled and kept to, and what happens every so often happens so often."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path

from hypothesis import given, strategies as st

from minispeed.chat.build import build_schedule
from minispeed.chat.clock import Clock, sample_is_due
from minispeed.chat.sft_options import SftOptions
from minispeed.chat.together import fix_together
from minispeed.collective.launch import launch

# whole numbers of seconds: their sums are exact
seconds = st.integers(1, 1000).map(float)
minutes = st.integers(1, 60).map(float)
warmups = st.integers(0, 40)
MOST = 12000  # updates: more than any time here holds


def measure(clock: Clock, paces: Iterable[float]) -> Clock:
    for pace in paces:
        clock = clock.after(pace)
    return clock


def run(clock: Clock, paces: Iterator[float]) -> tuple[Clock, int, float]:
    """Make updates as a run does; return the clock at its end, the updates made, and the seconds of the last."""
    step, pace = 0, 0.0
    while clock.is_open or step < clock.total:
        pace = next(paces)
        clock, step = clock.after(pace), step + 1
        if clock.is_open and clock.is_measured:
            clock = clock.fixed(step + clock.steps_left)
        if clock.is_over:
            break
    return clock, step, pace


@given(minutes, st.lists(seconds, min_size=1, max_size=20), seconds)
def test_the_plan_fills_the_time_to_half_an_update(time, first, pace):
    clock = measure(Clock.of(0, time, warmup=0), [*first, *repeat(pace, len(first))])
    planned = clock.spent + clock.steps_left * pace
    if clock.spent < clock.budget - pace / 2:
        assert abs(planned - clock.budget) <= pace / 2
    else:  # the time is gone already
        assert clock.steps_left == 1


@given(minutes, st.lists(st.tuples(seconds, seconds), max_size=9), seconds, seconds, st.data())
def test_neither_the_first_updates_nor_a_stall_count_in_the_pace(time, first, pace, stall, data):
    later = [pace] * max(5, len(first))  # the later half, three updates or more
    stalled = later.copy()
    stalled[data.draw(st.integers(0, len(later) - 1))] = stall
    one = measure(Clock(budget=60 * time), [*(a for a, _ in first), *later])
    gone = sum(b - a for a, b in first) + stall - pace
    other = measure(Clock(budget=60 * time + gone), [*(b for _, b in first), *stalled])
    assert one.budget - one.spent == other.budget - other.spent  # as much time is left: only the pace could differ
    assert one.steps_left == other.steps_left


@given(minutes, warmups, st.sampled_from([1, 50]), st.lists(st.integers(1, 20), min_size=50, max_size=50))
def test_measuring_lasts_for_the_warm_up_but_not_for_long(time, warmup, slowness, paces):
    clock, count, paces = Clock.of(0, time, warmup=warmup), 0, [float(pace * slowness) for pace in paces]
    while not clock.is_measured:
        before, clock, count = clock.spent, clock.after(paces[count]), count + 1
    assert clock.is_open and clock.budget == 60 * time
    assert clock.spent == sum(paces[:count]) and clock.pace == tuple(paces[:count])
    assert 3 <= count <= max(5, warmup)
    assert count == max(5, warmup) or clock.spent > 0.15 * clock.budget
    assert count == 3 or before <= 0.15 * clock.budget


@given(minutes, warmups, st.lists(seconds, min_size=1, max_size=60), seconds)
def test_no_machine_trains_for_more_than_110_percent_of_the_time(time, warmup, paces, pace):
    clock, step, last = run(Clock.of(0, time, warmup=warmup), chain(paces, repeat(pace, MOST)))
    assert step >= 3  # however long they take
    assert step == 3 or clock.spent - last <= 1.1 * clock.budget
    assert step == clock.total or clock.is_over and clock.spent > 1.1 * clock.budget


@given(warmups, st.lists(seconds, min_size=1, max_size=60), st.integers(0, 100).map(float))
def test_a_machine_that_becomes_no_slower_makes_all_its_steps_in_time(warmup, paces, more):
    paces = sorted(paces, reverse=True)
    time = 10 * paces[0] + more
    clock, step, _ = run(Clock(budget=time, patience=max(5, warmup)), chain(paces, repeat(paces[-1], MOST)))
    assert step == clock.total and not clock.is_over
    assert clock.spent <= 1.05 * time


@given(warmups, seconds, st.integers(400, 500), st.integers(2, 5))
def test_a_machine_that_becomes_slower_ends_at_110_percent(warmup, pace, updates, factor):
    time = pace * updates
    usual = chain(repeat(pace, max(5, warmup)), repeat(pace * factor, MOST))
    clock, step, last = run(Clock(budget=time, patience=max(5, warmup)), usual)
    assert step < clock.total == updates
    assert 1.1 * time < clock.spent <= 1.1 * time + last


@given(st.lists(st.lists(st.sampled_from([1.0, 5.0, 30.0]), min_size=5, max_size=5), min_size=1, max_size=4))
def test_ranks_fix_one_number_when_the_last_of_them_knows_its_pace(paces):
    def fix(world):
        clock = Clock(budget=300.0)
        for step, pace in enumerate(paces[world.group.rank], 1):
            clock = clock.after(pace)
            knew, clock = clock, fix_together(clock, step, world.group)
            if not clock.is_open:
                return step, knew, clock.total
        raise AssertionError("five updates are enough")

    ranks = launch(fix, ranks=len(paces))
    step, first, total = ranks[0]
    assert total == step + first.steps_left
    assert all((other_step, other_total) == (step, total) for other_step, _, other_total in ranks)
    clocks = [measure(Clock(budget=300.0), each[: step - 1]) for each in paces]
    assert all(knew.is_measured for _, knew, _ in ranks) and not all(clock.is_measured for clock in clocks)


@given(st.integers(1, 60), st.none() | minutes, warmups, st.lists(seconds, min_size=60, max_size=60))
def test_a_number_of_steps_is_kept_however_long_it_takes(total, time, warmup, paces):
    clock, step, _ = run(Clock.of(total, time, warmup=warmup), iter(paces))
    assert step == clock.total == total and not clock.is_over
    assert clock.spent == sum(paces[:total]) and clock.budget == math.inf and clock.pace == ()


@given(st.integers(1, 2000), st.integers(1, 100))
def test_what_is_due_every_so_often_is_due_so_often_and_never_at_the_end(total, every):
    clock = Clock(total=total)
    assert [step for step in range(1, total + 1) if clock.is_due(step, every)] == list(range(every, total, every))
    by_default = sum(clock.is_due(step, None) for step in range(1, total + 1))
    assert by_default in (7, 8) or total < 64
    assert not any(Clock(budget=1.0).is_due(step, every) for step in range(1, 200))  # who knows when it ends


def test_samples_are_taken_at_every_doubling():
    assert [step for step in range(1000) if sample_is_due(step)] == [25, 50, 100, 200, 400, 800]


def test_while_the_number_of_steps_is_open_the_rate_does_not_fall():
    options = SftOptions(
        model="nano", data=(), out=Path("run"), seq=8, batch=1, micro_batch=1, lr=1.0, warmup=2, weight_decay=0.0
    )
    rates = [build_schedule(options, 0)(step) for step in range(8)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert build_schedule(options, 8)(7) < 0.1
