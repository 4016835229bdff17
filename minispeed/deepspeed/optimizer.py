"""The optimizer that `initialize` returns: the engine's, with the loss scale where DeepSpeed's users look for it.

    optimizer.param_groups, optimizer.state                         the inner optimizer's, of this rank's masters
    optimizer.cur_scale, optimizer.overflow, optimizer.loss_scaler  the state of `minispeed.scaler.LossScaler`

It is a torch Optimizer, so torch's learning-rate schedulers take it; what it says is read from the engine each time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.scaler import FACTOR, LossScaler


class EngineOptimizer(torch.optim.Optimizer):
    """The inner `optimizer`, which updates masters; `step` and `zero_grad` are the engine's."""

    def __init__(self, core: Engine, *, step: Callable[[], None], zero_grad: Callable[[], None]) -> None:
        # torch's constructor wants parameters: they, and all else, are the inner optimizer's
        self.core, self._step, self._zero_grad = core, step, zero_grad

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of the masters."""
        return self.core.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the inner optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """Return what the inner optimizer keeps of each master."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the inner optimizer's settings."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["core"].optimizer, name)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make an update now, at whatever micro-batch the engine is."""
        if closure is not None:
            raise UserError("a closure, and a step's gradients are computed once", fix="optimizer.step()")
        self._step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self._zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise UserError: what is cut is cut when the engine is made."""
        raise UserError("a parameter group after initialize", fix="all groups in initialize(model_parameters=...)")

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part: the inner optimizer's and the loss scaler's."""
        return {"optimizer": self.optimizer.state_dict(), "loss_scaler": self.core.scaler.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned on the same rank of the same layout."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.core.scaler = LossScaler(**state_dict["loss_scaler"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    @property
    def loss_scaler(self) -> "ScaleView":
        """Return the loss scaler under DeepSpeed's names."""
        return ScaleView(self.core.scaler)

    @property
    def cur_scale(self) -> float:
        """Return what the loss is multiplied by."""
        return self.core.scaler.scale

    loss_scale = cur_scale

    @property
    def overflow(self) -> bool:
        """Return whether the last step was skipped."""
        return self.core.skipped

    @property
    def dynamic_loss_scale(self) -> bool:
        """Return whether the scale changes."""
        return self.core.scaler.dynamic


class ScaleView:
    """A loss scaler's state as DeepSpeed names it."""

    scale_factor = FACTOR

    def __init__(self, scaler: LossScaler) -> None:
        self.cur_scale = self.loss_scale = scaler.scale
        self.cur_iter, self.last_overflow_iter = scaler.iteration, scaler.last_overflow
        self.scale_window, self.min_scale = scaler.window, scaler.floor
        self.delayed_shift, self.cur_hysteresis = scaler.hysteresis, scaler.patience
        self.consecutive_hysteresis, self.dynamic = scaler.consecutive_hysteresis, scaler.dynamic


def named_groups(model: nn.Module, groups: Sequence[Any]) -> list[dict[str, Any]]:
    """Return parameter groups with names in place of parameters; frozen ones are left out.

    groups  parameters, or dicts {"params", ...}
    Raises  UserError if a parameter is not the model's, or a trainable one is in no group
    """
    names = {id(p): name for name, p in model.named_parameters()}
    given = list(groups) if groups and isinstance(groups[0], dict) else [{"params": list(groups)}]
    found = []
    for index, group in enumerate(given):
        params = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        params = [p[1] if isinstance(p, tuple) else p for p in params]  # named_parameters() is allowed in torch too
        for p in params:
            if id(p) not in names:
                what = f"parameter group {index} holds a tensor of shape {tuple(p.shape)} that is not the model's"
                raise UserError(what, fix="parameters of the model given to initialize")
        chosen = [names[id(p)] for p in params if p.requires_grad]
        found.append({**{key: value for key, value in group.items() if key != "params"}, "names": chosen})
    missing = [n for n, p in model.named_parameters() if p.requires_grad and all(n not in g["names"] for g in found)]
    if missing:
        what = f"{missing[0]} is trainable, and in none of the optimizer's {len(found)} groups"
        raise UserError(what, fix="requires_grad_(False) on what is not to be trained, or another group")
    return found


def check_tested(optimizer: torch.optim.Optimizer, stage: int, *, allowed: bool) -> None:
    """Refuse an optimizer that may look at more than single elements where a rank holds flat pieces of parameters.

    stage    of ZeRO
    allowed  by zero_allow_untested_optimizer
    """
    known = type(optimizer).__module__.startswith(("torch.", "minispeed."))
    if stage and not known and not allowed:
        what = f"{type(optimizer).__name__} at ZeRO stage {stage}, where each rank updates flat pieces of parameters"
        raise UserError(what, fix='"zero_allow_untested_optimizer": true, if it looks at elements one by one')


def adopt(optimizer: torch.optim.Optimizer) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """Return a maker that gives a caller's optimizer the masters in place of its parameters, group by group.

    The object stays the same, so whoever holds it (a learning-rate scheduler) goes on with it.
    Raises  UserError if it has made updates already: what it remembers is of whole parameters
    """
    for state in optimizer.state.values():
        if float(state.get("step", 0)) > 0 or "momentum_buffer" in state:
            what = f"the {type(optimizer).__name__} given has made updates already"
            raise UserError(what, fix="initialize first, then load_checkpoint")

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for own, made in zip(optimizer.param_groups, groups, strict=True):
            own["params"] = made["params"]
        if optimizer.state:  # Adagrad keeps its sums from the first moment on
            optimizer.state = type(optimizer)(groups, **optimizer.defaults).state
        return optimizer

    return make
