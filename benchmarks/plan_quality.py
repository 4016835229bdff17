"""Is what the planner chooses the fastest, and does it order layouts as a clock does?

    python benchmarks/plan_quality.py                 measure this machine, then three models on 4 gloo processes
    python benchmarks/plan_quality.py --profile FILE  with rates that `minispeed calibrate` has measured
    python benchmarks/plan_quality.py --quick         a few layouts of one small model; nothing is written

Every layout of 4 ranks, at every ZeRO stage, with one micro-batch or, in a pipeline, four, is trained for a few steps:
visit after visit in another order, so that what else the machine does falls on all alike. A layout's time is the median
of its visits' (a visit: the median of its steps, of the slowest rank), its spread half the range of the middle half of
them. Predicted are the times of `minispeed.plan.step` from the rates that `minispeed calibrate` measures.

    choice    measured time of the layout that is predicted fastest, over the least measured
    ranks     Spearman's correlation of predicted and measured times: of all, and of layouts that are apart, taken from
              the fastest on, each slower than the one before by more than both their spreads

All compute the same: their first losses are compared before anything is timed.
"""

import argparse
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from report import report, table

from minispeed.chat.calibrate import profile_of
from minispeed.chat.speeds import measure
from minispeed.collective.launch import launch
from minispeed.collective.world import World
from minispeed.engine import Engine, MicroBatch
from minispeed.ledger.job import Job
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.plan.report import line_of
from minispeed.plan.request import Request
from minispeed.plan.space import all_jobs
from minispeed.plan.step import step
from minispeed.precision import DTYPES, Precision
from minispeed.profiles import Profile, load

RANKS, VISITS, STEPS = 4, 3, 2
SHAPES = {
    "deep": dict(num_layers=6, model_dim=96, num_heads=4, num_kv_heads=4, head_dim=24, hidden_dim=256),
    "wide": dict(num_layers=2, model_dim=256, num_heads=8, num_kv_heads=4, head_dim=32, hidden_dim=768),
    "words": dict(num_layers=3, vocab_size=8192),
}
MODELS: dict[str, GPTConfig] = {name: preset("nano", **shape) for name, shape in SHAPES.items()}
ROWS, TOKENS = 8, 64


def request_of(name: str, profile: Profile) -> Request:
    """Return what is planned: nothing is offloaded or recomputed, for there is room enough."""
    fixed = {"offload": "none", "recompute": "none"}
    return Request(
        model=MODELS[name],
        devices=RANKS,
        rows=ROWS,
        tokens=TOKENS,
        memory=10**12,
        profile=profile,
        dtype="fp32",
        fixed=fixed,
    )


def sweep(request: Request) -> list[Job]:
    """Return every layout and stage: a pipeline with four micro-batches, others with one."""
    return [job for job in all_jobs(request) if job.micros == (4 if job.layout.pp > 1 else 1)]


def batches(job: Job, mine: int, seed: int) -> list[MicroBatch]:
    """Return the micro-batches of one replica, of rows that all layouts have."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(job.model.vocab_size, (job.rows, job.tokens + 1), generator=generator)
    tokens = tokens[mine * job.replica_rows : (mine + 1) * job.replica_rows]
    positions = torch.arange(job.tokens).expand(job.micro_batch, -1).contiguous()
    zeros = torch.zeros_like(positions)
    return [
        MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), positions, zeros, zeros)
        for rows in tokens.split(job.micro_batch)
    ]


def visit(world: World, jobs: Sequence[Job], order: Sequence[int], steps: int) -> dict[int, tuple[float, float]]:
    """Train each layout for some steps, in this order; return its first loss and the median of the other steps."""
    torch.set_num_threads(1)
    group, known = world.group, dict[Any, Any]()
    subgroup = group.subgroup
    group.subgroup = lambda lines: known.get(key := str(lines)) or known.setdefault(key, subgroup(lines))
    found = {}
    for index in order:
        job = jobs[index]
        engine = Engine(GPT(job.model), group, precision=Precision(DTYPES[job.dtype]), layout=job.layout, zero=job.zero)
        mine = batches(job, engine.lines.coords["dp"], seed=0)
        loss = engine.train_step(mine).loss
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            engine.train_step(mine)
            times.append(time.perf_counter() - start)
        found[index] = loss, statistics.median(times)
        del engine
        gc.collect()
    return found


def measured(jobs: Sequence[Job], visits: int, steps: int) -> tuple[list[list[float]], list[float]]:
    """Return the times of each layout, a visit each, and its first loss."""
    times: list[list[float]] = [[] for _ in jobs]
    losses = [math.nan] * len(jobs)
    for number in range(visits):
        order = random.Random(number).sample(range(len(jobs)), len(jobs))
        ranks = launch(visit, jobs, order, steps, ranks=RANKS, backend="gloo")
        for index in order:
            times[index].append(max(rank[index][1] for rank in ranks))
            losses[index] = ranks[0][index][0]
        print(f"visit {number + 1} of {visits}", file=sys.stderr, flush=True)
    return times, losses


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the correlation of the ranks of two rows of numbers; NaN of fewer than three."""
    places = [[sorted(of).index(one) for one in of] for of in (a, b)]
    return statistics.correlation(*places) if len(a) > 2 else math.nan


def apart(medians: Sequence[float], spreads: Sequence[float]) -> list[int]:
    """Return layouts from the fastest on, each slower than the last taken by more than both their spreads."""
    taken: list[int] = []
    for index in sorted(range(len(medians)), key=lambda one: medians[one]):
        if not taken or medians[index] - medians[taken[-1]] > spreads[index] + spreads[taken[-1]]:
            taken.append(index)
    return taken


def compare(name: str, profile: Profile, visits: int, steps: int, limit: int | None) -> list[dict[str, Any]]:
    """Return a row for each layout of a model, the fastest first."""
    jobs = sweep(request_of(name, profile))[:limit]
    predicted = [step(job, profile).seconds for job in jobs]
    times, losses = measured(jobs, visits, steps)
    assert max(losses) - min(losses) < 1e-4, f"layouts that compute the same differ: {min(losses)} to {max(losses)}"
    medians = [statistics.median(of) for of in times]
    spreads = [
        (statistics.quantiles(of, n=4)[2] - statistics.quantiles(of, n=4)[0]) / 2 if visits > 1 else 0.0 for of in times
    ]
    chosen, taken = min(range(len(jobs)), key=lambda one: predicted[one]), set(apart(medians, spreads))
    return [
        {
            "model": name,
            "layout": line_of(jobs[index]),
            "measured ms": 1e3 * medians[index],
            "spread ms": 1e3 * spreads[index],
            "predicted ms": 1e3 * predicted[index],
            "ratio": predicted[index] / medians[index],
            "chosen": index == chosen,
            "apart": index in taken,
        }
        for index in sorted(range(len(jobs)), key=lambda one: medians[one])
    ]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the answer for one model."""
    fastest, chosen = rows[0]["measured ms"], next(row for row in rows if row["chosen"])
    taken = [row for row in rows if row["apart"]]
    pairs = [([row["predicted ms"] for row in of], [row["measured ms"] for row in of]) for of in (rows, taken)]
    return {
        "model": rows[0]["model"],
        "layouts": len(rows),
        "apart": len(taken),
        "choice": chosen["layout"],
        "choice over best": chosen["measured ms"] / fastest,
        "best": rows[0]["layout"],
        "rank correlation, all": spearman(*pairs[0]),
        "rank correlation, apart": spearman(*pairs[1]),
        "predicted over measured": statistics.median(row["ratio"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", help="of this machine; measured now if absent")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--visits", type=int, default=VISITS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.profile:
        profile = load(options.profile)
    else:
        found = {n: launch(measure, options.quick, 1, tuple(DTYPES), ranks=n, backend="gloo") for n in (1, 2, RANKS)}
        profile = profile_of(found, on_gpu=False)
    names, visits, limit = (["words"], 1, 6) if options.quick else (options.models, options.visits, None)
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        rows[name] = compare(name, profile, visits, STEPS, limit)
        print(table(rows[name][:5] + rows[name][-1:]), flush=True)
    answers = [summary(of) for of in rows.values()]
    if options.quick:
        print(table(answers))
    else:
        report("plan_quality", answers, layouts=rows, profile=profile.to_dict(), visits=visits, steps=STEPS)


if __name__ == "__main__":
    main()
