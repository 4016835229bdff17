"""Start the ranks: as threads of this process, as new processes, or as the processes that torchrun has
started.

    minispeed.launch(train, ranks=4)                      four ranks as threads, here and now
    minispeed.launch(train, ranks=4, backend="gloo")      four processes on this machine's CPU
    torchrun --nproc-per-node 8 script.py                 the same script: launch calls train on this rank

This is the one file that reads the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT),
which is how torchrun tells a process who it is; several machines meet through torchrun's own rendezvous.
"""

import atexit
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous as by_torch

from minispeed.collective.flight import FlightRecorder
from minispeed.collective.group import Group
from minispeed.collective.processes import TorchGroup, connect
from minispeed.collective.supervise import Post, run_processes
from minispeed.collective.threads import run_threads
from minispeed.collective.world import World, current_world, inside
from minispeed.errors import UserError, nearest

T = TypeVar("T")
Backend: TypeAlias = Literal["threads", "gloo", "nccl"]
BACKENDS = ("threads", "gloo", "nccl")


def launch(
    fn: Callable[..., T],
    *args: Any,
    ranks: int | None = None,
    backend: Backend = "threads",
    lockstep: bool = False,
    timeout: float = 600.0,
    device: str = "cpu",
) -> list[T]:
    """Run `fn(world, *args)` on every rank and return what the ranks returned, in rank order.

    ranks     how many; 1 if not given
    backend   "threads": one process, any function, deterministic; "gloo": a process each; "nccl": a GPU each
    lockstep  threads run one at a time and hand over only inside a collective: prints come in rank order,
              and a breakpoint stops one rank while the others hold
    timeout   seconds that a rank of "gloo" or "nccl" waits in a collective before it gives up; not threads
    device    where thread ranks compute

    Threads share torch's default generator: what a rank draws from it depends on who comes first, unless in lockstep.
    A generator of its own draws the same every time.

    Under torchrun `fn` runs once, on this process's rank, and the list holds its one result; `ranks` is
    torchrun's affair then, and "threads" means "nccl" where there is a GPU, else "gloo".

    Raises  the error of the rank that raised; CollectiveError if ranks disagree, hang or are killed;
            UserError on an unknown backend, ranks below 1, or a function that cannot go to another process
    """
    if backend not in BACKENDS:
        fix = nearest(backend, BACKENDS) or ", ".join(BACKENDS)
        raise UserError(f"there is no backend {backend!r}", fix=fix)
    if lockstep and (backend != "threads" or under_torchrun()):
        processes = "torchrun's processes" if under_torchrun() else repr(backend)
        raise UserError(f"lockstep needs ranks that are threads, got {processes}", fix='backend="threads"')
    if under_torchrun():
        with inside(join(backend=backend, ranks=ranks, timeout=timeout)) as world:
            return [fn(world, *args)]
    size = 1 if ranks is None else ranks
    if size < 1:
        raise UserError(f"launch with {size} ranks", fix="ranks=1")
    if backend == "threads":
        return run_threads(lambda group: _on_thread(fn, args, group, device), size, lockstep=lockstep)
    if backend == "nccl" and torch.cuda.device_count() < size:
        what = f"{size} ranks on nccl need as many GPUs, this machine has {torch.cuda.device_count()}"
        raise UserError(what, fix='backend="gloo"')
    with tempfile.TemporaryDirectory(prefix="minispeed-") as folder:
        first = Post(
            rank=0,
            size=size,
            backend=backend,
            timeout=timeout,
            folder=Path(folder),
            num_threads=_threads_per_rank(size),
        )
        return run_processes(fn, args, posts=[dataclasses.replace(first, rank=rank) for rank in range(size)])


def under_torchrun() -> bool:
    """Return whether torchrun, or a launcher that speaks as it does, has started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def restart_count() -> int:
    """Return how many times torchrun has started this process's ranks again, after one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join(*, backend: str, ranks: int | None = None, timeout: float = 600.0) -> World:
    """Return this process's world, meeting torchrun's other processes where that has not happened yet.

    "threads" takes the fastest backend that is there: nccl with a GPU, else gloo.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks not in (None, size) and rank == 0:
        print(
            f"warning: launch asks for {ranks} ranks, torchrun started {size}: running on {size}",
            file=sys.stderr,
        )
    if dist.is_initialized():
        return adopt(timeout=timeout)
    return meet(rank, size, backend=backend, rendezvous="start://", timeout=timeout)


def _by_start(url: str, **how: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """Meet as by "env://", but under this start's own name: torchrun's store outlives the ranks that it starts again.

    They would find each other's addresses of the time before: https://github.com/pytorch/pytorch/issues/135712. Several
    machines count their starts each for itself, and meet as torch has it.
    """
    alone = int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1
    for store, rank, size in by_torch("env://", **how):
        yield dist.PrefixStore(f"start {restart_count()}", store) if alone else store, rank, size


register_rendezvous_handler("start", _by_start)


def meet(rank: int, size: int, *, backend: str, rendezvous: str = "env://", timeout: float = 600.0) -> World:
    """Return the world of `size` processes that somebody else has started, of which this is number `rank`.

    backend     as for `join`
    rendezvous  where they meet, torch's `init_method`
    """
    on_gpu = torch.cuda.is_available() and backend != "gloo"
    device = _own_device(rank, on_gpu)
    group = connect("nccl" if on_gpu else "gloo", rendezvous, rank=rank, size=size, timeout=timeout)
    atexit.register(leave)
    return World(group, device)


def adopt(*, timeout: float = 600.0) -> World:
    """Return the world of a process group that the script has made itself.

    One that carries nothing between CPUs gets a second beside it that does.
    """
    carriers = dist.get_backend_config()
    group = dist.group.WORLD if "cpu:" in carriers else dist.new_group(backend="cpu:gloo,cuda:nccl")
    device = _own_device(dist.get_rank(), torch.cuda.is_available() and "nccl" in carriers)
    return World(TorchGroup(group, FlightRecorder(dist.get_rank()), timeout=timeout), device)


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """Return this rank's number among those of its machine: that of its GPU, where it has one."""
    world = current_world()
    if world.device.type == "cuda":
        return world.device.index or 0
    return int(os.environ.get("LOCAL_RANK", world.rank))


def check_alone() -> None:
    """Raise UserError if a launcher that says nothing of a rendezvous started this process as one of several."""
    for name, launcher in {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}.items():
        if int(os.environ.get(name, 1)) > 1 and not under_torchrun():
            what = f"{launcher} started {os.environ[name]} processes, and none is told where they meet"
            raise UserError(what, fix="torchrun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set for each")


def _own_device(rank: int, on_gpu: bool) -> torch.device:
    """Return the GPU that is this process's, and make it the current one; or the CPU."""
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
    torch.cuda.set_device(device)
    return device


def _on_thread(fn: Callable[..., T], args: tuple[Any, ...], group: Group, device: str) -> T:
    with inside(World(group, torch.device(device))) as world:
        return fn(world, *args)


def _threads_per_rank(size: int) -> int:
    """Return how many threads torch may use in each of `size` processes: the user's word, or a share."""
    return int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // size)))
