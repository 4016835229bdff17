"""ZeRO: what a rank holds and sends at each stage, as the paper prints it and as ranks are counted.

    python benchmarks/papers/zero.py            half a minute
    python benchmarks/papers/zero.py --quick    4 ranks in place of 64; nothing is written

A GPT trains two steps in fp16 on ranks that are threads; the storages of its parameters, gradients and optimizer states
are measured (benchmarks/zero_memory.py), and the elements of its messages counted (benchmarks/zero_traffic.py).

ZeRO, Rajbhandari et al. 2020. https://arxiv.org/abs/1910.02054
Letters: N ranks, P parameters, g micro-batches of a step.
"""

import sys
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import zero_memory
import zero_traffic
from entry import Entry, Row, run

from minispeed.ledger import Held, Widths, held, paper_bytes, sent
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.precision import Precision
from minispeed.zero.division import units_of

RANKS, PARAMETERS = 64, 7.5e9  # of figure 1
FIGURE_1 = (120, 31.4, 16.6, 1.9)  # GB at stages 0 to 3
TABLE_1 = (4011, 2013, 15.6)  # GB at stages 1 to 3: 1T parameters on 1,024 ranks
LAWS = ("16 P", "4 P + 12 P/N", "2 P + 14 P/N", "16 P/N")
HALF = Precision(torch.float16, accumulate=torch.float16)  # gradients in 16 bits, as the paper's
GB = 1e9


def entry(quick: bool) -> Entry:
    """Return the paper's statements with what was counted."""
    ranks = 4 if quick else RANKS
    bars = [largest(ranks, stage) for stage in range(4)]
    P = sum(sizes(zero_memory.CONFIG))
    kinds = ("parameters", "gradients", "optimizer")
    return Entry(
        topic="zero",
        title="ZeRO: memory and communication of a stage",
        source="ZeRO, Rajbhandari et al. 2020",
        link="https://arxiv.org/abs/1910.02054",
        rows=[*figure_1(bars, ranks), *table_1(), *laws(quick), *traffic(quick)],
        notes=[
            f"Counted: a GPT of {P:,} parameters, two steps in fp16 with gradients in fp16; the rank that holds most. "
            "Bytes are those of the storages under parameters, gradients, masters and moments; activations, messages "
            "and what is whole only while a unit computes are left out, as in the paper.",
            f"Figure 1's measured column is the bytes that {ranks} thread ranks hold, divided by {P:,} and multiplied "
            "by 7.5 billion: the largest model is not run, its law is.",
            "The closed form for bytes is the ledger's, which counts padding: a unit's buffer is filled up until N "
            "divides it, which N = 7 shows. The paper's law knows no padding; both agree where N divides every unit.",
            "The paper counts a single micro-batch. With g of them stage 2 sums over ranks after each, which costs "
            "g + 1 in place of 2, and stage 3 gathers the parameters twice and sums once for each, which costs 3 g; "
            "stage 1 sums once a step. Sent elements are the mean over ranks, in a ring.",
        ],
        series={
            "ranks": ranks,
            "paper": FIGURE_1,
            "GB": {kind: [getattr(bar, kind) / P * PARAMETERS / GB for bar in bars] for kind in kinds},
        },
    )


def figure_1(bars: list[Held], ranks: int) -> list[Row]:
    """Return the paper's first figure, by as many ranks as it has."""
    P = sum(sizes(zero_memory.CONFIG))
    return [
        Row(
            claim=f"stage {stage} needs {LAWS[stage]} bytes: P = 7.5 billion, N = {ranks}",
            section="section 1, figure 1",
            paper=FIGURE_1[stage] if ranks == RANKS else None,
            closed_form=paper_bytes(int(PARAMETERS), ranks=ranks, stage=stage) / GB,
            measured=bar.total * PARAMETERS / P / GB,
            unit="GB",
        )
        for stage, bar in enumerate(bars)
    ]


def table_1() -> list[Row]:
    """Return the paper's table for a trillion parameters, which nobody runs here."""
    return [
        Row(
            claim=f"stage {stage}: P = 1 trillion, N = 1,024",
            section="section 5.4, table 1",
            paper=printed,
            closed_form=paper_bytes(10**12, ranks=1024, stage=stage) / GB,
            measured=None,
            unit="GB",
        )
        for stage, printed in enumerate(TABLE_1, 1)
    ]


def laws(quick: bool) -> list[Row]:
    """Return the law of each stage on some numbers of ranks, beside the ledger with its padding."""
    cases = [(0, 2 if quick else 8), *product((1, 2, 3), (2, 3) if quick else (1, 2, 4, 7, 8))]
    return [
        Row(
            claim=f"stage {stage} holds {LAWS[stage]} bytes, N = {ranks}",
            section="section 3.1" if stage == 0 else f"section 5.{stage}",
            paper=None,
            closed_form=held(
                sizes(zero_memory.CONFIG),
                ranks=ranks,
                stage=stage,
                widths=Widths.named("fp16", zero=stage, accumulate="fp16"),
            ).total,
            measured=largest(ranks, stage).total,
            unit="bytes",
        )
        for stage, ranks in cases
    ]


def traffic(quick: bool) -> list[Row]:
    """Return what a rank sends in a step, of one micro-batch and of four."""
    ranks, units = 2 if quick else 8, sizes(zero_traffic.CONFIG)
    unit = Fraction(sum(units) * (ranks - 1), ranks)
    rows = []
    for micro, stage in product((1, 4), range(4)):
        elements, _ = zero_traffic.sent_by(ranks, stage, micro)
        law = ("2", "2", "g + 1", "3 g")[stage]
        rows.append(
            Row(
                claim=f"stage {stage} sends {law} times P (N - 1)/N elements, N = {ranks}, g = {micro}",
                section=("" if micro == 1 else "from ")
                + ("section 7.1", *["section 7.2.1"] * 2, "section 7.2.2")[stage],
                paper=(2, 2, 2, 3)[stage] if micro == 1 else None,
                closed_form=float(Fraction(sent(units, ranks=ranks, stage=stage, micro=micro)) / unit),
                measured=float(Fraction(sum(elements), ranks) / unit),
                unit="P (N - 1)/N",
            )
        )
    return rows


@lru_cache
def largest(ranks: int, stage: int) -> Held:
    """Train; return what the rank holds that holds most."""
    return max(zero_memory.measured(ranks, stage, HALF)[0], key=lambda one: one.total)


@lru_cache
def sizes(config: GPTConfig) -> tuple[int, ...]:
    """Return the elements of each unit of a model."""
    model = GPT(config)
    elements = {name: p.numel() for name, p in model.named_parameters()}
    return tuple(sum(elements[name] for name in names) for names in units_of(model).values())


def draw(saved: Mapping[str, Any], path: Path) -> None:
    """Draw the paper's figure 1 from what the ranks held."""
    from drawing import save
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6))
    axes = figure.add_subplot()
    series, left = saved["series"], [0.0] * 4
    for (kind, widths), colour in zip(series["GB"].items(), ("#0072b2", "#e69f00", "#009e73")):
        axes.barh(range(4), widths, left=left, height=0.6, color=colour, label=kind)
        left = [start + width for start, width in zip(left, widths)]
    for stage, (end, printed) in enumerate(zip(left, series["paper"])):
        axes.text(end + 1.5, stage, f"{end:.4g} GB (paper: {printed})", va="center", fontsize=8, color="#8a8a8a")
    axes.set_yticks(range(4), [f"stage {stage}" for stage in range(4)])
    axes.set(xlim=(0, 155), ylim=(3.6, -0.6), xlabel=f"GB on each of {series['ranks']} ranks, 7.5 billion parameters")
    save(figure, path)


if __name__ == "__main__":
    run(entry, draw)
