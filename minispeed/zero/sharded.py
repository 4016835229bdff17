"""Call the verbs of a model's units at the moments of the table, whatever the model is.

Where the moments come from:
- a run: hooks on the whole module's forward
- forward: hooks on each unit's module; a parameter used outside it (a tied head, a borrowed weight) unshards
  its unit when it is read, and so does, through a TorchFunctionMode, a view of one
- before backward: whatever autograd saved of a released buffer is unsharded when it is taken out again, and a unit of
  which nothing was saved when its first gradient arrives
- gradients complete: a hook on each parameter tells the `Reduction`

ZeRO, Rajbhandari et al. 2020, section 5.2.  https://arxiv.org/abs/1910.02054
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minispeed.collective.group import Group
from minispeed.errors import UserError
from minispeed.zero.division import buckets_of, check_names, units_of
from minispeed.zero.reduction import Look, Reduction
from minispeed.zero.rooms import Rooms
from minispeed.zero.summing import Compression, InFull
from minispeed.zero.table import TABLE, check_stage
from minispeed.zero.unit import Dtypes, ShardedUnit
from minispeed.zero.watch import Touching, tensors_in, touching_saved


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Where what is rarely needed lives, None: with the parameters.

    states      masters and moments; the optimizer then runs there
    parameters  at stage 3, the shards of released units
    """

    states: torch.device | None = None
    parameters: torch.device | None = None


class ShardedModel:
    """A module whose parameters live in sharded units.

    units          in the order of their division
    num_backwards  that have begun so far, whoever called them
    """

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
        predivide: float = 1.0,
        compression: Compression = InFull(),
        alone: Collection[str] = (),
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
        predivide     what gradients are divided by on their way to the sum
        compression   how they travel to it
        alone         names of parameters that are a unit each, whatever the division
        Raises        UserError if a name is in no unit, or in two
        """
        self.module, self.group, self.stage = module, group, check_stage(stage)
        self.dtypes, self.prefetch = dtypes, prefetch
        compression.check(stage, (dtypes.compute, dtypes.reduce))
        parameters = dict(module.named_parameters())
        for name, p in parameters.items():
            if not p.is_floating_point():
                what = f"{name} is of {p.dtype}, and parameters lie in one buffer of the compute dtype"
                raise UserError(what, fix="register_buffer for what is not trained")
        trainable = [name for name, p in parameters.items() if p.requires_grad]
        param_groups = param_groups or [trainable]
        check_names(param_groups, trainable, "parameter group")
        division = units or units_of(module)
        check_names(list(division.values()), list(parameters), "unit")
        if bucket is not None and stage < 3:
            division = buckets_of({name: p.numel() for name, p in parameters.items()}, bucket)
        division = {where: [name for name in names if name not in alone] for where, names in division.items()}
        division |= {f"{name} alone": [name] for name in alone}
        self.units: list[ShardedUnit] = []
        self._hooks: list[Any] = []  # handles, to take them off again
        self.rooms = Rooms()
        modules = dict(module.named_modules())
        self._owner: dict[int, ShardedUnit] = {}  # by id of a parameter, and by address of the flat storage
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
                    predivide=predivide,
                    compression=compression,
                )
                self._adopt(unit, modules.get(where))
        self._hooks += [
            module.register_forward_pre_hook(lambda module, args: self._open(), prepend=True),
            module.register_forward_hook(lambda module, args, out: self._close(out), always_call=True),
        ]
        self.num_backwards = 0
        self.reduction = Reduction(group, self.units, overlap=overlap)
        self._is_running = self._in_backward = False
        self._runs: list[contextlib.ExitStack] = []  # of the whole module's forward that are under way
        self._order: list[ShardedUnit] = []  # of the first forward
        self._order_is_known = False
        self._used: set[ShardedUnit] = set()  # in this run: what follows a second use has been asked for

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
                    self._hooks.append(p.register_hook(lambda gradient, unit=unit: self._expects_gradient(unit)))
                self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._got_gradient, unit, name)))
        if home is not None:
            self._hooks += [
                home.register_forward_pre_hook(lambda module, args: self._enter(unit), prepend=True),
                home.register_forward_hook(lambda module, args, out: self._leave(unit), always_call=True),
            ]
        unit.at("after forward")

    def _follow(self, unit: ShardedUnit, old: Any, new: Any) -> None:
        """Know a unit's views by its new storage."""
        self._owner.pop(old._cdata, None)
        self._owner[new._cdata] = unit

    def masters_by_group(self, count: int) -> list[list[nn.Parameter]]:
        """Return what the optimizer updates, by parameter group."""
        masters: list[list[nn.Parameter]] = [[] for _ in range(count)]
        for unit in self.units:
            for (index, _, _), master in zip(unit.windows, unit.masters):
                masters[index].append(master)
        return masters

    # ---- forward

    def _open(self) -> None:
        """The whole module's forward begins: by itself, inside another run, or recomputed inside a backward."""
        if self._in_backward and torch._C._current_graph_task_id() == -1:  # an error ended that backward
            self._stop()
        self._runs.append(contextlib.ExitStack())
        if not self._is_running and not self._in_backward:
            self._runs[-1].enter_context(self.running())

    def _close(self, out: Any) -> None:
        self._runs.pop().close()
        if not self._in_backward:
            for x in tensors_in(out):
                if x.requires_grad:
                    x.register_hook(lambda gradient: self._begin_unasked())

    def _enter(self, unit: ShardedUnit) -> None:
        self._depth[id(unit)] += 1
        self._use(unit)

    def _leave(self, unit: ShardedUnit) -> None:
        self._depth[id(unit)] -= 1
        if not self._depth[id(unit)] and not self._in_backward:
            unit.at("after forward")

    def _use(self, unit: ShardedUnit) -> None:
        """Make a unit whole, note its place in the first forward, and ask for those that follow."""
        if unit not in self._order:
            self._order.append(unit)
        unit.at("before backward" if self._in_backward else "before forward")
        if self.prefetch and self._order_is_known and unit.stage == 3 and unit not in self._used:
            self._ask_for_next(unit)
        self._used.add(unit)

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
        """Run what is not the whole module's forward inside this: parts of it; afterwards no unit is left whole."""
        with contextlib.ExitStack() as stack:
            if self.stage == 3:
                stack.enter_context(Touching(self.touch))
                stack.enter_context(self._saving())
            self._is_running = True
            self._used.clear()
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
        return touching_saved(self.touch) if self.stage == 3 else contextlib.nullcontext()

    # ---- backward

    def backward(self, loss: Tensor, *, last: bool, **options: Any) -> None:
        """Run the backward of one micro-batch, and reduce what the table wants reduced.

        last     whether it is the step's last micro-batch
        options  of torch's backward
        Raises   UserError if the loss is not one number that depends on the parameters
        """
        if loss.numel() != 1 or not loss.requires_grad:
            what = f"shape {tuple(loss.shape)}" if loss.numel() != 1 else "no gradient"
            raise UserError(f"a backward starts from one loss, and it has {what}", fix="loss.sum() of a forward")
        self.reduction.is_last = last
        with self._reducing(), self._saving():
            loss.backward(**options)

    def backward_from(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        """Run the backward of one micro-batch from what the module returned, given the gradients of that."""
        self.reduction.is_last = last
        with self._reducing(), self._saving():
            torch.autograd.backward(tensors, gradients)

    def backward_unreduced(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """The same, but leave the gradients where autograd puts them, until `reduce_now`."""
        self._in_backward = True
        try:
            with self._saving():
                torch.autograd.backward(tensors, gradients)
        finally:
            self._stop()

    def add_gradient(self, p: nn.Parameter, gradient: Tensor) -> None:
        """Add to a parameter's gradient without a backward; the parameter need not be there."""
        unit = self._owner[id(p)]
        unit.add(next(name for name, own in unit.parameters.items() if own is p), gradient)

    def reduce_now(self) -> None:
        """Reduce the gradients that are there, without a backward: somebody has set them, or they have waited."""
        with self._reducing():
            pass

    @contextlib.contextmanager
    def _reducing(self) -> Iterator[None]:
        """Reduce what becomes complete inside this, and at its end what is left."""
        self._begin()
        try:
            yield
            self.reduction.end()
        finally:
            self._stop()

    def _begin_unasked(self) -> None:
        """Somebody called backward himself: do what `backward` does, the end of it when autograd is done."""
        if not self._in_backward:
            whole = contextlib.ExitStack()
            whole.enter_context(self._reducing())
            torch.autograd.Variable._execution_engine.queue_callback(whole.close)

    def _begin(self) -> None:
        self.num_backwards += 1
        self.reduction.begin(self._order)
        self._used.clear()
        self._in_backward = True

    def _stop(self) -> None:
        self._in_backward = False
        self._rest()

    def _expects_gradient(self, unit: ShardedUnit) -> None:
        """A gradient is about to be added: autograd gives it its parameter's shape, so that must be there."""
        self._revive(unit)

    @contextlib.contextmanager
    def watching(self, look: Look) -> Iterator[None]:
        """Show `look` each parameter's name and gradient, once it is there and before it is summed over ranks."""
        self.reduction.look = look
        try:
            yield
        finally:
            self.reduction.look = lambda name, gradient: None

    def _got_gradient(self, unit: ShardedUnit, name: str, p: Tensor) -> None:
        self._begin_unasked()
        self.reduction.got(unit, name, p.grad)

    # ---- step

    def absorb(self) -> None:
        """Take over what somebody put in the parameters' places."""
        for unit in self.units:
            unit.absorb()

    def forget(self) -> None:
        """Drop all gradients."""
        for unit in self.units:
            unit.forget()

    def publish(self, *, frozen: bool = False) -> None:
        """After the optimizer's step, or with `frozen` after all were replaced: let every rank see the new values."""
        changed = [unit for unit in self.units if unit.trainable or frozen]
        for unit in changed:
            unit.publish()
            if frozen:
                unit.summing.restart()
            if TABLE["after step"][unit.stage]:
                unit.start_unshard()
        for unit in changed:
            unit.at("after step")

    @contextlib.contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Make the whole model readable on every rank for a while, its forward included."""
        for unit in self.units:
            unit.unshard()
            unit.pins += 1
        try:
            yield self.module
        finally:
            for unit in self.units:
                unit.pins -= 1
                if unit.stage == 3:
                    unit.let_go()

    def dissolve(self) -> None:
        """Give the module back as an ordinary one, whole on every rank."""
        self.forget()
        for hook in self._hooks:
            hook.remove()
        for unit in self.units:
            unit.unshard()
            for p in unit.parameters.values():
                p.__class__ = nn.Parameter
