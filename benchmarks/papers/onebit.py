"""1-bit Adam: what gradients of one bit send, that nothing of them is lost, and what a small GPT learns from them.

    python benchmarks/papers/onebit.py            about two minutes on two idle cores
    python benchmarks/papers/onebit.py --quick    a few steps; nothing is written

Bytes are counted on ranks that are threads. The same GPT is then trained by two such ranks with gradients in full and
with gradients of one bit: with Adam's second moment frozen after a warm-up as the paper asks for, and without each of
the things that it asks for.

1-bit Adam, Tang et al. 2021. https://arxiv.org/abs/2102.02888
Letters: N ranks, P parameters.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from drawing import save
from entry import Entry, Row, run
from learning import BATCH, SETTING, held_out_loss, mixture, share_of, share_out, small, smoothed, steps_of

from minispeed.collective.group import Group
from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Trace, Traced
from minispeed.engine import Engine
from minispeed.layout import FlatLayout
from minispeed.model.gpt import GPT
from minispeed.optim import AdamW
from minispeed.precision import Precision
from minispeed.scaler import LossScaler
from minispeed.schedules import warmup_then
from minispeed.zero.division import units_of
from minispeed.zero.frozen import FrozenAdamW
from minispeed.zero.onebit import OneBit, OneBitSum
from minispeed.zero.summing import Compression, InFull, Wire

SCALARS = 64  # bytes: counts and norms
RANKS, LR, BETAS = 4, 2e-3, (0.9, 0.99)
WARM = 0.15  # the share of the updates that the paper makes in full
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ForgetfulSum(OneBitSum):
    """What the signs leave out is lost."""

    def keep(self) -> None:
        super().keep()
        self.owed = self.owed_by_sum = None


class Forgetful(OneBit):
    """Signs without error feedback."""

    def summing(self, wire: Wire) -> ForgetfulSum:
        return ForgetfulSum(wire, self)


@dataclass(frozen=True)
class Way:
    """How a run's gradients travel after the warm-up, and whether the second moment stays then."""

    name: str
    how: Callable[..., Compression]
    freezes: bool
    warms_up: bool = True


WAYS = (
    Way("in full", lambda freeze_step: InFull(), False),
    Way("in full, v frozen", lambda freeze_step: InFull(), True),
    Way("one bit, v frozen (1-bit Adam)", OneBit, True),
    Way("one bit, v goes on", OneBit, False),
    Way("one bit from the first update", OneBit, False, warms_up=False),
    Way("one bit, v frozen, nothing owed", Forgetful, True),
    Way("one bit, v frozen, a scale for 4,096", partial(OneBit, block=4096), True),
)


def entry(quick: bool) -> Entry:
    """Return the paper's statements with what was counted and learnt."""
    steps, seeds = (4, 1) if quick else (120, 1)
    ways = WAYS[2:3] if quick else WAYS
    cases = [(index, seed, steps) for seed in range(seeds) for index, way in enumerate(WAYS) if way in ways]
    found = share_out(learn, cases, processes=0 if quick else 2)
    by_way: dict[str, list[tuple[list[float], float]]] = {}
    for (index, _, _), one in zip(cases, found, strict=True):
        by_way.setdefault(WAYS[index].name, []).append(one)
    ends = {name: sum(loss for _, loss in runs) / seeds for name, runs in by_way.items()}
    freeze_step = round(WARM * steps)
    P = sum(p.numel() for p in GPT(small()).parameters())
    return Entry(
        topic="onebit",
        title="1-bit Adam: gradients as signs, what they leave out sent later",
        source="1-bit Adam, Tang et al. 2021",
        link="https://arxiv.org/abs/2102.02888",
        rows=[*volumes(), identity(), *(learnt(name, loss, ends) for name, loss in ends.items())],
        notes=[
            f"Counted: one update of {SETTING.partition(',')[0]}, {P:,} parameters, by {RANKS} thread ranks at ZeRO "
            "stage 0; bytes that leave a rank, the mean over ranks. A message is a bit for each element and an fp32 "
            "scale for each 256 of one parameter, which is why a little less is saved than the paper says: it has one "
            "scale for a whole message.",
            "What travels here is the gradient, there the momentum. After the warm-up, with v frozen, an update is "
            "linear in either, and what is left out is owed in both. At stage 1 the sum is cut, and only the "
            "first half of the messages is sent: the other is the updated parameters, in full.",
            f"Learnt: {SETTING}, two ranks, {steps} updates of AdamW, the first {freeze_step} in full; the loss of "
            f"held-out answers, nats per token, mean of {seeds} seed{'s' * (seeds > 1)}.",
            *([] if quick else [compared(ends)]),
        ],
        series={"steps": steps, "freeze_step": freeze_step, "curves": curves(by_way)},
    )


def compared(ends: Mapping[str, float]) -> str:
    """Return in a sentence what each of the paper's measures was worth."""
    full, frozen, one_bit, live, cold, forgetful, coarse = (ends[way.name] for way in WAYS)
    return (
        f"Beside gradients in full, signs cost {one_bit - full:+.3f}; but frozen v alone makes gradients in full "
        f"{frozen - full:+.3f}, and beside these signs cost {one_bit - frozen:+.3f}. Left out one by one, what the "
        f"paper asks for was worth: frozen v {live - one_bit:+.3f}, frozen v and warm-up {cold - one_bit:+.3f}, error "
        f"feedback {forgetful - one_bit:+.3f}; scales for 256 in place of 4,096 {coarse - one_bit:+.3f}. One small "
        "model, few updates, one seed (between seeds losses spread by about 0.04): the paper's models are BERT's size."
    )


def curves(by_way: Mapping[str, list[tuple[list[float], float]]]) -> dict[str, list[float]]:
    """Return the training losses of each way, mean over seeds, smoothed."""
    return {
        name: smoothed([sum(each) / len(each) for each in zip(*(losses for losses, _ in runs), strict=True)])
        for name, runs in by_way.items()
    }


def learnt(name: str, loss: float, ends: Mapping[str, float]) -> Row:
    """Return what a way of summing has learnt, beside gradients in full."""
    claim = {
        WAYS[2].name: "converges as uncompressed Adam does, after equally many samples",
        WAYS[3].name: "Adam with error feedback alone, v not frozen, converges worse",
    }.get(name, "beside it")
    full = ends.get(WAYS[0].name)
    more = "" if full is None or name == WAYS[0].name else f", {loss - full:+.3f}"
    return Row(
        claim=f"{claim}: held-out loss, {name}",
        section="section 6, figure 4" if name != WAYS[3].name else "section 3.2, figure 1",
        paper=None,
        closed_form=None,
        measured=f"{loss:.3f}{more}",
        unit="nats per token",
    )


def learn(case: tuple[int, int, int]) -> tuple[list[float], float]:
    """Train one way with one seed; return the losses of the updates, and the one held out."""
    index, seed, steps = case
    return run_threads(partial(train, WAYS[index], seed, steps), 2)[0]


def train(way: Way, seed: int, steps: int, group: Group) -> tuple[list[float], float]:
    """Train as one rank."""
    learn_from, unseen = mixture()
    warm = max(1, round(WARM * steps))
    make = partial(FrozenAdamW, freeze_step=warm) if way.freezes else AdamW
    engine = Engine(
        GPT(small(), seed=seed),
        group,
        precision=Precision(torch.float32),
        schedule=warmup_then("cosine", warmup=steps // 10, total=steps),
        lr=LR,
        weight_decay=0.1,
        clip=1.0,
        compression=way.how(freeze_step=warm if way.warms_up else 0),
        optimizer=lambda groups: make(groups, lr=LR, betas=BETAS),
    )
    rows = steps_of(learn_from, steps, seed=seed)
    losses = [engine.train_step([share_of(each, group.rank, group.size)]).loss for each in rows]
    return losses, held_out_loss(engine, unseen)


def volumes() -> list[Row]:
    """Return the bytes of one update's gradients in each dtype, and of a run with its warm-up."""
    counted = {name: sent(InFull(), dtype) for name, dtype in DTYPES.items()}
    one_bit = sent(OneBit(), torch.float32)
    says = one_bit_form(GPT(small()))
    P, most = sum(p.numel() for p in GPT(small()).parameters()), 2 * (RANKS - 1) / RANKS
    rows = [
        Row(
            claim=f"gradients in {name}: bytes that a rank sends in an update, 2 (N - 1)/N bytes each",
            section="section 4.1",
            paper=None,
            closed_form=most * P * dtype.itemsize,
            measured=counted[name],
            unit="bytes",
        )
        for name, dtype in DTYPES.items()
    ]
    section = "section 4.1"
    rows.append(Row(claim="in one bit", section=section, paper=None, closed_form=says, measured=one_bit, unit="bytes"))
    for name, saved in (("fp32", 97), ("fp16", 94)):
        form = 100 * (1 - says / (most * P * DTYPES[name].itemsize))
        rows.append(
            Row(
                claim=f"one bit saves, against {name}",
                section=section,
                paper=saved,
                closed_form=form,
                measured=100 * (1 - one_bit / counted[name]),
                unit="%",
            )
        )
    steps = 20
    warm = round(WARM * steps)
    whole = sent(OneBit(freeze_step=warm), torch.bfloat16, steps=steps)
    rows.append(
        Row(
            claim=f"a whole run, {WARM:.0%} of it in full, sends up to 5 times less than in 16 bits",
            section="abstract",
            paper=5,
            closed_form=1 / (WARM + (1 - WARM) * says / (most * P * 2)),
            measured=steps * counted["bf16"] / whole,
            unit="times",
        )
    )
    return rows


def sent(how: Compression, dtype: torch.dtype, *, steps: int = 1) -> float:
    """Return the bytes of gradients that a rank sends in so many updates, the mean over ranks."""

    def count(group: Group) -> int:
        trace = Trace()
        reduced = Precision(torch.float32, reduce=dtype)
        engine = Engine(
            GPT(small()), Traced(group, trace), precision=reduced, compression=how, scaler=LossScaler.static(1.0)
        )
        (rows,) = steps_of(mixture()[0], 1)
        rows = share_of(rows, group.rank, BATCH)
        trace.clear()
        for _ in range(steps):
            engine.train_step([rows])
        summed = [event.sent for event in trace.events if event.kind == "all_reduce" and event.bytes > SCALARS]
        return sum(summed) + trace.sent("all_to_all") + trace.sent("all_gather")

    return sum(run_threads(count, RANKS)) / RANKS


def one_bit_form(model: GPT) -> float:
    """Return the bytes of an update in one bit: to each other rank twice, a bit an element and a scale a block."""
    parameters, total = dict(model.named_parameters()), 0
    for names in units_of(model).values():
        matrices_first = sorted((parameters[name] for name in names), key=lambda p: p.dim() < 2)  # as the groups are
        sizes = [p.numel() for p in matrices_first]
        S = -(-sum(sizes) // RANKS)
        total += 2 * (RANKS - 1) * (-(-S // 8) + 4 * max(num_blocks(sizes, rank * S, S) for rank in range(RANKS)))
    return total


def num_blocks(sizes: list[int], start: int, S: int, block: int = 256) -> int:
    """Return into how many blocks a part of a unit falls, of parameters of these sizes; padding is one."""
    count = begin = 0
    for size in sizes:
        inside = min(begin + size, start + S) - max(begin, start)
        count += -(-inside // block) if inside > 0 else 0
        begin += size
    return count + (start + S > begin)


def identity() -> Row:
    """Return how far what was said and what is owed are from what was given, over many updates of random numbers."""
    x = torch.randn(50, 4097, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def add_up(group: Group) -> float:
        layout = FlatLayout({"x": (4097,)}, 1)
        exact = torch.float64
        wire = Wire(group=group, layout=layout, whole=True, reduce=exact, exact=exact, predivide=1.0)
        summing, said = OneBitSum(wire, OneBit()), torch.zeros(4097, dtype=exact)
        for numbers in x:
            work, mine = summing.start(numbers)
            work.wait()
            summing.keep()
            said += mine
        assert summing.owed is not None and summing.owed_by_sum is not None
        said += summing.owed[:4097] + summing.owed_by_sum[:4097]
        return ((said - x.sum(0)).abs().max() / x.abs().max()).item()

    return Row(
        claim="what was said and what is owed is all that was given, after 50 updates: largest error, of the largest",
        section="section 3.1",
        paper=None,
        closed_form=None,
        measured=f"{run_threads(add_up, 1)[0]:.1e}",
    )


def draw(saved: Mapping[str, Any], path: Path) -> None:
    """Draw the curves."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    series = saved["series"]
    for name, losses in series["curves"].items():
        over = series["steps"] / len(losses)
        axes.plot([(index + 0.5) * over for index in range(len(losses))], losses, lw=1.3, label=name)
    axes.axvline(series["freeze_step"], color="#8a8a8a", lw=0.8, ls=":")
    axes.set(xlabel="update (dotted: the warm-up is over)", ylabel="training loss, nats per token")
    axes.legend()
    save(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    run(entry, draw)
