"""LoRA: how much less is trained and held, in closed form and counted, and what it learns beside full fine-tuning.

    python benchmarks/papers/lora.py            two minutes on two idle cores
    python benchmarks/papers/lora.py --quick    a few steps; nothing is written

Bytes are those of a real engine's storages after a step. A small GPT learns ten of the bundled skills; the four others
are then taught to it by full fine-tuning and by adapters of rank 8, for as many steps, each at two learning rates.

LoRA, Hu et al. 2021. https://arxiv.org/abs/2106.09685
Letters: P parameters, D model, r rank, I and O the features into and out of a Linear.
"""

import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from drawing import save
from entry import Entry, Row, run
from learning import BATCH, SEQ, VOCAB, held_out_loss, share_out, small, smoothed, steps_of

from minispeed.chat.conversation import Conversation
from minispeed.chat.documents import Documents
from minispeed.chat.prepare import encode_documents
from minispeed.chat.skills import SKILLS, eval_conversations, train_conversations
from minispeed.chat.template import Template
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.engine import Engine
from minispeed.ledger import Held, Widths, held
from minispeed.model.gpt import GPT
from minispeed.model.lora import LoRA, add_lora
from minispeed.precision import Precision
from minispeed.schedules import warmup_then
from minispeed.testing.measure import measure_held

NEW = ("translation", "capitals", "symbols", "sentiment")  # taught afterwards
RANK, BASE_LR = 8, 4e-3
RATES = {"full fine-tuning": (4e-3, 8e-3), f"LoRA, r = {RANK}": (1.6e-2, 4e-2)}
GPT3 = dict(layers=96, width=12288, parameters=175e9)  # the paper's largest
CONVERSATIONS, PER_SKILL = 2500, 20


@dataclass(frozen=True)
class Found:
    """What a fine-tuning came to: losses of its steps, of the new skills and of the old ones, held out."""

    losses: list[float]
    new: float
    old: float


def entry(quick: bool) -> Entry:
    """Return the paper's statements with what was counted and learnt."""
    steps, seeds = ((2, 2), 1) if quick else ((100, 60), 2)
    found = share_out(tune, [(seed, *steps) for seed in range(seeds)], processes=0 if quick else 2)
    best = {name: min(RATES[name], key=lambda lr, name=name: mean(of[name, lr].new for of in found)) for name in RATES}
    return Entry(
        topic="lora",
        title="LoRA: what is trained, held and learnt",
        source="LoRA, Hu et al. 2021",
        link="https://arxiv.org/abs/2106.09685",
        rows=[*of_gpt3(), *counted(), *learnt(found, best)],
        notes=[
            "Of GPT-3 nothing is run. Its adapters are those of the paper's section 4.2: of rank 4, on the query and "
            "value of each layer, r (I + O) numbers each; 16 bits a parameter in its checkpoint. The paper's factor "
            "of 3 in memory is 1.2 TB to 350 GB; the parameters in 16 bits alone are those 350 GB. With 16 bytes a "
            "parameter, as ZeRO counts them, full fine-tuning takes 2.8 TB: the factor is then 8.",
            f"Counted: a GPT of {num_parameters(GPT(small())):,} parameters in bf16 on one rank, adapters of rank "
            f"{RANK} on every Linear of every layer; storages after a step.",
            f"Learnt: {BATCH} rows of {SEQ} tokens a step; {steps[0]} steps on ten skills, then {steps[1]} steps on "
            f"{', '.join(NEW)}, which the model has not seen; loss of held-out answers, nats per token, mean of "
            f"{seeds} seeds. Each way at two learning rates, the better one shown: "
            + ", ".join(f"{name} at {lr:g}" for name, lr in best.items())
            + f". LoRA ends {behind(found, best):+.3f} of full fine-tuning. A base model as small as this has learnt "
            "little that adapters could lean on: the paper's claim is of models that are ten thousand times larger, "
            "and of tasks that need little that is new.",
        ],
        series={
            "steps": steps[1],
            "curves": {
                name: smoothed([mean(x) for x in zip(*(of[name, lr].losses for of in found), strict=True)])
                for name, lr in best.items()
            },
        },
    )


mean = statistics.fmean


def of_gpt3() -> list[Row]:
    """Return what the paper's largest model comes to, in closed form."""
    D, P = GPT3["width"], GPT3["parameters"]
    trained = adapters([(D, D)] * 2, 4) * GPT3["layers"]
    whole = held([int(P)], ranks=1, stage=0, widths=Widths.named("fp16", zero=0, accumulate="fp16"))
    less = held(
        [int(trained)], ranks=1, stage=0, widths=Widths.named("fp16", zero=0, accumulate="fp16"), frozen=[int(P)]
    )
    rows = [
        ("trainable parameters of GPT-3 175B, r = 4", "section 4.2", "10,000 times fewer", P / trained, "times"),
        ("its checkpoint, from 350 GB", "section 4.2", 35, 2 * trained / 1e6, "MB"),
        ("memory in training, without activations", "section 4.2, 350 GB", 350, less.total / 1e9, "GB"),
        ("the same with full fine-tuning", "section 4.2, 1.2 TB", 1200, whole.total / 1e9, "GB"),
    ]
    return [
        Row(claim=claim, section=section, paper=paper, closed_form=form, measured=None, unit=unit)
        for claim, section, paper, form, unit in rows
    ]


def adapters(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """Return the numbers in adapters of Linears of these (O, I)."""
    return sum(rank * (rows + columns) for rows, columns in shapes)


def counted() -> list[Row]:
    """Return what one rank's engine trains and holds, beside the closed form."""
    model = GPT(small())
    shapes = [leaf.weight.shape for block in model.blocks for leaf in block.modules() if isinstance(leaf, nn.Linear)]
    form = adapters(shapes, RANK)
    (full, _, _), (lora, trained, forms) = hold(None), hold(LoRA(rank=RANK))
    of = {"parameters": "the frozen model and its adapters", "gradients": "of adapters", "optimizer": "of adapters"}
    rows = [
        Row(
            claim=f"trainable parameters are r (I + O) of each Linear; of {num_parameters(model):,}",
            section="section 4.1",
            paper=None,
            closed_form=form,
            measured=trained,
        )
    ]
    for kind, what in of.items():
        claim = f"bytes of {kind}, {what}; with full fine-tuning {getattr(full, kind):,}"
        values = dict(closed_form=getattr(forms, kind), measured=getattr(lora, kind))
        rows.append(Row(claim=claim, section="section 4.2", paper=None, unit="bytes", **values))
    return rows


def hold(lora: LoRA | None) -> tuple[Held, int, Held]:
    """Train two steps; return what was held, how many parameters were trained, and the closed form."""
    model = GPT(small())
    if lora is not None:
        add_lora(model, lora, seed=0)
    engine = Engine(model, precision=Precision(torch.bfloat16))
    first, second = steps_of(documents()[0], 2)
    engine.train_step([first])
    found = measure_held(engine, lambda: engine.train_step([second]))
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for unit in engine.sharded.units:
        sizes[unit.trainable].append(unit.num_elements)
    widths = Widths.of(engine.sharded.dtypes)
    return found, sum(sizes[True]), held(sizes[True], ranks=1, stage=0, widths=widths, frozen=sizes[False])


def num_parameters(model: nn.Module) -> int:
    """Return P."""
    return sum(p.numel() for p in model.parameters())


@cache
def documents() -> tuple[Documents, Documents, Documents, Documents]:
    """Return conversations of the skills that the base learns and of the new ones, each to train on and held out."""
    old = [name for name in SKILLS if name not in NEW]
    base, new = train_conversations(CONVERSATIONS, skills=old), train_conversations(CONVERSATIONS, skills=NEW)
    unseen = eval_conversations(PER_SKILL)
    template = Template()
    tokenizer = ChatTokenizer.train((turn.text for one in base + new for turn in one.turns), VOCAB, template.tokens)

    def encoded(conversations: list[Conversation]) -> Documents:
        return encode_documents(conversations, tokenizer, template)

    held_out = [[one for one in unseen if (one.task in NEW) is is_new] for is_new in (False, True)]
    return encoded(base), encoded(held_out[0]), encoded(new), encoded(held_out[1])


def tune(case: tuple[int, int, int]) -> dict[tuple[str, float], Found]:
    """Train a base model, then fine-tune it in each way at each rate."""
    seed, base_steps, steps = case
    base, _, _, _ = documents()
    model = GPT(small(), seed=seed)
    learn(model, base, base_steps, BASE_LR, seed)
    start = {name: x.clone() for name, x in model.state_dict().items()}
    found = {}
    for name, rates in RATES.items():
        for lr in rates:
            copy = GPT(small(), seed=seed)
            copy.load_state_dict(start)
            if name != "full fine-tuning":
                add_lora(copy, LoRA(rank=RANK), seed=seed)
            found[name, lr] = learn(copy, documents()[2], steps, lr, seed)
    return found


def learn(model: GPT, rows: Documents, steps: int, lr: float, seed: int) -> Found:
    """Train, and leave the model with what it has learnt."""
    schedule = warmup_then("cosine", warmup=max(1, steps // 10), total=steps)
    engine = Engine(model, precision=Precision(torch.float32), schedule=schedule, lr=lr, weight_decay=0.0, clip=1.0)
    losses = [engine.train_step([micro]).loss for micro in steps_of(rows, steps, seed=seed)]
    _, old, _, new = documents()
    found = Found(losses, held_out_loss(engine, new), held_out_loss(engine, old))
    engine.sharded.dissolve()
    return found


def learnt(found: list[dict[tuple[str, float], Found]], best: Mapping[str, float]) -> list[Row]:
    """Return the losses of each way at its better rate."""
    rows = []
    for name, lr in best.items():
        for what, claim in (("new", "performs on par with full fine-tuning"), ("old", "and forgets")):
            losses = [getattr(of[name, lr], what) for of in found]
            spread = f" +- {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            rows.append(
                Row(
                    claim=f"{claim}: {name}, held-out loss of the {what} skills",
                    section="section 5" if what == "new" else "not in the paper",
                    paper=None,
                    closed_form=None,
                    measured=f"{mean(losses):.3f}{spread}",
                    unit="nats per token",
                )
            )
    return rows


def behind(found: list[dict[tuple[str, float], Found]], best: Mapping[str, float]) -> float:
    """Return by how much LoRA's loss of the new skills is higher."""
    full, lora = (mean(of[name, lr].new for of in found) for name, lr in best.items())
    return lora - full


def draw(saved: Mapping[str, Any], path: Path) -> None:
    """Draw the losses of the new skills while they are learnt."""
    from matplotlib import pyplot

    series = saved["series"]
    figure, axes = pyplot.subplots(figsize=(6, 3.4))
    for name, losses in series["curves"].items():
        over = series["steps"] / len(losses)
        axes.plot([(index + 0.5) * over for index in range(len(losses))], losses, lw=1.3, label=name)
    axes.set(xlabel="step on the new skills", ylabel="training loss, nats per token")
    axes.legend()
    save(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    run(entry, draw)
