"""Hold one module's parameters as one flat buffer, of which 1/N is mine.

A rank needs all parameters of a module only while the module runs, all gradients only until they are summed, and
optimizer states only for the elements that it updates. So the parameters of a module lie in one flat buffer, cut into N
equal shards; I keep the masters, the moments and (by stage) the gradients and parameters of my shard alone. Four verbs
are all there is, and the stage only decides when they are called (`table.py`):

    unshard   my shard -> everyone's -> the whole buffer      reshard   free all but my shard
    reduce    my gradients -> their sum -> my shard of it     publish   my masters -> my shard, rounded

The third is in `gradients.py`, with all that becomes of gradients before it; the other three are here. At stage 0 the
"shard" is the whole buffer, and reduce an all-reduce: the same lines with a layout of one part.

ZeRO, Rajbhandari et al. 2020, section 5.  https://arxiv.org/abs/1910.02054
Letters: N ranks, S elements of a shard, P = N S elements of the padded buffer.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minispeed.collective.group import Group, Work
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.zero.absent import classes, owner_of, plainly
from minispeed.zero.gradients import DataParallelUnit, Dtypes
from minispeed.zero.rooms import Rooms
from minispeed.zero.summing import Compression, InFull
from minispeed.zero.table import TABLE


class ShardedUnit(DataParallelUnit):
    """The parameters of one module, which are whole only when they are used; `masters` are what the optimizer updates.

    stage       its column of the table
    layout      where each parameter lies, in the order of its groups
    masters     for each parameter group that reaches into my shard, a view of it, fp32 (fp64 for fp64)
    moved       bytes that went from or to the place where offloaded states live
    """

    def __init__(
        self,
        parameters: Sequence[Mapping[str, nn.Parameter]],
        group: Group,
        *,
        stage: int,
        dtypes: Dtypes,
        states_on: torch.device | None = None,
        shard_on: torch.device | None = None,
        on_read: Callable[["ShardedUnit"], bool] = lambda unit: False,
        rooms: Rooms | None = None,
        predivide: float = 1.0,
        compression: Compression = InFull(),
    ) -> None:
        """Copy the parameters into a flat buffer; from now on each is a view of it.

        parameters   one mapping per parameter group, all frozen or all trainable; may be empty
        states_on    where masters and moments live when they are offloaded; None: with the parameters
        shard_on     where a released unit's shard lives when it is offloaded; None: with the parameters
        rooms        memory for gradients on their way, shared by the units of a model
        predivide    what gradients are divided by on their way to the sum
        compression  how they travel
        on_read      called when somebody reads a released parameter: unshards the unit, or returns False to refuse
        Holds        P (or, at stage 3, S) in compute dtype, S masters where their dtype or place is another
        """
        by_name = {name: p for of_group in parameters for name, p in of_group.items()}
        for p in by_name.values():
            if (owner := owner_of(p)) is not None:  # it was born in pieces
                owner.unshard()
        how: dict[str, Any] = dict(rooms=rooms or Rooms(), predivide=predivide, compression=compression)
        super().__init__(by_name, group, stage=stage, dtypes=dtypes, **how)
        self.trainable = any(p.requires_grad for p in by_name.values())
        self.part = 0 if self.whole else group.rank
        self.moved = 0
        exact = torch.empty(self.layout.size, dtype=dtypes.master, device=self.device)
        self.layout.flatten(self.parameters, out=exact)
        self.flat = exact.to(dtypes.compute)  # the same tensor where the dtypes agree
        self._storage = self.flat.untyped_storage()
        mine = self.layout.shard(self.flat, self.part)
        self.has_shard_away = stage == 3 and shard_on is not None
        self.has_states_away = self.trainable and states_on is not None
        self.shard = mine.to(shard_on or self.device, copy=True) if stage == 3 else mine
        if not self.trainable or (dtypes.compute == dtypes.master and not self.has_states_away):
            self.master = self.shard
        else:
            self.master = self.layout.shard(exact, self.part).to(states_on or self.device, copy=True)
        self.windows = self._windows(parameters) if self.trainable else []
        shapes = self.layout.shapes
        self.masters = tuple(
            nn.Parameter(self.master[slice(*window)].view(shapes[name] if self.whole else -1))
            for _, window, name in self.windows
        )
        self.is_released = False
        self.pins = 0  # who wants the parameters whole for a while
        self.on_new_storage: Callable[[Any, Any], None] = lambda old, new: None
        self._gathering: Work | None = None
        named = {id(p): (name, self.layout.shapes[name]) for name, p in self.parameters.items()}
        self._present, self._absent = classes(self, named, partial(self._read, on_read))
        self._point_into_buffer()
        # autograd's node of each parameter remembers the shape that it saw first: make it see the whole one, and stay
        self._nodes = [p.view_as(p).grad_fn for p in self.parameters.values() if p.requires_grad]

    def _windows(self, parameters: Sequence[Mapping[str, nn.Parameter]]) -> list[tuple[int, Interval, str]]:
        """Return what the optimizer updates, as windows in my shard: parameter by parameter where they are whole.

        Returns  (parameter group, window, the first parameter in it)
        """
        parts = [[[name] for name in of_group] if self.whole else [list(of_group)] for of_group in parameters]
        spans = [(index, self.layout.span(names), names) for index, part in enumerate(parts) for names in part if names]
        windows = [(index, self.layout.in_shard(span, self.part), names[0]) for index, span, names in spans]
        return [(index, window, name) for index, window, name in windows if window.size]

    def _read(self, on_read: Callable[["ShardedUnit"], bool], func: Any, operation: Callable[[], Any]) -> Any:
        if not on_read(self):
            raise LookupError
        return operation()

    def at(self, moment: str) -> None:
        """Do what the table says for my stage."""
        verb = TABLE[moment][self.stage]
        if verb == "unshard":
            self.unshard()
        elif verb == "reshard":
            self.reshard()
        elif verb == "reduce" and self.trainable:
            self.reduce()

    @property
    def num_elements(self) -> int:
        """Elements of all parameters, padding left out."""
        return self.layout.total

    def start_unshard(self) -> None:
        """Ask for every parameter, and do not wait: nobody may read one before `unshard` returns.

        Sends  S (N - 1) elements per rank (all-gather)
        """
        if self._gathering is not None or self.whole or (self.stage == 3 and not self.is_released):
            return
        with plainly():
            if self.is_released:
                self._storage.resize_(self.layout.size * self.flat.element_size())
                self.flat = self.flat.new_empty(0).set_(self._storage, 0, (self.layout.size,), (1,))
                self._move(self.shard, self.layout.shard(self.flat, self.part), self.has_shard_away)
            mine = self.layout.shard(self.flat, self.part)
            self._gathering = self.group.all_gather(self.flat, mine)

    def unshard(self) -> None:
        """Make every parameter whole on this rank."""
        self.start_unshard()
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None
        if self.is_released:
            self.is_released = False
            with plainly():
                self._point_into_buffer()

    def reshard(self) -> None:
        """Free the buffer but my shard. Who reads a parameter now is told its name, and never reads freed memory."""
        if self.pins:
            return
        if self._gathering is not None:  # asked for, and not needed in the end
            self._gathering.wait()
            self._gathering = None
        elif self.is_released:
            return
        with plainly():
            for p in self.parameters.values():
                p.data = p.data.new_empty(0)
                p.__class__ = self._absent
            # the storage shrinks and stays: what autograd saved of it is whole again after unshard. No tensor of ours
            # is left on it, for to read one, even to print it, would kill the process
            self._storage.resize_(0)
            self.flat = self.flat.new_empty(0)
        self.is_released = True

    def let_go(self) -> None:
        """Release the parameters after somebody has looked at them, leaving the memory to the views that he kept.

        `reshard` would shrink it under them, and to read one would kill the process.
        """
        if self.is_released or self.pins:
            return
        old = self._storage
        self._storage = self.flat.new_empty(0).untyped_storage()
        self.reshard()
        self.on_new_storage(old, self._storage)

    def lend(self) -> None:
        """Take over what was put in the parameters' places, then lend them room for their gradients."""
        self.absorb()
        super().lend()

    def give_gradients(self, factor: float) -> None:
        """Set the masters' gradients: views of my shard times `factor`, in the masters' dtype, where they live."""
        if self.gradient is None:
            return
        self.moved += self.gradient.nbytes * self.has_states_away
        wide = self.gradient.to(self.master.device).to(self.master.dtype)
        if factor != 1.0:
            wide.mul_(factor)  # in the masters' dtype: a small gradient times a small factor is no fp16 number
        for (_, window, _), master in zip(self.windows, self.masters):
            master.grad = wide[slice(*window)].view_as(master)
        self.gradient = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round my masters into my shard of the buffer, and of a buffer that stays whole make it whole again."""
        self.summing.keep()
        if self.master is not self.shard:
            self._move(self.master, self.shard, self.has_states_away)
        if self.stage == 3 and not self.is_released:
            with plainly():
                mine = self.layout.shard(self.flat, self.part)
                self._move(self.shard, mine, self.has_shard_away)
                self.group.all_gather(self.flat, mine).wait()

    def absorb(self) -> None:
        """Take over what somebody put in a parameter's place (`p.data = value`), on every rank the same.

        Raises  UserError if it has another dtype or shape
        """
        if self.is_released:
            return
        with plainly():
            replaced = False
            for (name, p), view in zip(self.parameters.items(), self.layout.views(self.flat).values()):
                if p.data_ptr() == view.data_ptr() or not p.numel():
                    continue
                if p.dtype != view.dtype or p.shape != view.shape:
                    what = f"{name} is {tuple(p.shape)} of {p.dtype} now, and was {tuple(view.shape)} of {view.dtype}"
                    raise UserError(what, fix="casting and reshaping before the engine takes the model")
                view.copy_(p)
                p.data = view
                replaced = True
            if replaced:
                self._follow_buffer()

    def take(self, root: int) -> None:
        """Make the parameters' values on rank `root` everybody's; masters follow where a value changed.

        Sends  P elements from `root` (broadcast)
        """
        self.absorb()
        with plainly():
            self.group.broadcast(self.flat, root).wait()
            self._follow_buffer()

    def _follow_buffer(self) -> None:
        """Let my shard and my masters have the values of the whole buffer; a master stays where it rounds to them."""
        mine = self.layout.shard(self.flat, self.part)
        if self.shard.data_ptr() != mine.data_ptr():
            self._move(mine, self.shard, self.has_shard_away)
        if self.master is not self.shard:
            found = self.shard.to(self.master.device)
            is_new = self.master.to(found.dtype) != found
            self.master.copy_(torch.where(is_new, found.to(self.master.dtype), self.master))

    def _move(self, source: Tensor, target: Tensor, is_away: bool) -> None:
        """Copy, counting what crosses between an offloaded state's home and the device."""
        target.copy_(source)
        self.moved += target.nbytes * is_away

    def _point_into_buffer(self) -> None:
        """Let each parameter be its view of the flat buffer."""
        for (name, p), view in zip(self.parameters.items(), self.layout.views(self.flat).values()):
            p.__class__ = self._present
            p.data = view
