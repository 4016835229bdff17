"""Rows cut by tokens: what Ulysses and ring attention send, when the ring's are hidden, and who has most to do.

    python benchmarks/papers/sequence.py            seconds
    python benchmarks/papers/sequence.py --quick    fewer ranks; nothing is written

One attention, forward and backward, on ranks that are threads: every message is counted, and the floating-point
operations of its matrix products as torch counts them. Pairs of tokens are counted off the masks by which the ring
attends, and, where rows were cut in runs, off the tokens' places.

DeepSpeed Ulysses, Jacobs et al. 2023 (https://arxiv.org/abs/2309.14509). Ring attention, Liu et al. 2023
(https://arxiv.org/abs/2310.01889). Striped attention, Brandon et al. 2023 (https://arxiv.org/abs/2311.09431).
Letters, the papers': N tokens of a row, h features of all heads, P ranks, c = N/P tokens of a rank.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import tensor_traffic
from entry import Entry, Row, run

from minispeed.collective.group import Group
from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Trace, Traced
from minispeed.model.attention import fused
from minispeed.model.mask import Mask
from minispeed.sequence.ring import blocks_of, ring
from minispeed.sequence.ulysses import contiguous, ulysses

HEADS, WIDTH = 8, 4
h = HEADS * WIDTH
ULYSSES, RING = "Jacobs 2023, section 3.2", "Liu 2023, section 3"
Share = Callable[[int, int], tuple[int, ...]]  # (rank, P) -> its chunks of a row


class Said(NamedTuple):
    """Elements of one attention on a rank, and its products' floating-point operations.

    held, sent  of a forward: in its messages, and what of them leaves the rank
    back        what leaves it in the backward
    """

    held: float
    sent: float
    back: float
    flops: int


@lru_cache
def said(kind: str, ranks: int, tokens: int, *, causal: bool = True) -> Said:
    """Return what each rank says of a row; it is the same on all."""

    def on_rank(group: Group) -> Said:
        trace = Trace()
        traced = Traced(group, trace)
        attend = ulysses(fused, traced) if kind == "ulysses" else ring(traced)
        mine = tokens // group.size
        q, k, v = (torch.ones(1, HEADS, mine, WIDTH, requires_grad=True) for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            out = attend(q, k, v, Mask(mine, mine, causal=causal))
        held = sum(event.bytes for event in trace.events if event.kind != "recv") / 4
        sent, flops = trace.sent() / 4, counter.get_total_flops()
        out.sum().backward()
        return Said(held, sent, trace.sent() / 4 - sent, flops)

    found = set(run_threads(on_rank, ranks))
    assert len(found) == 1, "all ranks say as much, and compute as much"
    return found.pop()


def pairs(share: Share, ranks: int, chunk: int) -> list[list[int]]:
    """Return by rank and step of the ring how many of its tokens' pairs order allows, of chunks of so many tokens."""

    def places(rank: int) -> torch.Tensor:
        return torch.cat([torch.arange(number * chunk, (number + 1) * chunk) for number in share(rank, ranks)])

    def seen(rank: int, step: int) -> int:
        return int((places(rank)[:, None] >= places((rank - step) % ranks)).sum())

    return [[seen(rank, step) for step in range(ranks)] for rank in range(ranks)]


def pairs_of_the_ring(ranks: int, chunk: int) -> list[list[int]]:
    """Return the same for the ring as it runs: counted off the masks of its blocks."""

    def seen(rank: int, step: int) -> int:
        source, whole = (rank - step) % ranks, slice(0, chunk)
        blocks = blocks_of(rank, source, size=ranks, mask=Mask(2 * chunk, 2 * chunk), documents=None)
        allowed = (block.mask.allowed(whole, whole, torch.device("cpu")) for block in blocks)
        return sum(chunk**2 if mask is None else int(mask.sum()) for mask in allowed)

    return [[seen(rank, step) for step in range(ranks)] for rank in range(ranks)]


def waits(counted: list[list[int]]) -> float:
    """Return how long all steps take if each waits for its slowest rank, of what it would if all had as much to do."""
    return sum(map(max, zip(*counted))) * len(counted) / sum(map(sum, counted))


def all_to_all(ranks: int) -> Iterator[Row]:
    """Yield what Ulysses says of its messages."""
    N = 16 * ranks
    found = said("ulysses", ranks, N)
    share = (ranks - 1) / ranks
    row = partial(Row, section=ULYSSES)
    yield row(
        claim=f"queries, keys, values and outputs change places in messages of 4 N h/P a rank, P = {ranks}",
        paper=4 / ranks,
        closed_form=4 / ranks,
        measured=found.held / (N * h),
        unit="N h elements",
    )
    yield row(
        claim=f"of which (P - 1)/P leave the rank, and as many backward, P = {ranks}",
        paper=None,
        closed_form=2 * 4 * share / ranks,
        measured=(found.sent + found.back) / (N * h),
        unit="N h elements",
    )
    layer = [line for line in tensor_traffic.layer(ranks, True) if line["message"] != "all_reduce"]
    theirs = sum(line["in BTD(t-1)/t"] for line in layer)
    yield row(
        claim=f"Megatron's sequence parallelism sends P times as much in a layer, P = {ranks}",
        paper=ranks,
        closed_form=8 / (8 / ranks),
        measured=theirs / ((found.sent + found.back) / (N * h) / share),
        unit="times",
    )


def growing(counts: tuple[int, ...]) -> Row:
    """Return that longer rows on more ranks send no more."""
    held = [said("ulysses", ranks, 16 * ranks).held for ranks in counts]
    return Row(
        claim=f"the messages stay as long when N and P grow together, from P = {counts[0]} to {counts[-1]}",
        section=ULYSSES,
        paper=1,
        closed_form=1,
        measured=held[-1] / held[0],
        unit="times",
    )


def passed_on(ranks: int) -> Iterator[Row]:
    """Yield what is said of a ring: messages of keys and values, and what is computed meanwhile."""
    c = 16
    N = c * ranks
    found, ordered = said("ring", ranks, N, causal=False), said("ring", ranks, N)
    row = partial(Row, section=RING)
    yield row(
        claim=f"each step a rank hands on keys and values of c tokens, 2 c h elements, P = {ranks}",
        paper=2,
        closed_form=2,
        measured=found.sent / (ranks - 1) / (c * h),
        unit="c h elements a step",
    )
    yield row(
        claim=f"backward, here, those and their gradients, P = {ranks}",
        paper=None,
        closed_form=4,
        measured=found.back / (ranks - 1) / (c * h),
        unit="c h elements a step",
    )
    yield row(
        claim=f"a step computes 4 h c^2, P = {ranks}",
        paper=4,
        closed_form=4,
        measured=found.flops / ranks / (h * c**2),
        unit="h c^2 FLOPs",
    )
    yield row(
        claim=f"so in 16 bits it has c FLOPs to hide each byte behind, P = {ranks}",
        paper=1,
        closed_form=1,
        measured=(found.flops / ranks) / (found.sent / (ranks - 1) * 2) / c,
        unit="c FLOPs for a byte",
    )
    yield row(
        claim=f"under order, here, half as many in every step but the first, P = {ranks}",
        paper=None,
        closed_form=0.5,
        measured=(ordered.flops - found.flops / ranks * 3 / 4) / (ranks - 1) / (found.flops / ranks),
        unit="of the FLOPs",
    )


def smallest_chunk() -> Row:
    """Return how many tokens hide the messages on the paper's hardware."""
    return Row(
        claim="on A100s at 312 TFLOP/s and 300 GB/s messages are hidden from c = F/B tokens on",
        section=f"{RING}, table 2",
        paper="1.0 thousand",
        closed_form=312e12 / 300e9,
        measured=None,
        unit="tokens",
    )


def balance(ranks: int, chunk: int) -> Iterator[Row]:
    """Yield how evenly pairs of tokens lie on the ranks: in runs, and in pairs of chunks."""
    c, N = 2 * chunk, 2 * chunk * ranks
    whole = N * (N + 1) // 2
    runs, ours = pairs(contiguous, ranks, c), pairs_of_the_ring(ranks, chunk)
    places = (("the first", 0), ("the last", ranks - 1))
    for name, rank in places:
        yield Row(
            claim=f"cut in runs, {name} rank has this share of all pairs, P = {ranks}",
            section="Brandon 2023, section 1",
            paper=None,
            closed_form=(rank * c**2 + c * (c + 1) // 2) / whole,
            measured=sum(runs[rank]) / whole,
            unit="of the pairs",
        )
    for name, rank in places:
        yield Row(
            claim=f"in two chunks, one from each end, {name} rank has as much as all, P = {ranks}",
            section="Brandon 2023, by other chunks",
            paper=None,
            closed_form=1 / ranks,
            measured=sum(ours[rank]) / whole,
            unit="of the pairs",
        )
    slowest = (c * (c + 1) / 2 + (ranks - 1) * c**2) * ranks / whole
    for name, counted, paper, formula in (
        ("in runs, it takes up to twice", runs, 2, slowest),
        ("in two chunks, as long as", ours, 1, 1),
    ):
        yield Row(
            claim=f"cut {name} what it would if each step were shared evenly, P = {ranks}",
            section="Brandon 2023, section 1",
            paper=paper,
            closed_form=formula,
            measured=waits(counted),
            unit="times",
        )


def entry(quick: bool) -> Entry:
    """Return the papers' statements with what was counted."""
    counts = (2, 4) if quick else (2, 4, 8)
    ranks, chunk = counts[-1], 16 if quick else 256
    return Entry(
        topic="sequence",
        title="Rows cut by tokens: Ulysses and ring attention",
        source="DeepSpeed Ulysses, Jacobs et al. 2023; ring attention, Liu et al. 2023 "
        "(https://arxiv.org/abs/2310.01889)",
        link="https://arxiv.org/abs/2309.14509",
        rows=[
            *(row for P in counts for row in all_to_all(P)),
            growing(counts),
            *(row for P in counts for row in passed_on(P)),
            smallest_chunk(),
            *balance(ranks, chunk),
        ],
        notes=[
            f"One attention of {HEADS} heads with keys and values of their own, h = {h}, fp32; messages are counted in "
            "elements, so that the dtype does not matter, but that gradients of keys and values travel in fp32 always. "
            "With fewer key heads both send less: benchmarks/sequence_traffic.py.",
            "Ulysses' paper counts the part of a message that a rank keeps; on P ranks (P - 1)/P of it leave. "
            "Megatron's is a layer of tensor parallelism with rows cut by tokens, forward and backward, counted in "
            "benchmarks/tensor_traffic.py.",
            "FLOPs are those of matrix products. That messages are hidden while they take no longer than the products "
            "follows from the two counts; times are not measured. Under order the ring computes a block of every two, "
            "and so needs chunks twice as long; blocks on the diagonal, in the first step, are computed whole, 3 of 4.",
            "Striped attention deals out single tokens in turn; here a rank has a chunk from the start and its like "
            f"from the end, to the same effect. Pairs: a row of {2 * chunk * ranks} tokens.",
        ],
        series={"runs": pairs(contiguous, ranks, 2 * chunk), "two chunks": pairs_of_the_ring(ranks, chunk)},
    )


def draw(saved: Mapping[str, Any], path: Path) -> None:
    """Draw each rank's pairs, step upon step, for both ways to cut a row."""
    import matplotlib
    from drawing import save
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 3.0))
    both = figure.subplots(1, 2, sharey=True)
    titles = {"runs": "one run of tokens each", "two chunks": "two chunks each, from both ends"}
    for axes, (name, title) in zip(both, titles.items()):
        counted = saved["series"][name]
        ranks, whole = len(counted), sum(map(sum, counted))
        below = [0.0] * ranks
        for step in range(ranks):
            shares = [100 * of_rank[step] / whole for of_rank in counted]
            colour = matplotlib.colormaps["viridis"](0.15 + 0.75 * step / max(1, ranks - 1))
            axes.bar(range(ranks), shares, 0.72, bottom=below, color=colour)
            below = [a + b for a, b in zip(below, shares)]
        axes.axhline(100 / ranks, color="#d1793b", lw=1, ls="--")
        axes.set(
            xlabel="rank", title=f"{title}:\n{waits(counted):.2f} times as long as shared evenly", xticks=range(ranks)
        )
    both[0].set_ylabel("pairs of tokens, % of all;\nfrom dark to light, step by step")
    figure.subplots_adjust(wspace=0.08)
    save(figure, path)


if __name__ == "__main__":
    run(entry, draw)
