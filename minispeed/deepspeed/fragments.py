"""Look at, and change, what is cut: masters, gradients and optimizer states of one parameter, whole or my piece of it.

    safe_get_full_fp32_param(p)                  the master, in p's shape       gathered: every rank calls it
    safe_get_full_grad(p)                        the mean gradient, after the step's last backward
    safe_get_full_optimizer_state(p, "exp_avg")
    safe_set_full_...(p, value)                  the same, replaced by `value`, which every rank brings
    safe_get_local_...(p), safe_set_local_...    what this rank holds of it, flat; nothing is sent

https://deepspeed.readthedocs.io/en/latest/zero3.html#debugging
"""

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from minispeed.collective.numbers import any_of
from minispeed.deepspeed.slices import joined, shape_of, slice_of
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.zero.absent import owner_of
from minispeed.zero.unit import ShardedUnit

_engines: "weakref.WeakKeyDictionary[ShardedUnit, Engine]" = weakref.WeakKeyDictionary()  # who trains a unit


def register(core: Engine) -> None:
    """Let an engine's parameters be found."""
    for unit in core.sharded.units:
        _engines[unit] = core


class _Part:
    """One parameter: where its elements lie in its unit's shard on this rank."""

    def __init__(self, param: nn.Parameter) -> None:
        owner = owner_of(param)
        if not isinstance(owner, ShardedUnit) or owner not in _engines:
            raise UserError("this parameter is no engine's", fix="a parameter of the model given to initialize")
        self.unit, self.core = owner, _engines[owner]
        self.name = next(name for name, p in owner.parameters.items() if p is param)
        self.slice, self.shape = slice_of(self.core, self.name), shape_of(self.core, owner, self.name)
        held = (piece[1:] for piece in owner.layout.pieces(owner.part) if piece[0] == self.name)
        self.elements, self.place = next(held, (Interval(0, 0), Interval(0, 0)))

    def whole(self, shard: Tensor) -> Tensor:
        """Gather what all ranks hold of this parameter.

        shard    (S,)
        Returns  (its shape, that of the uncut model)
        Sends    S (N - 1) elements per rank (all-gather); then, of a cut layer, its slice (tp - 1) times
        """
        flat = shard
        if not self.unit.whole:
            flat = shard.new_empty(self.unit.layout.size)
            self.unit.group.all_gather(flat, shard.contiguous()).wait()
        return joined(self.unit.layout.views(flat)[self.name].clone(), self.slice, self.core.lines.tp)

    def mine(self, shard: Tensor) -> Tensor:
        """Return what this rank holds of this parameter, a flat view."""
        return shard[slice(*self.place)]

    def put(self, shard: Tensor, value: Tensor) -> None:
        """Write my piece of a whole value.  Raises UserError if it has another shape"""
        if tuple(value.shape) != tuple(self.shape):
            what = f"{self.name} has the shape {tuple(self.shape)}, the value {tuple(value.shape)}"
            raise UserError(what, fix="a value of the parameter's shape")
        self.mine(shard).copy_(self.slice.of(value.detach()).flatten()[slice(*self.elements)])

    def put_mine(self, shard: Tensor, value: Tensor) -> None:
        """Write my piece, given flat."""
        mine = self.mine(shard)
        if value.numel() != mine.numel():
            what = f"this rank holds {mine.numel()} elements of {self.name}, the value has {value.numel()}"
            raise UserError(what, fix="a value of that many")
        mine.copy_(value.detach().flatten())

    def get_gradient(self, read: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return what `read` takes of the shard of the mean gradient, None before there is one."""
        shard = self.unit.gradient
        return None if shard is None else read(shard).to(self.unit.master.dtype) / self.core.gradient_divisor

    def set_gradient(self, write: Callable[[Tensor, Tensor], None], value: Tensor) -> None:
        """Let `write` put a mean gradient into the shard, which is made where there is none."""
        unit = self.unit
        if unit.gradient is None:
            unit.gradient = unit.master.new_zeros(unit.layout.shard_size, dtype=unit.dtypes.gradient)
        write(unit.gradient, value.to(unit.master.dtype) * self.core.gradient_divisor)

    def state(self, key: str, *, together: bool = True) -> Tensor:
        """Return a shard of the optimizer's state `key`, put together from the parameter groups' windows.

        together  all ranks ask at once: what one lacks, all are told
        """
        shard, kept = torch.zeros_like(self.unit.master), list(self._states())
        is_missing = any(key not in state for _, state in kept)
        if any_of(self.unit.group, is_missing) if together else is_missing:
            known = {name for _, state in kept for name in state}
            what = f"the optimizer keeps no {key!r} of {self.name}"
            raise UserError(what, fix=", ".join(sorted(known)) or "an update first")
        for window, state in kept:
            shard[slice(*window)] = state[key].view(-1)
        return shard

    def put_state(self, key: str, shard: Tensor) -> None:
        """Write a shard of the optimizer's state `key` back."""
        for window, state in self._states():
            state[key].view(-1).copy_(shard[slice(*window)])

    def _states(self) -> Iterator[tuple[Interval, dict[str, Tensor]]]:
        for (_, window, _), master in zip(self.unit.windows, self.unit.masters):
            yield window, self.core.optimizer.state.get(master, {})

    def publish(self) -> None:
        """Let the parameter follow its master."""
        self.unit.publish()
        self.unit.at("after step")


@torch.no_grad()
def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor:
    """Return the master of a parameter, (its shape), fp32."""
    part = _Part(param)
    return part.whole(part.unit.master)


@torch.no_grad()
def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """Return the gradient that the step will use before clipping, (its shape), fp32; None before there is one.

    It is the mean over ranks and micro-batches, the loss scale divided out.
    """
    part = _Part(param)
    return part.get_gradient(part.whole)


@torch.no_grad()
def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor:
    """Return a state of the optimizer, "exp_avg" or the like, (its shape), fp32."""
    part = _Part(param)
    return part.whole(part.state(optim_state_key))


@torch.no_grad()
def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Replace a parameter: master, and the rounded copy that the model computes with."""
    part = _Part(param)
    part.put(part.unit.master, value)
    part.publish()


@torch.no_grad()
def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Replace the gradient that the step will use, before clipping."""
    part = _Part(param)
    part.set_gradient(part.put, value)


@torch.no_grad()
def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Replace a state of the optimizer."""
    part = _Part(param)
    shard = part.state(optim_state_key)
    part.put(shard, value)
    part.put_state(optim_state_key, shard)


@torch.no_grad()
def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor:
    """Return what this rank holds of a parameter's master, flat."""
    part = _Part(param)
    return part.mine(part.unit.master).clone()


@torch.no_grad()
def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """Return what this rank holds of the gradient, flat."""
    part = _Part(param)
    return part.get_gradient(part.mine)


@torch.no_grad()
def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor:
    """Return what this rank holds of a state of the optimizer, flat."""
    part = _Part(param)
    return part.mine(part.state(optim_state_key, together=False))


@torch.no_grad()
def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Replace what this rank holds of a parameter; every rank calls it, each with its own."""
    part = _Part(param)
    part.put_mine(part.unit.master, value)
    part.publish()


@torch.no_grad()
def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Replace what this rank holds of the gradient."""
    part = _Part(param)
    part.set_gradient(part.put_mine, value)


@torch.no_grad()
def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Replace what this rank holds of a state of the optimizer."""
    part = _Part(param)
    shard = part.state(optim_state_key, together=False)
    part.put_mine(shard, value)
    part.put_state(optim_state_key, shard)
