"""Pipelines: how long ranks idle and how much they hold, by the papers' formulas, a counting clock, and the wall's.

    python benchmarks/papers/pipelines.py            a minute; for the timed rows on two idle cores
    python benchmarks/papers/pipelines.py --quick    small sizes, timed on threads; nothing is written

Programs run on ranks that are threads, by a clock that counts what an action is said to take: exact figures
(pipeline_bubble.py). Then a GPT's forwards and backwards run on two processes of one thread each, schedules in turn, by
the wall's (timed_pipelines.py).

Huang et al. 2019, https://arxiv.org/abs/1811.06965 (GPipe); Narayanan et al. 2021, https://arxiv.org/abs/2104.04473
(1F1B, interleaved); Qi et al. 2024, https://arxiv.org/abs/2401.10241 (ZB-H1).
Letters: p ranks, m micro-batches, v stages on each rank; F forward, I and W the backward's input and weight half.
"""

import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import pipeline_bubble
from entry import Entry, Row, run
from timed_pipelines import CONTESTANTS, MICROS, on_process, take_turns

import minispeed
from minispeed.collective.threads import run_threads
from minispeed.model.presets import preset
from minispeed.pipeline.actions import COMPUTE
from minispeed.pipeline.messages import with_messages
from minispeed.pipeline.schedule import SCHEDULES
from minispeed.pipeline.simulate import Cost
from minispeed.pipeline.timeline import Timeline

GPIPE, MEGATRON, ZERO_BUBBLE = "Huang et al. 2019", "Narayanan et al. 2021", "Qi et al. 2024"
BEYOND = ((2, 2, (1, 2, 2)), (4, 2, (1, 1, 1)))  # p, m and F, I, W outside the reach of ZB-H1's formula
TITLES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "interleaved, 2 stages a rank", "zb_h1": "ZB-H1"}
Times = tuple[int, int, int]


def entry(quick: bool) -> Entry:
    """Return the papers' statements with what was counted and timed."""
    sizes = ((2, 4),) if quick else ((4, 8), (8, 64))
    counted = [row for p, m in sizes for row in (*bubbles(p, m), *peaks(p, m))]
    p, m = (2, 4) if quick else (4, 8)
    return Entry(
        topic="pipelines",
        title="Pipelines: bubbles and activations of four schedules",
        source="GPipe, Huang et al. 2019",
        link="https://arxiv.org/abs/1811.06965",
        rows=[*counted, *beyond(), *timed(quick)],
        notes=[
            "The other papers: [1F1B and interleaving, Narayanan et al. 2021](https://arxiv.org/abs/2104.04473), "
            "[ZB-H1, Qi et al. 2024](https://arxiv.org/abs/2401.10241).",
            "Counted rows are real runs of linear layers on ranks that are threads, by a clock on which an action "
            "takes what F, I, W say (1 each where nothing is said; an unsplit backward I + W; a stage of v on a rank a "
            "v-th) and a message nothing. A simulation of the same programs gives the same events.",
            "ZB-H1's (p - 1)(F + I - W) holds where m >= p and W <= min(F, I). Outside of it ranks can idle longer: "
            "with F, I, W = 1, 2, 2 and p = m = 2 a step takes 12 units of time and by the formula 11; and the last "
            "of the counted rows has fewer micro-batches than ranks.",
            "Timed rows are shares of the wall's time on two gloo processes, medians over turns in which the schedules "
            "alternate. Their closed form takes F, I and W from the same run, as means over stages; "
            "what is above it is messages and stages that do not weigh the same.",
            "The figure is drawn from the counted runs with F = I = W = 1.",
        ],
        series={
            "p": p,
            "m": m,
            "timelines": {name: boxes(counted_run(name, p, m, v, (1, 1, 1))) for name, v in CONTESTANTS.items()},
        },
    )


def bubbles(p: int, m: int) -> list[Row]:
    """Return what the papers say of idle time, as shares of the time or in units of it."""
    case, thirds = f"p = {p}, m = {m}", (1, 1, 1)
    rows = [
        Row(
            claim=f"GPipe idles (p - 1)/(m + p - 1) of the time, {case}",
            section=f"{GPIPE}, section 2.3",
            paper=None,
            closed_form=float(Fraction(p - 1, m + p - 1)),
            measured=float(counted_run("gpipe", p, m, 1, thirds).bubble),
            unit="of the time",
        )
    ]
    for schedule, v, says in (("1f1b", 1, "(p - 1)/m"), *(("interleaved", v, "(p - 1)/(v m)") for v in (2, 4))):
        rows.append(
            Row(
                claim=f"{TITLES[schedule].split(',')[0]} idles {says} of the ideal time, {case}, v = {v}",
                section=f"{MEGATRON}, section 2.2.{1 + (v > 1)}",
                paper=None,
                closed_form=float(Fraction(p - 1, v * m)),
                measured=float(idle(schedule, p, m, v, thirds) / (m * sum(thirds))),
                unit="of the ideal",
            )
        )
    third = Row(
        claim=f"ZB-H1 idles a third as long as 1F1B, {case}",
        section=f"{ZERO_BUBBLE}, section 2.1",
        paper="1/3",
        closed_form=1 / 3,
        measured=float(idle("zb_h1", p, m, 1, thirds) / idle("1f1b", p, m, 1, thirds)),
        unit="of 1F1B's",
    )
    return [*rows, *(zb_h1(p, m, times) for times in pipeline_bubble.TIMES), third]


def zb_h1(p: int, m: int, times: Times) -> Row:
    """Return what ZB-H1 idles, by its formula and by a run."""
    return Row(
        claim="ZB-H1 idles (p - 1)(F + I - W), p = {}, m = {}, F, I, W = {}, {}, {}".format(p, m, *times),
        section=f"{ZERO_BUBBLE}, section 2.3",
        paper=None,
        closed_form=float(pipeline_bubble.idle("zb_h1", p, 1, *times)),
        measured=float(idle("zb_h1", p, m, 1, times)),
        unit="units of time",
    )


def peaks(p: int, m: int) -> list[Row]:
    """Return how many micro-batches' activations the first rank holds at once."""
    return [
        Row(
            claim=f"{TITLES[schedule]} holds the activations of {says} micro-batches, p = {p}, m = {m}",
            section=section,
            paper=None,
            closed_form=pipeline_bubble.in_flight(schedule, p, m, 1, 0),
            measured=counted_run(schedule, p, m, 1, (1, 1, 1)).peak_in_flight(0),
            unit="micro-batches",
        )
        for schedule, says, section in (
            ("gpipe", "m", f"{MEGATRON}, section 2.2.1"),
            ("1f1b", "p", f"{MEGATRON}, section 2.2.1"),
            ("zb_h1", "p", f"{ZERO_BUBBLE}, section 2.3"),
        )
    ]


def beyond() -> list[Row]:
    """Return ZB-H1 where its formula promises too much."""
    return [zb_h1(p, m, times) for p, m, times in BEYOND]


def idle(schedule: str, p: int, m: int, v: int, times: Times) -> Fraction:
    """Return what a run takes beyond the time that a rank computes."""
    return Fraction(counted_run(schedule, p, m, v, times).length) - m * sum(times)


@lru_cache
def counted_run(schedule: str, p: int, m: int, v: int, times: Times) -> Timeline:
    """Run a schedule on threads by the clock that counts."""
    F, I, W = times  # noqa: E741
    cost = Cost(f=Fraction(F, v), b=Fraction(I + W, v), bi=Fraction(I, v), bw=Fraction(W, v))
    return pipeline_bubble.run(with_messages(SCHEDULES[schedule](p, m, v), cost), cost, v)


def boxes(timeline: Timeline) -> list[str]:
    """Return what each rank computes, a line of text for each: kind, stage, micro-batch, start and end."""
    return [
        "; ".join(
            f"{e.action.kind} {e.action.stage} {e.action.micro} {float(e.start)} {float(e.end)}"
            for e in timeline.of(rank)
            if e.action.kind in COMPUTE
        )
        for rank in range(timeline.ranks)
    ]


def timed(quick: bool) -> list[Row]:
    """Return the share of the time in which two processes idle, by the wall's clock."""
    width, shape, repeats = (16, (1, 8), 1) if quick else (256, (2, 256), 5)
    heads = dict(num_heads=4, num_kv_heads=4, head_dim=width // 4)
    config = preset("nano", num_layers=8, vocab_size=512, model_dim=width, hidden_dim=8 * width // 3, **heads)
    config = replace(config, tied=False, attention="reference")
    if quick:
        turns = run_threads(partial(take_turns, config=config, shape=shape, repeats=repeats), 2)[0]
    else:
        turns = minispeed.launch(on_process, config, shape, repeats, ranks=2, backend="gloo")[0]
    formulas = {
        "gpipe": ("(p - 1)/(m + p - 1)", f"{GPIPE}, section 2.3"),
        "1f1b": ("(p - 1)/(m + p - 1)", f"{MEGATRON}, section 2.2.1"),
        "interleaved": ("(p - 1)/(v m + p - 1)", f"{MEGATRON}, section 2.2.2"),
        "zb_h1": ("(p - 1)(F + I - W) beside m (F + I + W)", f"{ZERO_BUBBLE}, section 2.3"),
    }
    return [
        Row(
            claim=f"timed: {TITLES[schedule]}, idles {says}, p = 2, m = {MICROS}",
            section=section,
            paper=None,
            closed_form=statistics.median(turn[schedule][0] for turn in turns),
            measured=statistics.median(turn[schedule][1] for turn in turns),
            unit="of the time",
        )
        for schedule, (says, section) in formulas.items()
    ]


def draw(saved: Mapping[str, Any], path: Path) -> None:
    """Draw the four schedules of the counted runs, an inch the same time in all."""
    import matplotlib

    from minispeed import spans
    from minispeed.figures import draw_timelines

    def row(rank: int, text: str) -> spans.Row:
        found = []
        for kind, stage, micro, start, end in (box.split() for box in text.split("; ")):
            args = {"stage": int(stage), "micro": int(micro)}
            start, duration = float(start) * spans.MICRO, (float(end) - float(start)) * spans.MICRO
            found.append(spans.Span(spans.ACTIONS[kind], kind, start, duration, args))
        return spans.Row(rank, found)

    series = saved["series"]
    runs = [
        (TITLES[name], spans.Run([row(rank, text) for rank, text in enumerate(ranks)], "simulated units"))
        for name, ranks in series["timelines"].items()
    ]
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        draw_timelines(path, runs, same_scale=True)


if __name__ == "__main__":
    run(entry, draw)
