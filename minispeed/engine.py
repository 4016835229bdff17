"""Put the pieces of a training step together, in a fixed order, on any number of ranks.

    losses of every micro-batch -> gradients, summed over ranks -> norm, clip -> optimizer on masters -> parameters

The law that everything rests on: the step's loss is the sum over supervised tokens divided by the number of supervised
tokens in the whole step, of all micro-batches and all ranks. The number is counted first and divided by once, before
backward, and after that only sums travel: so no way of cutting the same rows changes a gradient.

Masters and half-precision parameters: Micikevicius et al. 2017, section 3.1 (https://arxiv.org/abs/1710.03740).
Clipping by the global norm: Pascanu et al. 2013, section 3.2 (https://arxiv.org/abs/1211.5063).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minispeed.checkpoint import Piece
from minispeed.collective.agree import agree
from minispeed.collective.group import Group, SoloGroup
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.model.loss import IGNORED
from minispeed.optim import AdamW, check_elementwise, decay_groups
from minispeed.precision import Precision
from minispeed.scaler import LossScaler
from minispeed.schedules import OneCycle, Schedule
from minispeed.zero.absent import owner_of
from minispeed.zero.sharded import Offload, ShardedModel
from minispeed.zero.unit import Dtypes, ShardedUnit

SMALLEST_FP16 = 2.0**-24
MOMENTS = ("exp_avg", "exp_avg_sq")


class MicroBatch(NamedTuple):
    """Rows of tokens, everything attached before any cut. All (B, T) int64.

    labels     the token that should follow, -100 where nothing is learnt
    positions  place of each token in its document
    documents  which document of the row it belongs to, -1 for padding
    tasks      which task its loss is counted under
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor
    tasks: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same rows on another device."""
        return MicroBatch(*(field.to(device, non_blocking=device.type == "cuda") for field in self))

    @property
    def num_supervised(self) -> int:
        """How many tokens of these rows are learnt from."""
        return int((self.labels != IGNORED).sum())


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
        schedule: Schedule,
        lr: float,
        zero: int = 0,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        clip: float = 0.0,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        units: Mapping[str, Sequence[str]] | None = None,
        scaler: LossScaler | None = None,
        bucket: int | None = None,
        overlap: bool = True,
        prefetch: int = 0,
        persistence: int = 0,
        offload: Offload = Offload(),
    ) -> None:
        """Take over the model's parameters; every rank starts from rank 0's values.

        zero        ZeRO stage
        clip        largest global norm of the gradient; 0 leaves it alone
        optimizer   makes the optimizer of groups {"params", "weight_decay"}; our AdamW when absent
        scaler      the loss scale and how it changes; fp16 needs one
        units, bucket, overlap, prefetch, persistence, offload   see `ShardedModel`
        Holds       see `minispeed.zero.table`
        Raises      UserError if the ranks built different models, nothing is trainable, or fp16 has no scaler
        """
        if precision.needs_scaler and scaler is None:
            raise UserError(
                "fp16 gradients below 6e-8 become zero, and there is no loss scaler",
                fix="scaler=LossScaler(), or bf16",
            )
        self.group: Group = group or SoloGroup()
        self.schedule, self.lr, self.clip = schedule, lr, clip
        self.step = self.num_updates = 0  # a skipped step is no update
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
        agree(self.group, settings | {f"parameter {name}": _describe(p) for name, p in model.named_parameters()})
        for tensor in [*(p for p in model.parameters() if owner_of(p) is None), *model.buffers()]:
            self.group.broadcast(tensor.detach(), 0).wait()  # who has an owner was born with equal values
        groups = decay_groups(model, weight_decay)
        accumulate = precision.accumulate or precision.master
        dtypes = Dtypes(
            compute=precision.compute,
            master=precision.master,
            # stages 0 and 1 add up whole gradients before they are summed over ranks, stages 2 and 3 their shards after
            collect=precision.compute if zero >= 2 else accumulate,
            reduce=precision.reduce or precision.compute,
            gradient=accumulate,
        )
        self.sharded = ShardedModel(
            model,
            self.group,
            stage=zero,
            dtypes=dtypes,
            param_groups=[group["names"] for group in groups],
            units=units,
            bucket=bucket,
            overlap=overlap,
            prefetch=prefetch,
            persistence=persistence,
            offload=offload,
        )
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(precision.compute)
        for group_of, masters in zip(groups, self._masters_by_group(len(groups))):
            group_of["params"] = masters
        made = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups if g["params"]]
        # a rank may own nothing at all: fewer elements than ranks
        make = optimizer or (lambda groups: AdamW(groups, lr=lr, betas=betas))
        try:
            self.optimizer = make(made) if made else None
        except ValueError as error:
            how = "each a whole tensor" if zero == 0 else f"at ZeRO stage {zero} flat shards of many"
            raise UserError(f"the optimizer refuses the parameters, {how}: {error}", fix="zero=0, or AdamW") from error
        if self.optimizer is not None:
            check_elementwise(self.optimizer, zero)

    def _masters_by_group(self, count: int) -> Iterator[list[nn.Parameter]]:
        for index in range(count):
            yield [
                master
                for unit in self.sharded.units
                for (of_group, _, _), master in zip(unit.windows, unit.masters)
                if of_group == index
            ]

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        observe: Callable[[MicroBatch, Tensor], None] = lambda micro, losses: None,
        *,
        watch_small: bool = False,
    ) -> Report:
        """Make one update from all micro-batches of all ranks together. Every rank brings as many.

        observe      is given each micro-batch of this rank with its losses, (B, T) nats, 0 where not supervised
        watch_small  count, for the report, the gradients that fp16 could not hold without the loss scale
        """
        # 1. count, so that everything after is a plain sum
        counts = [sum(micro.num_supervised for micro in micro_batches)]
        counts.append(sum(int((micro.documents >= 0).sum()) for micro in micro_batches))
        num_supervised, num_tokens = self._sum(counts).tolist()
        # 2. gradients, times the loss scale
        total = self._gradients(micro_batches, num_supervised, observe)
        # 3. one norm, one rate, one step
        norm, is_finite = self._norm()
        rate = self.lr * self.schedule(self.step)
        nonfinite, too_small = "", self._too_small() if watch_small else {}
        if is_finite:
            self._update(norm, rate)
        else:
            self._forget()
            if self.scaler.is_at_floor:
                nonfinite = self._find_nonfinite(micro_batches, num_supervised)
        report = Report(
            loss=self._sum([total]).item() / max(1, num_supervised),
            num_supervised=int(num_supervised),
            num_tokens=int(num_tokens),
            norm=norm,
            lr=rate,
            scale=self.scaler.scale,
            skipped=not is_finite,
            nonfinite=nonfinite,
            too_small=too_small,
        )
        self.scaler = self.scaler.after(not is_finite)
        self.step += 1
        return report

    def _gradients(
        self,
        micro_batches: Sequence[MicroBatch],
        num_supervised: float,
        observe: Callable[[MicroBatch, Tensor], None] = lambda micro, losses: None,
    ) -> float:
        """Leave this step's gradients, times the loss scale, in the units; return this rank's summed loss."""
        total = 0.0
        for index, micro in enumerate(micro_batches):
            here = micro.to(self.device)
            with self.sharded.running():
                losses = self.model(here.tokens, here.labels, positions=here.positions, documents=here.documents)
                loss = losses.sum() * (self.scaler.scale / max(1, num_supervised))
            self.sharded.backward(loss, last=index == len(micro_batches) - 1)
            observe(here, losses.detach())
            total += losses.detach().sum().item()
        return total

    def _forget(self) -> None:
        for unit in self.sharded.units:
            unit.gradient = None

    def _find_nonfinite(self, micro_batches: Sequence[MicroBatch], num_supervised: float) -> str:
        """Run a skipped step's backward again and say where its first gradient that is not finite came from.

        Once ranks have added their gradients up, nobody can tell whose was bad: so each looks at its own before.
        """
        found: list[str] = []
        with self.sharded.watching(lambda name, grad: None if grad.isfinite().all() else found.append(name)):
            self._gradients(micro_batches, num_supervised)
        self._forget()
        names = [name for name, _ in self.model.named_parameters()]
        mine = torch.tensor([names.index(found[0]) if found else len(names)])
        everyone = mine.new_empty(self.group.size)
        self.group.all_gather(everyone, mine).wait()
        bad = [(rank, index) for rank, index in enumerate(everyone.tolist()) if index < len(names)]
        if not bad:
            return f"step {self.step}: finite on every rank, not when summed in {self.precision.name}"
        rank, index = bad[0]
        return f"step {self.step}: the gradient of {names[index]} on rank {rank} is not finite"

    def _sum(self, values: Sequence[float]) -> Tensor:
        """Return the sums over all ranks, fp64 (exact for counts below 2**53)."""
        sums = torch.tensor(values, dtype=torch.float64)
        self.group.all_reduce(sums).wait()
        return sums

    def _norm(self) -> tuple[float, bool]:
        """Return the global norm of the gradient, unscaled, and whether all its elements are finite: one for all ranks.

        Each element counts once: at stage 0 every rank holds all, else each holds its shard.
        """
        gradients = [unit.gradient for unit in self.sharded.units if unit.gradient is not None]
        squares = _squares(gradients, torch.float32)
        # a finite sum has finite terms; one that is not may have overflowed itself: look at every element
        bad = not math.isfinite(squares) and not all(gradient.isfinite().all() for gradient in gradients)
        if not math.isfinite(squares) and not bad:
            squares = _squares(gradients, torch.float64)
        anywhere = torch.tensor([float(bad)])
        self.group.all_reduce(anywhere, "max").wait()
        squares = squares if self.sharded.stage == 0 else self._sum([squares]).item()
        return math.sqrt(squares) / self.scaler.scale, not anywhere.item()

    def _too_small(self) -> dict[str, float]:
        modules = {name: name.rpartition(".")[0] for unit in self.sharded.units for name in unit.parameters}
        counts = {module: [0.0, 0.0] for module in modules.values()}  # of small elements, of all
        for unit in self.sharded.units:
            gradient = unit.gradient
            for name, elements, place in unit.layout.pieces(unit.part) if gradient is not None else ():
                assert gradient is not None
                size = gradient[slice(*place)].abs().to(torch.float64) / self.scaler.scale
                counts[modules[name]][0] += int(((size > 0) & (size < SMALLEST_FP16)).sum())
                counts[modules[name]][1] += elements.size
        flat = [number for pair in counts.values() for number in pair]
        small, every = self._sum(flat).view(-1, 2).unbind(1)  # at stage 0 each rank counts all: the share is the same
        return {module: float(a / b) for module, a, b in zip(counts, small, every) if b}

    @torch.no_grad()
    def _update(self, norm: float, rate: float) -> None:
        coefficient = self.clip / norm if self.clip and norm > self.clip else 1.0
        for group in self.optimizer.param_groups if self.optimizer else ():
            group["lr"] = rate
            if isinstance(self.schedule, OneCycle) and (momentum := self.schedule.momentum(self.step)) is not None:
                group.update({"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum})
        for unit in self.sharded.units:
            # unit by unit, so that gradients in the masters' dtype exist for one unit at a time
            unit.give_gradients(coefficient / self.scaler.scale)
            if unit.masters and self.optimizer is not None:
                self.optimizer.step()
            for master in unit.masters:
                master.grad = None
        self.num_updates += 1
        self.sharded.publish()

    # ---- what a checkpoint holds

    def pieces(self) -> list[Piece]:
        """Return everything of this rank that a checkpoint must hold, by logical name: masters and both moments.

        Names  "parameters/NAME", "exp_avg/NAME", "exp_avg_sq/NAME"; the tensors are views of the live ones. At stage 0
               every rank returns everything
        """
        found = []
        for unit in self.sharded.units:
            for name, elements, place in unit.layout.pieces(unit.part):
                for kind, window, tensor in self._held(unit):
                    both = place.meet(window)
                    if both.size:
                        which = both.shift(elements.start - place.start)
                        part = tensor[slice(*both.shift(-window.start))]
                        found.append(Piece(f"{kind}/{name}", unit.layout.shapes[name], which, part, unit.whole))
        return found

    def _held(self, unit: ShardedUnit) -> Iterator[tuple[str, Interval, Tensor]]:
        """Yield kind, window in the shard and elements of all that is kept of a unit's shard over a step."""
        yield "parameters", Interval(0, unit.layout.shard_size), unit.master
        for (_, window, _), master in zip(unit.windows, unit.masters):
            state = {} if self.optimizer is None else self.optimizer.state.get(master, {})
            for moment in MOMENTS:
                if moment in state:
                    yield moment, window, state[moment].view(-1)

    @torch.no_grad()
    def load(self, read: Callable[[str, Interval], Tensor | None], *, step: int, num_updates: int) -> None:
        """Go on from what `pieces` returned after `step` steps, of which `num_updates` were not skipped.

        read  returns the elements of a flattened tensor by logical name, None where there is no such tensor
        """
        self.step, self.num_updates = step, num_updates
        for unit in self.sharded.units:
            for master in unit.masters if num_updates else ():
                state: dict[str, Any] = {moment: torch.zeros_like(master) for moment in MOMENTS}
                assert self.optimizer is not None
                self.optimizer.state[master] = {"step": torch.tensor(float(num_updates), device=master.device), **state}
        for name, _, elements, tensor, _ in self.pieces():
            found = read(name, elements)
            if found is None:
                raise UserError(f"the checkpoint holds no {name}", fix="the checkpoint of a run of this model")
            tensor.copy_(found)
        self.sharded.publish()


def _describe(p: nn.Parameter) -> str:
    return f"{tuple(p.shape)} of {p.dtype}, {'trained' if p.requires_grad else 'frozen'}"


def _squares(gradients: Sequence[Tensor], at_least: torch.dtype) -> float:
    """Return the sum of the squares of all elements, added up in `at_least` or wider."""
    wide = [torch.promote_types(gradient.dtype, at_least) for gradient in gradients]
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient, dtype in zip(gradients, wide)]
    return sum(norm.item() ** 2 for norm in norms)
