"""How many elements does a rank send in a step at each ZeRO stage?

    python benchmarks/zero_traffic.py

In units of P (N - 1)/N, for g micro-batches: 2, 2, g + 1, 3 g (ZeRO, Rajbhandari et al. 2020, section 7). And why a
ring: summed through one rank, that rank sends (N - 1) P; in a ring every rank sends 2 P (N - 1)/N.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from report import report

from minispeed.collective.rings import all_reduce, central_all_reduce
from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Trace, Traced
from minispeed.engine import Engine, MicroBatch
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.precision import Precision
from minispeed.schedules import constant

SHAPE = dict(num_heads=4, num_kv_heads=4, head_dim=16, hidden_dim=128, tied=False)
CONFIG = preset("nano", vocab_size=512, num_layers=4, model_dim=64, **SHAPE)
SCALARS = 16  # bytes: counts and norms


def sent_by(ranks: int, stage: int, micro: int) -> tuple[list[int], int]:
    """Return the elements that each rank sends in a step, and P."""

    def train(group):
        trace = Trace()
        engine = Engine(
            GPT(CONFIG),
            Traced(group, trace),
            precision=Precision(torch.float32),
            schedule=constant,
            lr=1e-3,
            zero=stage,
        )
        tokens = torch.arange(8)[None]
        zeros = torch.zeros_like(tokens)
        step = [MicroBatch(tokens, tokens, tokens, zeros, zeros)] * micro
        engine.train_step(step)
        trace.clear()
        engine.train_step(step)
        return sum(e.sent for e in trace.events if e.bytes > SCALARS) // 4, sum(
            u.num_elements for u in engine.sharded.units
        )

    results = run_threads(train, ranks)
    return [elements for elements, _ in results], results[0][1]


def sent_to_sum(ranks: int, how) -> list[int]:
    """Return the elements that each rank sends to sum a buffer of 1,000 elements per rank."""

    def reduce(group):
        trace = Trace()
        how(Traced(group, trace), torch.ones(1000 * group.size))
        return trace.sent() // 4

    return run_threads(reduce, ranks)


def main() -> None:
    rows = []
    for ranks in (2, 4, 8):
        for micro in (1, 4):
            for stage, says in enumerate((2, 2, micro + 1, 3 * micro)):
                elements, P = sent_by(ranks, stage, micro)
                unit = P * (ranks - 1) / ranks
                rows.append(
                    {
                        "ranks": ranks,
                        "micro-batches": micro,
                        "stage": stage,
                        "sent per rank": round(sum(elements) / ranks),
                        "in P(N-1)/N": sum(elements) / ranks / unit,
                        "paper": says,
                    }
                )
    report("zero_traffic", rows, parameters=P)
    rows = []
    for ranks in (2, 4, 8):
        for name, how in (("ring", all_reduce), ("through rank 0", central_all_reduce)):
            elements = sent_to_sum(ranks, how)
            rows.append({"all-reduce": name, "ranks": ranks, "P": 1000 * ranks, "sent by rank 0": elements[0],
                         "sent by rank 1": elements[1]})  # fmt: skip
    report("central_gather", rows)


if __name__ == "__main__":
    main()
