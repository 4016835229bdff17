"""Move the weights: AdamW, Adam and SGD of our own, which parameters decay, and which optimizers a shard allows.

    AdamW    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      (both start at 0, so both are divided by 1 - b^t)
             w = w - lr decay w - lr m^ / (sqrt(v^) + eps)
    Adam     the same with g + decay w in place of g, and no other decay
    SGD      g = g + decay w            m = mu m + g                 w = w - lr m, or with Nesterov w - lr (g + mu m)

AdamW's decay acts on the weights directly and not through the gradient: Loshchilov & Hutter 2017, algorithm 2
(https://arxiv.org/abs/1711.05101); the moments are Adam's, Kingma & Ba 2014 (https://arxiv.org/abs/1412.6980). Both
kinds of momentum: Sutskever et al. 2013, section 2 (https://proceedings.mlr.press/v28/sutskever13.html), in torch's
form. The loops here and torch's fused kernels compute the same; a kernel reads each number once and is used where it
exists.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from minispeed.errors import UserError

_FLAT = "and from ZeRO stage 1 on a rank holds flat pieces of them"
# torch's optimizers that are not element-wise: what they do that flat pieces of parameters do not allow
NOT_ELEMENTWISE = {
    "Muon": f"looks at whole matrices, {_FLAT}",
    "Adafactor": f"looks at rows and columns of whole matrices, {_FLAT}",
    "LBFGS": f"looks at all parameters at once, {_FLAT}",
}
NEVER = {"SparseAdam": "needs sparse gradients, and the engine's are dense"}


class _Elementwise(torch.optim.Optimizer):
    """What ours share: they walk over any parameters, whole tensors or one rank's flat shards of them."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Reads   p.grad, (shape of p)
        Writes  p, and what is held of it
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = self._start(p, group)
            (self._fused_update if group["fused"] else self._update)(params, group)
        return loss

    @abstractmethod
    def _start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return what is held of a parameter before its first update."""

    @abstractmethod
    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Move parameters in a loop, line by line as the formulas above."""

    @abstractmethod
    def _fused_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Move them by torch's kernel."""


class Adam(_Elementwise):
    """Adam; the decay is added to the gradient.

    Holds  two moments per element, in the parameter's dtype, and a step count per parameter
    """

    decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(
                f"{type(self).__name__} got lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}",
                fix="none negative, and betas below 1",
            )
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=fused)
        super().__init__(params, defaults)

    def _start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            state["step"] += 1
            m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
            gradient = p.grad if self.decoupled else p.grad.add(p, alpha=decay)
            if self.decoupled:
                p.mul_(1 - lr * decay)
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
            p.addcdiv_(m, root, value=-lr / (1 - beta1**t))

    def _fused_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adam(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            decoupled_weight_decay=self.decoupled,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class AdamW(Adam):
    """Adam with the decay on the weights themselves."""

    decoupled = True

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
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


class SGD(_Elementwise):
    """Gradient descent with momentum; the decay is added to the gradient.

    Holds  one number per element, in the parameter's dtype, with momentum; nothing without
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        fused: bool = True,
    ) -> None:
        if lr < 0 or momentum < 0 or weight_decay < 0:
            raise UserError(f"SGD got lr {lr}, momentum {momentum}, weight_decay {weight_decay}", fix="none negative")
        if nesterov and not momentum:
            raise UserError("SGD got nesterov and no momentum", fix="momentum=0.9")
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused)
        super().__init__(params, defaults)

    def _start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] else {}

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        for p in params:
            assert p.grad is not None
            gradient = p.grad.add(p, alpha=group["weight_decay"])
            if momentum:
                m = self.state[p]["momentum_buffer"].mul_(momentum).add_(gradient)
                gradient = gradient.add_(m, alpha=momentum) if group["nesterov"] else m
            p.add_(gradient, alpha=-group["lr"])

    def _fused_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        sgd(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["momentum_buffer"] for p in params if group["momentum"]],
            fused=True,
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            lr=group["lr"],
            dampening=0.0,
            maximize=False,
        )


def check_elementwise(optimizer: torch.optim.Optimizer, stage: int, *, pp: int = 1, tp: int = 1) -> None:
    """Refuse an optimizer of torch's that would compute something else than it does on whole parameters.

    stage   of ZeRO
    pp, tp  ranks that share the model's depth, and each layer's width
    Raises  UserError with the reason. What is not torch's is taken to be element-wise
    """
    for name, reason in (NOT_ELEMENTWISE | NEVER).items():
        kind = getattr(torch.optim, name, None)  # not every torch has every one
        if kind is None or not isinstance(optimizer, kind):
            continue
        if name in NEVER:
            raise UserError(f"{name} {reason}", fix="AdamW")
        if stage:
            raise UserError(f"{name} {reason}", fix="ZeRO stage 0, or AdamW")
        if tp > 1:
            raise UserError(f"{name} looks at whole matrices, and tp={tp} cuts them", fix="tp=1, or AdamW")
        if pp > 1 and needs_closure(optimizer):
            raise UserError(f"{name} looks at all parameters at once, and pp={pp} shares them", fix="pp=1, or AdamW")


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer asks for the loss and its gradients again, at other values, within one step."""
    return isinstance(optimizer, torch.optim.LBFGS)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters in two groups: matrices decay, biases and gains of norms do not.

    Returns  groups of {"names", "weight_decay"}; every trainable parameter is in exactly one
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [name for name, p in named if p.dim() >= 2]
    vectors = [name for name, p in named if p.dim() < 2]
    groups = [{"names": matrices, "weight_decay": weight_decay}, {"names": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["names"]]
