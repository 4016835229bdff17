"""Say how long the axes of a run's mesh are, and how each cuts: data alone, which a plan can be made of.

The order of the cuts is fixed: width (tp), then rows (sp), then depth (pp), and what is left of each stage is ZeRO's
(dp).

The axes: Narayanan et al. 2021, section 3 (https://arxiv.org/abs/2104.04473).
"""

from dataclasses import dataclass

from minispeed.errors import UserError, nearest
from minispeed.mesh import Mesh
from minispeed.pipeline.actions import Program
from minispeed.pipeline.messages import with_messages
from minispeed.pipeline.schedule import SCHEDULES, with_reductions

SEQUENCE = ("ulysses", "ring")


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
        for what, name, known in (("schedule", self.schedule, SCHEDULES), ("sequence", self.sequence, SEQUENCE)):
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
