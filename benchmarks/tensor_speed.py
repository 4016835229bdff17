"""What does a step cost at tp=2, beside one process, and beside torch's own tensor parallelism?

    python benchmarks/tensor_speed.py                   2 gloo ranks of one thread each, on two idle cores
    python benchmarks/tensor_speed.py --quick           a small model, to see that it works; nothing is written

A GPT whose matrix products dominate, and the same global batch for all: one process on one thread; two ranks of this
library's engine, the stream between cut layers whole, then cut by tokens; two ranks of torch's parallelize_module with
ColwiseParallel and RowwiseParallel, embedding and head cut by the vocabulary, as torch recommends. Contestants take
their steps in turn; their losses, also after updates, must agree before a time counts. Figures are medians over turns
of the slower rank's time over that of the one process in the same turn.

Megatron-LM, Shoeybi et al. 2019, section 3 (https://arxiv.org/abs/1909.08053): ideal is 1/2, and messages on top.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from report import report, table

import minispeed
from minispeed.axes import Layout
from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.numbers import barrier
from minispeed.collective.world import World
from minispeed.engine import Engine, MicroBatch
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.precision import Precision

LR, BETAS = 1e-4, (0.9, 0.95)
TARGET = 0.75  # of one process
ALONE = "one process"
Step = Callable[[MicroBatch], float]  # one update; returns the mean loss


def ours(config: GPTConfig, group: Group, layout: Layout) -> Step:
    """This library's engine."""
    precision = Precision(torch.float32)
    engine = Engine(GPT(config), group, precision=precision, lr=LR, betas=BETAS, layout=layout)
    return lambda batch: engine.train_step([batch]).loss


def torchs(config: GPTConfig, size: int) -> Step:
    """torch.distributed.tensor.parallel on the same GPT, its losses from logits that stay cut."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    model = GPT(config)
    for block in model.blocks:
        with torch.no_grad():
            block.attention.qkv.weight.copy_(by_rank(block.attention.qkv.weight, config, size))
    plan = {"embed.tokens": RowwiseParallel(input_layouts=Replicate())}
    plan["head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    for of in range(config.num_layers):
        plan |= {f"blocks.{of}.attention.qkv": ColwiseParallel(), f"blocks.{of}.attention.out": RowwiseParallel()}
        plan |= {f"blocks.{of}.mlp.gate": ColwiseParallel(), f"blocks.{of}.mlp.up": ColwiseParallel()}
        plan[f"blocks.{of}.mlp.down"] = RowwiseParallel()
    parallelize_module(model, init_device_mesh("cpu", (size,)), plan)
    kinds = [[p for p in model.parameters() if isinstance(p, DTensor) is cut] for cut in (True, False)]
    # one group of each kind, for the fused kernel takes no list of both
    groups = [{"params": kind} for kind in kinds]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, weight_decay=0, fused=True)

    def step(batch: MicroBatch) -> float:
        logits = model.logits(batch.tokens, positions=batch.positions, documents=batch.documents)
        with loss_parallel():
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def by_rank(weight: Tensor, config: GPTConfig, size: int) -> Tensor:
    """Order the rows of a fused projection so that each rank's slice of them has its queries, keys and values."""
    widths = [heads * config.head_dim for heads in (config.num_heads, *[config.num_kv_heads] * 2)]
    slices = [part.chunk(size) for part in weight.split(widths)]
    return torch.cat([part[rank] for rank in range(size) for part in slices])


def compare(world: World, config: GPTConfig, shape: tuple[int, int], repeats: int) -> list[dict[str, object]]:
    """Step all contestants in turn on rows of this `shape`, after two turns to warm up; return a line for each."""
    torch.set_num_threads(1)
    contestants: dict[str, Step] = {} if world.rank else {ALONE: ours(config, SoloGroup(), Layout())}
    for name, tokens in (("minispeed, stream whole", False), ("minispeed, cut by tokens", True)):
        contestants[name] = ours(config, world.group, Layout(tp=world.size, tokens=tokens))
    contestants["parallelize_module"] = torchs(config, world.size)
    names = [ALONE, *(name for name in contestants if name != ALONE)]
    losses: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(2 + repeats):
        batch = draw(config, turn, shape)
        for name in names:
            loss, spent = timed(contestants.get(name), batch, world.group)
            losses[name].append(loss)
            seconds[name].append(spent)
        if turn == 1:
            check_equal(losses)
    return [line(name, losses[name][-1], seconds[name][2:], seconds[ALONE][2:]) for name in names]


def timed(step: Step | None, batch: MicroBatch, group: Group) -> tuple[float, float]:
    """Return a step's loss and the seconds of the slower rank; a rank without a step waits."""
    barrier(group)
    start = time.perf_counter()
    loss = step(batch) if step else -math.inf
    mine = torch.tensor([loss, time.perf_counter() - start if step else 0.0], dtype=torch.float64)
    group.all_reduce(mine, "max").wait()
    return mine[0].item(), mine[1].item()


def check_equal(losses: dict[str, list[float]]) -> None:
    """Compare the losses of all turns so far, the later ones after updates, with those of the one process."""
    for name, found in losses.items():
        for loss, wanted in zip(found, losses[ALONE], strict=True):
            assert abs(loss - wanted) <= 1e-5 * wanted, f"{name} has loss {loss}, {ALONE} {wanted}"


def line(name: str, loss: float, seconds: list[float], alone: list[float]) -> dict[str, object]:
    """Compare a contestant's seconds with those of the one process, turn by turn."""
    ratios = [a / b for a, b in zip(seconds, alone, strict=True)]
    row: dict[str, object] = {"contestant": name, "last loss": loss, "ms": statistics.median(seconds) * 1e3}
    row |= {"ideal": 1.0 if name == ALONE else 0.5, "time of one process's": statistics.median(ratios)}
    return row | {"lowest": min(ratios), "highest": max(ratios), "target": None if name == ALONE else TARGET}


def draw(config: GPTConfig, turn: int, shape: tuple[int, int]) -> MicroBatch:
    """Return the rows of a turn, the same on every rank; every token is learnt."""
    generator = torch.Generator().manual_seed(turn)
    tokens = torch.randint(0, config.vocab_size, (shape[0], shape[1] + 1), generator=generator)
    zeros = torch.zeros(shape, dtype=torch.int64)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, zeros, zeros)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model; nothing is written")
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="of the global batch")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--repeats", type=int, default=9, help="turns that are timed")
    options = parser.parse_args()
    if options.quick:
        options.width, options.layers, options.rows, options.tokens, options.repeats = 64, 2, 2, 32, 2
    D = options.width
    config = preset("nano", num_layers=options.layers, model_dim=D, num_heads=8, num_kv_heads=8, head_dim=D // 8)
    config = replace(config, hidden_dim=4 * D, tied=False, attention="reference")
    shape = options.rows, options.tokens
    rows = minispeed.launch(compare, config, shape, options.repeats, ranks=2, backend="gloo")[0]
    print(table(rows)) if options.quick else report(
        "tensor_speed", rows, D=D, layers=options.layers, B=shape[0], T=shape[1], repeats=options.repeats
    )


if __name__ == "__main__":
    main()
