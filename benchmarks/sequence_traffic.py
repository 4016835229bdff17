"""How much does a rank send in a layer of sequence parallelism, and how evenly is the work shared?

    python benchmarks/sequence_traffic.py

b rows of s tokens, h features of all query heads, h_kv of all key heads, P ranks. Ulysses changes places four times,
queries, keys, values and output: b s (2 h + 2 h_kv) (P - 1)/P^2 elements forward (Jacobs et al. 2023, section 3), and
its transpose backward. The ring passes keys and values on P - 1 times: 2 b s h_kv (P - 1)/P (Liu et al. 2023, section
3); here backward their gradients as often. Documents of packed rows, b s/P (P - 1) integers, are gathered once for all
layers and counted apart. Under order each rank of the ring computes 2 P + 1 of the 4 P^2 blocks of s/2P x s/2P tokens,
so that all have the same to do. Counted from real steps of a GPT: the rank that sends, or does, least, and the most.
"""

import sys
import threading
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent))

from report import report

from minispeed.collective.launch import launch
from minispeed.collective.trace import Trace, Traced
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.sequence import ring
from minispeed.sequence.cut import cut_sequence

B, T, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 96, 2, 48, 24, 4
SHAPE = dict(num_layers=LAYERS, model_dim=32, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, hidden_dim=32)
H, H_KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM


def step(kind: str, ranks: int, *, packed: bool) -> list[tuple[Trace, Trace]]:
    """Return what each rank said in the forward of one step, and in its backward."""
    tokens = torch.arange(B * T).view(B, T) % 512
    rows = {"tokens": tokens, "labels": tokens, "positions": torch.arange(T).expand(B, T)}
    rows |= {"documents": rows["positions"] // 40} if packed else {}

    def on_rank(world) -> tuple[Trace, Trace]:
        forward, backward, model = Trace(), Trace(), GPT(preset("nano", **SHAPE))
        cut = cut_sequence(model, kind, Traced(world.group, forward))
        loss = model(**{name: cut.share(x, fill=0) for name, x in rows.items()}).sum()
        num_forward = forward.count()
        loss.backward()
        backward.events = forward.events[num_forward:]
        del forward.events[num_forward:]
        return forward, backward

    return launch(on_rank, ranks=ranks, backend="threads")


def formulas(kind: str, ranks: int) -> dict[str, float]:
    """Return the elements that each rank should send in a layer's forward and backward."""
    ulysses = B * T * (2 * H + 2 * H_KV) * (ranks - 1) / ranks**2
    once_round = 2 * B * T * H_KV * (ranks - 1) / ranks
    both = {"ulysses": (ulysses, ulysses), "ring": (once_round, 2 * once_round)}
    return dict(zip(("forward", "backward"), both[kind], strict=True))


def layer(kind: str, ranks: int) -> list[dict[str, object]]:
    """Return a row for the features of a layer's forward and backward, and one for all layers' documents."""
    message = {"ulysses": "all_to_all", "ring": "send"}[kind]
    packed = step(kind, ranks, packed=True)
    documents = [forward.sent("all_gather") / 8 for forward, _ in packed]
    for traces in packed:
        assert sum(t.sent() - t.sent(message) for t in traces) == traces[0].sent("all_gather")
    rows = []
    for (moment, formula), traces in zip(formulas(kind, ranks).items(), zip(*packed, strict=True), strict=True):
        sent = [trace.sent(message) / 4 / LAYERS for trace in traces]
        rows.append(line(kind, ranks, f"features, {moment}", formula, sent))
    return [*rows, line(kind, ranks, "documents, once", B * T / ranks * (ranks - 1), documents)]


def line(kind: str, ranks: int, what: str, formula: float, measured: list[float]) -> dict[str, object]:
    """Compare the least and the most of all ranks with a formula."""
    difference = max(abs(one - formula) for one in measured)
    row = {"kind": kind, "ranks": ranks, "elements per rank": what, "paper or closed form": round(formula, 3)}
    return row | {"measured, least": min(measured), "most": max(measured), "difference": difference}


def blocks(ranks: int) -> dict[str, object]:
    """Return how many blocks of queries and keys the ranks compute in a layer's forward."""
    computed: Counter[str] = Counter()
    original = ring.tile_scores

    def counted(q, k, block, tile):
        computed[threading.current_thread().name] += 1
        return original(q, k, block, tile)

    with patch.object(ring, "tile_scores", counted):
        step("ring", ranks, packed=False)
    each = [count / LAYERS for count in computed.values()]
    row = {"ranks": ranks, "blocks on a rank: 2 P + 1": 2 * ranks + 1, "measured, least": min(each), "most": max(each)}
    return row | {"in all": sum(each), "of": (2 * ranks) ** 2}


def main() -> None:
    counts = (1, 2, 3, 4, 8)
    settings = dict(b=B, s=T, h=H, h_kv=H_KV)
    rows = [row for kind in ("ulysses", "ring") for ranks in counts for row in layer(kind, ranks)]
    report("sequence_traffic", rows, **settings)
    report("sequence_blocks", [blocks(ranks) for ranks in counts], **settings)


if __name__ == "__main__":
    main()
