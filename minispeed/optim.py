"""Move the weights: AdamW of our own, which parameters decay, and how the learning rate goes.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        (both start at 0, so both are divided by 1 - b^t)
    w = w - lr decay w - lr m^ / (sqrt(v^) + eps)

The decay acts on the weights directly and not through the gradient: Loshchilov & Hutter 2017, algorithm 2
(https://arxiv.org/abs/1711.05101); the moments are Adam's, Kingma & Ba 2014 (https://arxiv.org/abs/1412.6980). The
loop here and torch's fused kernel compute the same; the kernel reads each number once and is used where it exists.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from minispeed.errors import UserError


class AdamW(torch.optim.Optimizer):
    """AdamW over any parameters: whole tensors, or one rank's flat shards of them.

    Holds  two moments per element, in the parameter's dtype, and a step count per parameter
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(
                f"AdamW got lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}",
                fix="none negative, and betas below 1",
            )
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=fused)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Reads   p.grad, (shape of p)
        Writes  p, and its two moments
        """
        loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            (self._fused_update if group["fused"] else self._update)(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            state["step"] += 1
            m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
            p.mul_(1 - lr * group["weight_decay"])
            m.lerp_(p.grad, 1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            root = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
            p.addcdiv_(m, root, value=-lr / (1 - beta1**t))

    def _fused_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters in two groups: matrices decay, biases and gains of norms do not.

    Returns  groups of {"names", "weight_decay"}; every trainable parameter is in exactly one
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [name for name, p in named if p.dim() >= 2]
    vectors = [name for name, p in named if p.dim() < 2]
    groups = [{"names": matrices, "weight_decay": weight_decay}, {"names": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["names"]]


Schedule = Callable[[int], float]


def constant(step: int) -> float:
    """Return 1: the rate stays."""
    return 1.0


def warmup_then(shape: str, *, warmup: int, total: int, final: float = 0.0) -> Schedule:
    """Return the factor on the learning rate at each step: up in a line, then down to `final`.

    shape   "cosine" (Loshchilov & Hutter 2016, equation 5, https://arxiv.org/abs/1608.03983), "linear" or "constant"
    warmup  steps of the rise; step 0 already has 1 / warmup of the rate
    total   steps in all; the last one stands one step before `final`
    """
    falls: dict[str, Callable[[float], float]] = {
        "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
        "linear": lambda progress: 1 - progress,
        "constant": lambda progress: 1.0,
    }
    if shape not in falls:
        raise UserError(f"no learning-rate schedule is called {shape!r}", fix=" or ".join(falls))
    if warmup < 0 or total < 1:
        raise UserError(f"a schedule of {total} steps with {warmup} of warm-up", fix="total >= 1, warmup >= 0")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return final + (1 - final) * falls[shape](progress)

    return factor
