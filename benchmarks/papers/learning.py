"""What the topics that train share: a small GPT, the conversations of the bundled skills, the loss held out."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from deep_masks import VOCAB, micro_batch, skills

from minispeed.chat.documents import Documents
from minispeed.chat.pack import Packing
from minispeed.engine import Engine, MicroBatch
from minispeed.model.config import GPTConfig
from minispeed.model.presets import preset

SEQ, BATCH = 192, 8
SETTING = f"a GPT of 4 layers of width 64, {BATCH} rows of {SEQ} tokens a step, the demo's mixture of skills"


def small(**more: object) -> GPTConfig:
    """Return the sizes of the model that is trained."""
    shape = dict(num_layers=4, model_dim=64, hidden_dim=172, num_heads=4, num_kv_heads=4, head_dim=16)
    return preset("nano", vocab_size=VOCAB, attention="reference", **{**shape, **more})


@cache
def mixture() -> tuple[Documents, Documents]:
    """Return the conversations to train on and those held out."""
    return skills()


def steps_of(learnt: Documents, steps: int, *, seed: int = 0) -> Iterator[MicroBatch]:
    """Yield the rows of so many steps."""
    rows = Packing(learnt, seq=SEQ, batch=BATCH, seed=seed)
    for step in range(steps):
        yield micro_batch(rows.batch(*divmod(step, rows.steps_per_epoch())))


def share_of(rows: MicroBatch, rank: int, ranks: int) -> MicroBatch:
    """Return the rows of one rank."""
    each = BATCH // ranks
    return MicroBatch(*(x[rank * each : (rank + 1) * each].contiguous() for x in rows))


def held_out_loss(engine: Engine, unseen: Documents) -> float:
    """Return the loss of the held-out answers, nats per token; every rank looks at all of them."""
    rows = Packing(unseen, seq=SEQ, batch=BATCH)
    micros = [micro_batch(rows.batch(0, step)) for step in range(rows.steps_per_epoch())]
    total = torch.zeros((), dtype=torch.float64)

    def add(micro: MicroBatch, losses: Tensor) -> None:
        total.add_(losses.sum())

    engine.runner.evaluate(micros, add)
    return total.item() / sum(micro.num_supervised for micro in micros)


def smoothed(losses: Sequence[float], over: int = 10) -> list[float]:
    """Return the mean of each so many losses."""
    groups = [losses[start : start + over] for start in range(0, len(losses) - over + 1, over)]
    return [sum(group) / over for group in groups]


def share_out(job: Callable[[Any], Any], cases: Iterable[Any], *, processes: int = 2) -> list[Any]:
    """Return what a function of this or another module makes of each case, by processes of one thread that share them.

    processes  0: this one alone
    """
    cases = list(cases)
    if not processes:
        return [job(case) for case in tqdm(cases, "runs", disable=None)]
    start = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=start, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(tqdm(pool.map(job, cases), "runs", total=len(cases), disable=None))
