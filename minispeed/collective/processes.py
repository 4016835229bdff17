"""Run the ranks as processes: torch.distributed over gloo (CPU) or NCCL (GPU).

Every call is noted before it starts, in memory and, under our launcher, in a file that outlives the process;
so when a rank hangs or is killed, the others say what they waited for, and the launcher what the missing one
did last.

gloo's own reduce-scatter and all-gather are slower than rings of its messages: on gloo those two run on our
rings, in a thread of their own, from the size on where that is faster. On NCCL all collectives are NCCL's.

Letters: N ranks of the group, n elements.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minispeed.collective import rings
from minispeed.collective.flight import FlightRecorder, Operation
from minispeed.collective.group import (
    Group,
    Message,
    Op,
    SoloGroup,
    Work,
    check_buffers,
    check_lines,
    check_messages,
    copy_to_self,
    describe,
    describe_messages,
)

# torch 2.13 renamed these two; 2.11 knows only the older names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_BOOL_OPS = {"sum": "max", "max": "max", "min": "min"}  # gloo would add the bytes of bools
# From this size of the whole buffer on, rings were faster than gloo's own (2 and 4 ranks, one machine).
RING_BYTES = {"reduce_scatter": 1 << 20, "all_gather": 1 << 22}


def connect(
    backend: str, rendezvous: str, *, rank: int, size: int, timeout: float, record: Path | None = None
) -> "TorchGroup":
    """Meet the other processes and return the group of all.

    rendezvous  where they meet, torch's `init_method`: "file:///path" or "env://"
    timeout     seconds that a collective may wait for the other ranks
    record      a file for this rank's last operations, read by the launcher
    """
    patience = timedelta(seconds=timeout)
    # counts and flags stay on the CPU, where reading them waits for no stream
    both = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    dist.init_process_group(both, init_method=rendezvous, rank=rank, world_size=size, timeout=patience)
    return TorchGroup(dist.group.WORLD, FlightRecorder(rank, record), timeout=timeout)


class TorchGroup:
    """The group of ranks that are processes; made by `launch`. Calls run on while the caller computes."""

    def __init__(self, process_group: Any, recorder: FlightRecorder, *, timeout: float) -> None:
        """Speak to the ranks of one of torch's process groups; `timeout` (seconds) is for its subgroups."""
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.members = tuple(dist.get_process_group_ranks(process_group))
        self._group, self._recorder, self._timeout = process_group, recorder, timeout
        self._lane, self._ring_lane = (_Lane(process_group, self.members, tag) for tag in (0, 1))
        self._rings = ThreadPoolExecutor(1, "rings") if self.size > 1 else None

    def all_reduce(self, x: Tensor, op: Op = "sum") -> Work:
        """Replace `x` (n,) by the sum (max, min) of all ranks' `x`."""
        check_buffers("all_reduce", self, x, op=op)
        numbers, number_op = (x.view(torch.uint8), _BOOL_OPS[op]) if x.dtype == torch.bool else (x, op)
        text = f"all_reduce({op}) of {describe(x)}"
        return self._begin(text, dist.all_reduce, _flat(numbers), _OPS[number_op])

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """Write every rank's `x` (n,) into `out` (N n,), in rank order; `x` may lie at its place in `out`."""
        check_buffers("all_gather", self, x, out)
        text = f"all_gather of {describe(x)}"
        if self._rings and x.device.type == "cpu" and out.nbytes >= RING_BYTES["all_gather"]:
            return self._begin_ring(text, rings.all_gather, _flat(out), _flat(x))
        return self._begin(text, _all_gather, _flat(out), _flat(x))

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        """Sum every rank's `x` (N n,) and write part `rank` of the sum into `out` (n,)."""
        check_buffers("reduce_scatter", self, x, out)
        text = f"reduce_scatter of {describe(x)}"
        is_long = x.nbytes >= RING_BYTES["reduce_scatter"] or x.dtype == torch.bool
        if self._rings and x.device.type == "cpu" and is_long:
            return self._begin_ring(text, rings.reduce_scatter, _flat(out), _flat(x))
        return self._begin(text, _reduce_scatter, _flat(out), _flat(x))

    def all_to_all(self, out: Tensor, x: Tensor) -> Work:
        """Send part r of `x` (N n,) to rank r; `out` (N n,) holds what came, in rank order."""
        check_buffers("all_to_all", self, x, out)
        return self._begin(f"all_to_all of {describe(x)}", dist.all_to_all_single, _flat(out), _flat(x))

    def broadcast(self, x: Tensor, root: int) -> Work:
        """Replace `x` (n,) by that of rank `root`."""
        check_buffers("broadcast", self, x, root=root)
        text = f"broadcast from {root} of {describe(x)}"
        return self._begin(text, dist.broadcast, _flat(x), self.members[root])

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Work:
        """Send and receive point to point, all in flight together."""
        check_messages(self, sends, recvs)
        return self._record(describe_messages(sends, recvs), lambda: [self._lane.exchange(sends, recvs)])

    def subgroup(self, lines: Sequence[Sequence[int]]) -> Group:
        """Return the group of the line that holds me; only its own ranks need to call, in one order.

        Where all lines are of one rank, or there is one line, no new connections are made. Else every rank makes one
        group: torch numbers them by how many the process has, and the members of a line must count alike.
        """
        members = [self.members[rank] for rank in check_lines(self, lines)]
        if len(lines) == self.size:
            return SoloGroup(members[0])
        if len(lines) == 1:
            return self
        timeout = timedelta(seconds=self._timeout)
        group = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
        return TorchGroup(group, self._recorder, timeout=self._timeout)

    def _begin(self, text: str, function: Callable[..., Any], *args: Any) -> Work:
        """Start one of torch's collectives."""
        return self._record(text, lambda: [function(*args, group=self._group, async_op=True)])

    def _begin_ring(self, text: str, function: Callable[..., None], out: Tensor, x: Tensor) -> Work:
        """Start one of our rings; they run one after another, in call order, as on every rank."""
        assert self._rings is not None
        rings_thread = self._rings
        return self._record(text, lambda: [_Future(rings_thread.submit(function, self._ring_lane, out, x))])

    def _record(self, text: str, start: Callable[[], Sequence[Work]]) -> Work:
        operation = self._recorder.begin(text)
        try:
            return _Recorded(start(), operation, self._recorder)
        except RuntimeError as error:  # a lost connection shows itself here or in wait
            raise self._recorder.give_up(operation, error) from error


class _Lane:
    """Messages with a tag of their own: those of the rings pass beside those of the user."""

    def __init__(self, process_group: Any, members: tuple[int, ...], tag: int) -> None:
        self.rank, self.size = dist.get_rank(process_group), len(members)
        self._group, self._members, self._tag = process_group, members, tag

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Work:
        """Start all messages as one batch, as NCCL needs it; those to myself are copied."""
        copy_to_self([m for m in sends if m[1] == self.rank], [m for m in recvs if m[1] == self.rank])
        batch = [
            dist.P2POp(way, buffer.detach(), self._members[peer], self._group, self._tag)
            for way, messages in ((dist.irecv, recvs), (dist.isend, sends))
            for buffer, peer in messages
            if peer != self.rank
        ]
        return _All(dist.batch_isend_irecv(batch) if batch else [])


@dataclass(frozen=True)
class _All:
    """Several works as one."""

    works: Sequence[Any]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


@dataclass(frozen=True)
class _Future:
    """Work in another thread."""

    future: Future[None]

    def wait(self) -> None:
        self.future.result()


@dataclass(frozen=True)
class _Recorded:
    """Work whose states are noted."""

    works: Sequence[Work]
    operation: Operation
    recorder: FlightRecorder

    def wait(self) -> None:
        if self.operation.state == "done":
            return
        self.recorder.become(self.operation, "waiting")
        try:
            _All(self.works).wait()
        except RuntimeError as error:
            raise self.recorder.give_up(self.operation, error) from error
        self.recorder.become(self.operation, "done")


def _flat(x: Tensor) -> Tensor:
    return x.detach().view(-1)
