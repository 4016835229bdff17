"""Say how the ranks of a run share its model, and what of it one rank holds.

A `Layout` says how long the axes of the mesh are, and how each cuts. The `Lines` are the groups that a rank then stands
in. A `Part` is what it holds: one stage of the model in sharded units, with, for each parameter, what it is to the
whole: its name there, which slice, and whether this copy counts. Whoever looks at all of a run's parameters (the norm,
the checkpoint) walks over parts and asks no more.

The axes: Narayanan et al. 2021, section 3 (https://arxiv.org/abs/2104.04473).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from minispeed.collective.group import Group
from minispeed.errors import UserError
from minispeed.mesh import Mesh
from minispeed.model.gpt import GPT
from minispeed.placement import WHOLE, Shard, Slice, counts
from minispeed.tensor.parallel import tensor_parallel
from minispeed.tensor.plan import Plan, gpt_plan
from minispeed.zero.sharded import ShardedModel
from minispeed.zero.unit import ShardedUnit


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks share what; the ranks that are left over hold replicas, or ZeRO's shards of them (dp).

    tp          ranks that share each layer's width
    tokens      between the layers that tp cuts, cut by tokens: Megatron's sequence parallelism
    """

    tp: int = 1
    tokens: bool = False

    @property
    def ranks(self) -> int:
        """How many ranks together hold one copy of the model."""
        return self.tp

    def mesh(self, world: int) -> Mesh:
        """Return the mesh of so many ranks.  Raises UserError if they do not divide"""
        if world % self.ranks:
            raise UserError(
                f"tp {self.tp} = {self.ranks} ranks share a model, and the world has {world}",
                fix=f"{-(-world // self.ranks) * self.ranks} ranks",
            )
        return Mesh(world=world, tp=self.tp, dp=world // self.ranks)


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The groups that one rank stands in.

    world     all ranks
    dp, tp    the ranks that differ from this one along that axis alone
    shards    those that hold other shards of the same parameters: along dp and sp
    model     those that together hold one copy of the model: along pp and tp
    """

    mesh: Mesh
    world: Group
    dp: Group
    tp: Group
    shards: Group
    model: Group

    @classmethod
    def of(cls, mesh: Mesh, world: Group) -> "Lines":
        """Return the groups of this rank; every rank of the world calls this."""
        axes = {"dp": ("dp",), "tp": ("tp",), "shards": ("dp", "sp"), "model": ("pp", "tp")}
        groups = {name: world.subgroup(mesh.lines(*along)) for name, along in axes.items()}
        return cls(mesh=mesh, world=world, **groups)

    @property
    def coords(self) -> dict[str, int]:
        """Where this rank stands on each axis."""
        return self.mesh.coords(self.world.rank)


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


@dataclass(frozen=True)
class Part:
    """Parameters that one rank holds, in units; `logical` says by their names here what each is to the whole."""

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


def cut_model(model: nn.Module, layout: Layout, lines: Lines, plan: Plan | None) -> dict[str, Logical]:
    """Keep this rank's part of a model that every rank has built whole.

    plan     how tp cuts the leaves; None: the GPT's own
    Returns  for each parameter that is left, what it is to the whole
    Raises   UserError as `tensor_parallel`, or if tp is to cut a model that has no plan
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    placement = tensor_parallel(model, _plan(model, layout, plan), lines.tp, sequence_parallel=layout.tokens)
    found = {}
    for name in shapes:
        place = placement[name]
        part = Slice(place, lines.tp.rank, lines.tp.size) if isinstance(place, Shard) else WHOLE
        found[name] = Logical(name, shapes[name], part, counts(place, lines.coords, over=("tp",)))
    return found


def _plan(model: nn.Module, layout: Layout, plan: Plan | None) -> Plan:
    if plan is not None or layout.tp == 1:
        return plan or {}
    if not isinstance(model, GPT):
        what = f"tp={layout.tp} is to cut a {type(model).__name__}, which brings no plan"
        raise UserError(what, fix="plan={name pattern: Column(), Row(), ...}")
    return gpt_plan(model.config)
