"""What does the engine cost on one rank, beside a loop of five lines in plain PyTorch?

    python benchmarks/engine_speed.py [--tokens 256] [--rows 8]

A GPT of 14M parameters in fp32, one process, one thread. The loop is forward, mean loss, backward, torch's fused AdamW,
zero_grad. Contestants start from the same weights, see the same rows and take their steps in turn, in an order that
turns by one each time; their losses must agree before anything is timed. Figures are medians over steps of the ratio to
the loop in the same turn.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from report import report
from zero_speed import BETAS, CONFIG, LR, draw

from minispeed.collective.world import current_world
from minispeed.engine import Engine, MicroBatch
from minispeed.model.gpt import GPT
from minispeed.precision import Precision

WARM_UP, STEPS = 3, 21
Step = Callable[[MicroBatch], float]  # one update; returns the mean loss


def plain() -> Step:
    """Return the step of a plain loop."""
    model = GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0, fused=True)

    def step(batch: MicroBatch) -> float:
        loss = model(batch.tokens, batch.labels, positions=batch.positions, documents=batch.documents).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def ours(stage: int) -> Step:
    """Return the step of this library's engine."""
    engine = Engine(GPT(CONFIG), precision=Precision(torch.float32), lr=LR, betas=BETAS, zero=stage)
    return lambda batch: engine.train_step([batch]).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    contestants = {"plain loop": plain()} | {f"minispeed {stage}": ours(stage) for stage in range(4)}
    order = list(contestants)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    losses: dict[str, float] = {}
    for index in range(WARM_UP + STEPS):
        batch = draw(current_world(), index, (options.rows, options.tokens))
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            losses[name] = contestants[name](batch)
            if index >= WARM_UP:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        order = order[1:] + order[:1]
        for name, loss in losses.items():
            assert abs(loss - losses["plain loop"]) <= 1e-5 * loss, f"{name} has loss {loss} at step {index}"
    rows = []
    for name, spent in seconds.items():
        wall, cpu = ([a[i] / b[i] for a, b in zip(spent, seconds["plain loop"])] for i in (0, 1))
        rows.append(
            {
                "contestant": name,
                "ms": statistics.median(a[0] for a in spent) * 1e3,
                "time of the loop's": statistics.median(wall),
                "lowest": min(wall),
                "highest": max(wall),
                "CPU time of the loop's": statistics.median(cpu),
            }
        )
    report("engine_speed", rows, batch=options.rows, tokens=options.tokens, steps=STEPS)


if __name__ == "__main__":
    main()
