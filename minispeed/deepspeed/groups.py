"""Who is there, and who talks to whom, asked without naming a world: the ranks' half of `deepspeed.comm`.

A script's groups may be three things: None for all ranks, a Group of ours, a ProcessGroup that it made by
torch.distributed. `group_of` makes one of them: a Group. Ranks given to a collective are the world's, also in a
smaller group, as torch has it.

The names are torch.distributed's.  https://pytorch.org/docs/stable/distributed.html
Letters: N ranks of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch.distributed as dist

from minispeed.collective import launch
from minispeed.collective.flight import FlightRecorder
from minispeed.collective.group import Group
from minispeed.collective.processes import TorchGroup
from minispeed.collective.world import current_world, launched_world, settle
from minispeed.deepspeed.start import is_initialized
from minispeed.errors import UserError

AnyGroup: TypeAlias = Any  # None, a Group of ours, a ProcessGroup of torch's, or Outside
TIMEOUT = 1800.0  # seconds that a collective of a group of torch's waits


@dataclass(frozen=True)
class Outside:
    """What `new_group` gives to a rank that is not in the group: nothing can be done with it."""

    members: tuple[int, ...]
    rank: int = -1
    size: int = -1


def group_of(group: AnyGroup) -> Group:
    """Return the Group that a script means.

    Raises  UserError before `init_distributed`, on a group that this rank is not in, and on what is no group
    """
    if not is_initialized():
        raise UserError("nobody knows yet which ranks there are", fix="deepspeed.init_distributed()")
    if isinstance(group, Outside) or group is dist.GroupMember.NON_GROUP_MEMBER:
        members = list(group.members) if isinstance(group, Outside) else "a group of torch's"
        what = f"rank {current_world().rank} called a collective of a group that it is not in: {members}"
        raise UserError(what, fix="the call on the group's own ranks alone")
    if group is None or (dist.is_initialized() and group is dist.group.WORLD):
        return current_world().group
    if isinstance(group, dist.ProcessGroup):
        return TorchGroup(group, FlightRecorder(dist.get_rank()), timeout=TIMEOUT)
    if not hasattr(group, "members"):
        raise UserError(f"{group!r} is no group", fix="None for all ranks, or what new_group returned")
    found: Group = group
    return found


def rank_in(group: Group, world_rank: int) -> int:
    """Return the group's number of a rank of the world.

    Raises  UserError if the group has no such member
    """
    if world_rank not in group.members:
        raise UserError(f"rank {world_rank} is not in the group {list(group.members)}", fix="one of its ranks")
    return group.members.index(world_rank)


def is_available() -> bool:
    """Whether ranks can talk here: always, be they threads."""
    return True


def get_world_group() -> Group:
    """Return the group of all ranks."""
    return group_of(None)


def get_rank(group: AnyGroup = None) -> int:
    """Return my number in the group, -1 outside it."""
    return -1 if isinstance(group, Outside) else group_of(group).rank


def get_world_size(group: AnyGroup = None) -> int:
    """Return N, -1 outside the group."""
    return -1 if isinstance(group, Outside) else group_of(group).size


def get_local_rank() -> int:
    """Return my number among the ranks of this machine: the number of my GPU, where I have one."""
    group_of(None)
    return launch.local_rank()


def get_global_rank(group: AnyGroup = None, group_rank: int = 0) -> int:
    """Return the world's number of the group's rank `group_rank`."""
    return get_all_ranks_from_group(group)[group_rank]


def get_all_ranks_from_group(group: AnyGroup = None) -> list[int]:
    """Return the world's numbers of the group's ranks, in its order."""
    return list(group.members if isinstance(group, Outside) else group_of(group).members)


def new_group(ranks: Sequence[int] | None = None) -> Group | Outside:
    """Return the group of these ranks of the world, in rising order.

    Every rank of the world calls, with the same ranks; one that is not among them has rank -1 in what it gets.
    """
    world = group_of(None)
    line = list(range(world.size)) if ranks is None else sorted(ranks)
    others = [[rank] for rank in range(world.size) if rank not in line]
    group = world.subgroup([line, *others])
    return group if world.rank in line else Outside(tuple(line))


def destroy_process_group(group: AnyGroup = None) -> None:
    """Leave the world that `init_distributed` found. What `minispeed.launch` started ends with `launch`, not here."""
    if group is None and launched_world() is None:
        launch.leave()
        settle(None)


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> None:
    """Say, on rank 0, that collectives are not counted here, and where they are."""
    if get_rank() == 0:
        print("log_summary: calls are not counted here; minispeed.collective.trace.Traced(group) counts them")
