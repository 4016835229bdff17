"""Find out which ranks there are, and settle among them: `init_distributed`.

Whoever started this process has said so already, or nobody has. The first that applies:

    inside minispeed.launch, or called before   the world that stands
    the script made torch's process group       that group
    rank, world_size or init_method given       the processes that meet there
    torchrun, or a launcher that speaks like it its processes
    nobody                                      a world of one rank, without a process group

https://deepspeed.readthedocs.io/en/latest/initialize.html#distributed-initialization
"""

import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from minispeed.collective import launch
from minispeed.collective.group import SoloGroup
from minispeed.collective.world import World, best_device, current_world, launched_world, settle, settled_world
from minispeed.errors import UserError, nearest

BACKENDS = ("nccl", "gloo")
FASTEST = "threads"  # what `launch.join` calls the fastest backend that is there


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta = timedelta(minutes=30),
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Make this process one of the ranks; called again, it changes nothing.

    dist_backend        "nccl" or "gloo"; None: nccl with a GPU, else gloo. Without a GPU "nccl" becomes gloo
    timeout             how long a rank waits in a collective
    init_method         where the processes meet, with `rank` and `world_size`: "tcp://host:port", "file:///path"
    dist_init_required  False: the script has made the process group itself
    The others are accepted and mean nothing here: nobody is looked for by MPI, and no port is chosen.

    Warns   on rank 0, where messages go another way: there is no GPU, or the world stood before
    Raises  UserError on an unknown backend, on half of a rank and world_size, if there is no process group and
            `dist_init_required` is False, and if mpirun started several processes that know of no rendezvous
    """
    if dist_backend not in (None, *BACKENDS):
        fix = nearest(str(dist_backend), BACKENDS) or " or ".join(BACKENDS)
        raise UserError(f"there is no backend {dist_backend!r}", fix=fix)
    if not is_initialized():
        settle(_find_world(dist_backend, timeout.total_seconds(), init_method, dist_init_required, rank, world_size))
    _warn_of_another(dist_backend)


def is_initialized() -> bool:
    """Whether this thread's world is known: inside `minispeed.launch`, and after `init_distributed`."""
    return (launched_world() or settled_world()) is not None


def _find_world(
    backend: str | None, timeout: float, init_method: str | None, required: bool | None, rank: int, size: int
) -> World:
    """Return the world of the first line of the table above that applies."""
    if dist.is_initialized():
        return launch.adopt(timeout=timeout)
    if required is False:
        raise UserError("dist_init_required is False, and there is no process group", fix="dist_init_required=True")
    if (rank < 0) != (size < 1):
        raise UserError(f"init_distributed with rank {rank} of {size}", fix="rank and world_size, or neither")
    if rank >= 0:
        where = init_method or "env://"
        return launch.meet(rank, size, backend=backend or FASTEST, rendezvous=where, timeout=timeout)
    if launch.under_torchrun():
        return launch.join(backend=backend or FASTEST, timeout=timeout)
    if init_method is not None:
        raise UserError(f"init_method is {init_method!r}, and nobody says which rank this is", fix="rank, world_size")
    launch.check_alone()
    return World(SoloGroup(), best_device())


def _warn_of_another(backend: str | None) -> None:
    """Say on rank 0 that messages go another way than asked for."""
    carriers = dist.get_backend_config() if dist.is_initialized() else ""
    if backend is not None and carriers and backend not in carriers and current_world().rank == 0:
        print(f"warning: init_distributed({backend!r}): the ranks talk over {carriers}", file=sys.stderr)
