"""Collect the gradients of one module's parameters in a flat buffer, and sum them over the ranks.

This is data parallelism by itself, four verbs in the order of a backward. Where the sum is cut, each rank keeps its
shard of it alone, and the buffer that held the summands serves the next unit.

    lend      views of the buffer -> p.grad: autograd adds to them        collect   p.grad -> the buffer, added up
    reduce    the buffer -> on its way to the sum over ranks              settle    my shard of the sum -> gradient

ZeRO, Rajbhandari et al. 2020, section 5.2.  https://arxiv.org/abs/1910.02054
Letters: N ranks, S elements of a shard, P = N S elements of the padded buffer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minispeed.collective.group import Group, Work
from minispeed.errors import UserError
from minispeed.layout import FlatLayout
from minispeed.zero.absent import plainly
from minispeed.zero.rooms import Rooms
from minispeed.zero.summing import Compression, Wire


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """What a unit keeps and sends its elements in.

    compute   parameters, and the gradients that autograd makes
    master    what the optimizer adds to
    collect   gradients of one rank, added up until they are reduced
    reduce    gradients on their way to the sum over ranks
    gradient  my shard of that sum, over micro-batches
    """

    compute: torch.dtype
    master: torch.dtype
    collect: torch.dtype
    reduce: torch.dtype
    gradient: torch.dtype


class DataParallelUnit:
    """The parameters of one module, whole on every rank while gradients are made.

    layout      where each parameter's gradient lies in the buffer
    full        gradients of all parameters, not yet summed over ranks, (P,), collect dtype; None while there are none
    gradient    my shard of the sum, (S,), gradient dtype; None before the first reduce of a step
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        group: Group,
        *,
        stage: int,
        dtypes: Dtypes,
        rooms: Rooms,
        predivide: float,
        compression: Compression,
    ) -> None:
        """Hold nothing yet.

        rooms        memory for gradients on their way, shared by the units of a model
        predivide    what gradients are divided by on their way to the sum
        compression  how they travel
        """
        self.parameters, self.group, self.stage, self.dtypes = parameters, group, stage, dtypes
        self.whole = stage == 0  # the sum is not cut: every rank updates everything
        self.layout = FlatLayout.of(parameters, 1 if self.whole else group.size)
        self.device = next(iter(parameters.values())).device
        reduce, exact = dtypes.reduce, dtypes.master
        wire = Wire(group=group, layout=self.layout, whole=self.whole, reduce=reduce, exact=exact, predivide=predivide)
        self.summing = compression.summing(wire)
        self.full: Tensor | None = None
        self.gradient: Tensor | None = None
        self._rooms = rooms
        self._room: Tensor | None = None
        # the call, the room of the gradients, my part of the sum
        self._reducing: tuple[Work, Tensor, Tensor] | None = None

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient that is not collected yet."""
        with torch._C.DisableTorchFunctionSubclass():
            return any(p.grad is not None for p in self.parameters.values())

    def lend(self) -> None:
        """Let autograd add gradients that stay right into the buffer of collected ones, where it is of their dtype.

        Before the first micro-batch there is none: what autograd makes is copied then, which takes less than zeros do.

        Writes  p.grad of each parameter, a view of `full`
        """
        if self.full is None or self.stage >= 2 or self.dtypes.collect != self.dtypes.compute:
            return  # nothing yet, or they are gone when the backward is over, or of another dtype
        with plainly():
            for p, view in zip(self.parameters.values(), self.layout.views(self.full).values()):
                if p.requires_grad and p.grad is None:
                    p.grad = view

    def add(self, name: str, gradient: Tensor) -> None:
        """Add to what is collected for one parameter, which may be released meanwhile.

        Writes  full, (P,), collect dtype
        """
        with plainly():
            if self.full is None:
                self.full = self._take_room().zero_()
            self.layout.views(self.full)[name].add_(gradient)

    def collect(self) -> None:
        """Move p.grad of every parameter into one buffer, adding; None counts as zero.

        Reads   p.grad, (shape of p), compute dtype; afterwards None
        Writes  full, (P,), collect dtype
        Raises  UserError if a gradient has another shape than its parameter
        """
        with plainly():
            fresh = self.full is None
            if self.full is None:
                self.full = self._take_room()
                self.full[self.layout.total :].zero_()
            views, gradients = [], []
            for (name, p), view in zip(self.parameters.items(), self.layout.views(self.full).values()):
                if p.grad is None:
                    view.zero_() if fresh else None
                    continue
                if p.grad.is_sparse:
                    p.grad = p.grad.to_dense()
                if p.grad.shape != view.shape:
                    what = f"the gradient of {name} is {tuple(p.grad.shape)}, the parameter {tuple(view.shape)}"
                    raise UserError(what, fix="a gradient of the parameter's shape")
                if p.grad.data_ptr() != view.data_ptr():  # else it was lent, and is there already
                    views.append(view)
                    gradients.append(p.grad)
                p.grad = None
            if views:
                (torch._foreach_copy_ if fresh else torch._foreach_add_)(views, gradients)

    def reduce(self) -> None:
        """Start to sum the collected gradients over the group; `settle` keeps my shard and frees the rest.

        Reads  full, (P,); None counts as zeros. Additive: call it again
        Sends  S (N - 1) elements per rank (reduce-scatter), at stage 0 an all-reduce; or as `compression` says
        """
        self.settle()
        self.collect()
        assert self.full is not None
        with plainly():
            room, self.full = self.full, None
            work, mine = self.summing.start(room)
            self._reducing = work, room, mine

    def settle(self) -> None:
        """Wait for the sum that `reduce` started, and add my shard of it up.

        Writes  gradient += my part of the sum, (S,), gradient dtype
        """
        if self._reducing is None:
            return
        work, room, mine = self._reducing
        self._reducing = None
        with plainly():
            work.wait()
            wide = mine.to(self.dtypes.gradient)
            self.gradient = wide if self.gradient is None else self.gradient.add_(wide)
        if self.stage >= 2:
            self._rooms.give(room)

    def forget(self) -> None:
        """Drop the gradients, summed or not."""
        self.settle()
        self.summing.undo()
        self.gradient = self.full = None
        with plainly():
            for p in self.parameters.values():
                p.grad = None

    def _take_room(self) -> Tensor:
        """Return memory for all gradients: my own where they stay until the last micro-batch, else the model's."""
        size, dtype, device = self.layout.size, self.dtypes.collect, self.device
        if self.stage >= 2:
            return self._rooms.take(size, dtype, device)
        if self.gradient is not None or self._reducing is not None:  # the sum may lie in my own room
            return torch.empty(size, dtype=dtype, device=device)
        if self._room is None:
            self._room = torch.empty(size, dtype=dtype, device=device)
        return self._room
