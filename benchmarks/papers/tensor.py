"""Megatron's tensor and sequence parallelism: what a layer says on each rank, and what it keeps for its backward.

    python benchmarks/papers/tensor.py            half a minute
    python benchmarks/papers/tensor.py --quick    small shapes; nothing is written

Messages are counted in steps of a GPT on ranks that are threads; a layer's are what a model of two layers sends beyond
one of one. What is kept are the storages that autograd saves, each once, on every rank alike.

Megatron-LM, Shoeybi et al. 2019 (https://arxiv.org/abs/1909.08053). Reducing activation recomputation, Korthikanti et
al. 2022 (https://arxiv.org/abs/2205.05198).
Letters, the papers': b rows, s tokens, h model, a heads, t ranks.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import tensor_traffic
from activation_memory import Case, beyond_paper, closed_form, count, paper
from entry import Entry, Row, run

from minispeed.axes import Layout
from minispeed.ledger.job import Job
from minispeed.ledger.messages import messages
from minispeed.model.presets import preset

COUNTS = "elements, in b s h (t - 1)/t"
MEGATRON, SECTION = "Shoeybi 2019, section 3", "Korthikanti 2022, section"
VARIANTS = {  # ranks, rows cut by tokens, attention, recomputed; how table 2 and section 4.2 write it
    "one rank": (1, False, "reference", "none", "34 + 5 a s/h"),
    "tensor": (4, False, "reference", "none", "10 + 24/t + 5 a s/(h t)"),
    "tensor, sequence": (4, True, "reference", "none", "34/t + 5 a s/(h t)"),
    "tensor, selective": (4, False, "reference", "attention", "10 + 24/t"),
    "tensor, sequence, selective": (4, True, "reference", "attention", "34/t"),
    "the same, by a kernel": (4, True, "fused", "none", "34/t"),
    "tensor, all recomputed": (4, False, "reference", "all", "2"),
}


@lru_cache
def said(ranks: int, layers: int, is_cut: bool) -> Mapping[tuple[str, bool], tuple[int, float]]:
    """Return the closed form of what the counted model says: calls and elements, by kind, and whether of features."""
    config = preset("nano", num_layers=layers, **tensor_traffic.SHAPE)
    layout = Layout(tp=ranks, tokens=is_cut)
    B, T = tensor_traffic.B, tensor_traffic.T
    job = Job(model=config, devices=ranks, rows=B, tokens=T, micro_batch=B, layout=layout, dtype="fp32")
    found: dict[tuple[str, bool], tuple[int, float]] = {}
    for one in messages(job):
        if one.axis == "tp":
            key = one.kind, "parameters" not in one.what
            calls, elements = found.get(key, (0, 0.0))
            found[key] = calls + one.count, elements + one.bytes / 4
    return found


def of_a_layer(ranks: int, is_cut: bool, kind: str, *, features: bool = True) -> tuple[int, float]:
    """Return its calls of a kind, and elements in b s h (t - 1)/t, by the closed form."""
    (more, most), (fewer, least) = (said(ranks, n, is_cut).get((kind, features), (0, 0.0)) for n in (2, 1))
    share = tensor_traffic.B * tensor_traffic.T * tensor_traffic.D * (ranks - 1) / ranks
    return more - fewer, (most - least) / share


def traffic(ranks: int) -> Iterator[Row]:
    """Yield what both papers say of a layer's messages."""
    rows = [line for is_cut in (False, True) for line in tensor_traffic.layer(ranks, is_cut)]
    counted = {(line["rows"], line["message"]): (line["calls"], line["in BTD(t-1)/t"]) for line in rows}
    whole = counted["whole", "all_reduce"]
    cut = {kind: counted["cut by tokens", kind] for kind in ("all_gather", "reduce_scatter", "all_reduce")}
    calls, elements = of_a_layer(ranks, False, "all_reduce")
    claim = f"a layer all-reduces twice forward and twice backward, t = {ranks}"
    yield Row(claim=claim, section=MEGATRON, paper=4, closed_form=calls, measured=whole[0], unit="calls")
    yield Row(
        claim=f"of its features each time, t = {ranks}",
        section=MEGATRON,
        paper=None,
        closed_form=elements,
        measured=whole[1],
        unit=COUNTS,
    )
    for kind in ("all_gather", "reduce_scatter"):
        calls, _ = of_a_layer(ranks, True, kind)
        claim = f"cut by tokens it has four calls of {kind} in place of them, t = {ranks}"
        yield Row(
            claim=claim, section=f"{SECTION} 4.2.2", paper=4, closed_form=calls, measured=cut[kind][0], unit="calls"
        )
    yield Row(
        claim=f"which together send what the all-reduces do, t = {ranks}",
        section=f"{SECTION} 4.2.2",
        paper=1,
        closed_form=sum(of_a_layer(ranks, True, kind)[1] for kind in ("all_gather", "reduce_scatter")) / elements,
        measured=(cut["all_gather"][1] + cut["reduce_scatter"][1]) / whole[1],
        unit="of theirs",
    )
    yield Row(
        claim=f"and gradients of norms beside, of which the paper does not speak, t = {ranks}",
        section=f"{SECTION} 4.2.2",
        paper=None,
        closed_form=of_a_layer(ranks, True, "all_reduce", features=False)[1],
        measured=cut["all_reduce"][1],
        unit=COUNTS,
    )


def loss(ranks: int) -> Row:
    """Return what is said of a token's loss in place of its logits."""
    found = tensor_traffic.token(ranks)
    return Row(
        claim=f"a token's loss needs a few numbers, and not v logits ({tensor_traffic.V} here), t = {ranks}",
        section=MEGATRON,
        paper=1,
        closed_form=found["forward: formula"],
        measured=found["forward"],
        unit="elements all-reduced forward",
    )


def case_of(name: str, h: int, s: int) -> Case:
    """Return a variant of a GPT-2 block of width h on rows of s tokens."""
    t, is_cut, attention, recomputed, _ = VARIANTS[name]
    config = preset(
        "gpt2",
        vocab_size=512,
        max_positions=s,
        num_layers=1,
        model_dim=h,
        num_heads=12,
        num_kv_heads=12,
        head_dim=h // 12,
        hidden_dim=4 * h,
    )
    config = replace(config, attention=attention)
    return Case(config=config, b=2, s=s, dtype="bf16", t=t, is_cut=is_cut, recomputed=recomputed)


def kept(name: str, case: Case) -> Row:
    """Return what a block keeps, in units of s b h bytes, the paper's."""
    unit = case.b * case.s * case.config.model_dim
    counted = count(case)
    assert min(counted) == max(counted), "all ranks keep as much"
    return Row(
        claim=f"a layer keeps s b h ({VARIANTS[name][-1]}) bytes: {name}, t = {case.t}",
        section=f"{SECTION}s 4 and 5, table 2",
        paper=(paper(case) or 0) / unit,
        closed_form=sum(closed_form(case).values()) / unit,
        measured=counted[0] / unit,
        unit="s b h bytes",
    )


def terms(case: Case) -> dict[str, float]:
    """Return by how much, and why, a block keeps more or less than the paper says, in s b h bytes."""
    unit = case.b * case.s * case.config.model_dim
    return {name: size / unit for name, size in beyond_paper(case).items() if size}


def large() -> tuple[Case, Case]:
    """Return the paper's model of 22 billion parameters, with tensor parallelism alone, and with all that it adds."""
    shape = dict(model_dim=6144, num_heads=64, num_kv_heads=64, head_dim=96, hidden_dim=24576)
    plain = Case(config=preset("gpt2", num_layers=1, attention="reference", **shape), b=4, s=2048, t=8)
    return plain, replace(plain, is_cut=True, recomputed="attention")


def left(both: Iterable[float]) -> float:
    """Return what the second of two keeps of what the first does."""
    first, second = both
    return second / first


def entry(quick: bool) -> Entry:
    """Return the papers' statements with what was counted."""
    h, s = (48, 16) if quick else (768, 512)
    shapes = {name: case_of(name, h, s) for name in VARIANTS}
    rows = [row for ranks in ((2,) if quick else (2, 4, 8)) for row in (*traffic(ranks), loss(ranks))]
    keeps = [kept(name, case) for name, case in shapes.items()]
    theirs, ours = ([of(case) for case in large()] for of in (paper, lambda case: sum(closed_form(case).values())))
    unit = 4 * 2048 * 6144
    share = Row(
        claim="sequence parallelism and selective recomputation leave under 20 % of what tensor parallelism keeps, 22B",
        section=f"{SECTION} 6.1, figure 7",
        paper="< 0.20",
        closed_form=left(ours),
        measured=None,
        unit="share",
    )
    B, T, D = tensor_traffic.B, tensor_traffic.T, tensor_traffic.D
    return Entry(
        topic="tensor",
        title="Tensor and sequence parallelism: messages, and what a layer keeps",
        source="Megatron-LM, Shoeybi et al. 2019; Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198)",
        link="https://arxiv.org/abs/1909.08053",
        rows=[*rows, *keeps, share],
        notes=[
            f"Messages: b = {B}, s = {T}, h = {D}, fp32, ranks as threads; each call counted as the ring that it is, "
            "which is what NCCL sends for large messages. How long they take is not measured.",
            "Of a token's loss the paper speaks of the one number that is left; to have it, the largest logit, the sum "
            "and the label's logit are all-reduced: three.",
            f"Kept: a GPT-2 block in bf16, b = 2, s = {s}, h = {h}, a = 12, on a CPU. What differs from the paper, in "
            "s b h bytes, and nothing is left unexplained: "
            + "; ".join(f"{name}: {_spelt(terms(case))}" for name, case in shapes.items())
            + ".",
            "No dropout masks (a byte each) and no weights after dropout: the model is trained without. Inputs kept "
            "gathered: where tokens are cut, the paper keeps s/t of what enters a layer and gathers it again in the "
            "backward; here it stays gathered, for 4 (1 - 1/t) more, and a call fewer. A recomputed block's input is "
            "whole in the paper, and here too where rows are.",
            "The row of 22B is the closed form alone, no such layer was run: "
            f"{ours[1] / unit:.2f} of {ours[0] / unit:.2f} s b h bytes, where the paper's formulas say "
            f"{theirs[1] / unit:.2f} of {theirs[0] / unit:.2f}. Without dropout there is less to save, and what stays "
            f"gathered, {4 * 7 / 8} s b h at t = 8, is nearly half of what is left.",
        ],
        series={"variants": {name: [row.paper, row.measured] for name, row in zip(shapes, keeps, strict=True)}},
    )


def _spelt(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size:+.3f}" for name, size in found.items()) or "nothing"


def draw(saved: Mapping[str, Any], path: Path) -> None:
    """Draw what a layer keeps by variant: the paper's bytes beside the counted ones."""
    from drawing import save
    from matplotlib.figure import Figure

    from minispeed.figures import GREY

    variants = saved["series"]["variants"]
    figure = Figure(figsize=(6.4, 0.42 * len(variants) + 0.9))
    axes = figure.subplots()
    for offset, place, colour, label in ((-0.19, 0, "#8a9bb4", "the paper"), (0.19, 1, "#d1793b", "counted here")):
        sizes = [both[place] for both in variants.values()]
        places = [index + offset for index in range(len(sizes))]
        axes.barh(places, sizes, 0.36, color=colour, label=label)
        for y, size in zip(places, sizes):
            axes.text(size + 0.6, y, f"{size:.1f}", va="center", fontsize=7, color=GREY)
    axes.set_yticks(range(len(variants)), list(variants))
    axes.invert_yaxis()
    axes.set_xlabel("bytes that a layer keeps on a rank, in s b h")
    axes.legend(loc="lower right")
    save(figure, path)


if __name__ == "__main__":
    run(entry, draw)
