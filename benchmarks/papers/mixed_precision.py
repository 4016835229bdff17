"""Mixed precision: which updates fp16 weights ignore, which gradients fp16 cannot hold, and what training makes of it.

    python benchmarks/papers/mixed_precision.py            two minutes on two idle cores
    python benchmarks/papers/mixed_precision.py --quick    a few steps; nothing is written

The rule of 2048 is tried on every fp16 number. The exponents of all gradients of a small GPT are counted while it
trains in fp32. Then it trains in fp16: with fp16 weights alone, with fp32 masters, and with masters and a loss scale.

Mixed Precision Training, Micikevicius et al. 2017. https://arxiv.org/abs/1710.03740
"""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from drawing import save
from entry import Entry, Row, run
from learning import BATCH, SEQ, held_out_loss, mixture, share_out, small, smoothed, steps_of

from minispeed.engine import Engine
from minispeed.model.gpt import GPT
from minispeed.precision import Precision
from minispeed.scaler import LossScaler
from minispeed.schedules import warmup_then

LR, LAYERS = 2e-3, 2
HALF = Precision(torch.float16, accumulate=torch.float16)  # gradients stay in fp16
SETTING = f"a GPT of {LAYERS} layers of width 64, {BATCH} rows of {SEQ} tokens a step, the demo's mixture of skills"
SMALLEST = -24  # exponent of the smallest fp16 number


@dataclass(frozen=True)
class Way:
    """Dtypes of a run; `forgets`: the weights are kept in fp16 alone."""

    name: str
    precision: Precision
    scaler: LossScaler | None
    forgets: bool = False


UNSCALED = LossScaler.static(1.0)
WAYS = (
    Way("fp32", Precision(torch.float32), None),
    Way("fp16 alone", HALF, UNSCALED, forgets=True),
    Way("fp16, fp32 masters", HALF, UNSCALED),
    Way("fp16, fp32 masters, loss scale", HALF, LossScaler()),
)


def entry(quick: bool) -> Entry:
    """Return the paper's statements with what was counted and learnt."""
    steps, seeds = (3, 1) if quick else (300, 1)
    cases = [(index, seed, steps) for seed in range(seeds) for index in range(len(WAYS))]
    found = share_out(train, cases[:2] if quick else cases, processes=0 if quick else 2)
    runs: dict[str, list[Trained]] = {}
    for (index, _, _), trained in zip(cases, found):
        runs.setdefault(WAYS[index].name, []).append(trained)
    exponents = sum((trained.exponents for trained in runs["fp32"]), Counter[int]())
    scale = largest_scale(exponents)
    return Entry(
        topic="mixed_precision",
        title="Mixed precision: masters, and gradients that fp16 cannot hold",
        source="Mixed Precision Training, Micikevicius et al. 2017",
        link="https://arxiv.org/abs/1710.03740",
        rows=[*rule_of_2048(), *small_gradients(exponents, scale), *ends(runs, seeds)],
        notes=[
            "The rule: a weight w and an update u of fp16, added in fp16, rounded to the nearest, ties to even. Let d "
            "be the distance from w to the next number on u's side. The sum is w exactly if |u| < d/2, or |u| = d/2 "
            "and w's last bit is 0. For normal w that is never so if |w| < 2048 |u|, and always so if |w| > 4094 |u|; "
            "between the two it depends on w: 2048 is enough for a power of two and an update that makes it larger.",
            f"Counted: exponents of the gradients of all parameters, every tenth update of a training in fp32: "
            f"{SETTING}. The loss is a mean over the supervised tokens of a step. The paper's 5 % is of weights' "
            "gradients of a speech model, its 67 % of zeros of activations' gradients of an SSD: of other models.",
            f"Learnt: {steps} updates of AdamW, moments and updates in fp32 everywhere; products in torch's fp16 on a "
            f"CPU; mean of {seeds} seed{'s' * (seeds > 1)}. fp16 alone: what the update makes of a weight is rounded "
            "to fp16 at once. AdamW divides by the size of the gradients, so that a small one moves its weight as far "
            "as a large one, and costs it the update where fp16 makes it zero. The loss scale found no gradients to "
            "save here: fp16 holds nearly all of them. Updates "
            f"that the dynamic scale skipped: {skipped(runs)}.",
        ],
        series={
            "exponents": {str(exponent): count for exponent, count in sorted(exponents.items())},
            "scale": scale,
            "steps": steps,
            "curves": {
                name: smoothed([sum(x) / len(x) for x in zip(*(t.losses for t in of))]) for name, of in runs.items()
            },
        },
    )


@dataclass(frozen=True)
class Trained:
    """What became of a run.

    losses     of its updates
    held_out   loss at the end
    ignored    over all updates, the share of elements that had one and whose weight in fp16 did not change
    exponents  of nonzero gradients, floor(log2 |g|), with the loss scale divided out
    skipped    updates
    """

    losses: list[float]
    held_out: float
    ignored: float
    exponents: Counter[int]
    skipped: int


def train(case: tuple[int, int, int]) -> Trained:
    """Train one way with one seed."""
    index, seed, steps = case
    way, (learn_from, unseen) = WAYS[index], mixture()
    engine = Engine(
        GPT(small(num_layers=LAYERS), seed=seed),
        precision=way.precision,
        scaler=way.scaler,
        schedule=warmup_then("cosine", warmup=steps // 10, total=steps),
        lr=LR,
        weight_decay=0.1,
        clip=1.0,
    )
    if way.forgets:
        round_masters(engine)
    losses, exponents, ignored, skipped = list[float](), Counter[int](), list[float](), 0
    for step, rows in enumerate(steps_of(learn_from, steps, seed=seed)):
        before = [unit.master.clone() for unit in engine.sharded.units]
        counts = exponents if step % 10 == 0 else Counter[int]()
        with engine.sharded.watching(lambda name, gradient, counts=counts: counts.update(exponents_of(gradient))):
            report = engine.train_step([rows])
        losses.append(report.loss)
        skipped += report.skipped
        ignored.append(share_ignored(before, [unit.master for unit in engine.sharded.units]))
        if way.forgets:
            round_masters(engine)
    return Trained(losses, held_out_loss(engine, unseen), sum(ignored) / steps, exponents, skipped)


@torch.no_grad()
def round_masters(engine: Engine) -> None:
    """Let the weights be fp16 numbers: what is less is forgotten."""
    for unit in engine.sharded.units:
        unit.master.copy_(unit.master.half())


def share_ignored(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the share of the elements that were to change and are the same number in fp16."""
    pairs = [(old, new) for old, new in zip(before, after, strict=True)]
    moved = sum(int((old != new).sum()) for old, new in pairs)
    same = sum(int(((old != new) & (old.half() == new.half())).sum()) for old, new in pairs)
    return same / max(1, moved)


def exponents_of(gradient: Tensor) -> Counter[int]:
    """Return how many nonzero elements lie in [2**e, 2**(e + 1)), by e."""
    nonzero = gradient[gradient != 0].abs().to(torch.float64)
    exponents, counts = torch.unique(torch.frexp(nonzero).exponent - 1, return_counts=True)
    return Counter(dict(zip(exponents.tolist(), counts.tolist())))


def largest_scale(exponents: Mapping[int, int]) -> int:
    """Return the exponent of the largest power of two that lets the largest gradient stay below fp16's largest."""
    return 15 - max(exponents, default=0)


def share_below(exponents: Mapping[int, int], scale: int = 0) -> float:
    """Return the share of nonzero gradients that are below fp16's smallest number, times 2**scale."""
    small = sum(count for exponent, count in exponents.items() if exponent + scale < SMALLEST)
    return small / max(1, sum(exponents.values()))


def small_gradients(exponents: Mapping[int, int], scale: int) -> list[Row]:
    """Return the shares that fp16 cannot hold."""
    shares = {by: 100 * share_below(exponents, by) for by in (0, 3, scale)}
    claims = {
        0: ("gradients of weights too small for fp16, of those that are not zero", "section 3.1, figure 2b", 5),
        3: ("and with a loss scale of 8, which sufficed for the paper's SSD", "section 3.2", None),
        scale: (f"and with 2^{scale}, the largest that overflows nowhere", "section 3.2", None),
    }
    return [
        Row(claim=claim, section=section, paper=paper, closed_form=None, measured=shares[by], unit="%")
        for by, (claim, section, paper) in claims.items()
    ]


def skipped(runs: Mapping[str, list[Trained]]) -> int:
    """Return how many updates the dynamic loss scale skipped, of all seeds."""
    return sum(trained.skipped for trained in runs.get(WAYS[-1].name, []))


def ends(runs: Mapping[str, list[Trained]], seeds: int) -> list[Row]:
    """Return what was learnt, and which updates were ignored."""
    rows = []
    full = sum(trained.held_out for trained in runs["fp32"]) / seeds
    for name, of in runs.items():
        loss = sum(trained.held_out for trained in of) / len(of)
        more = f", {loss - full:+.3f}" if name != "fp32" else ""
        rows.append(
            Row(
                claim=f"held-out loss after training in {name}",
                section="section 3.1, figure 2a" if "scale" not in name else "section 3.2",
                paper=None,
                closed_form=None,
                measured=f"{loss:.3f}{more}",
                unit="nats per token",
            )
        )
    if "fp16 alone" in runs:
        alone = [trained.ignored for trained in runs["fp16 alone"]]
        rows.append(
            Row(
                claim="elements that fp16 weights ignore, of an update, mean over the training",
                section="section 3.1",
                paper=None,
                closed_form=None,
                measured=100 * sum(alone) / len(alone),
                unit="%",
            )
        )
    return rows


def rule_of_2048() -> list[Row]:
    """Return at which ratios of weight and update, over all normal fp16 weights, an update is ignored."""
    smallest, largest = ratios()
    section = "section 3.1"
    return [
        Row(
            claim="an update is ignored where the weight is at least 2048 times larger: the smallest ratio at which "
            "one is",
            section=section,
            paper=2048,
            closed_form=2048,
            measured=smallest,
            unit="times",
        ),
        Row(
            claim="the largest ratio at which one is not",
            section=section,
            paper=2048,
            closed_form=2 * (2**11 - 1),
            measured=largest,
            unit="times",
        ),
    ]


def ratios() -> tuple[float, float]:
    """Return the smallest |w/u| with w + u == w, and the largest with w + u != w.

    Over all positive normal fp16 w whose ignored updates are fp16 numbers too, and u of both signs.
    """
    w = torch.arange(0x0400, 0x7C00, dtype=torch.int16).view(torch.float16)
    w = w[w >= 2.0**-10]  # below, updates that are ignored are smaller than fp16 numbers are
    ignored, heeded = [], []
    for sign in (1, -1):
        for u in candidates(w, sign):
            same = (w + u) == w
            ratio = w.double() / u.double().abs()
            ignored.append(ratio[same])
            heeded.append(ratio[~same])
    return torch.cat(ignored).min().item(), torch.cat(heeded).max().item()


def candidates(w: Tensor, sign: int) -> list[Tensor]:
    """Return updates around half the distance to w's neighbours on either side: there it is decided."""
    exponent = torch.frexp(w.float()).exponent - 1
    half = torch.ldexp(torch.ones_like(w, dtype=torch.float32), exponent - 11)
    around = [half.half(), torch.nextafter(half.half(), torch.tensor(torch.inf, dtype=torch.float16))]
    around += [(half / 2).half(), torch.nextafter((half / 2).half(), torch.tensor(torch.inf, dtype=torch.float16))]
    return [sign * u for u in around]


def is_ignored(w: Tensor, u: Tensor) -> Tensor:
    """Say by the rule, in float64, whether w + u is w in fp16: |u| below half the distance, or just that and w even."""
    towards = torch.where(u > 0, torch.inf, -torch.inf).to(torch.float16)
    distance = (torch.nextafter(w, towards).double() - w.double()).abs()
    even = (w.view(torch.int16) & 1) == 0
    size = u.double().abs()
    return (size < distance / 2) | ((size == distance / 2) & even)


def draw(saved: Mapping[str, Any], path: Path) -> None:
    """Draw the histogram and the curves."""
    from matplotlib import pyplot

    series = saved["series"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    exponents = {int(exponent): count for exponent, count in series["exponents"].items()}
    total = sum(exponents.values())
    for shift, label in ((0, "as they are"), (series["scale"], f"times 2^{series['scale']}")):
        left.bar(
            [exponent + shift for exponent in exponents],
            [100 * count / total for count in exponents.values()],
            width=0.9,
            alpha=0.65,
            label=label,
        )
    left.axvline(SMALLEST - 0.5, color="#8a8a8a", lw=1, ls=":")
    left.axvline(15.5, color="#8a8a8a", lw=1, ls=":")
    left.set(xlabel="exponent of a gradient (dotted: fp16's smallest and largest)", ylabel="% of those not zero")
    left.legend()
    exact, *others = series["curves"].items()
    for name, losses in others:
        over = series["steps"] / len(losses)
        more = [loss - of for loss, of in zip(losses, exact[1], strict=True)]
        right.plot([(index + 0.5) * over for index in range(len(losses))], more, lw=1.3, label=name)
    right.set(xlabel="update", ylabel="training loss less that in fp32")
    right.legend()
    figure.tight_layout()
    save(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    run(entry, draw)
