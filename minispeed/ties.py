"""Add up the gradients of a parameter that several stages of a pipeline hold copies of.

The token embedding is used by the first stage, and as the head by the last; the matrix of deep connections by all. Each
has a copy, and its part of the gradient. A copy is a ZeRO unit of its own, so on every holder the same shard lies on
the rank at the same place of its line: shards are sent to the other holders, and all add them up in the same order.
So the copies are updated from equal bits, and stay equal.

Tied embeddings across a cut: Narayanan et al. 2021, section 2.1 (https://arxiv.org/abs/2104.04473).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minispeed.collective.group import Group
from minispeed.parts import Part
from minispeed.zero.unit import ShardedUnit


class Ties:
    """The parameters of which this rank holds a copy, with the ranks of the pipeline that hold the others."""

    def __init__(self, parts: Sequence[Part], holders: Mapping[str, Sequence[int]], group: Group) -> None:
        """Find this rank's copies.

        holders  by its name in the whole model, the ranks of the group that hold a parameter
        group    the ranks of the pipeline
        """
        self.group = group
        copies: dict[str, list[ShardedUnit]] = {}
        for part in parts:
            for unit in part.units:
                for name in unit.parameters:
                    copies.setdefault(part.logical[name].name, []).append(unit)
        self.tied = {name: (copies[name], list(ranks)) for name, ranks in holders.items() if name in copies}

    @torch.no_grad()
    def sum(self) -> None:
        """Give each copy the sum of the gradients of all.

        Sends  S elements to each other holder
        """
        summed = {name: self._of_mine(units) for name, (units, _) in self.tied.items()}
        sends = [(mine, rank) for name, mine in summed.items() for rank in self._others(name)]
        arrived = {name: {rank: torch.empty_like(mine) for rank in self._others(name)} for name, mine in summed.items()}
        recvs = [(room, rank) for rooms in arrived.values() for rank, room in rooms.items()]
        self.group.exchange(sends, recvs).wait()
        for name, (units, ranks) in self.tied.items():
            of = arrived[name] | {self.group.rank: summed[name]}
            total = sum((of[rank] for rank in ranks[1:]), of[ranks[0]])
            for unit in units:
                unit.gradient = total.clone()

    def _others(self, name: str) -> list[int]:
        return [rank for rank in self.tied[name][1] if rank != self.group.rank]

    def _of_mine(self, units: Sequence[ShardedUnit]) -> Tensor:
        zeros = units[0].master.new_zeros(units[0].layout.shard_size, dtype=units[0].dtypes.gradient)
        return sum((unit.gradient for unit in units if unit.gradient is not None), zeros)
