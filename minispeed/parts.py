"""Say what of a run's model one rank holds, and in which groups it stands, given the run's `Layout` (`axes.py`).

The `Lines` are the groups that a rank stands in. A `Part` is what it holds of one stage of the model, in sharded
units, with, for each parameter, what it is to the whole: its name there, which slice, and whether this copy counts.
Whoever looks at all of a run's parameters (the norm, the checkpoint) walks over parts and asks no more.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from minispeed.collective.group import Group
from minispeed.mesh import Mesh
from minispeed.placement import WHOLE, Slice
from minispeed.zero.sharded import ShardedModel
from minispeed.zero.unit import ShardedUnit


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The groups that one rank stands in.

    world           all ranks
    pp, dp, sp, tp  the ranks that differ from this one along that axis alone
    shards          those that hold other shards of the same parameters: along dp and sp
    model           those that together hold one copy of the parameters: along pp and tp
    copy            those that together compute with one: along pp, sp and tp
    """

    mesh: Mesh
    world: Group
    pp: Group
    dp: Group
    sp: Group
    tp: Group
    shards: Group
    model: Group
    copy: Group

    @classmethod
    def of(cls, mesh: Mesh, world: Group) -> "Lines":
        """Return the groups of this rank; every rank of the world calls this."""
        axes: dict[str, tuple[str, ...]] = {axis: (axis,) for axis in mesh.sizes}
        axes |= {"shards": ("dp", "sp"), "model": ("pp", "tp"), "copy": ("pp", "sp", "tp")}
        groups: dict[tuple[tuple[int, ...], ...], Group] = {}
        for along in ((), *axes.values()):
            lines = tuple(mesh.lines(*along))
            groups[lines] = groups.get(lines) or world.subgroup(lines)
        return cls(mesh=mesh, world=world, **{name: groups[tuple(mesh.lines(*along))] for name, along in axes.items()})

    @property
    def coords(self) -> dict[str, int]:
        """Where this rank stands on each axis."""
        return self.mesh.coords(self.world.rank)

    @property
    def has_losses(self) -> bool:
        """Whether this is the rank, of those with equal losses of the same tokens, whose losses count."""
        return self.pp.rank == self.pp.size - 1 and self.tp.rank == 0


@dataclass(frozen=True)
class Logical:
    """What a parameter of a part is to the whole model.

    name    there
    shape   of the whole
    part    the slice of it that is here
    counts  whether of several equal copies this is the one that the norm and the checkpoint look at
    """

    name: str
    shape: tuple[int, ...]
    part: Slice = WHOLE
    counts: bool = True


@dataclass(frozen=True, eq=False)
class Part:
    """One stage of the model, as much of it as one rank holds.

    stage    its number
    run      (what came from the stage before, the micro-batch's tokens and what is attached to them) -> what goes on
    sharded  its parameters, in units
    logical  by their names here, what each is to the whole
    """

    stage: int
    run: Callable[..., tuple[Tensor, ...]]
    sharded: ShardedModel
    logical: Mapping[str, Logical]

    @property
    def units(self) -> list[ShardedUnit]:
        """The units, in the order of their division."""
        return self.sharded.units

    def counted_gradients(self) -> Iterator[Tensor]:
        """Yield the summed gradients of this rank's elements, but for copies that another rank counts."""
        for unit in self.units:
            gradient = unit.gradient
            if gradient is None:
                continue
            counts = [self.logical[name].counts for name in unit.parameters]
            if all(counts):
                yield gradient
                continue
            for name, _, place in unit.layout.pieces(unit.part):
                if self.logical[name].counts:
                    yield gradient[slice(*place)]
