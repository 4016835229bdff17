"""FlashAttention: bytes that attention needs at its peak, forward and backward, as rows grow longer.

    python benchmarks/papers/attention.py            a minute
    python benchmarks/papers/attention.py --quick    short rows; nothing is written

Three attentions of one causal row run forward and backward alone: the formula, ours in tiles, torch's kernel. Counted
are the storages that operations make, beyond queries, keys, values and the gradient of the output, after each one; what
a kernel of torch takes for itself while it runs is not seen.

FlashAttention, Dao et al. 2022. https://arxiv.org/abs/2205.14135
Letters: H heads, T tokens (the paper's N), K head dim (its d), t tokens of a tile.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry import Entry, Row, run

from minispeed.census import Census
from minispeed.model.attention import fused, reference, tiled
from minispeed.model.mask import Mask

E = 4  # bytes of an element, fp32
KINDS = ("formula", "tiles", "kernel")
MOMENTS = ("kept for the backward", "peak forward", "peak backward")


@dataclass(frozen=True)
class Shape:
    """Heads, features of each, and tokens of a tile."""

    heads: int = 2
    width: int = 64
    tile: int = 128


MINE = Shape()


@lru_cache
def count(kind: str, tokens: int, shape: Shape = MINE) -> tuple[int, int, int]:
    """Return the bytes of the three moments; what is kept is beyond inputs and output."""
    kinds = {"formula": reference, "tiles": partial(tiled, tile=shape.tile), "kernel": fused}
    q, k, v, gradient = tensors(tokens, torch.float32, shape)
    with Census([q, k, v, gradient]) as census:
        before = census.alive()
        out = kinds[kind](q, k, v, Mask(tokens, tokens))
        forward, kept = census.peak - before, census.alive() - before - out.nbytes
        census.peak = 0
        out.backward(gradient)
        return kept, forward, census.peak - before


def tensors(tokens: int, dtype: torch.dtype, shape: Shape = MINE) -> list[Tensor]:
    """Return q, k, v and the gradient of the output, each (1, H, T, K)."""
    generator = torch.Generator().manual_seed(tokens)
    size = 1, shape.heads, tokens, shape.width
    drawn = [torch.randn(size, generator=generator, dtype=dtype) for _ in range(4)]
    return [x.requires_grad_(place < 3) for place, x in enumerate(drawn)]


def closed_form(kind: str, tokens: int, shape: Shape = MINE) -> tuple[int, int, int]:
    """Return the bytes of the three moments, read off `minispeed/model/attention.py`.

    formula  q / sqrt(K) and the softmax are kept; forward there are also the scores, the mask's term, which the heads
             share, and their sum; backward two gradients of scores, that of values and the output
    tiles    one number for each query is kept; forward there is the output, backward it, three gradients and one more
             number for each query; beside them scores of a few tiles, whatever T is, with their mask, a byte each,
             and its opposite. Of rows of two tiles or more, and heads at most half as wide as a tile
    kernel   the same is kept; backward there are the output, three gradients, and a copy of one, laid out as its
             tensor is. Of two heads or more
    """
    row, pairs, one = (E * shape.heads * tokens * by for by in (shape.width, tokens, 1))
    tile, some, few = (E * shape.heads * shape.tile * by for by in (shape.tile, shape.width, 1))
    masks = 2 * shape.tile**2
    return {
        "formula": (pairs + row, 3 * pairs + E * tokens**2 + row, 3 * pairs + 3 * row),
        "tiles": (one, row + one + 4 * tile + some + 4 * few + masks, 4 * row + 2 * one + 6 * tile + masks),
        "kernel": (one, row + one, 5 * row),
    }[kind]


def apart(tokens: int) -> float:
    """Return how far the tiles' output and gradients lie from the formula's, in float64, at most."""
    results = []
    for attend in (reference, tiled):
        *inputs, gradient = tensors(tokens, torch.float64)
        out = attend(*inputs, Mask(tokens, tokens))
        results.append([out, *torch.autograd.grad(out, inputs, gradient)])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


def at_a_length(tokens: int) -> Iterator[Row]:
    """Yield the bytes of each attention at each moment."""
    says = {"formula": "of order T T", "tiles": "of order T beside inputs and output", "kernel": "the same, of torch"}
    for kind, claim in says.items():
        for moment, ours, counted in zip(MOMENTS, closed_form(kind, tokens), count(kind, tokens), strict=True):
            yield Row(
                claim=f"{kind}, {moment}: {claim}, T = {tokens}",
                section="section 3.1, theorem 1" if kind != "formula" else "section 2.2, algorithm 0",
                paper=None,
                closed_form=ours,
                measured=counted,
                unit="bytes",
            )


def growth(short: int, long: int) -> Iterator[Row]:
    """Yield how much a longer row needs, and how much less than the formula."""
    for kind, order in (("formula", 2), ("tiles", 1), ("kernel", 1)):
        closed, counted = (max(of(kind, long)) / max(of(kind, short)) for of in (closed_form, count))
        yield Row(
            claim=f"{kind}: a row {long // short} times as long takes {(long // short) ** order} times the memory",
            section="section 4.3, figure 3",
            paper=(long / short) ** order,
            closed_form=closed,
            measured=counted,
            unit="times",
        )
    closed, counted = (max(of("formula", long)) / max(of("tiles", long)) for of in (closed_form, count))
    yield Row(
        claim="up to 20 times less memory than exact attention by the formula",
        section="section 4.3, figure 3",
        paper="up to 20",
        closed_form=closed,
        measured=counted,
        unit="times",
    )


def entry(quick: bool) -> Entry:
    """Return the paper's statements with what was counted."""
    lengths = (256, 512) if quick else (256, 512, 1024, 2048, 4096)
    exact = Row(
        claim="it is exact: nothing is approximated",
        section="section 3.1, theorem 1",
        paper=0,
        closed_form=None,
        measured=apart(lengths[0]),
        unit="largest difference in float64",
    )
    return Entry(
        topic="attention",
        title="FlashAttention: bytes at the peak",
        source="FlashAttention, Dao et al. 2022",
        link="https://arxiv.org/abs/2205.14135",
        rows=[exact, *at_a_length(lengths[-1]), *growth(lengths[0], lengths[-1])],
        notes=[
            f"One causal row, {MINE.heads} heads of {MINE.width} features, fp32, on a CPU, our tiles of {MINE.tile} x "
            f"{MINE.tile}. A peak is of the bytes alive after any operation, beyond the inputs; of torch's kernel its "
            "workspace is not seen.",
            "The formula needs most in the forward, where scores, their sum with the mask, and softmax stand side by "
            "side; tiles and kernel in the backward, where three gradients grow. Short rows grow by less than the "
            "order says, because a few tiles, or a few tensors of T K, are most of what they need.",
            "The paper's 20 times are of whole attention layers on a GPU, up to 64K tokens, among them others than the "
            "formula; ours of the peaks of the longest row here. The ratio goes on with T.",
            "How fast it is, and the accesses to slow memory that the paper counts, are not measured: our tiles are "
            "written to be read.",
        ],
        series={"lengths": lengths, "peaks": {kind: [max(count(kind, T)) for T in lengths] for kind in KINDS}},
    )


def draw(saved: Mapping[str, Any], path: Path) -> None:
    """Draw the peaks over the length, both in powers of two."""
    from drawing import save
    from matplotlib.figure import Figure

    from minispeed.figures import GREY

    lengths, peaks = saved["series"]["lengths"], saved["series"]["peaks"]
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    styles = {"formula": ("#d1793b", "o-"), "tiles": ("#4c7fb8", "s-"), "kernel": ("#5f9e6e", "^--")}
    for kind, (colour, style) in styles.items():
        axes.plot(lengths, peaks[kind], style, color=colour, ms=4, lw=1.4, label=kind)
    first = peaks["formula"][0]
    for order, name in ((2, "T T"), (1, "T")):
        start = first if order == 2 else peaks["kernel"][0] / 2
        line = [start * (T / lengths[0]) ** order * 0.6 for T in lengths]
        axes.plot(lengths, line, ":", color=GREY, lw=1)
        axes.annotate(
            f"of order {name}", (lengths[-2], line[-2]), (4, -12), textcoords="offset points", color=GREY, fontsize=8
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(T) for T in lengths])
    axes.set(xlabel="tokens of the row", ylabel="bytes at the peak, beyond the inputs")
    axes.legend(loc="upper left")
    save(figure, path)


if __name__ == "__main__":
    run(entry, draw)
