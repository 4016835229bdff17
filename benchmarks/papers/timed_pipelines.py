"""How long do two ranks idle under each schedule by the wall's clock, and how long should they?

A GPT's forwards and backwards run in turn under the four schedules, without an optimizer; of each run's events, the
share of the time in which ranks do not compute stands beside what the papers' formulas make of its mean times.
pipelines.py runs it.

Letters: p ranks, m micro-batches, v stages on each rank; F forward, B backward, I its input half, W its weight half.
"""

import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline_speed import draw, num_supervised

from minispeed.collective.group import Group
from minispeed.collective.numbers import barrier
from minispeed.collective.world import World
from minispeed.model.chunk import Chunk, layer_costs
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.pipeline.clock import gather
from minispeed.pipeline.execute import execute
from minispeed.pipeline.messages import with_messages
from minispeed.pipeline.partition import partition
from minispeed.pipeline.schedule import SCHEDULES
from minispeed.pipeline.simulate import Cost
from minispeed.pipeline.stage import Stage
from minispeed.pipeline.timeline import Timeline

CONTESTANTS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb_h1": 1}  # with v
MICROS, WARM_UP = 8, 2
Turn = dict[str, tuple[float, float]]  # of a schedule: the idle share by the formula, and by the wall


def on_process(world: World, config: GPTConfig, shape: tuple[int, int], repeats: int) -> list[Turn]:
    """Take turns on one process."""
    return take_turns(world.group, config=config, shape=shape, repeats=repeats)


def take_turns(group: Group, *, config: GPTConfig, shape: tuple[int, int], repeats: int) -> list[Turn]:
    """Run the schedules in turn; return, for each turn that counts, how long each one idled."""
    torch.set_num_threads(1)
    contestants = {schedule: (stages_of(group, config, v, shape), v) for schedule, v in CONTESTANTS.items()}
    turns = []
    for _ in range(WARM_UP + repeats):
        found: Turn = {}
        for schedule, (stages, v) in contestants.items():
            programs = with_messages(SCHEDULES[schedule](group.size, MICROS, v), Cost(f=1, b=2))
            barrier(group)
            timeline = gather(execute(programs, stages, group), group)
            found[schedule] = (formula(schedule, timeline, v), float(timeline.bubble))
        turns.append(found)
    return turns[WARM_UP:]


def stages_of(group: Group, config: GPTConfig, v: int, shape: tuple[int, int]) -> dict[int, Stage]:
    """Return this rank's stages of a model, on some micro-batches that are the same on every rank."""
    model, micros = GPT(config), [draw(config, micro, shape) for micro in range(MICROS)]
    bounds = partition(layer_costs(model), group.size * v)

    def stage(index: int) -> Stage:
        chunk = Chunk(model, bounds[index], bounds[index + 1])

        def forward(inputs: tuple[Tensor, ...], micro: int) -> tuple[Tensor, ...]:
            rows = micros[micro]
            return chunk(
                inputs, rows.tokens, rows.labels, positions=rows.positions, documents=rows.documents, tasks=rows.tasks
            )

        return Stage(run=forward, loss=lambda outputs, micro: outputs[0].sum() / num_supervised(micros))

    return {index: stage(index) for index in range(group.rank, group.size * v, group.size)}


def formula(schedule: str, timeline: Timeline, v: int) -> float:
    """Return the share of the time that the papers let ranks idle, given the mean times of a run's actions."""
    p, m = timeline.ranks, MICROS
    times: dict[str, list[float]] = {}
    for event in timeline.events:
        times.setdefault(event.action.kind, []).append(float(event.end - event.start))
    F, B, I, W = (statistics.mean(times.get(kind, [0.0])) for kind in ("F", "B", "BI", "BW"))  # noqa: E741
    whole = F + B + I + W
    idle = (p - 1) * (F + I - W if schedule == "zb_h1" else whole / v)
    return idle / (m * whole + idle)
