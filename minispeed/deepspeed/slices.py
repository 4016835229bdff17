"""Give whole tensors of a module whose layers are cut by width, and take them.

A cut module's own `state_dict()` would hold slices under the names of wholes, which nobody who loads them could tell:
so it is refused, and the engine's calls put slices together. Where nothing is cut, nothing here does anything.

https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minispeed.collective.group import Group
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.placement import WHOLE, Slice, join
from minispeed.zero.unit import ShardedUnit


class Slices:
    """The parameters of a module of which this rank holds slices, by all their names."""

    def __init__(self, module: nn.Module, core: Engine | None) -> None:
        """Find them; from now on only `readable` lets the module's state be read."""
        self._core, self._is_readable = core, False
        held = {} if core is None else {n: slice_of(core, n) for part in core.parts for n in part.logical}
        first = {p: name for name, p in module.named_parameters()}
        named = module.named_parameters(remove_duplicate=False)
        self.parts = {name: held.get(first[p], WHOLE) for name, p in named}
        self.parts = {name: part for name, part in self.parts.items() if part != WHOLE}
        if self.parts:
            module.register_state_dict_pre_hook(self._refuse)

    def _refuse(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not self._is_readable:
            what = f"state_dict() of a module of which each rank holds slices ({next(iter(self.parts))} and others)"
            raise UserError(what, fix="engine.module_state_dict(), on every rank")

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Let the module's state be read inside this, slices and all."""
        self._is_readable = True
        try:
            yield
        finally:
            self._is_readable = False

    def join(self, state: dict[str, Any], prefix: str = "") -> None:
        """Replace slices by wholes; the ranks that share a layer's width call this together."""
        for name, part in self.parts.items():
            assert self._core is not None
            state[prefix + name] = joined(state[prefix + name].detach(), part, self._core.lines.tp)

    @torch.no_grad()
    def cut(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state with this rank's slices in place of wholes, all values those of the first rank."""
        if not self.parts or self._core is None:
            return dict(state)
        cut = {}
        for name in sorted(state):
            whole = state[name].detach().clone(memory_format=torch.contiguous_format)
            self._core.lines.tp.broadcast(whole, 0).wait()
            cut[name] = self.parts.get(name, WHOLE).of(whole)
        return cut


def slice_of(core: Engine, name: str) -> Slice:
    """Return the slice that a parameter of a cut layer is; WHOLE for any other, and for what its caller has cut."""
    part = next(part.logical[name].part for part in core.parts if name in part.logical)
    return part if part.count == core.lines.tp.size else WHOLE


def joined(mine: Tensor, part: Slice, group: Group) -> Tensor:
    """Return the whole of which each rank of the group brings a slice.

    Sends  the slice's elements x (tp - 1) per rank (all-gather)
    """
    if part == WHOLE:
        return mine
    every = mine.new_empty((group.size, *mine.shape))
    group.all_gather(every, mine.contiguous()).wait()
    return join(list(every), part.place)


def shape_of(core: Engine, unit: ShardedUnit, name: str) -> tuple[int, ...]:
    """Return the shape of a parameter where no layer is cut."""
    local: tuple[int, ...] = unit.layout.shapes[name]
    part = next(part for part in core.parts if unit in part.units)
    return local if slice_of(core, name) == WHOLE else part.logical[name].shape
