"""Put the pieces of a training step together, in a fixed order, on any number of ranks.

    losses of every micro-batch -> gradients, summed over ranks -> norm, clip -> optimizer on masters -> parameters

The law that everything rests on: the step's loss is the sum over supervised tokens divided by the number of supervised
tokens in the whole step, of all micro-batches and all ranks. The number is counted first and divided by once, before
backward, and after that only sums travel: so no way of cutting the same rows changes a gradient.

Masters and half-precision parameters: Micikevicius et al. 2017, section 3.1 (https://arxiv.org/abs/1710.03740).
Clipping by the global norm: Pascanu et al. 2013, section 3.2 (https://arxiv.org/abs/1211.5063).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minispeed.axes import Layout
from minispeed.checkpoint import Piece
from minispeed.clip import clip_factor, norm_of, too_small
from minispeed.collective.agree import agree
from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.numbers import everyones, sums_of
from minispeed.cut import Chain, cut_model
from minispeed.errors import UserError
from minispeed.model.generate import Reader
from minispeed.optim import AdamW, check_elementwise, decay_groups, needs_closure
from minispeed.parts import Lines, Part
from minispeed.precision import Precision
from minispeed.reader import reading
from minispeed.runner import MicroBatch, Observe, Runner, check_alike, ignore
from minispeed.scaler import LossScaler
from minispeed.schedules import Schedule, constant, set_rates
from minispeed.sharding import dtypes_for, make_optimizer, shard_parts
from minispeed.snapshot import Source, given_by, pieces_of, put_back
from minispeed.tensor.plan import Plan
from minispeed.ties import Ties
from minispeed.zero.absent import owner_of
from minispeed.zero.sharded import Offload, ShardedModel
from minispeed.zero.summing import Compression, InFull
from minispeed.zero.unit import ShardedUnit


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one step did, on all ranks.

    loss       nats per supervised token
    norm       of the gradient, before clipping
    scale      what the loss was multiplied by
    skipped    a gradient was not finite on some rank, and no rank changed anything
    nonfinite  if the loss scale can go no lower: which step, parameter and rank had the first such gradient
    too_small  by module, if asked for: the share of the gradient's elements, the loss scale divided out, that are not
               zero and below 2**-24, fp16's smallest number
    """

    loss: float
    num_supervised: int
    num_tokens: int
    norm: float
    lr: float
    scale: float
    skipped: bool
    nonfinite: str = ""
    too_small: Mapping[str, float] = field(default_factory=dict)


class Engine:
    """A model with its masters and optimizer, cut over a group by ZeRO; `train_step` is one update."""

    def __init__(
        self,
        model: nn.Module,
        group: Group | None = None,
        *,
        precision: Precision,
        schedule: Schedule = constant,
        lr: float = 1e-3,
        zero: int = 0,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        clip: float = 0.0,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        param_groups: Sequence[Mapping[str, Any]] | None = None,
        units: Mapping[str, Sequence[str]] | None = None,
        scaler: LossScaler | None = None,
        bucket: int | None = None,
        overlap: bool = True,
        prefetch: int = 0,
        persistence: int = 0,
        offload: Offload = Offload(),
        divisor: float = 1.0,
        predivide: float = 1.0,
        compression: Compression = InFull(),
        layout: Layout = Layout(),
        plan: Plan | None = None,
        chain: Chain | None = None,
        source: Source | None = None,
    ) -> None:
        """Take over the model's parameters; every rank builds the whole model and starts from rank 0's values.

        group         all ranks of the run, which share the model as `layout` says
        plan, chain   how tp cuts the model's leaves, and between which layers pp does; a GPT brings its own
        zero          ZeRO stage
        clip          largest global norm of the gradient; 0 leaves it alone
        optimizer     makes the optimizer of groups {"params", ...}; our AdamW when absent. On a rank that owns nothing
                      of a group (fewer elements than ranks) its "params" are empty
        param_groups  {"names", ...}: the trainable parameters by group, each with the optimizer's settings of that
                      group; matrices with `weight_decay` and vectors without when absent
        scaler        the loss scale and how it changes; fp16 needs one
        source        where the values of parameters are read from, by each rank its own slices alone; what it has not
                      is rank 0's. With a model that was built `hollow_on` a device, nothing is whole on any rank
        divisor       what the summed gradient is divided by at the step, for losses that are means of their own
        predivide     how much of that is divided out before gradients are summed over ranks
        compression   how they travel: `InFull`, or as `OneBit`s
        units, bucket, overlap, prefetch, persistence, offload   see `ShardedModel`
        Holds         see `minispeed.zero.table`
        Raises        UserError if the ranks built different models, nothing is trainable, or fp16 has no scaler
        """
        if precision.needs_scaler and scaler is None:
            raise UserError(
                "fp16 gradients below 6e-8 become zero, and there is no loss scaler",
                fix="scaler=LossScaler(), or bf16",
            )
        self.group: Group = group or SoloGroup()
        self.layout, self.lines = layout, Lines.of(layout.mesh(self.group.size), self.group)
        self.schedule, self.lr, self.clip = schedule, lr, clip
        self.step = self.num_updates = 0  # a skipped step is no update
        self.skipped = False  # whether the last one was
        self.divisor, self.predivide = divisor, predivide
        self.model, self.precision, self.scaler = model, precision, scaler or LossScaler.static(1.0)
        self.device = next(model.parameters()).device
        settings: dict[str, object] = {
            "precision": precision,
            "scaler": scaler,
            "lr": lr,
            "ZeRO stage": zero,
            "clip": clip,
        }
        settings |= {"bucket": bucket, "prefetch": prefetch, "persistence": persistence, "offload": offload}
        settings |= {"layout": layout, "compression": compression}
        agree(self.group, settings | {f"parameter {name}": _describe(p) for name, p in model.named_parameters()})
        given = set() if source is None else given_by(source)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if owner_of(tensor) is None and name not in given:  # who has an owner was born with equal values
                self.group.broadcast(tensor.detach(), 0).wait()
        if not any(p.requires_grad for p in model.parameters()):
            count = sum(1 for _ in model.parameters())
            raise UserError(f"none of the {count} parameters requires a gradient", fix="requires_grad_(True)")
        groups = [dict(of) for of in param_groups or decay_groups(model, weight_decay)]
        self.names = [name for name, _ in model.named_parameters()]
        cut = cut_model(model, layout, self.lines, plan, chain)
        self.parts = shard_parts(
            cut,
            self.lines,
            groups,
            units,
            stage=zero,
            dtypes=dtypes_for(precision, zero),
            bucket=bucket,
            overlap=overlap,
            prefetch=prefetch,
            persistence=persistence,
            offload=offload,
            predivide=predivide,
            compression=compression,
        )
        self.ties = Ties(self.parts, cut.holders, self.lines.pp)
        self.runner = Runner(self.parts, layout, self.lines, cut.sequence, self.device)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(precision.compute)
        make = optimizer or (lambda groups: AdamW(groups, lr=lr, betas=betas))
        self.optimizer = make_optimizer(self.parts, groups, make, zero=zero)
        check_elementwise(self.optimizer, zero, pp=layout.pp, tp=layout.tp)
        if source is not None:
            put_back(self.parts, self.optimizer, source, with_optimizer=False, strict=False)

    @property
    def sharded(self) -> ShardedModel:
        """The sharded model of a rank that holds one part alone."""
        (part,) = self.parts
        return part.sharded

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        observe: Observe = ignore,
        *,
        watch_small: bool = False,
    ) -> Report:
        """Make one update from all micro-batches of all ranks together. Every rank brings as many.

        micro_batches  the same on ranks that share a copy of the model; of one shape where it is a pipeline
        observe        is given each micro-batch, this rank's tokens of it, with their losses, nats, 0 where not
                       supervised; of ranks that have the same losses, on one
        watch_small    count, for the report, the gradients that fp16 could not hold without the loss scale
        """
        # 1. count, so that everything after is a plain sum
        check_alike(micro_batches, self.lines)
        counts = [sum(micro.num_supervised for micro in micro_batches)]
        counts.append(sum(int((micro.documents >= 0).sum()) for micro in micro_batches))
        num_supervised, num_tokens = sums_of(self.lines.dp, counts).tolist()
        # 2. gradients, times the loss scale
        scaler = self.scaler
        train = partial(self.runner.train, micro_batches, scaler.scale / max(1, num_supervised), step=self.step)
        total = train(observe)
        small = too_small(self.parts, self.lines, scaler.scale, self.names) if watch_small else {}
        # 3. one rate, one norm, one step
        rate = set_rates(self.optimizer.param_groups, self.schedule, self.lr, self.step)
        loss = self._mean(total, num_supervised)
        norm = self.update(lambda: loss, lambda: self._mean(train(), num_supervised))
        hopeless = self.skipped and scaler.is_at_floor
        return Report(
            loss=loss,
            num_supervised=int(num_supervised),
            num_tokens=int(num_tokens),
            norm=norm,
            lr=rate,
            scale=scaler.scale,
            skipped=self.skipped,
            nonfinite=self._find_nonfinite(micro_batches, num_supervised) if hopeless else "",
            too_small=small,
        )

    @property
    def gradient_divisor(self) -> float:
        """What the gradient in the units is divided by at the step, the loss scale included."""
        return self.divisor / self.predivide * self.scaler.scale

    def _mean(self, total: float, num_supervised: float) -> float:
        """Return the loss of a token, given the sum of this rank's."""
        return sums_of(self.group, [total]).item() / max(1, num_supervised)

    @torch.no_grad()
    def update(self, *losses: Callable[[], float]) -> float:
        """Step with the gradients that lie in the units, or, where one is not finite on some rank, forget them.

        losses   for an optimizer that evaluates several times in a step: what tells the loss of these gradients, and
                 what computes loss and gradients again, at the parameters of then
        Returns  the gradient's norm before clipping; `skipped` says which it was
        """
        for part in self.parts:
            part.sharded.absorb()
        self.ties.sum()
        norm, is_finite = norm_of(self.parts, self.lines)
        norm /= self.gradient_divisor
        if is_finite:
            self._step_at_once(norm, *losses) if needs_closure(self.optimizer) else self._step(norm)
            self.num_updates += 1
        for part in self.parts:
            part.sharded.publish() if is_finite else part.sharded.forget()
        self.skipped = not is_finite
        self.scaler = self.scaler.after(self.skipped)
        self.step += 1
        return norm

    def _units(self) -> Iterator[ShardedUnit]:
        return (unit for part in self.parts for unit in part.units)

    def _step(self, norm: float) -> None:
        """Step unit by unit, so that gradients in the masters' dtype exist for one unit at a time."""
        for unit in self._units():
            unit.give_gradients(clip_factor(norm, self.clip) / self.gradient_divisor)
            if unit.masters:
                self.optimizer.step()
            for master in unit.masters:
                master.grad = None

    def _step_at_once(
        self, norm: float, first: Callable[[], float] | None = None, again: Callable[[], float] | None = None
    ) -> None:
        """Let the optimizer ask for loss and gradients as often as it likes; the first are there."""
        if first is None or again is None:
            what = f"{type(self.optimizer).__name__} computes gradients several times in a step"
            raise UserError(what, fix="Engine.train_step, which can; or AdamW")
        evaluate = first

        def closure() -> float:
            nonlocal evaluate, norm
            if evaluate is again:
                for part in self.parts:
                    part.sharded.publish()
            loss = evaluate()
            if evaluate is again:
                norm = norm_of(self.parts, self.lines)[0] / self.gradient_divisor
            evaluate = again
            for unit in self._units():
                unit.give_gradients(clip_factor(norm, self.clip) / self.gradient_divisor)
            return loss

        self.optimizer.step(closure)
        for unit in self._units():
            for master in unit.masters:
                master.grad = None

    def _find_nonfinite(self, micro_batches: Sequence[MicroBatch], num_supervised: float) -> str:
        """Run a skipped step's backward again and say where its first gradient that is not finite came from.

        Once ranks have added their gradients up, nobody can tell whose was bad: so each looks at its own before.
        """
        found: list[str] = []
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                look = partial(_note_nonfinite, found, part)
                stack.enter_context(part.sharded.watching(look))
            self.runner.train(micro_batches, self.scaler.scale / max(1, num_supervised), step=self.step - 1)
        for part in self.parts:
            part.sharded.forget()
        names = self.names
        firsts = everyones(self.group, [names.index(found[0]) if found else len(names)]).flatten().tolist()
        # a backward begins in the last stage, and what is wrong there is handed on
        bad = [(-self.lines.mesh.coords(rank)["pp"], rank, index) for rank, index in enumerate(firsts)]
        bad = sorted(one for one in bad if one[2] < len(names))
        step = self.step - 1
        if not bad:
            return f"step {step}: finite on every rank, not when summed in {self.precision.name}"
        _, rank, index = bad[0]
        return f"step {step}: the gradient of {names[index]} on rank {rank} is not finite"

    def reading(self) -> contextlib.AbstractContextManager[Reader]:
        """Make the model, a GPT, ready to write on every rank; all are given the same prompts, and write the same."""
        return reading(self.parts, self.layout, self.lines, self.runner.sequence, self.device)

    # ---- what a checkpoint holds

    def pieces(self) -> list[Piece]:
        """Return everything of this rank that a checkpoint must hold, by logical name; see `minispeed.snapshot`."""
        for part in self.parts:
            part.sharded.absorb()
        return pieces_of(self.parts, self.optimizer)

    def load(self, source: Source, *, step: int, num_updates: int, with_optimizer: bool = True) -> None:
        """Go on from what `pieces` returned after `step` steps, of which `num_updates` were not skipped."""
        self.step, self.num_updates = step, num_updates
        put_back(self.parts, self.optimizer, source, with_optimizer=with_optimizer)


def _describe(p: nn.Parameter) -> str:
    return f"{tuple(p.shape)} of {p.dtype}, {'trained' if p.requires_grad else 'frozen'}"


def _note_nonfinite(found: list[str], part: Part, name: str, gradient: Tensor) -> None:
    """Write down the name that a parameter of a part has in the whole model, if its gradient is not finite."""
    if not gradient.isfinite().all():
        found.append(part.logical[name].name)
