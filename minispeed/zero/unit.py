"""Hold one module's parameters as one flat buffer, of which 1/N is mine.

A rank needs all parameters of a module only while the module runs, all gradients only until they are summed, and
optimizer states only for the elements that it updates. So the parameters of a module lie in one flat buffer, cut into N
equal shards; I keep the masters, the moments and (by stage) the gradients and parameters of my shard alone. Four verbs
are all there is, and the stage only decides when they are called (`table.py`):

    unshard   my shard -> everyone's -> the whole buffer      reshard   free all but my shard
    reduce    my gradients -> their sum -> my shard of it     publish   my masters -> my shard, rounded

At stage 0 the "shard" is the whole buffer, and reduce an all-reduce: the same lines with a layout of one part.

ZeRO, Rajbhandari et al. 2020, section 5.  https://arxiv.org/abs/1910.02054
Letters: N ranks, S elements of a shard, P = N S elements of the padded buffer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minispeed.collective.group import Group
from minispeed.errors import UserError
from minispeed.layout import FlatLayout


class ShardedUnit:
    """The parameters of one module; `masters` are what the optimizer updates.

    layout      where each parameter lies, in the order of its groups
    gradient    my shard of the summed gradient, (S,), gradient dtype; None before the first reduce of a step
    masters     for each parameter group that reaches into my shard, a view of it, fp32 (fp64 for fp64)
    """

    def __init__(
        self,
        parameters: Sequence[Mapping[str, nn.Parameter]],
        group: Group,
        *,
        compute: torch.dtype,
        master: torch.dtype,
        gradient: torch.dtype,
        whole: bool,
        released: bool,
        on_read: Callable[["ShardedUnit"], bool] = lambda unit: False,
    ) -> None:
        """Copy the parameters into a flat buffer; from now on each is a view of it.

        parameters  one mapping per parameter group, all frozen or all trainable; may be empty
        compute, master, gradient   dtypes of the buffer, of the masters and of the gradient shard
        whole       stage 0: every rank updates everything
        released    stage 3: between uses only my shard exists
        on_read     called when somebody reads a released parameter: unshards the unit, or returns False to refuse
        Holds       P (or, released, S) in compute dtype, S masters where their dtype is another
        """
        self.parameters = {name: p for of_group in parameters for name, p in of_group.items()}
        self.group, self.whole = group, whole
        self.gradient_dtype = gradient
        self.trainable = any(p.requires_grad for p in self.parameters.values())
        self.part = 0 if whole else group.rank
        self.layout = FlatLayout.of(self.parameters, 1 if whole else group.size)
        device = next(iter(self.parameters.values())).device
        exact = torch.empty(self.layout.size, dtype=master, device=device)
        self.layout.flatten(self.parameters, out=exact)
        self.flat = exact.to(compute)  # the same tensor where the dtypes agree
        mine = self.layout.shard(self.flat, self.part)
        self.shard = mine.clone() if released else mine
        if not self.trainable or compute == master:
            self.master = self.shard
        else:
            self.master = self.layout.shard(exact, self.part).clone()
        windows = [self.layout.in_shard(self.layout.span(list(of_group)), self.part) for of_group in parameters]
        self.windows = [(index, window) for index, window in enumerate(windows) if window.size]
        if not self.trainable:
            self.windows = []
        self.masters = tuple(nn.Parameter(self.master[slice(*window)]) for _, window in self.windows)
        self.full: Tensor | None = None  # gradients of all parameters, not yet summed over ranks
        self.gradient: Tensor | None = None
        self.is_released = False
        self._absent = _absent_class({id(p): name for name, p in self.parameters.items()}, partial(on_read, self))
        self._point_into_buffer()
        # autograd's node of each parameter remembers the shape that it saw first: make it see the whole one, and stay
        self._nodes = [p.view_as(p).grad_fn for p in self.parameters.values() if p.requires_grad]

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient that is not collected yet."""
        with torch._C.DisableTorchFunctionSubclass():
            return any(p.grad is not None for p in self.parameters.values())

    @property
    def num_elements(self) -> int:
        """Elements of all parameters, padding left out."""
        return self.layout.total

    def unshard(self) -> None:
        """Make every parameter whole on this rank.

        Sends  S (N - 1) elements per rank (all-gather)
        """
        with _plainly():
            if self.is_released:
                self.flat.untyped_storage().resize_(self.layout.size * self.flat.element_size())
                self.layout.shard(self.flat, self.part).copy_(self.shard)
            if not self.whole:
                self.group.all_gather(self.flat, self.layout.shard(self.flat, self.part)).wait()
            if self.is_released:
                self.is_released = False
                self._point_into_buffer()

    def reshard(self) -> None:
        """Free the buffer but my shard. Who reads a parameter now is told its name, and never reads freed memory."""
        if self.is_released:
            return
        with _plainly():
            for p in self.parameters.values():
                p.data = p.data.new_empty(0)
                p.__class__ = self._absent
            # the storage shrinks and the tensor objects stay: what autograd saved of them is whole again after unshard
            self.flat.untyped_storage().resize_(0)
        self.is_released = True

    def collect(self, dtype: torch.dtype) -> None:
        """Move p.grad of every parameter into one buffer of `dtype`, adding; None counts as zero.

        Reads   p.grad, (shape of p), compute dtype; afterwards None
        Writes  full, (P,)
        Raises  UserError if a gradient has another shape than its parameter
        """
        with _plainly():
            if self.full is None:
                self.full = torch.zeros(self.layout.size, dtype=dtype, device=self.flat.device)
            for (name, p), view in zip(self.parameters.items(), self.layout.views(self.full).values()):
                if p.grad is None:
                    continue
                if p.grad.shape != view.shape:
                    what = f"the gradient of {name} is {tuple(p.grad.shape)}, the parameter {tuple(view.shape)}"
                    raise UserError(what, fix="a gradient of the parameter's shape")
                view += p.grad
                p.grad = None

    def reduce(self, dtype: torch.dtype) -> None:
        """Sum the collected gradients over the group, keep only my shard, free the rest. Additive: call it again.

        Reads   full, (P,), which is then freed; None counts as zeros of `dtype`
        Writes  gradient += my part of the sum, (S,), gradient dtype
        Sends   S (N - 1) elements per rank (reduce-scatter); at stage 0 an all-reduce

        ZeRO, Rajbhandari et al. 2020, section 5.2.
        """
        self.collect(dtype)
        assert self.full is not None
        with _plainly():
            if self.whole:
                self.group.all_reduce(self.full).wait()
                mine = self.full
            else:
                mine = self.full.new_empty(self.layout.shard_size)
                self.group.reduce_scatter(mine, self.full).wait()
            self.full = None
            mine = mine.to(self.gradient_dtype)
            self.gradient = mine if self.gradient is None else self.gradient.add_(mine)

    def give_gradients(self, factor: float) -> None:
        """Set the masters' gradients: views of my shard times `factor`, in the masters' dtype."""
        if self.gradient is None:
            return
        self.gradient.mul_(factor)
        wide = self.gradient.to(self.master.dtype)
        for (_, window), master in zip(self.windows, self.masters):
            master.grad = wide[slice(*window)]

    @torch.no_grad()
    def publish(self) -> None:
        """Round my masters into my shard of the buffer, and drop the gradients."""
        self.gradient = None
        for master in self.masters:
            master.grad = None
        if self.master is not self.shard:
            self.shard.copy_(self.master)

    def _point_into_buffer(self) -> None:
        """Let each parameter be its view of the flat buffer."""
        for (name, p), view in zip(self.parameters.items(), self.layout.views(self.flat).values()):
            p.__class__ = nn.Parameter
            p.data = view


@contextmanager
def _plainly() -> Iterator[None]:
    """Do the book-keeping unseen by autograd and by whoever watches operations (the table's hooks do)."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        yield


def _absent_class(names: Mapping[int, str], on_read: Callable[[], bool]) -> type[nn.Parameter]:
    """Make the class that parameters have while they are released: reading one unshards its unit, or raises."""

    class Absent(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not on_read():
                name = next((names[id(one)] for one in args if id(one) in names), next(iter(names.values())))
                raise UserError(
                    f"parameter {name} is released: its elements are spread over the ranks",
                    fix="reading it inside the model's forward, or in `with engine.sharded.gathered():`",
                )
            return func(*args, **(kwargs or {}))

    return Absent
