"""Run a job of the ledger for real, on thread ranks or processes, and measure what a rank holds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from minispeed.collective.group import Group
from minispeed.engine import Engine
from minispeed.ledger.job import Job
from minispeed.ledger.measure import measure
from minispeed.ledger.memory import Memory
from minispeed.model.dropout import cells_of
from minispeed.model.gpt import GPT
from minispeed.model.lora import LoRA, add_lora
from minispeed.model.loss import IGNORED
from minispeed.model.recompute import recompute
from minispeed.model.shapes import LORA_TARGETS
from minispeed.precision import DTYPES, Precision
from minispeed.runner import MicroBatch
from minispeed.zero.sharded import Offload

CPU = torch.device("cpu")


def measured(job: Job, group: Group) -> tuple[int, Memory]:
    """Train two steps; return this rank's place in the pipeline, and what it held in the second."""
    engine, rows = build(job, Quiet(group)), rows_of(job)
    engine.train_step(rows)
    return engine.lines.pp.rank, measure(engine, lambda: engine.train_step(rows))


def build(job: Job, group: Group) -> Engine:
    """Return the engine of a job."""
    model = GPT(job.model).to(DTYPES[job.dtype])
    if job.lora_rank:
        add_lora(model, LoRA(rank=job.lora_rank, targets=job.lora_targets or LORA_TARGETS), seed=0)
    recompute(model, job.recompute)
    accumulate = job.accumulate or (job.dtype if job.micros == 1 else None)
    return Engine(
        model,
        group,
        precision=Precision(DTYPES[job.dtype], accumulate=DTYPES[accumulate] if accumulate else None),
        zero=job.zero,
        layout=job.layout,
        overlap=job.overlap,
        prefetch=job.prefetch,
        persistence=job.persistence,
        offload=Offload(states=CPU if job.offload_optimizer else None, parameters=CPU if job.offload_param else None),
    )


def rows_of(job: Job) -> list[MicroBatch]:
    """Return a replica's micro-batches: of whole rows, every second token supervised where half of them are."""
    generator = torch.Generator().manual_seed(0)
    return [_micro_batch(job, rows, generator) for rows in _sizes(job)]


def _sizes(job: Job) -> Sequence[int]:
    starts = range(0, job.replica_rows, job.micro_batch)
    return [min(job.micro_batch, job.replica_rows - start) for start in starts]


def _micro_batch(job: Job, rows: int, generator: torch.Generator) -> MicroBatch:
    tokens = torch.randint(0, job.model.vocab_size, (rows, job.tokens), generator=generator)
    labels, zeros = tokens.clone(), torch.zeros_like(tokens)
    labels[:, torch.arange(job.tokens) % round(1 / job.supervised) > 0] = IGNORED
    positions = torch.arange(job.tokens).expand(rows, -1).contiguous()
    return MicroBatch(tokens, labels, positions, zeros, zeros, cells_of(range(rows), job.tokens))


class Quiet:
    """A group whose own work no census sees: among threads the last rank to come does it for all."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self.members, self._group = group.rank, group.size, group.members, group

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._group, name)

        def called(*args: Any, **options: Any) -> Any:
            with _disable_current_modes():
                return verb(*args, **options)

        return called

    def subgroup(self, lines: Sequence[Sequence[int]]) -> "Quiet":
        """Return the subgroup, as quiet."""
        return Quiet(self._group.subgroup(lines))
