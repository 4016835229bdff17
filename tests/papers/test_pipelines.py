"""Bubbles and activations that are counted are the papers' formulas, exactly, wherever these hold."""

import json
from dataclasses import asdict
from fractions import Fraction
from functools import cache

from hypothesis import given, strategies as st
from pipeline_bubble import idle as formula_of_idle, in_flight
from pipelines import BEYOND, CONTESTANTS, counted_run, draw, entry, idle
from timed_pipelines import MICROS, formula

from minispeed.pipeline.messages import with_messages
from minispeed.pipeline.schedule import SCHEDULES
from minispeed.pipeline.simulate import Cost, simulate

made = cache(lambda: entry(quick=True))
ranks, micros = st.integers(1, 4), st.integers(1, 6)
times = st.tuples(*[st.integers(1, 4)] * 3)  # F, I, W


def test_every_counted_row_is_its_closed_form_exactly_but_those_beyond_its_reach():
    rows = [row for row in made().rows if not row.claim.startswith("timed")]
    exact, others = rows[: -len(BEYOND)], rows[-len(BEYOND) :]
    assert len(exact) == 10 and all(row.difference == 0 for row in exact)
    assert [(row.closed_form, row.measured) for row in others] == [(1, 2), (3, 5)]


def test_the_step_that_zb_h1s_formula_says_is_11_takes_12():
    p, m, F_I_W = BEYOND[0]
    assert counted_run("zb_h1", p, m, 1, F_I_W).length == 12
    assert m * sum(F_I_W) + formula_of_idle("zb_h1", p, 1, *F_I_W) == 11


@given(st.sampled_from(["gpipe", "1f1b"]), ranks, micros, times)
def test_gpipe_and_1f1b_idle_p_less_1_of_m_and_p_less_1(schedule, p, m, F_I_W):
    run = counted_run(schedule, p, m, 1, F_I_W)
    assert run.bubble == Fraction(p - 1, m + p - 1)
    assert run.peak_in_flight(0) == in_flight(schedule, p, m, 1, 0)


@given(ranks, st.integers(1, 2), st.integers(1, 3), times)
def test_interleaving_idles_a_vth(p, groups, v, F_I_W):
    assert idle("interleaved", p, p * groups, v, F_I_W) / sum(F_I_W) == Fraction(p - 1, v)


@given(ranks, st.integers(0, 3), times)
def test_zb_h1_idles_what_its_formula_says_with_enough_micro_batches_and_short_weight_halves(p, more, F_I_W):
    F, I, W = F_I_W[0], F_I_W[1], min(F_I_W)  # noqa: E741
    assert idle("zb_h1", p, p + more, 1, (F, I, W)) == (p - 1) * (F + I - W)
    assert counted_run("zb_h1", p, p + more, 1, (F, I, W)).peak_in_flight(0) == p


@given(st.sampled_from(list(CONTESTANTS.items())), ranks, times)
def test_a_simulation_gives_the_events_of_the_run(contestant, p, F_I_W):
    (schedule, v), (F, I, W) = contestant, F_I_W  # noqa: E741
    cost = Cost(f=Fraction(F, v), b=Fraction(I + W, v), bi=Fraction(I, v), bw=Fraction(W, v))
    simulated = simulate(with_messages(SCHEDULES[schedule](p, 2 * p, v), cost), cost)
    assert counted_run(schedule, p, 2 * p, v, F_I_W).events == simulated.events


@given(st.sampled_from(list(CONTESTANTS.items())), times)
def test_the_formula_of_timed_runs_is_exact_where_stages_weigh_the_same(contestant, F_I_W):
    schedule, v = contestant
    F, I, W = F_I_W[0], F_I_W[1], min(F_I_W)  # noqa: E741
    run = counted_run(schedule, 2, MICROS, v, (F, I, W))
    assert abs(formula(schedule, run, v) - run.bubble) < 1e-12


def test_timed_rows_are_shares_of_the_time():
    rows = [row for row in made().rows if row.claim.startswith("timed")]
    assert len(rows) == len(CONTESTANTS)
    assert all(0 < share < 1 for row in rows for share in (row.closed_form, row.measured))


def test_the_figure_shows_every_box_of_the_counted_runs(tmp_path):
    series = made().series
    for schedule, lines in series["timelines"].items():
        boxes = [box for line in lines for box in line.split("; ")]
        halves = 3 if schedule == "zb_h1" else 2
        assert len(boxes) == halves * series["p"] * series["m"] * CONTESTANTS[schedule]
    draw(json.loads(json.dumps(asdict(made()))), tmp_path / "it.svg")
    assert "ZB-H1" in (tmp_path / "it.svg").read_text()
