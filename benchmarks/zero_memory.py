"""How many bytes does a rank hold at each ZeRO stage, and is it what the paper says?

    python benchmarks/zero_memory.py

A GPT trains a step on 1, 2, 4 and 8 thread ranks; the storages of its parameters, gradients and optimizer states are
measured, and stand beside the paper's 16 P, 4 P + 12 P/N, 2 P + 14 P/N, 16 P/N (ZeRO, Rajbhandari et al. 2020,
section 3.1 and figure 1) and beside the same with fp32 gradients. What differs is padding.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from report import report

from minispeed.collective.threads import run_threads
from minispeed.engine import Engine, MicroBatch
from minispeed.ledger import Held, paper_bytes
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.precision import DTYPES, Precision
from minispeed.scaler import LossScaler
from minispeed.schedules import constant
from minispeed.testing.measure import measure_held

CONFIG = preset("nano", vocab_size=512, num_layers=4, model_dim=64, num_heads=4, num_kv_heads=4, head_dim=16)


def measured(ranks: int, stage: int, precision: Precision) -> tuple[list[Held], int]:
    """Train two steps; return what each rank held, and P."""

    def train(group):
        scaler = LossScaler(scale=8.0) if precision.needs_scaler else None
        engine = Engine(GPT(CONFIG), group, precision=precision, schedule=constant, lr=1e-3, zero=stage, scaler=scaler)
        tokens = torch.arange(8)[None]
        zeros = torch.zeros_like(tokens)
        step = [MicroBatch(tokens, tokens, tokens, zeros, zeros)]
        engine.train_step(step)
        return measure_held(engine, lambda: engine.train_step(step)), sum(u.num_elements for u in engine.sharded.units)

    results = run_threads(train, ranks)
    return [held for held, _ in results], results[0][1]


def main() -> None:
    rows = []
    for dtype in ("fp16", "bf16"):
        for gradient_bytes, accumulate in ((2, DTYPES[dtype]), (4, torch.float32)):
            for ranks in (1, 2, 4, 8):
                for stage in range(4):
                    precision = Precision(DTYPES[dtype], accumulate=accumulate)
                    held, P = measured(ranks, stage, precision)
                    most = max(held, key=lambda one: one.total)
                    says = paper_bytes(P, ranks=ranks, stage=stage, gradient_bytes=gradient_bytes)
                    rows.append(
                        {
                            "dtype": dtype,
                            "gradient": "fp32" if gradient_bytes == 4 else dtype,
                            "ranks": ranks,
                            "stage": stage,
                            "parameters": most.parameters,
                            "gradients": most.gradients,
                            "optimizer": most.optimizer,
                            "measured": most.total,
                            "paper": round(says),
                            "bytes per P": most.total / P,
                            "difference": most.total / says - 1,
                        }
                    )
    report("zero_memory", rows, parameters=P)


if __name__ == "__main__":
    main()
