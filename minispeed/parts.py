"""Say how the ranks of a run share its model, and what of it one rank holds.

A `Layout` says how long the axes of the mesh are, and how each cuts. The `Lines` are the groups that a rank then stands
in. A `Part` is what it holds of one stage of the model, in sharded units, with, for each parameter, what it is to the
whole: its name there, which slice, and whether this copy counts. Whoever looks at all of a run's parameters (the norm,
the checkpoint) walks over parts and asks no more.

The order of the cuts is fixed: width, then rows, then depth, and what is left of each stage is ZeRO's.

The axes: Narayanan et al. 2021, section 3 (https://arxiv.org/abs/2104.04473).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from minispeed.collective.group import Group
from minispeed.errors import UserError, nearest
from minispeed.mesh import Mesh
from minispeed.pipeline.actions import Program
from minispeed.pipeline.messages import with_messages
from minispeed.pipeline.schedule import SCHEDULES, with_reductions
from minispeed.placement import WHOLE, Slice
from minispeed.sequence.cut import KINDS
from minispeed.zero.sharded import ShardedModel
from minispeed.zero.unit import ShardedUnit


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks share what; the ranks that are left over hold replicas, or ZeRO's shards of them (dp).

    pp          ranks that share the model's depth
    schedule    in which order they compute: "gpipe", "1f1b", "interleaved" or "zb_h1"
    virtual     stages on each of them
    sp          ranks that share each row
    sequence    how they attend beyond their own tokens: "ulysses" or "ring"
    tp          ranks that share each layer's width
    tokens      between the layers that tp cuts, cut by tokens: Megatron's sequence parallelism
    """

    pp: int = 1
    schedule: str = "1f1b"
    virtual: int = 1
    sp: int = 1
    sequence: str = "ulysses"
    tp: int = 1
    tokens: bool = False

    def __post_init__(self) -> None:
        for what, name, known in (("schedule", self.schedule, SCHEDULES), ("sequence", self.sequence, KINDS)):
            if name not in known:
                raise UserError(f"{what} is {name!r}, not one of {', '.join(known)}", fix=nearest(name, known) or "")
        for axis in ("pp", "sp", "tp", "virtual"):
            if getattr(self, axis) < 1:
                raise UserError(f"{axis} is {getattr(self, axis)}", fix=f"{axis}=1, or more")
        if self.tokens and self.tp == 1:
            raise UserError("tokens are to be cut over the ranks of tp, and tp is 1", fix="tp=2, or no cut of tokens")
        if self.pp == 1 and self.virtual > 1:
            what = f"{self.virtual} stages on each rank of a pipeline of one"
            raise UserError(what, fix="virtual=1, or pp above 1")

    @property
    def ranks(self) -> int:
        """How many ranks together hold one copy of the model."""
        return self.pp * self.sp * self.tp

    @property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return self.pp * self.virtual

    def mesh(self, world: int) -> Mesh:
        """Return the mesh of so many ranks.  Raises UserError if they do not divide"""
        if world % self.ranks:
            sides = f"pp {self.pp} x sp {self.sp} x tp {self.tp} = {self.ranks}"
            raise UserError(
                f"{sides} ranks share a model, and the world has {world}",
                fix=f"{-(-world // self.ranks) * self.ranks} ranks",
            )
        return Mesh(world=world, pp=self.pp, sp=self.sp, tp=self.tp, dp=world // self.ranks)

    def programs(self, micros: int) -> list[Program]:
        """Return what each rank of a pipeline does in a step of so many micro-batches."""
        computing = SCHEDULES[self.schedule](self.pp, micros, self.virtual)
        programs = with_messages(computing)
        is_split = any(action.kind == "BW" for program in computing for action in program)
        # a backward in one piece reduces while it runs
        return with_reductions(programs, each_micro=True) if is_split else programs


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
