"""Does a pipeline of two ranks take as long as the simulation says, and 5/8 of one process's time?

    python benchmarks/pipeline_speed.py                 2 gloo ranks of one thread each, on two idle cores
    python benchmarks/pipeline_speed.py --quick         a small model, to see that it works; nothing is written

A GPT of 8 layers with a small vocabulary, so that two stages can weigh the same; 4 micro-batches under 1F1B.

`execute` alone runs the programs on the two chunks of the model. Beside it stands `simulate`, fed with the time of each
stage's forward and backward: measured in the same turn by a rank that runs its stage alone while the other waits; and
as they were in the run itself, which leaves messages and waiting as the only difference. Both simulations take messages
to cost nothing.

End to end, the engine with pp=2 beside the engine in one process, both from micro-batches to updated parameters: of p
ranks with m micro-batches the ideal is (m + p - 1) / (m p), here 5/8 (Huang et al. 2019, section 2.3: the bubble is
(p - 1) / (m + p - 1), https://arxiv.org/abs/1811.06965). Losses must agree before a time counts. All take turns, and
figures are medians over turns of ratios within one.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from report import report, table

import minispeed
from minispeed.axes import Layout
from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.numbers import barrier
from minispeed.collective.world import World
from minispeed.engine import Engine, MicroBatch
from minispeed.model.chunk import Chunk, layer_costs
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.pipeline.clock import gather
from minispeed.pipeline.execute import execute
from minispeed.pipeline.partition import partition
from minispeed.pipeline.simulate import Cost, simulate
from minispeed.pipeline.stage import Stage
from minispeed.pipeline.timeline import Timeline
from minispeed.precision import Precision

RANKS, MICROS, WARM_UP = 2, 4, 2
LAYOUT = Layout(pp=RANKS, schedule="1f1b")
IDEAL = (MICROS + RANKS - 1) / (MICROS * RANKS)
PAIRS = (  # what is timed, what it is divided by, what the papers say of the ratio, the most that it should be
    ("execute", "simulate, stages alone", 1.0, 1.06),
    ("execute", "simulate, times of the run", 1.0, None),
    ("engine, pp=2", "engine, one process", IDEAL, 0.68),
)


@dataclass(frozen=True)
class Turn:
    """What one turn measured.

    seconds        of each contestant
    losses         of each way to run the same micro-batches
    alone, in_run  the times of the stages' forward and backward
    """

    seconds: dict[str, float]
    losses: dict[str, float]
    alone: Cost
    in_run: Cost


class Contest:
    """The contestants on one rank: its stage, the engine with pp=2, on rank 0 the engine of one process."""

    def __init__(self, world: World, config: GPTConfig, shape: tuple[int, int]) -> None:
        torch.set_num_threads(1)
        self.group, self.config, self.shape = world.group, config, shape
        self.programs = LAYOUT.programs(MICROS)
        model = GPT(config)
        bounds = partition(layer_costs(model), RANKS)
        self.chunk = Chunk(model, bounds[world.rank], bounds[world.rank + 1])
        self.engines = {"engine, pp=2": engine(config, world.group, LAYOUT)}
        if world.rank == 0:
            self.engines["engine, one process"] = engine(config, SoloGroup(), Layout())

    def turn(self, number: int) -> Turn:
        """Run everything once, on the micro-batches of a turn."""
        micros = [draw(self.config, MICROS * number + index, self.shape) for index in range(MICROS)]
        alone = self.time_stages(micros)
        timeline, loss = self.execute(micros)
        in_run = costs_of(timeline)
        losses, seconds = {"execute": loss}, {"execute": float(timeline.length)}
        seconds["simulate, stages alone"] = float(simulate(self.programs, alone).length)
        seconds["simulate, times of the run"] = float(simulate(self.programs, in_run).length)
        for name in ("engine, pp=2", "engine, one process"):
            losses[name], seconds[name] = self.train(self.engines.get(name), micros)
        return Turn(seconds, losses, alone, in_run)

    def train(self, engine: Engine | None, micros: Sequence[MicroBatch]) -> tuple[float, float]:
        """Return the loss and the seconds of an update, of the slower rank; a rank without an engine waits."""
        barrier(self.group)
        start = time.perf_counter()
        loss = engine.train_step(micros).loss if engine else 0.0
        return largest(self.group, loss, time.perf_counter() - start if engine else 0.0)

    def execute(self, micros: Sequence[MicroBatch]) -> tuple[Timeline, float]:
        """Run the programs; return what happened on all ranks, and the mean loss."""
        total = 0.0

        def observe(micro: int, outputs: tuple[Tensor, ...]) -> None:
            nonlocal total
            total += outputs[0].sum().item()

        stages = {self.group.rank: self.stage(micros)}
        barrier(self.group)
        timeline = gather(execute(self.programs, stages, self.group, observe=observe), self.group)
        return timeline, largest(self.group, total / num_supervised(micros), 0.0)[0]

    def stage(self, micros: Sequence[MicroBatch]) -> Stage:
        """Return this rank's stage of the model, on some micro-batches."""

        def run(inputs: tuple[Tensor, ...], micro: int) -> tuple[Tensor, ...]:
            tokens, labels, positions, documents, tasks, _ = micros[micro]
            return self.chunk(inputs, tokens, labels, positions=positions, documents=documents, tasks=tasks)

        return Stage(run=run, loss=lambda outputs, micro: outputs[0].sum() / num_supervised(micros))

    def time_stages(self, micros: Sequence[MicroBatch]) -> Cost:
        """Return the time of each stage's forward and backward, one rank after the other."""
        mine = [0.0, 0.0]
        for rank in range(RANKS):
            barrier(self.group)
            if rank == self.group.rank:
                mine = self.time_alone(self.stage(micros))
        everyone = torch.empty(2 * RANKS, dtype=torch.float64)
        self.group.all_gather(everyone, torch.tensor(mine, dtype=torch.float64)).wait()
        return Cost(f=everyone[0::2].tolist(), b=everyone[1::2].tolist())

    def time_alone(self, stage: Stage) -> list[float]:
        """Return the mean seconds of a micro-batch's forward and backward, on features of no meaning."""
        features = torch.randn(*self.shape, self.config.model_dim)
        forward = backward = 0.0
        for micro in range(MICROS):
            inputs = () if self.chunk.is_first else (features.clone().requires_grad_(),)
            start = time.perf_counter()
            made = stage.forward(inputs, micro, is_split=False)
            middle = time.perf_counter()
            stage.give_back(made, None if self.chunk.is_last else (features,), micro)
            forward, backward = forward + middle - start, backward + time.perf_counter() - middle
        return [forward / MICROS, backward / MICROS]


def engine(config: GPTConfig, group: Group, layout: Layout) -> Engine:
    """Return an engine in fp32."""
    return Engine(GPT(config), group, precision=Precision(torch.float32), lr=1e-4, layout=layout)


def num_supervised(micros: Sequence[MicroBatch]) -> int:
    """Return how many tokens a step learns from."""
    return sum(micro.num_supervised for micro in micros)


def costs_of(timeline: Timeline) -> Cost:
    """Return the mean time of each stage's actions in a run."""

    def mean(kind: str, stage: int) -> float:
        found = [e for e in timeline.events if (e.action.kind, e.action.stage) == (kind, stage)]
        return statistics.mean(float(event.end - event.start) for event in found)

    return Cost(f=[mean("F", s) for s in range(RANKS)], b=[mean("B", s) for s in range(RANKS)])


def largest(group: Group, *values: float) -> tuple[float, ...]:
    """Return the largest of the ranks' values, one by one."""
    mine = torch.tensor(values, dtype=torch.float64)
    group.all_reduce(mine, "max").wait()
    return tuple(mine.tolist())


def draw(config: GPTConfig, seed: int, shape: tuple[int, int]) -> MicroBatch:
    """Return rows, the same on every rank; every token is learnt."""
    tokens = torch.randint(
        0, config.vocab_size, (shape[0], shape[1] + 1), generator=torch.Generator().manual_seed(seed)
    )
    zeros = torch.zeros(shape, dtype=torch.int64)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, zeros, zeros)


def compare(world: World, config: GPTConfig, shape: tuple[int, int], repeats: int) -> list[Turn]:
    """Take turns, two of them to warm up; all losses of the first must agree, and the engines' of every turn."""
    contest = Contest(world, config, shape)
    turns = [contest.turn(number) for number in range(WARM_UP + repeats)]
    for number, turn in enumerate(turns):
        wanted = turn.losses["engine, one process"]
        for name, loss in turn.losses.items():
            is_comparable = name != "execute" or number == 0  # which updates nothing
            assert not is_comparable or abs(loss - wanted) <= 1e-5 * wanted, f"turn {number}, {name}: {loss}, {wanted}"
    return turns[WARM_UP:]


def ratios(turns: Sequence[Turn]) -> list[dict[str, object]]:
    """Return a row for each ratio."""
    rows = []
    for what, beside, says, most in PAIRS:
        found = [turn.seconds[what] / turn.seconds[beside] for turn in turns]
        row: dict[str, object] = {"what": what, "beside": beside}
        row["ms"] = statistics.median(turn.seconds[what] for turn in turns) * 1e3
        row |= {"paper": says, "ratio": statistics.median(found), "lowest": min(found), "highest": max(found)}
        rows.append(row | {"difference": row["ratio"] - says, "target": most})
    return rows


def stage_times(turns: Sequence[Turn]) -> list[dict[str, object]]:
    """Return a row for each stage: its forward and backward alone, and in the run beside the other."""
    rows = []
    for stage in range(RANKS):
        row: dict[str, object] = {"stage": stage}
        for where in ("alone", "in_run"):
            for kind in ("f", "b"):
                times = [getattr(getattr(turn, where), kind)[stage] for turn in turns]
                row[f"{kind.upper()} {where.replace('_', ' ')}, ms"] = statistics.median(times) * 1e3
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model; nothing is written")
    parser.add_argument("--width", type=int, default=384, help="D")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--repeats", type=int, default=7, help="turns that are timed")
    options = parser.parse_args()
    if options.quick:
        options.width, options.rows, options.tokens, options.repeats = 64, 2, 32, 2
    D, shape = options.width, (options.rows, options.tokens)
    heads = dict(num_heads=8, num_kv_heads=8, head_dim=D // 8)
    config = preset("nano", num_layers=8, vocab_size=512, model_dim=D, hidden_dim=8 * D // 3, **heads)
    config = replace(config, tied=False, attention="reference")
    turns = minispeed.launch(compare, config, shape, options.repeats, ranks=RANKS, backend="gloo")[0]
    settings = dict(D=D, layers=8, micros=MICROS, B=shape[0], T=shape[1], repeats=options.repeats)
    for name, rows in (("pipeline_speed", ratios(turns)), ("pipeline_speed_stages", stage_times(turns))):
        print(table(rows)) if options.quick else report(name, rows, **settings)


if __name__ == "__main__":
    main()
