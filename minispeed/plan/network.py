"""Say how long the ranks of a job speak: which link each group has, and what a call on it takes.

Rank numbers run through the mesh with tp fastest, and through the machines in the same order: so a group stays inside
a machine as long as the ranks that lie between its first and its last fill no more than one. A call takes as long as a
ring does, whose steps are messages of one N-th of the buffer:

    all-reduce              2 (N - 1) messages, 2 (N - 1)/N of the buffer sent by each rank
    all-gather, reduce-scatter, all-to-all    N - 1 messages, (N - 1)/N of the whole buffer

Patarasu & Yuan 2009, section 3. https://doi.org/10.1016/j.jpdc.2008.09.002
Letters: N ranks of the group.
"""

from dataclasses import dataclass
from math import ceil, log2, prod

from minispeed.mesh import AXES, Mesh
from minispeed.profiles import Link, Profile, Rates


@dataclass(frozen=True)
class Network:
    """The links between the ranks of a mesh that fills one machine after another."""

    mesh: Mesh
    profile: Profile

    @property
    def busy(self) -> int:
        """How many ranks of a machine are."""
        return min(self.mesh.world, self.profile.per_machine)

    @property
    def rates(self) -> Rates:
        """What each rank does while all of them are busy."""
        return self.profile.at(self.busy)

    def spans(self, axis: str) -> bool:
        """Whether some group along an axis, or along it and all faster ones, has ranks on several machines."""
        if self.mesh.world <= self.profile.per_machine:
            return False
        faster = AXES[AXES.index(axis) :]
        reach = prod(self.mesh.sizes[name] for name in faster)
        return self.mesh.sizes[axis] > 1 and self.profile.per_machine % reach != 0

    def link(self, axis: str) -> Link:
        """Return the slowest link of the groups along an axis."""
        return self.profile.link(self.busy, machines=1 + self.spans(axis))

    def to_next(self, rank: int) -> Link:
        """Return the link from a rank of the pipeline to the next, the last one's next being the first."""
        stride = self.mesh.world // self.mesh.pp
        machines = [
            {(place * stride + offset) // self.profile.per_machine for place in (rank, (rank + 1) % self.mesh.pp)}
            for offset in range(min(stride, self.profile.per_machine))
        ]
        return self.profile.link(self.busy, machines=max(map(len, machines)))

    def all_reduce(self, axis: str, size: float, *, ranks: int | None = None) -> float:
        """Return the seconds of an all-reduce of `size` bytes; `ranks` where the group is not the axis alone."""
        return 2 * self.gather(axis, size, ranks=ranks)

    def gather(self, axis: str, size: float, *, ranks: int | None = None) -> float:
        """Return the seconds of an all-gather, reduce-scatter or all-to-all of a whole buffer of `size` bytes."""
        N = self.mesh.sizes[axis] if ranks is None else ranks
        return self.link(axis).seconds((N - 1) / N * size, N - 1)

    def agree(self) -> float:
        """Return the seconds in which all ranks agree on a number: up a tree and down again."""
        slowest = max((self.link(axis) for axis in AXES), key=lambda link: link.latency)
        return slowest.seconds(0, 2 * ceil(log2(self.mesh.world)))
