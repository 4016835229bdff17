"""Run micro-batches through the parts of a model, wherever they lie.

One stage on one rank or many on many: the ranks of a pipeline follow the programs of a schedule, and a pipeline of one
is one of those. Rows are shared out before, by tokens, where several ranks share a row.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minispeed.axes import Layout
from minispeed.collective.numbers import everyones
from minispeed.errors import UserError
from minispeed.model.dropout import drops_out
from minispeed.model.loss import IGNORED
from minispeed.parts import Lines, Part
from minispeed.pipeline.actions import Program
from minispeed.pipeline.bundle import Bundle
from minispeed.pipeline.execute import execute
from minispeed.pipeline.messages import forward_only
from minispeed.pipeline.stage import Stage
from minispeed.pipeline.timeline import Timeline
from minispeed.sequence.cut import SequenceCut
from minispeed.zero.sharded import ShardedModel


class _Fields(NamedTuple):
    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor
    tasks: Tensor
    cells: Tensor


class MicroBatch(_Fields):
    """Rows of tokens, everything attached before any cut. All (B, T) int64.

    labels     the token that should follow, -100 where nothing is learnt
    positions  place of each token in its document
    documents  which document of the row it belongs to, -1 for padding
    tasks      which task its loss is counted under
    cells      where in the step it stands, for dropout: as `cells_of`; -1, unknown, when absent
    """

    __slots__ = ()

    def __new__(
        cls,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        documents: Tensor,
        tasks: Tensor,
        cells: Tensor | None = None,
    ) -> "MicroBatch":
        """Make one; every field is a tensor, so that all can be moved and cut alike."""
        cells = torch.full_like(tokens, UNKNOWN) if cells is None else cells
        return super().__new__(cls, tokens, labels, positions, documents, tasks, cells)

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same rows on another device."""
        return MicroBatch(*(field.to(device, non_blocking=device.type == "cuda") for field in self))

    @property
    def num_supervised(self) -> int:
        """How many tokens of these rows are learnt from."""
        return int((self.labels != IGNORED).sum())


UNKNOWN = -1  # where a token stands in the step
PADDING = {"tokens": 0, "labels": IGNORED, "positions": 0, "documents": -1, "tasks": 0, "cells": UNKNOWN}
Observe = Callable[[MicroBatch, Tensor], None]


def ignore(micro: MicroBatch, losses: Tensor) -> None:
    """Observe nothing."""


def check_alike(micro_batches: Sequence[MicroBatch], lines: Lines) -> None:
    """Raise UserError unless the ranks that share a copy of the model bring the same rows: each sees parts of them."""
    rows = [x.cpu().numpy().tobytes() for micro in micro_batches for x in (micro.tokens, micro.labels)]
    seen = everyones(lines.copy, [zlib.crc32(b"".join(rows))]).flatten().tolist()
    other = next((rank for rank, found in enumerate(seen) if found != seen[0]), None)
    if other is not None:
        members = lines.copy.members
        what = f"ranks {members[0]} and {members[other]} share a copy of the model, and bring different rows"
        raise UserError(what, fix="the rows of the replica: engine.lines.dp.rank of engine.lines.dp.size")


class Runner:
    """The parts that this rank holds, and how micro-batches come to them."""

    def __init__(
        self, parts: Sequence[Part], layout: Layout, lines: Lines, sequence: SequenceCut | None, device: torch.device
    ) -> None:
        self.parts, self.layout, self.lines, self.sequence, self.device = parts, layout, lines, sequence, device
        self.timeline: Timeline | None = None  # of the last run, this rank's events
        self._programs: dict[int, list[Program]] = {}

    def train(
        self, micro_batches: Sequence[MicroBatch], weight: float, observe: Observe = ignore, *, step: int
    ) -> float:
        """Leave the gradients of the summed losses, times `weight`, in the parts' units.

        observe  is given each micro-batch, this rank's tokens of it, with its losses, nats: where they count
        step     its number, which dropout is drawn by
        Returns  the sum of those losses
        Raises   UserError if the model has dropout, and a micro-batch does not know its cells
        """
        if any(drops_out(part.sharded.module) for part in self.parts):
            check_cells(micro_batches)
        return self._run(micro_batches, weight, self._program(len(micro_batches)), observe, step)

    def evaluate(self, micro_batches: Sequence[MicroBatch], observe: Observe) -> None:
        """Run forward alone; `observe` as in `train`."""
        self._run(micro_batches, 1.0, forward_only(self._program(len(micro_batches))), observe, None)

    def _program(self, micros: int) -> list[Program]:
        if micros not in self._programs:
            self._programs[micros] = self.layout.programs(micros)
        return self._programs[micros]

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        weight: float,
        programs: Sequence[Program],
        observe: Observe,
        step: int | None,
    ) -> float:
        here = [self._share(micro.to(self.device)) for micro in micro_batches]
        total = 0.0

        def note(micro: int, outputs: Bundle) -> None:
            nonlocal total
            if self.lines.has_losses:
                total += outputs[0].sum().item()
                observe(here[micro], outputs[0])

        stages = {
            part.stage: Stage(
                run=partial(_run_part, part, here, step),
                loss=lambda outputs, micro: outputs[0].sum() * weight,
                backward=Reducing(part.sharded, len(here)),
            )
            for part in self.parts
        }
        self.timeline = execute(programs, stages, self.lines.pp, observe=note, device=self.device)
        return total

    def _share(self, micro: MicroBatch) -> MicroBatch:
        """Return this rank's tokens of the rows."""
        if self.sequence is None:
            return micro
        return MicroBatch(*(self.sequence.share(x, fill=PADDING[name]) for name, x in micro._asdict().items()))


def check_cells(micro_batches: Sequence[MicroBatch]) -> None:
    """Raise UserError if a token does not know where in the step it stands."""
    for number, micro in enumerate(micro_batches):
        if (micro.cells == UNKNOWN).any():
            what = f"dropout is drawn by where in the step a token stands, and micro-batch {number} has no cells"
            raise UserError(what, fix="MicroBatch(.., cells=cells_of(rows, T)), rows those of the step that these are")


def _run_part(part: Part, micro_batches: Sequence[MicroBatch], step: int | None, inputs: Bundle, micro: int) -> Bundle:
    tokens, labels, positions, documents, tasks, cells = micro_batches[micro]
    drawn: dict[str, Any] = {"cells": cells, "step": step} if drops_out(part.sharded.module) else {}
    return part.run(inputs, tokens, labels, positions=positions, documents=documents, tasks=tasks, **drawn)


class Reducing:
    """How the gradients of a sharded part are made: those that are not put off are reduced while the backward runs."""

    def __init__(self, sharded: ShardedModel, micros: int) -> None:
        self.sharded, self.last = sharded, micros - 1

    def whole(self, tensors: Bundle, gradients: Bundle, micro: int) -> None:
        """Run the backward of a micro-batch, and reduce what the table wants reduced."""
        self.sharded.backward_from(tensors, gradients, last=micro == self.last)

    def inputs(self, tensors: Bundle, gradients: Bundle, micro: int) -> None:
        """Run it, and reduce nothing yet."""
        self.sharded.backward_unreduced(tensors, gradients)

    def weights(self, gradients: Iterable[tuple[nn.Parameter, Tensor]], micro: int) -> None:
        """Add what was put off."""
        for p, gradient in gradients:
            self.sharded.add_gradient(p, gradient)

    def reduce(self, micro: int) -> None:
        """Reduce what the table wants reduced."""
        self.sharded.reduction.is_last = micro == self.last
        self.sharded.reduce_now()
