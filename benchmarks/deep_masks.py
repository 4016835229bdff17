"""Do deep connections learn the bundled skills better than a plain GPT, after equally many steps?

    python benchmarks/deep_masks.py [--steps N] [--seeds N]     about three minutes on two idle cores
    python benchmarks/deep_masks.py --quick                     a few steps; nothing is written

A small GPT is trained from scratch on the mixture of skills that the demo trains on, once for each mask and seed, by
processes of one thread that share these runs out. A seed fixes weights and the order of rows: masks have both in
common. The figure is the loss of the answers, held out,
after the last step: its mean over seeds, and the difference from the plain GPT, `none`, in spreads. A spread is the
standard deviation over seeds of one mask's losses, pooled over masks. Differences below two spreads are printed as
what they are: none that was found.

dwa: DenseFormer, Pagliardini et al. 2024 (https://arxiv.org/abs/2402.02622) reports lower perplexity, of models far
deeper and trained far longer than these. unet: Bao et al. 2022 (https://arxiv.org/abs/2209.12152), of image models.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from report import report, table
from tqdm import tqdm

import minispeed
from minispeed.chat.documents import Documents
from minispeed.chat.pack import Batch, Packing
from minispeed.chat.prepare import encode_documents
from minispeed.chat.skills import eval_conversations, put_before, string_together, train_conversations
from minispeed.chat.template import Template
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.collective.world import World
from minispeed.engine import Engine, MicroBatch
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.precision import Precision
from minispeed.schedules import warmup_then

SEQ, BATCH, VOCAB, LR = 192, 6, 400, 4e-3
CONVERSATIONS, PER_SKILL = 6000, 20  # to train on; held out
MASKS: dict[str, dict[str, object]] = {
    "none": dict(deep="none"),
    "x0": dict(deep="x0"),
    "unet": dict(deep="unet"),
    "dwa": dict(deep="dwa"),
    "dwa, dilation 2, period 2": dict(deep="dwa", deep_dilation=2, deep_period=2),
}
FOUND = 2.0  # spreads from which on a difference counts as one


def skills() -> tuple[Documents, Documents]:
    """Return conversations to train on and held-out ones, made and tokenised as the demo does it."""
    train = string_together(train_conversations(CONVERSATIONS))
    held_out = put_before(eval_conversations(PER_SKILL))
    template = Template()
    tokenizer = ChatTokenizer.train((turn.text for one in train for turn in one.turns), VOCAB, template.tokens)
    return encode_documents(train, tokenizer, template), encode_documents(held_out, tokenizer, template)


def train(config: GPTConfig, seed: int, steps: int, rows: Packing, held_out: Packing) -> float:
    """Train from scratch, and return the loss of the held-out answers, nats per token."""
    engine = Engine(
        GPT(config, seed=seed),
        precision=Precision(torch.float32),
        schedule=warmup_then("cosine", warmup=steps // 10, total=steps),
        lr=LR,
        weight_decay=0.1,
        clip=1.0,
    )
    for step in range(steps):
        engine.train_step([micro_batch(rows.batch(*divmod(step, rows.steps_per_epoch())))])
    unseen = [micro_batch(held_out.batch(0, step)) for step in range(held_out.steps_per_epoch())]
    total = 0.0

    def add(micro: MicroBatch, losses: Tensor) -> None:
        nonlocal total
        total += losses.sum().item()

    engine.runner.evaluate(unseen, add)
    return total / sum(micro.num_supervised for micro in unseen)


def share(world: World, shape: Mapping[str, int], seeds: int, steps: int) -> dict[str, list[float]]:
    """Run every mask with every seed, those that are this process's; return the losses of all."""
    torch.set_num_threads(1)
    runs = [(seed, mask) for seed in range(seeds) for mask in MASKS]
    learnt, unseen = skills()
    held_out = Packing(unseen, seq=SEQ, batch=BATCH)
    losses = torch.zeros(len(runs), dtype=torch.float64)
    for index in tqdm(range(world.rank, len(runs), world.size), "runs", disable=None if world.rank == 0 else True):
        seed, mask = runs[index]
        config = preset("nano", vocab_size=VOCAB, attention="reference", **shape, **MASKS[mask])
        losses[index] = train(config, seed, steps, Packing(learnt, seq=SEQ, batch=BATCH, seed=seed), held_out)
    world.group.all_reduce(losses).wait()
    by_seed = losses.view(seeds, len(MASKS)).tolist()
    return {mask: [found[index] for found in by_seed] for index, mask in enumerate(MASKS)}


def micro_batch(batch: Batch) -> MicroBatch:
    """Return packed rows as tensors."""
    return MicroBatch(*map(torch.from_numpy, batch))


def compare(losses: Mapping[str, Sequence[float]]) -> list[dict[str, object]]:
    """Return a row for each mask: its losses, and how many spreads of a seed it lies from the plain GPT."""
    spread = statistics.mean(statistics.variance(found) for found in losses.values()) ** 0.5
    plain = statistics.mean(losses["none"])
    rows = []
    for mask, found in losses.items():
        difference = statistics.mean(found) - plain
        row: dict[str, object] = {"mask": mask, "loss": statistics.mean(found), "its spread": statistics.stdev(found)}
        row |= {"difference from none": difference, "in spreads": difference / spread}
        row["seeds in which it is lower"] = sum(one < other for one, other in zip(found, losses["none"], strict=True))
        rows.append(row | {"verdict": "-" if mask == "none" else verdict(difference / spread)})
    return rows


def verdict(spreads: float) -> str:
    """Say whether a difference is one."""
    if abs(spreads) < FOUND:
        return "no difference found"
    return "learns better" if spreads < 0 else "learns worse"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is written")
    parser.add_argument("--steps", type=int, default=150, help="updates of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each mask, two or more")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="D")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds = 4, 2
    if options.seeds < 2:
        parser.error("a spread is of two seeds or more")
    D = options.width
    shape = dict(num_layers=options.layers, model_dim=D, hidden_dim=8 * D // 3)
    shape |= dict(num_heads=4, num_kv_heads=4, head_dim=D // 4)
    run = (shape, options.seeds, options.steps)
    losses = minispeed.launch(share, *run, ranks=options.processes, backend="gloo")[0]
    lines = compare(losses)
    settings = dict(steps=options.steps, seeds=options.seeds, B=BATCH, T=SEQ, D=D, layers=options.layers)
    print(table(lines)) if options.quick else report("deep_masks", lines, **settings, lr=LR)


if __name__ == "__main__":
    main()
