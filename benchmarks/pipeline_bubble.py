"""How long do the ranks of a pipeline idle, and how much do they hold, under each schedule?

    python benchmarks/pipeline_bubble.py

Idle time of a rank and micro-batches in flight (in stages) on the first and last rank: the papers' closed forms, beside
a simulation in which messages take no time and every wait for a neighbour counts, beside a real run of linear layers on
ranks that are threads, by a clock that counts the same times. Forward, input half and weight half of a model's p-th
take 1 each: the paper's case of ZB-H1; and 2, 3, 1. A whole backward takes both halves.

GPipe, Huang et al. 2019, section 2.3; Narayanan et al. 2021, section 2.2; ZB-H1, Qi et al. 2024, section 2.
Letters: p ranks, m micro-batches, v stages on each rank, F forward, I input half, W weight half.
"""

import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from report import report

from minispeed.collective.group import Group
from minispeed.collective.threads import run_threads
from minispeed.pipeline.actions import Program
from minispeed.pipeline.clock import LogicalClock, gather
from minispeed.pipeline.execute import execute
from minispeed.pipeline.messages import with_messages
from minispeed.pipeline.schedule import SCHEDULES
from minispeed.pipeline.simulate import Cost, simulate
from minispeed.pipeline.stage import Stage
from minispeed.pipeline.timeline import Timeline

TIMES = ((1, 1, 1), (2, 3, 1))  # F, I, W of a p-th of the model
SIZES = ((2, 4), (4, 4), (4, 16), (8, 64))  # p, m
CONTESTANTS = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb_h1", 1))  # with v


def idle(schedule: str, p: int, v: int, F: int, I: int, W: int) -> Fraction:  # noqa: E741
    """Return what the papers say a rank idles."""
    return Fraction((p - 1) * (F + I - W) if schedule == "zb_h1" else (p - 1) * (F + I + W), v)


def in_flight(schedule: str, p: int, m: int, v: int, rank: int) -> int:
    """Return how many pairs of stage and micro-batch the papers say a rank holds at once."""
    warm_up = 2 * (p - 1 - rank) + (v - 1) * p
    return {"gpipe": m, "1f1b": min(p - rank, m), "interleaved": min(warm_up + 1, m * v), "zb_h1": p}[schedule]


def linear_stage(index: int) -> Stage:
    """Return a stage of one linear layer; the first makes its own input."""
    linear = torch.nn.Linear(4, 4)
    return Stage(
        run=lambda inputs, micro: (linear(inputs[0] if index else torch.ones(2, 4)),),
        loss=lambda outputs, micro: outputs[0].sum(),
    )


def run(programs: list[Program], cost: Cost, v: int) -> Timeline:
    """Run the programs on a thread for each rank, and return the timeline that the ranks gathered."""
    p = len(programs)

    def on_rank(group: Group) -> Timeline:
        stages = {s: linear_stage(s) for s in range(group.rank, p * v, p)}
        return gather(execute(programs, stages, group, clock=LogicalClock(cost)), group)

    return run_threads(on_rank, p)[0]


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for F, I, W in TIMES:  # noqa: E741
        for p, m in SIZES:
            for schedule, v in CONTESTANTS:
                stage = Cost(f=Fraction(F, v), b=Fraction(I + W, v), bi=I, bw=W)
                programs = with_messages(SCHEDULES[schedule](p, m, v), stage)
                timeline, ran = simulate(programs, stage), run(programs, stage, v)
                says, simulated = idle(schedule, p, v, F, I, W), timeline.length - m * (F + I + W)
                rows.append(
                    {
                        "F I W": f"{F} {I} {W}",
                        "ranks": p,
                        "micro-batches": m,
                        "schedule": schedule,
                        "stages of a rank": v,
                        "idle, paper": float(says),
                        "idle, simulated": float(simulated),
                        "idle, run": float(ran.length - m * (F + I + W)),
                        "difference": float(simulated - says),
                        "events of the run that differ": len(set(ran.events) ^ set(timeline.events)),
                        "bubble": float(timeline.bubble),
                        "in flight, paper": "{} to {}".format(*(in_flight(schedule, p, m, v, r) for r in (0, p - 1))),
                        "simulated": "{} to {}".format(*(timeline.peak_in_flight(r) for r in (0, p - 1))),
                        "run": "{} to {}".format(*(ran.peak_in_flight(r) for r in (0, p - 1))),
                    }
                )
    report("pipeline_bubble", rows)


if __name__ == "__main__":
    main()
