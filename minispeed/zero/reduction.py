"""Reduce the units of a model while the backward runs, in one order on all ranks.

A unit is reduced when all its gradients are there, and those of all units that come before it: in the order of
readiness, ranks whose rows take other ways through the model would not meet. What has no gradient at the end counts as
zeros. One unit's sum is on its way while the next one's gradients are computed.

Overlap of reduction and backward: Li et al. 2020, PyTorch Distributed, section 3.2.3. https://arxiv.org/abs/2006.15704
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minispeed.collective.group import Group
from minispeed.zero.unit import ShardedUnit

Look = Callable[[str, Tensor], None]


class Reduction:
    """One model's reductions; `is_last`: this backward is the step's last."""

    def __init__(self, group: Group, units: Sequence[ShardedUnit], *, overlap: bool) -> None:
        self.group, self.units, self.overlap, self.is_last = group, units, overlap, True
        self.look: Look = lambda name, gradient: None  # is shown each gradient before it is summed over ranks
        self._order: list[ShardedUnit] = []  # the same on every rank, from the first backward on
        self._missing: dict[int, set[str]] = {}  # names of parameters without a gradient yet, by id of the unit
        self._waiting: list[ShardedUnit] = []  # not complete yet in this backward
        self._under_way: ShardedUnit | None = None

    def begin(self, forward_order: Sequence[ShardedUnit]) -> None:
        """A backward begins; rank 0's first one says the order of all."""
        self._order = self._order or self._agree_on_order(forward_order)
        self._missing = {id(unit): set(unit.parameters) for unit in self._order if unit.trainable}
        self._waiting = [unit for unit in self._order if unit.trainable]
        for unit in self._waiting:
            unit.lend()

    def _agree_on_order(self, forward_order: Sequence[ShardedUnit]) -> list[ShardedUnit]:
        """Return rank 0's first forward reversed, then what it left out."""
        unused = [unit for unit in reversed(self.units) if unit not in forward_order]
        mine = [self.units.index(unit) for unit in (*reversed(forward_order), *unused)]
        order = torch.tensor(mine)
        self.group.broadcast(order, 0).wait()
        return [self.units[index] for index in order.tolist()]

    def got(self, unit: ShardedUnit, name: str, gradient: Tensor | None) -> None:
        """A parameter has its gradient: reduce what is complete by that."""
        if gradient is not None:
            self.look(name, gradient)
        self._missing.get(id(unit), set()).discard(name)
        while self._waiting and not self._missing[id(self._waiting[0])]:
            self._complete(self._waiting.pop(0))

    def end(self) -> None:
        """The backward is over: reduce what is left."""
        while self._waiting:  # unused parameters, units that no forward reached
            self._complete(self._waiting.pop(0))
        for unit in self._order:
            if unit.has_gradients:  # after it was complete: a re-entrant checkpoint
                self._complete(unit)
        if self.is_last:
            for unit in self._order:
                self._reduce_at("last backward over", unit)
        for unit in self._order:
            unit.settle()

    def _complete(self, unit: ShardedUnit) -> None:
        """All gradients of a unit are there: add them up, reduce, release."""
        if not unit.trainable:
            return
        unit.collect()
        self._reduce_at("last gradients complete" if self.is_last else "gradients complete", unit)
        unit.at("after backward")

    def _reduce_at(self, moment: str, unit: ShardedUnit) -> None:
        """Start what the table says, and finish the unit before."""
        unit.at(moment)
        if self._under_way not in (None, unit):
            self._under_way.settle()
        self._under_way = unit
        if not self.overlap:
            unit.settle()
