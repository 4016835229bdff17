"""Deep connections: what they add, what travels where a pipeline cuts them, and whether they learn more.

    python benchmarks/papers/deep.py            two minutes on two idle cores
    python benchmarks/papers/deep.py --quick    a few steps; nothing is written

Tensors and bytes are counted on a pipeline of two ranks that are threads, at every cut between two blocks that a
schedule of two stages can be given. Losses are those of benchmarks/deep_masks.py, measured anew with fewer steps.

DenseFormer, Pagliardini et al. 2024. https://arxiv.org/abs/2402.02622
U-ViT, Bao et al. 2022, for the U-Net's skips. https://arxiv.org/abs/2209.12152
Letters: L blocks, B batch, T tokens, D model.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import deep_masks
from drawing import save
from entry import Entry, Row, run
from learning import BATCH, SEQ, mixture, small, steps_of

import minispeed
from minispeed.axes import Layout
from minispeed.collective.group import Group
from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Trace, Traced
from minispeed.engine import Engine
from minispeed.model.connections import MASKS, Connections, learned_entries
from minispeed.model.gpt import GPT
from minispeed.precision import Precision

L, D = 8, 64
PAPERS = {"none": "a plain GPT", "x0": "the embedding to every block", "unet": "U-ViT", "dwa": "DenseFormer"}
LARGEST = 96  # blocks of GPT-3


def entry(quick: bool) -> Entry:
    """Return the papers' statements with what was counted and learnt."""
    steps, seeds = (2, 2) if quick else (50, 2)
    shape = dict(num_layers=L, model_dim=D, hidden_dim=8 * D // 3, num_heads=4, num_kv_heads=4, head_dim=D // 4)
    learnt = (
        []
        if quick
        else deep_masks.compare(minispeed.launch(deep_masks.share, shape, seeds, steps, ranks=2, backend="gloo")[0])
    )
    return Entry(
        topic="deep",
        title="Deep connections: weights over earlier outputs, in a pipeline",
        source="DenseFormer, Pagliardini et al. 2024; U-ViT, Bao et al. 2022",
        link="https://arxiv.org/abs/2402.02622",
        rows=[*added(), *(cut(mask) for mask in MASKS), *map(loss, learnt)],
        notes=[
            f"Counted: a GPT of {L} blocks of width {D} in fp32 on two thread ranks, one micro-batch of {BATCH} rows "
            f"of {SEQ} tokens; bytes of tensors of B T D numbers that the first stage sends to the second, and their "
            "gradients back. Closed form: twice the tensors of the minimum cover, times B T D and 4 bytes. Neither "
            "paper has a pipeline: what it costs is ours to say.",
            "A cut with dwa needs all that was there before it, or a sum begun for each block behind it, whichever is "
            f"fewer: at most {L // 2 + 1} tensors of {L} blocks, where a plain GPT sends 1.",
            f"Learnt: {steps} steps of a GPT of {L} blocks, {seeds} seeds, as benchmarks/deep_masks.py does with more "
            "of both; a spread is that of one mask over seeds. DenseFormer's gain is reported of models of 48 blocks, "
            "trained for thousands of times as long: here a difference below two spreads is none that was found.",
        ],
        series={
            "tensors": {mask: [len(sum(cover(mask, after), ())) for after in range(L + 1)] for mask in MASKS},
            "losses": {row["mask"]: [row["loss"], row["its spread"]] for row in learnt},
        },
    )


def cover(mask: str, after: int, num_layers: int = L) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which outputs and which sums travel over the cut after a block."""
    return Connections(num_layers, learned_entries(mask, num_layers)).cover(after)


def added() -> list[Row]:
    """Return the numbers that dwa adds to a model."""
    entries = len(learned_entries("dwa", LARGEST))
    row = Row(
        claim=f"parameters that DenseFormer adds to a model of {LARGEST} blocks, L (L + 3)/2",
        section="section 3",
        paper="a few thousand",
        closed_form=LARGEST * (LARGEST + 3) // 2,
        measured=entries,
    )
    model = {mask: sum(p.numel() for p in GPT(small(num_layers=L, deep=mask)).parameters()) for mask in MASKS}
    forms = {"x0": 2 * (L - 1), "unet": 2 * (L - 1 - L // 2), "dwa": L * (L + 3) // 2}
    return [row] + [
        Row(
            claim=f"and {PAPERS[mask]} to one of {L}",
            section=section,
            paper=None,
            closed_form=form,
            measured=model[mask] - model["none"],
        )
        for (mask, form), section in zip(forms.items(), ("ours", "figure 1", "section 3"), strict=True)
    ]


def cut(mask: str) -> Row:
    """Return the bytes that cross the cut between two stages, both ways."""
    (sent, after), (back, _) = run_threads(lambda group: crossing(mask, group), 2)
    columns, rows = cover(mask, after)
    tensor = BATCH * SEQ * D * 4
    return Row(
        claim=f"{PAPERS[mask]}: bytes over the cut after block {after} of {L}, {len(columns)} outputs and {len(rows)} "
        "sums, and their gradients",
        section="none: ours",
        paper=None,
        closed_form=2 * (len(columns) + len(rows)) * tensor,
        measured=sent + back,
        unit="bytes",
    )


def crossing(mask: str, group: Group) -> tuple[int, int]:
    """Train as one of two stages; return the bytes of a step's tensors sent, and after which block the cut is."""
    trace = Trace()
    config = small(num_layers=L, model_dim=D, deep=mask)
    engine = Engine(GPT(config), Traced(group, trace), layout=Layout(pp=2), precision=Precision(torch.float32))
    (rows,) = steps_of(mixture()[0], 1)
    engine.train_step([rows])
    trace.clear()
    engine.train_step([rows])
    first = min(int(of.name.split(".")[1]) for of in engine.parts[0].logical.values() if of.name.startswith("blocks."))
    last = max(int(of.name.split(".")[1]) for of in engine.parts[0].logical.values() if of.name.startswith("blocks."))
    tensor = BATCH * SEQ * D * 4
    sent = sum(event.sent for event in trace.events if event.kind == "send" and event.bytes == tensor)
    return sent, last + 1 if group.rank == 0 else first


def loss(row: Mapping[str, Any]) -> Row:
    """Return what was learnt with a mask."""
    spreads = "" if row["mask"] == "none" else f", {row['in spreads']:+.1f} spreads: {row['verdict']}"
    return Row(
        claim=f"held-out loss, {row['mask']}",
        section="DenseFormer, section 4" if row["mask"].startswith("dwa") else "beside it",
        paper=None,
        closed_form=None,
        measured=f"{row['loss']:.3f} +- {row['its spread']:.3f}{spreads}",
        unit="nats per token",
    )


def draw(saved: Mapping[str, Any], path: Path) -> None:
    """Draw the tensors over each cut, and the losses."""
    from matplotlib import pyplot

    series = saved["series"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4))
    for place, (mask, tensors) in enumerate(series["tensors"].items()):
        shift = 0.06 * (place - 1.5)  # lines that agree stay apart
        left.plot(range(len(tensors)), [count + shift for count in tensors], "o-", ms=4, lw=1.3, label=mask)
    left.set(xlabel="the cut is after block (0: the embedding)", ylabel="tensors that travel", ylim=(0, None))
    left.legend()
    masks = list(series["losses"])
    losses, spreads = zip(*series["losses"].values(), strict=True)
    right.errorbar(losses, range(len(masks)), xerr=spreads, fmt="o", capsize=3)
    right.set(yticks=range(len(masks)), xlabel="held-out loss, nats per token; spread over seeds")
    right.set_yticklabels(masks)
    right.invert_yaxis()
    figure.tight_layout()
    save(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    run(entry, draw)
