"""Sum one unit's gradients over the ranks: what there is to say of it, and the plain way.

In full it is one all-reduce, or a reduce-scatter where the sum is cut; `onebit.py` has the other way. A run is given a
`Compression`, which makes for each unit what sums its gradients.

ZeRO, Rajbhandari et al. 2020, section 5.2.  https://arxiv.org/abs/1910.02054
Letters: N ranks, S elements of a shard, P = N S elements of the padded buffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minispeed.collective.group import Group, Work
from minispeed.layout import FlatLayout


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What of one unit is summed, and over whom.

    layout     where its parameters lie
    whole      every rank gets the whole sum, (P,); else its shard, (S,)
    reduce     dtype in which gradients travel in full
    exact      dtype of the masters: what is owed is kept in it
    predivide  what gradients are divided by before they are summed
    """

    group: Group
    layout: FlatLayout
    whole: bool
    reduce: torch.dtype
    exact: torch.dtype
    predivide: float


class Summing(Protocol):
    """How one unit's gradients are summed."""

    def start(self, full: Tensor) -> tuple[Work, Tensor]:
        """Start to sum gradients, (P,); the buffer is the sum's until `wait` returns.

        Returns  what to wait for, and where my part of the sum, (P,) or (S,), then is
        """

    def keep(self) -> None:
        """The update with what was summed since the last `keep` or `undo` is made."""

    def undo(self) -> None:
        """What was summed since then is dropped."""

    def restart(self) -> None:
        """The parameters were replaced by others: no update was made of these yet."""


class Compression(Protocol):
    """What a run says of how gradients travel; equal ones are printed alike."""

    def summing(self, wire: Wire) -> Summing:
        """Return how the gradients of one unit are summed."""

    def check(self, stage: int, dtypes: Sequence[torch.dtype]) -> None:
        """Raise UserError where gradients cannot travel so: at a ZeRO stage, computed and summed in these dtypes."""


@dataclass(frozen=True)
class InFull:
    """Gradients travel as numbers."""

    def summing(self, wire: Wire) -> "PlainSum":
        """Return one all-reduce or reduce-scatter."""
        return PlainSum(wire)

    def check(self, stage: int, dtypes: Sequence[torch.dtype]) -> None:
        """Be content."""


class PlainSum:
    """Sum in full."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def start(self, full: Tensor) -> tuple[Work, Tensor]:
        """Sum in the reduce dtype.

        Sends  S (N - 1) elements per rank (reduce-scatter), or twice as many (all-reduce)
        """
        wire = self.wire
        sent = full.to(wire.reduce)
        if wire.predivide != 1.0:
            sent.div_(wire.predivide)
        if wire.whole:
            return wire.group.all_reduce(sent), sent
        mine = sent.new_empty(wire.layout.shard_size)
        return _Keeping(wire.group.reduce_scatter(mine, sent), sent), mine

    def keep(self) -> None:
        """Nothing is owed."""

    def undo(self) -> None:
        """Nothing is owed."""

    def restart(self) -> None:
        """Nothing is owed."""


@dataclass
class _Keeping:
    """Work that keeps a buffer of its own alive."""

    work: Work
    buffer: Tensor

    def wait(self) -> None:
        self.work.wait()
