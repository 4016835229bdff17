"""Call the verbs of a model's units at the moments of the table, whatever the model is.

Where the moments come from:
- forward: hooks on each unit's module; a parameter used outside it (a tied head, a borrowed weight) unshards
  its unit when it is read, and so does, through a TorchFunctionMode, a view of one
- before backward: whatever autograd saved of a released buffer is unsharded when it is taken out again, and a unit of
  which nothing was saved when its first gradient arrives
- gradients complete: a hook on each parameter; a unit is reduced when it and all that come before it are complete, so
  that every rank reduces in one order, the reverse of the first forward; what is missing at the end counts as zeros

ZeRO, Rajbhandari et al. 2020, section 5.2.  https://arxiv.org/abs/1910.02054
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minispeed.collective.group import Group
from minispeed.errors import UserError
from minispeed.zero.table import TABLE, check_stage
from minispeed.zero.unit import ShardedUnit


class ShardedModel:
    """A module whose parameters live in sharded units; `units` in the order of the first forward."""

    def __init__(
        self,
        module: nn.Module,
        group: Group,
        *,
        stage: int,
        compute: torch.dtype,
        master: torch.dtype,
        gradient: torch.dtype | None = None,
        param_groups: Sequence[Sequence[str]] | None = None,
        units: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Take over the module's parameters.

        stage         0 to 3, a column of the table
        gradient      dtype that gradients are added up in over micro-batches; compute dtype when absent
        param_groups  names of the trainable parameters by optimizer group; one group when absent
        units         names of the parameters of each unit, by the name of the module whose forward uses them (any other
                      name: no module's); `units_of(module)` when absent
        Raises        UserError if nothing is trainable, or a name is in no unit, or in two
        """
        self.module, self.group, self.stage = module, group, check_stage(stage)
        self.gradient_dtype = gradient or compute
        # stages 0 and 1 add up whole gradients before they are summed over ranks, stages 2 and 3 after
        self.collect_dtype = compute if stage >= 2 else self.gradient_dtype
        parameters = dict(module.named_parameters())
        trainable = [name for name, p in parameters.items() if p.requires_grad]
        if not trainable:
            raise UserError(f"none of the {len(parameters)} parameters requires a gradient", fix="requires_grad_(True)")
        param_groups = param_groups or [trainable]
        _check_names(param_groups, trainable, "parameter group")
        division = units or units_of(module)
        _check_names(list(division.values()), list(parameters), "unit")
        self.units: list[ShardedUnit] = []
        modules = dict(module.named_modules())
        self._owner: dict[int, ShardedUnit] = {}  # by id of a parameter, and by address of the flat storage
        self._missing: dict[int, set[str]] = {}
        for where, names in division.items():
            frozen = [name for name in names if not parameters[name].requires_grad]
            split = [[name for name in of_group if name in set(names)] for of_group in param_groups]
            for parts in (split, [frozen]):
                chosen = [{name: parameters[name] for name in part} for part in parts]
                if not any(chosen):
                    continue
                unit = ShardedUnit(
                    chosen,
                    group,
                    compute=compute,
                    master=master,
                    gradient=self.gradient_dtype,
                    whole=stage == 0,
                    released=stage == 3,
                    on_read=self._on_read,
                )
                self._adopt(unit, modules.get(where))
        self.is_last = True
        self._is_running = self._in_backward = self._is_gathered = False
        self._order: list[ShardedUnit] = []  # of the first forward
        self._waiting: list[ShardedUnit] = []  # not complete yet in this backward, in the order of reduction
        self._depth = {id(unit): 0 for unit in self.units}
        if stage == 3:
            for unit in self.units:
                unit.reshard()

    def _adopt(self, unit: ShardedUnit, home: nn.Module | None) -> None:
        """Hook a unit's moments to its module and parameters."""
        self.units.append(unit)
        self._owner[unit.flat.untyped_storage()._cdata] = unit
        for name, p in unit.parameters.items():
            self._owner[id(p)] = unit
            if p.requires_grad:
                p.register_hook(lambda gradient, unit=unit: self._expects_gradient(unit))
                p.register_post_accumulate_grad_hook(partial(self._got_gradient, unit, name))
        if home is not None:
            home.register_forward_pre_hook(lambda module, args: self._enter(unit), prepend=True)
            home.register_forward_hook(lambda module, args, out: self._leave(unit), always_call=True)

    def _at(self, moment: str, unit: ShardedUnit) -> None:
        """Do what the table says."""
        verb = TABLE[moment][self.stage]
        if verb == "unshard":
            if unit.is_released or moment == "after step":
                unit.unshard()
        elif verb == "reshard":
            unit.reshard()
        elif verb == "reduce" and unit.trainable:
            unit.reduce(self.collect_dtype)

    # ---- forward

    def _enter(self, unit: ShardedUnit) -> None:
        self._note(unit)
        self._depth[id(unit)] += 1
        self._at("before forward", unit)

    def _leave(self, unit: ShardedUnit) -> None:
        self._depth[id(unit)] -= 1
        if not self._depth[id(unit)] and not self._in_backward and not self._is_gathered:
            self._at("after forward", unit)

    def _note(self, unit: ShardedUnit) -> None:
        """Remember the order of the first forward."""
        if unit not in self._order:
            self._order.append(unit)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run forwards (and what is computed from their outputs) inside this; afterwards no unit is left whole."""
        with contextlib.ExitStack() as stack:
            if self.stage == 3:
                stack.enter_context(_Touching(self))
                stack.enter_context(self._saving())
            self._is_running = True
            try:
                yield
            finally:
                self._is_running = False
                self._rest()

    def _rest(self) -> None:
        for unit in self.units:
            self._depth[id(unit)] = 0
            self._at("after forward", unit)

    def _on_read(self, unit: ShardedUnit) -> bool:
        """Unshard a unit of which a parameter is read; refuse (False) outside of a step."""
        if not (self._is_running or self._in_backward):
            return False
        self._revive(unit)
        return True

    def touch(self, x: Tensor) -> None:
        """Unshard the unit whose parameter, or view of its buffer, a tensor is."""
        with torch._C.DisableTorchFunctionSubclass():
            unit = self._owner.get(id(x)) or self._owner.get(x.untyped_storage()._cdata)
        if unit is not None:
            self._revive(unit)

    def _revive(self, unit: ShardedUnit) -> None:
        if unit.is_released:
            self._note(unit)
            self._at("before backward" if self._in_backward else "before forward", unit)

    def _saving(self) -> contextlib.AbstractContextManager[Any]:
        """Let what autograd saves be looked at when it is taken out again."""

        def unpack(x: Tensor) -> Tensor:
            self.touch(x)
            return x

        return torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack) if self.stage == 3 else nullcontext()

    # ---- backward

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run the backward of one micro-batch, and reduce what the table wants reduced.

        last  whether it is the step's last micro-batch
        """
        self.is_last = last
        self._missing = {id(unit): set(unit.parameters) for unit in self.units if unit.trainable}
        self._waiting = [unit for unit in self._reduce_order() if unit.trainable]
        self._in_backward = True
        try:
            with self._saving():
                loss.backward()
            while self._waiting:  # unused parameters, units that no forward reached
                self._complete(self._waiting.pop(0))
            for unit in self._reduce_order():
                if unit.has_gradients:  # after it was complete: a re-entrant checkpoint
                    self._complete(unit)
            if last:
                for unit in self._reduce_order():
                    self._at("last backward over", unit)
        finally:
            self._in_backward = False
            self._rest()

    def _reduce_order(self) -> list[ShardedUnit]:
        """Return the units, last of the first forward first; those that no forward reached at the end."""
        return [*reversed(self._order), *(unit for unit in self.units if unit not in self._order)]

    def _expects_gradient(self, unit: ShardedUnit) -> None:
        """A gradient is about to be added: autograd gives it its parameter's shape, so that must be there."""
        self._revive(unit)

    def _got_gradient(self, unit: ShardedUnit, name: str, p: Tensor) -> None:
        self._missing.get(id(unit), set()).discard(name)
        while self._waiting and not self._missing[id(self._waiting[0])]:
            self._complete(self._waiting.pop(0))

    def _complete(self, unit: ShardedUnit) -> None:
        """All gradients of a unit are there: add them up, reduce, release."""
        if not unit.trainable:
            return
        unit.collect(self.collect_dtype)
        self._at("last gradients complete" if self.is_last else "gradients complete", unit)
        self._at("after backward", unit)

    # ---- step

    def publish(self) -> None:
        """After the optimizer's step: let every rank see the new parameters."""
        for unit in self.units:
            if unit.trainable:
                unit.publish()
                self._at("after step", unit)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Make the whole model readable on every rank for a while, its forward included."""
        for unit in self.units:
            if unit.is_released:
                unit.unshard()
        self._is_gathered = True
        try:
            yield self.module
        finally:
            self._is_gathered = False
            self._rest()


class _Touching(TorchFunctionMode):
    """Unshard whatever an operation is about to read a view of."""

    def __init__(self, sharded: ShardedModel) -> None:
        super().__init__()
        self.sharded = sharded

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in _tensors((args, kwargs or {})):
            self.sharded.touch(one)
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among (nested) arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)


def units_of(module: nn.Module) -> dict[str, list[str]]:
    """Divide a model: each element of a list of modules is a unit, so is each other child of the root.

    Returns  names of parameters by the name of the module that uses them; "" is the root
    """
    division: dict[str, list[str]] = {}
    homes = [
        f"{where}.{child}" if where else child
        for where, parent in module.named_modules()
        if isinstance(parent, (nn.ModuleList, nn.Sequential))
        for child, _ in parent.named_children()
    ]
    outermost = [home for home in homes if not any(home.startswith(f"{other}.") for other in homes)]
    for name, _ in module.named_parameters():
        home = next((home for home in outermost if name.startswith(f"{home}.")), name.rpartition(".")[0].split(".")[0])
        division.setdefault(home, []).append(name)
    return division


def _check_names(parts: Sequence[Sequence[str]], names: Sequence[str], what: str) -> None:
    """Raise UserError unless every name is in exactly one part."""
    given = [name for part in parts for name in part]
    for name in given:
        if name not in names:
            raise UserError(f"a {what} names {name}, which is not the model's", fix="names of model.named_parameters()")
        if given.count(name) > 1:
            raise UserError(f"{name} is in more than one {what}", fix="each name once")
    for name in names:
        if name not in given:
            raise UserError(f"{name} is in no {what}", fix="each name once")
