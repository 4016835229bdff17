"""Call the verbs of a model's units at the moments of the table, whatever the model is.

Where the moments come from:
- forward: hooks on each unit's module; a parameter used outside it (a tied head, a borrowed weight) unshards
  its unit when it is read, and so does, through a TorchFunctionMode, a view of one
- before backward: whatever autograd saved of a released buffer is unsharded when it is taken out again, and a unit of
  which nothing was saved when its first gradient arrives
- gradients complete: a hook on each parameter; a unit is reduced when it and all that come before it are complete, so
  that every rank reduces in one order, the reverse of rank 0's first forward; what is missing at the end counts as zeros

ZeRO, Rajbhandari et al. 2020, section 5.2.  https://arxiv.org/abs/1910.02054
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minispeed.collective.group import Group
from minispeed.errors import UserError
from minispeed.zero.division import buckets_of, check_names, units_of
from minispeed.zero.table import TABLE, check_stage
from minispeed.zero.unit import Dtypes, Rooms, ShardedUnit


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Where what is rarely needed lives, None: with the parameters.

    states      masters and moments; the optimizer then runs there
    parameters  at stage 3, the shards of released units
    """

    states: torch.device | None = None
    parameters: torch.device | None = None


class ShardedModel:
    """A module whose parameters live in sharded units; `units` in the order of their division."""

    def __init__(
        self,
        module: nn.Module,
        group: Group,
        *,
        stage: int,
        dtypes: Dtypes,
        param_groups: Sequence[Sequence[str]] | None = None,
        units: Mapping[str, Sequence[str]] | None = None,
        bucket: int | None = None,
        overlap: bool = True,
        prefetch: int = 0,
        persistence: int = 0,
        offload: Offload = Offload(),
    ) -> None:
        """Take over the module's parameters.

        stage         0 to 3, a column of the table
        param_groups  names of the trainable parameters by optimizer group; one group when absent
        units         names of the parameters of each unit, by the name of the module whose forward uses them (any other
                      name: no module's); `units_of(module)` when absent
        bucket        stages 0 to 2: parameters are reduced together up to this many elements, whatever their module;
                      None: by unit
        overlap       compute goes on while a unit's gradients are summed
        prefetch      stage 3: elements of the next units that are gathered while one computes
        persistence   stage 3: a unit of fewer elements stays whole, as at stage 2
        Raises        UserError if nothing is trainable, or a name is in no unit, or in two
        """
        self.module, self.group, self.stage = module, group, check_stage(stage)
        self.dtypes, self.overlap, self.prefetch = dtypes, overlap, prefetch
        parameters = dict(module.named_parameters())
        trainable = [name for name, p in parameters.items() if p.requires_grad]
        if not trainable:
            raise UserError(f"none of the {len(parameters)} parameters requires a gradient", fix="requires_grad_(True)")
        param_groups = param_groups or [trainable]
        check_names(param_groups, trainable, "parameter group")
        division = units or units_of(module)
        check_names(list(division.values()), list(parameters), "unit")
        if bucket is not None and stage < 3:
            division = buckets_of({name: p.numel() for name, p in parameters.items()}, bucket)
        self.units: list[ShardedUnit] = []
        self.rooms = Rooms()
        modules = dict(module.named_modules())
        self._owner: dict[int, ShardedUnit] = {}  # by id of a parameter, and by address of the flat storage
        self._missing: dict[int, set[str]] = {}
        self._depth: dict[int, int] = {}
        for where, names in division.items():
            frozen = [name for name in names if not parameters[name].requires_grad]
            split = [[name for name in of_group if name in set(names)] for of_group in param_groups]
            for parts in (split, [frozen]):
                chosen = [{name: parameters[name] for name in part} for part in parts]
                size = sum(p.numel() for part in chosen for p in part.values())
                if not any(chosen):
                    continue
                unit = ShardedUnit(
                    chosen,
                    group,
                    stage=2 if stage == 3 and size < persistence else stage,
                    dtypes=dtypes,
                    states_on=offload.states,
                    shard_on=offload.parameters,
                    on_read=self._on_read,
                    rooms=self.rooms,
                )
                self._adopt(unit, modules.get(where))
        self.is_last = True
        self._look: Callable[[str, Tensor], None] = lambda name, gradient: None
        self._is_running = self._in_backward = self._is_gathered = False
        self._order: list[ShardedUnit] = []  # of the first forward
        self._order_is_known = False
        self._reduce_order: list[ShardedUnit] = []  # the same on every rank, from the first backward on
        self._waiting: list[ShardedUnit] = []  # not complete yet in this backward, in the order of reduction
        self._reducing: ShardedUnit | None = None  # the last unit that was reduced, perhaps still on its way

    def _adopt(self, unit: ShardedUnit, home: nn.Module | None) -> None:
        """Hook a unit's moments to its module and parameters."""
        self.units.append(unit)
        self._depth[id(unit)] = 0
        self._owner[unit.flat.untyped_storage()._cdata] = unit
        unit.on_new_storage = partial(self._follow, unit)
        for name, p in unit.parameters.items():
            self._owner[id(p)] = unit
            if p.requires_grad:
                if unit.stage == 3:
                    p.register_hook(lambda gradient, unit=unit: self._expects_gradient(unit))
                p.register_post_accumulate_grad_hook(partial(self._got_gradient, unit, name))
        if home is not None:
            home.register_forward_pre_hook(lambda module, args: self._enter(unit), prepend=True)
            home.register_forward_hook(lambda module, args, out: self._leave(unit), always_call=True)
        unit.at("after forward")

    def _follow(self, unit: ShardedUnit, old: Any, new: Any) -> None:
        """Know a unit's views by its new storage."""
        self._owner.pop(old._cdata, None)
        self._owner[new._cdata] = unit

    # ---- forward

    def _enter(self, unit: ShardedUnit) -> None:
        self._depth[id(unit)] += 1
        self._use(unit)

    def _leave(self, unit: ShardedUnit) -> None:
        self._depth[id(unit)] -= 1
        if not self._depth[id(unit)] and not self._in_backward and not self._is_gathered:
            unit.at("after forward")

    def _use(self, unit: ShardedUnit) -> None:
        """Make a unit whole, note its place in the first forward, and ask for those that follow."""
        if unit not in self._order:
            self._order.append(unit)
        unit.at("before backward" if self._in_backward else "before forward")
        if self.prefetch and self._order_is_known and unit.stage == 3:
            self._ask_for_next(unit)

    def _ask_for_next(self, unit: ShardedUnit) -> None:
        order = self._order[::-1] if self._in_backward else self._order
        left = self.prefetch
        for following in order[order.index(unit) + 1 :]:
            left -= following.num_elements if following.stage == 3 else 0
            if left < 0:
                return
            if following.is_released:
                following.start_unshard()

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
                self._order_is_known = bool(self._order)
                self._rest()

    def _rest(self) -> None:
        for unit in self.units:
            self._depth[id(unit)] = 0
            unit.at("after forward")

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
            self._use(unit)

    def _saving(self) -> contextlib.AbstractContextManager[Any]:
        """Let what autograd saves be looked at when it is taken out again."""

        def unpack(x: Tensor) -> Tensor:
            self.touch(x)
            return x

        return torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack) if self.stage == 3 else nullcontext()

    # ---- backward

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run the backward of one micro-batch, and reduce what the table wants reduced.

        last    whether it is the step's last micro-batch
        Raises  UserError if the loss is not one number that depends on the parameters
        """
        if loss.numel() != 1 or not loss.requires_grad:
            what = f"shape {tuple(loss.shape)}" if loss.numel() != 1 else "no gradient"
            raise UserError(f"a backward starts from one loss, and it has {what}", fix="loss.sum() of a forward")
        self.is_last = last
        self._reduce_order = self._reduce_order or self._agree_on_order()
        self._missing = {id(unit): set(unit.parameters) for unit in self.units if unit.trainable}
        self._waiting = [unit for unit in self._reduce_order if unit.trainable]
        self._in_backward = True
        for unit in self.units if self.stage < 2 else ():  # gradients that stay whole are added where they stay
            unit.lend()
        try:
            with self._saving():
                loss.backward()
            while self._waiting:  # unused parameters, units that no forward reached
                self._complete(self._waiting.pop(0))
            for unit in self._reduce_order:
                if unit.has_gradients:  # after it was complete: a re-entrant checkpoint
                    self._complete(unit)
            if last:
                for unit in self._reduce_order:
                    self._reduce_at("last backward over", unit)
            for unit in self._reduce_order:
                unit.settle()
        finally:
            self._in_backward = False
            self._rest()

    def _agree_on_order(self) -> list[ShardedUnit]:
        """Return the order in which every rank reduces: rank 0's first forward reversed, then what it left out.

        Ranks whose rows took other ways through the model had another order of their own.
        """
        unused = [unit for unit in reversed(self.units) if unit not in self._order]
        mine = [self.units.index(unit) for unit in (*reversed(self._order), *unused)]
        order = torch.tensor(mine)
        self.group.broadcast(order, 0).wait()
        return [self.units[index] for index in order.tolist()]

    def _expects_gradient(self, unit: ShardedUnit) -> None:
        """A gradient is about to be added: autograd gives it its parameter's shape, so that must be there."""
        self._revive(unit)

    @contextlib.contextmanager
    def watching(self, look: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Show `look` each parameter's name and gradient, once it is there and before it is summed over ranks."""
        self._look = look
        try:
            yield
        finally:
            self._look = lambda name, gradient: None

    def _got_gradient(self, unit: ShardedUnit, name: str, p: Tensor) -> None:
        if p.grad is not None:
            self._look(name, p.grad)
        self._missing.get(id(unit), set()).discard(name)
        while self._waiting and not self._missing[id(self._waiting[0])]:
            self._complete(self._waiting.pop(0))

    def _complete(self, unit: ShardedUnit) -> None:
        """All gradients of a unit are there: add them up, reduce, release."""
        if not unit.trainable:
            return
        unit.collect()
        self._reduce_at("last gradients complete" if self.is_last else "gradients complete", unit)
        unit.at("after backward")

    def _reduce_at(self, moment: str, unit: ShardedUnit) -> None:
        """Start what the table says, and finish the unit before: one sum is under way while the next is computed."""
        unit.at(moment)
        if self._reducing not in (None, unit):
            self._reducing.settle()
        self._reducing = unit
        if not self.overlap:
            unit.settle()

    # ---- step

    def publish(self) -> None:
        """After the optimizer's step: let every rank see the new parameters."""
        trained = [unit for unit in self.units if unit.trainable]
        for unit in trained:
            unit.publish()
            if TABLE["after step"][unit.stage]:
                unit.start_unshard()
        for unit in trained:
            unit.at("after step")

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
            for unit in self.units:
                if unit.stage == 3:
                    unit.let_go()
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
