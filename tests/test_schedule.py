"""Laws of a pipeline's schedules: everything once, in causal order, without deadlock, and as idle as the papers say."""

from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, strategies as st

from minispeed.errors import UserError
from minispeed.pipeline.actions import COMPUTE, Action, calls, gives, needs, num_stages, rank_of
from minispeed.pipeline.messages import with_messages
from minispeed.pipeline.schedule import SCHEDULES, gpipe, interleaved, one_f_one_b, with_reductions, zb_h1
from minispeed.pipeline.simulate import Cost, Deadlock, simulate
from minispeed.testing.strategies import seeds

times = st.fractions(min_value=Fraction(1, 10), max_value=10, max_denominator=10)
ranks = st.integers(1, 6)
micros = st.integers(1, 9)
RANDOM_PROGRAMS = 200  # of one draw


@st.composite
def schedules(draw):
    """Draw the programs of any schedule."""
    name, p, groups, v = draw(st.sampled_from(sorted(SCHEDULES))), draw(ranks), draw(st.integers(1, 3)), 1
    m = p * groups if name == "interleaved" else draw(micros)
    if name in ("gpipe", "interleaved"):
        v = draw(st.integers(1, 3))
    return SCHEDULES[name](p, m, v)


def drawn_at_random(random):
    """Compute-only programs in some order that can be run, with whole and with split backwards side by side."""
    p, stages, m = random.randint(1, 3), random.randint(1, 4), random.randint(1, 2)
    kinds = [random.choice(("FB", ("F", "BI", "BW"))) for _ in range(stages)]
    left = {
        Action(kind, s, k): needs(Action(kind, s, k), stages)
        for s in range(stages)
        for k in range(m)
        for kind in kinds[s]
    }
    programs, made = [[] for _ in range(p)], set()
    while left:
        action = random.choice([action for action, needed in left.items() if made.issuperset(needed)])
        del left[action]
        made.update(gives(action))
        programs[rank_of(action.stage, p)].append(action)
    return programs


def timed(programs, cost):
    return simulate(with_messages(programs, cost), cost)


def in_the_order_of(first, second):
    assert first.end <= second.start, f"{first} must end before {second} starts"


@given(schedules())
def test_every_stage_runs_every_micro_batch_once_in_causal_order(programs):
    stages = num_stages(programs)
    m = 1 + max(action.micro for program in programs for action in program)
    timeline = timed(programs, Cost(send_f=1, send_b=1))
    events = [event for event in timeline.events if event.action.kind in COMPUTE]
    assert all(event.rank == event.action.stage % len(programs) for event in events)
    forward, backward, weights = ({(e.action.stage, e.action.micro): e for e in events if e.action.kind in kinds}
                                  for kinds in ("F", ("B", "BI"), ("B", "BW")))  # fmt: skip
    assert len(events) == len(forward) + len({*backward.values(), *weights.values()})
    assert set(forward) == set(backward) == set(weights) == {(s, k) for s in range(stages) for k in range(m)}
    for stage, micro in forward:
        in_the_order_of(forward[stage, micro], backward[stage, micro])
        if backward[stage, micro] != weights[stage, micro]:
            in_the_order_of(backward[stage, micro], weights[stage, micro])
        if stage:
            in_the_order_of(forward[stage - 1, micro], forward[stage, micro])
            in_the_order_of(backward[stage, micro], backward[stage - 1, micro])


@given(seeds)
def test_no_programs_deadlock_and_their_computing_is_left_as_it_is(seed):
    random = Random(seed)
    for _ in range(RANDOM_PROGRAMS):
        programs = drawn_at_random(random)
        full = with_messages(programs)
        assert [[action for action in program if action.kind in COMPUTE] for program in full] == programs
        simulate(full, lambda action: random.randint(0, 3))  # raises on a deadlock, or on an input that is not there


@given(ranks, micros, times, times)
def test_gpipe_and_1f1b_idle_alike_and_hold_m_and_at_most_p(p, m, f, b):
    for schedule, held in ((gpipe, [m] * p), (one_f_one_b, [min(p - i, m) for i in range(p)])):
        timeline = timed(schedule(p, m), Cost(f=f, b=b))
        assert timeline.length == (m + p - 1) * (f + b)
        assert timeline.bubble == Fraction(p - 1, m + p - 1)
        assert [timeline.peak_in_flight(rank) for rank in range(p)] == held
        assert [timeline.busy(rank) for rank in range(p)] == [m * (f + b)] * p


@given(ranks, st.integers(1, 3), st.integers(1, 3), times, times)
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(p, groups, v, f, b):
    m = p * groups
    timeline = timed(interleaved(p, m, v), Cost(f=f, b=b))
    ideal = m * v * (f + b)
    assert (timeline.length - ideal) / ideal == Fraction(p - 1, v * m)
    held = [min(2 * (p - 1 - i) + (v - 1) * p + 1, m * v) for i in range(p)]
    assert [timeline.peak_in_flight(rank) for rank in range(p)] == held


@given(ranks, st.integers(0, 5), st.integers(1, 3), times, times)
def test_gpipe_over_several_stages_idles_like_interleaved_where_micro_batches_fill_the_ranks(p, more, v, f, b):
    m = p + more
    timeline = timed(gpipe(p, m, v), Cost(f=f, b=b))
    assert timeline.length == (m * v + p - 1) * (f + b)
    assert [timeline.peak_in_flight(rank) for rank in range(p)] == [m * v] * p


@given(ranks, micros, times, times, times)
def test_zb_h1_idles_less_by_the_weight_halves_and_holds_at_most_p(p, m, f, bi, bw):
    bw = min(bw, max(f, bi))
    timeline = timed(zb_h1(p, m), Cost(f=f, bi=bi, bw=bw))
    idle = (p - 1) * (f + bi) - (min(m, p) - 1) * min(f, bi, bw)
    assert timeline.length == m * (f + bi + bw) + idle
    assert [timeline.peak_in_flight(rank) for rank in range(p)] == [min(p, m)] * p
    if m >= p and bw <= min(f, bi):
        assert idle == (p - 1) * (f + bi - bw)  # as the paper has it
    if m >= p and f == bi == bw:
        assert 3 * idle == (p - 1) * (f + bi + bw)  # of 1F1B


def test_where_the_papers_form_for_zb_h1_ends():
    """A long weight half hides no more than a forward or an input half; few micro-batches have few to hide."""
    assert timed(zb_h1(2, 2), Cost(f=1, bi=2, bw=2)).length == 2 * 5 + 2  # not 2 * 5 + 1
    assert timed(zb_h1(2, 1), Cost(f=1, bi=1, bw=1)).length == 3 + 2  # not 3 + 1
    late = timed(zb_h1(2, 2), Cost(f=1, bi=1, bw=2)).length  # messages wait for a long weight half
    assert late == 10 > 2 * 4 + (1 + 1 - 1)


@given(st.lists(st.tuples(times, times, times, times), min_size=1, max_size=6))
def test_one_micro_batch_takes_the_sum_of_all_stages_and_messages(stages):
    f, b, send_f, send_b = (list(column) for column in zip(*stages, strict=True))
    cost = Cost(f=f, b=b, send_f=send_f, send_b=send_b)
    timeline = timed(one_f_one_b(len(stages), 1), cost)
    assert timeline.length == sum(f) + sum(b) + sum(send_f[:-1]) + sum(send_b[1:])
    assert timeline.bubble == 1 - (sum(f) + sum(b)) / (len(stages) * timeline.length)


@given(schedules(), st.booleans())
def test_reductions_follow_the_backward_and_its_messages(programs, each_micro):
    full = with_messages(programs)
    reduced = with_reductions(full, each_micro=each_micro)
    assert [[a for a in program if a.kind != "REDUCE"] for program in reduced] == full
    for before, program in zip(full, reduced, strict=True):
        backwards = [action for action in program if action.kind in ("B", "BW")]
        last = {action.stage: action for action in backwards}
        expected = backwards if each_micro else [action for action in backwards if action == last[action.stage]]
        assert [a[1:] for a in program if a.kind == "REDUCE"] == [action[1:] for action in expected]
        after_reductions = [action for one, action in pairwise(program) if one.kind == "REDUCE"]
        assert {action.kind for action in after_reductions} <= {"REDUCE", *COMPUTE}  # no message waits for one
        assert [call for call in calls(program) if call[0].kind != "REDUCE"] == calls(before)  # no exchange is divided
    simulate(reduced, Cost())  # raises where a REDUCE comes before its weight gradients


def test_a_message_begins_at_the_later_of_two_clocks_and_holds_up_both_ranks():
    one, other = with_messages(gpipe(2, 2))
    assert [" ".join(map(str, call)) for call in calls(one)[:4]] == [
        "F(stage 0, micro 0)",
        "SEND_F(stage 0, micro 0)",
        "F(stage 0, micro 1)",
        "SEND_F(stage 0, micro 1) RECV_B(stage 0, micro 0)",
    ]
    timeline = simulate([one, other], Cost(f=[1, 10], b=1, send_f=3))
    assert [(e.start, e.end) for e in timeline.of(0)[:4]] == [(0, 1), (1, 4), (4, 5), (5, 17)]
    assert [(e.start, e.end) for e in timeline.of(1)[:4]] == [(0, 4), (4, 14), (14, 17), (17, 27)]


def parse(text):
    """Return a program from "F00 >F00 <B00": kind, stage and micro-batch; > sends, < receives."""
    words = [word.replace(">", "SEND_").replace("<", "RECV_") for word in text.split()]
    return [Action(word[:-2], int(word[-2]), int(word[-1])) for word in words]


def test_messages_side_by_side_are_one_exchange_and_apart_they_can_be_a_deadlock_that_is_named():
    lower = parse("<F10 F10 BI10 >B10 BW10 <F11 F11 B11 >B11")
    simulate([parse("F00 >F00 F01 >F01 <B00 B00 <B01 B01"), lower], Cost())
    with pytest.raises(Deadlock) as caught:
        simulate([parse("F00 >F00 F01 >F01 F02 <B00 B00 <B01 B01"), lower], Cost())
    assert caught.value.cycle == [(0, Action("SEND_F", 0, 1)), (1, Action("SEND_B", 1, 0))]
    assert caught.value.what == (
        "ranks wait for each other: rank 0 waits in SEND_F(stage 0, micro 1) for rank 1, "
        "rank 1 waits in SEND_B(stage 1, micro 0) for rank 0"
    )


@pytest.mark.parametrize(
    ("programs", "cycle"),
    [
        (["<F30", "<F10", "<F20"], [(0, "<F30"), (2, "<F20"), (1, "<F10")]),
        (["<B00", "<B10", "<F20", "<F30"], [(1, "<B10"), (2, "<F20")]),  # ranks 0 and 3 only wait for the cycle
    ],
)
def test_a_deadlock_names_its_cycle_and_nobody_else(programs, cycle):
    with pytest.raises(Deadlock, match="^ranks wait for each other: ") as caught:
        simulate([parse(program) for program in programs], Cost())
    assert caught.value.cycle == [(rank, *parse(text)) for rank, text in cycle]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: interleaved(4, 6, 2), r"in groups of 4, one for each rank, but there are 6; try: 4 or 8"),
        (lambda: interleaved(4, 3, 2), r"but there are 3; try: 4"),
        (lambda: one_f_one_b(0, 1), r"a pipeline of 0 ranks; try: 1 or more"),
        (lambda: gpipe(1, 0), r"a pipeline of 0 micro-batches"),
        (lambda: gpipe(1, 1, 0), r"a pipeline of 0 stages on each rank"),
        (lambda: one_f_one_b(2, 2, 2), r"1f1b has one stage on each rank, not 2; try: interleaved"),
        (lambda: zb_h1(2, 2, 3), r"zb_h1 has one stage on each rank, not 3"),
        (lambda: with_messages([parse("F00 B00 >F00"), []]), r"rank 0's program has SEND_F.stage 0, micro 0.; try"),
        (lambda: with_messages([parse("F10 B10"), []]), r"rank 0's program has F.* try: rank 1 of 2 holds that stage"),
        (lambda: with_messages([parse("F00 F00 B00")]), r"stage 0 runs micro-batch 0 2 times F, 1 times B, 0 times BI"),
        (
            lambda: with_messages([parse("F00 BI00")]),
            r"1 times F, 0 times B, 1 times BI, 0 times BW; try: F and B once",
        ),
        (
            lambda: with_messages([parse("B00 F00")]),
            r"wait for ever: B.stage 0, micro 0. for the activations of stage 0",
        ),
        (
            lambda: with_messages([parse("F00 BW00 BI00")]),
            r"wait for ever: BW.stage 0, micro 0. for the gradients of stage 0",
        ),
        (
            lambda: simulate([parse("F00 >F00"), []], Cost()),
            r"^rank 0 waits in SEND_F.* for rank 1, which has finished;",
        ),
        (
            lambda: simulate([parse("F00 F01 >F00 >F01"), parse("<F11 <F10")], Cost()),
            r"rank 1's RECV_F.stage 1, micro 1. meets rank 0's SEND_F.stage 0, micro 0.; try",
        ),
    ],
)
def test_mistakes_name_the_action_and_the_numbers(run, message):
    with pytest.raises(UserError, match=message):
        run()


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        (["F00", "F10"], r"rank 1 runs F.* without the activations of stage 0, micro 0; try: with_messages"),
        ([">F00 F00", ""], r"rank 0 runs SEND_F.* without the activations of stage 0"),
        (["B00"], r"rank 0 runs B.* without the activations of stage 0"),
        (["F00 BI00", "<F10"], r"rank 0 runs BI.* without the gradients of stage 1"),
        (["", ">B10"], r"rank 1 runs SEND_B.* without the gradients of stage 1"),
        (["F00 BW00"], r"rank 0 runs BW.* without the gradients of stage 0"),
        (["F00 BI00 REDUCE00"], r"rank 0 runs REDUCE.* without the weight gradients of stage 0"),
        (["<B00 F00 >F00", ">F10 <F10 F10"], r"rank 1 runs SEND_F.* without the activations of stage 1"),
    ],
)
def test_an_action_without_its_inputs_names_them(programs, message):
    with pytest.raises(UserError, match=message):
        simulate([parse(program) for program in programs], Cost())
