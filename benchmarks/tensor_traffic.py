"""How much does a rank send in a step of tensor parallelism, and where?

    python benchmarks/tensor_traffic.py

A layer: 2 all-reduces of B T D elements forward and 2 backward (Megatron-LM, Shoeybi et al. 2019, section 3), which in
a ring is 8 B T D (t - 1)/t elements sent by each of t ranks. With rows cut by tokens 4 all-gathers and 4
reduce-scatters send as much (Korthikanti et al. 2022, section 4.2.2), and the gradients of norms are summed. The loss
of a supervised token: 3 numbers, where its logits would be V; backward D more, the gradient of its features. Counted
from real steps; a layer's share is what a model with 2 layers sends beyond one with 1.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from report import report

from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Trace, Traced
from minispeed.model.gpt import GPT
from minispeed.model.loss import IGNORED
from minispeed.model.presets import preset
from minispeed.tensor.parallel import tensor_parallel
from minispeed.tensor.plan import gpt_plan

B, T, D, V = 2, 48, 64, 1003  # 1003 = 17 x 59: no number of ranks here divides it
SHAPE = dict(num_heads=24, num_kv_heads=24, head_dim=4, hidden_dim=192, vocab_size=V, model_dim=D)
KINDS = ("all_reduce", "all_gather", "reduce_scatter")


def trace_of(ranks: int, *, layers: int, is_cut: bool, supervised: int, backward: bool = True) -> list[Trace]:
    """Return what each rank said in a forward, and a backward, of rows with `supervised` tokens to learn from."""
    tokens = torch.arange(B * T).view(B, T)
    labels = torch.where(tokens < supervised, tokens, IGNORED)

    def step(group) -> Trace:
        trace, model = Trace(), GPT(preset("nano", num_layers=layers, **SHAPE))
        tensor_parallel(model, gpt_plan(model.config), Traced(group, trace), sequence_parallel=is_cut)
        loss = model(tokens, labels).sum()
        if backward:
            loss.backward()
        return trace

    return run_threads(step, ranks)


def beyond(more: list[Trace], fewer: list[Trace], kind: str) -> tuple[float, float]:
    """Return the calls of a kind, and the elements sent by them, that one run has beyond another: means over ranks."""
    calls = sum(a.count(kind) - b.count(kind) for a, b in zip(more, fewer, strict=True))
    sent = sum(a.sent(kind) - b.sent(kind) for a, b in zip(more, fewer, strict=True)) / 4
    return calls / len(more), sent / len(more)


def layer(ranks: int, is_cut: bool) -> list[dict[str, object]]:
    """Return a row for each kind of message of one layer."""
    two, one = (trace_of(ranks, layers=n, is_cut=is_cut, supervised=B * T) for n in (2, 1))
    norms = 2 * 2 * D  # weights and biases of two LayerNorms: with cut rows their gradients are summed
    says = (
        {"all_reduce": 2 * norms / (B * T * D), "all_gather": 4, "reduce_scatter": 4} if is_cut else {"all_reduce": 8}
    )
    rows = []
    for kind, formula in says.items():
        calls, sent = beyond(two, one, kind)
        row = {"ranks": ranks, "rows": "cut by tokens" if is_cut else "whole", "message": kind, "calls": round(calls)}
        row |= {"sent per rank": round(sent), "in BTD(t-1)/t": sent / (B * T * D * (ranks - 1) / ranks)}
        rows.append(row | {"formula": formula})
    return rows


def token(ranks: int) -> dict[str, object]:
    """Return the elements that are all-reduced for one more supervised token, forward and backward."""
    row: dict[str, object] = {"ranks": ranks}
    for name, backward, formula in (("forward", False, 3), ("and backward", True, 3 + D)):
        step = dict(layers=1, is_cut=False, backward=backward)
        more, fewer = (trace_of(ranks, supervised=n, **step) for n in (B * T, B * T // 2))
        _, sent = beyond(more, fewer, "all_reduce")
        row |= {name: sent / (B * T / 2) / (2 * (ranks - 1) / ranks), f"{name}: formula": formula}
    return row | {"logits would be": V}


def main() -> None:
    counts = (2, 3, 4, 8)
    rows = [row for ranks in counts for is_cut in (False, True) for row in layer(ranks, is_cut)]
    report("tensor_traffic", rows, B=B, T=T, D=D)
    report("tensor_traffic_loss", [token(ranks) for ranks in counts], B=B, T=T, D=D, V=V)


if __name__ == "__main__":
    main()
