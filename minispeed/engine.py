"""Put the pieces of a training step together, in a fixed order.

    losses of every micro-batch -> gradients -> global norm, clip -> AdamW on the masters -> parameters

The law that everything rests on: the step's loss is the sum over supervised tokens divided by the number of supervised
tokens in the whole step. The number is counted first and divided by once, before backward, so that no way of cutting
the same rows into micro-batches changes a gradient.

Masters and half-precision parameters: Micikevicius et al. 2017, section 3.1 (https://arxiv.org/abs/1710.03740).
Clipping by the global norm: Pascanu et al. 2013, section 3.2 (https://arxiv.org/abs/1211.5063).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minispeed.model.loss import IGNORED
from minispeed.optim import AdamW, Schedule, decay_groups
from minispeed.precision import Precision

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

    @property
    def num_supervised(self) -> int:
        """How many tokens of these rows are learnt from."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one step did. loss: nats per supervised token; norm: of the whole gradient, before clipping."""

    loss: float
    num_supervised: int
    num_tokens: int
    norm: float
    lr: float
    skipped: bool


class Engine:
    """A model with its masters and optimizer; `train_step` is one update."""

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: Precision,
        schedule: Schedule,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        clip: float = 0.0,
    ) -> None:
        """Cast the model to the compute dtype and keep masters of it.

        clip   largest global norm of the gradient; 0 leaves it alone
        Holds  per parameter: compute dtype, gradient, and for masters with two moments 12 bytes (fp32)
        """
        self.schedule, self.lr, self.clip = schedule, lr, clip
        self.step = self.num_updates = 0  # a skipped step is no update
        initial = {name: p.detach().clone() for name, p in model.named_parameters()}  # before the cast rounds it
        self.model = model.to(precision.compute)
        self.parameters = dict(model.named_parameters())
        self.masters = {
            name: p if p.dtype == precision.master else nn.Parameter(initial[name].to(precision.master))
            for name, p in self.parameters.items()
        }
        groups = [
            {"params": [self.masters[name] for name in group["names"]], "weight_decay": group["weight_decay"]}
            for group in decay_groups(model, weight_decay)
        ]
        self.optimizer = AdamW(groups, lr=lr, betas=betas)

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        observe: Callable[[MicroBatch, Tensor], None] = lambda micro, losses: None,
    ) -> Report:
        """Make one update from all micro-batches together.

        observe  is given each micro-batch with its losses, (B, T) nats, 0 where not supervised
        """
        # 1. count, so that everything after is a plain sum
        num_supervised = sum(micro.num_supervised for micro in micro_batches)
        total = 0.0
        # 2. gradients, added up in the masters' dtype
        for micro in micro_batches:
            losses = self.model(micro.tokens, micro.labels, positions=micro.positions, documents=micro.documents)
            (losses.sum() / max(1, num_supervised)).backward()
            observe(micro, losses.detach())
            total += losses.detach().sum().item()
            self._collect_gradients()
        # 3. one norm, one rate, one step
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = global_norm(gradients)
        skipped = not math.isfinite(norm)
        rate = self.lr * self.schedule(self.step)
        if not skipped:
            self._update(gradients, norm, rate)
        self.optimizer.zero_grad()
        self.step += 1
        return Report(
            loss=total / max(1, num_supervised),
            num_supervised=num_supervised,
            num_tokens=sum(int((micro.documents >= 0).sum()) for micro in micro_batches),
            norm=norm,
            lr=rate,
            skipped=skipped,
        )

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        """Add each parameter's gradient to its master's and free it."""
        for name, p in self.parameters.items():
            master = self.masters[name]
            if master is p or p.grad is None:
                continue
            if master.grad is None:
                master.grad = p.grad.to(master.dtype)
            else:
                master.grad += p.grad
            p.grad = None

    @torch.no_grad()
    def _update(self, gradients: list[Tensor], norm: float, rate: float) -> None:
        if self.clip and norm > self.clip:
            torch._foreach_mul_(gradients, self.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.num_updates += 1
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint must hold, by logical name: masters and both moments.

        Names  "parameters/NAME", "exp_avg/NAME", "exp_avg_sq/NAME"; the tensors are the live ones
        """
        held = {f"parameters/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for moment in MOMENTS if self.optimizer.state[master] else ():
                held[f"{moment}/{name}"] = self.optimizer.state[master][moment]
        return held

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor], *, step: int, num_updates: int) -> None:
        """Go on from what `tensors` returned after `step` steps, of which `num_updates` were not skipped."""
        self.step, self.num_updates = step, num_updates
        for name, master in self.masters.items():
            master.copy_(tensors[f"parameters/{name}"])
            self.parameters[name].copy_(master)
            if f"exp_avg/{name}" in tensors:
                state: dict[str, Any] = {m: tensors[f"{m}/{name}"].to(master.dtype).clone() for m in MOMENTS}
                self.optimizer.state[master] = {"step": torch.tensor(float(num_updates)), **state}


def global_norm(gradients: Iterable[Tensor]) -> float:
    """Return the square root of the sum of all squares; inf or nan if any element is."""
    norms = [gradient.norm() for gradient in gradients]
    return torch.stack(norms).norm().item() if norms else 0.0
