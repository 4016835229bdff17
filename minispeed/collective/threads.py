"""Run the ranks as threads of one process: a whole cluster that a debugger can stop.

A collective is a meeting: each rank leaves its buffers and waits, and the last to come does the work for all,
summing in rank order, so that two runs give the same bits. Because every rank's wait is known here, so is
every mistake, at the moment it is made: ranks that meet for different things, a rank that left, a circle of
ranks that wait for each other. Each becomes an error on every rank that names the lines of code.

In lockstep one rank runs at a time, and the turn passes, in rank order, only inside a collective.

MPI 4.0, chapter 3.5 on messages that need buffering, chapter 6 on collectives.
https://www.mpi-forum.org/docs/ Letters: N ranks of the group, n elements.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from minispeed.collective.cluster import Call, Cluster, Posted, Room
from minispeed.collective.group import (
    REDUCE,
    Done,
    Message,
    Op,
    Work,
    call_site,
    check_buffers,
    check_lines,
    check_messages,
    describe,
    describe_messages,
)

T = TypeVar("T")


def run_threads(fn: Callable[["ThreadGroup"], T], size: int, *, lockstep: bool = False) -> list[T]:
    """Run `fn(group)` on `size` threads and return what the ranks returned, in rank order.

    Raises  the error of the first rank that raised (the others are freed from their collectives);
            CollectiveError, on every rank too, where ranks disagree about a collective or wait for each other
    """
    cluster = Cluster(size, lockstep)
    room = Room(tuple(range(size)))
    results: dict[int, T] = {}

    def live(rank: int) -> None:
        try:
            cluster.wait_for_turn(rank)
            results[rank] = fn(ThreadGroup(cluster, room, rank))
        except BaseException as error:  # SystemExit and a debugger's quit also end the run
            cluster.fail(rank, error)
        finally:
            cluster.leave(rank)

    threads = [threading.Thread(target=live, args=(r,), name=f"rank {r}", daemon=True) for r in range(size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: free the ranks that wait, then stop
        cluster.fail(None, error)
        raise
    if cluster.failure is not None:
        if cluster.failed is not None and sys.version_info >= (3, 11):
            cluster.failure.add_note(f"raised on rank {cluster.failed} of {size}")
        raise cluster.failure
    return [results[rank] for rank in range(size)]


class ThreadGroup:
    """The group of ranks that are threads; made by `launch`. Every call is complete when it returns."""

    def __init__(self, cluster: Cluster, room: Room, member: int) -> None:
        """Join `room` as the world's rank `member`."""
        self.members = room.members
        self.rank, self.size = room.members.index(member), len(room.members)
        self._cluster, self._room, self._member = cluster, room, member

    def all_reduce(self, x: Tensor, op: Op = "sum") -> Work:
        """Replace `x` (n,) by the sum (max, min) of all ranks' `x`, added in rank order."""
        check_buffers("all_reduce", self, x, op=op)
        return self._meet(f"all_reduce({op}) of {describe(x)}", x, x, partial(_all_reduce, op))

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """Write every rank's `x` (n,) into `out` (N n,), in rank order. `x` may lie inside `out`."""
        check_buffers("all_gather", self, x, out)
        return self._meet(f"all_gather of {describe(x)}", x, out, _all_gather)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        """Sum every rank's `x` (N n,) in rank order and write part `rank` of the sum into `out` (n,)."""
        check_buffers("reduce_scatter", self, x, out)
        return self._meet(f"reduce_scatter of {describe(x)}", x, out, _reduce_scatter)

    def all_to_all(self, out: Tensor, x: Tensor) -> Work:
        """Send part r of `x` (N n,) to rank r; `out` (N n,) holds what came, in rank order."""
        check_buffers("all_to_all", self, x, out)
        return self._meet(f"all_to_all of {describe(x)}", x, out, _all_to_all)

    def broadcast(self, x: Tensor, root: int) -> Work:
        """Replace `x` (n,) by that of rank `root`."""
        check_buffers("broadcast", self, x, root=root)
        return self._meet(f"broadcast from {root} of {describe(x)}", x, x, partial(_broadcast, root))

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Work:
        """Send and receive point to point, all in flight together; return when every message met its partner.

        A buffer must not be sent and received into at once: the other side may come first.
        """
        check_messages(self, sends, recvs)
        call = Call(self._member, describe_messages(sends, recvs), call_site())
        with self._cluster.changed, torch.no_grad():
            self._cluster.check_alive()
            for buffer, peer in sends:
                self._post(call, Posted(call, buffer, True), (self.rank, peer), self.members[peer])
            for buffer, peer in recvs:
                self._post(call, Posted(call, buffer, False), (peer, self.rank), self.members[peer])
            self._cluster.wait(call)
        return Done()

    def subgroup(self, lines: Sequence[Sequence[int]]) -> "ThreadGroup":
        """Return the group of the line that holds me; the ranks meet to make it."""
        check_lines(self, lines)
        agreed = [list(line) for line in lines]
        mine: list[Room] = []
        self._meet(f"subgroup({agreed})", None, mine, partial(_divide, agreed))
        return ThreadGroup(self._cluster, mine[0], self._member)

    def _meet(self, text: str, x: Any, out: Any, perform: Callable[[list[Call]], None]) -> Work:
        """Bring my buffers to the room; the last to come performs the collective for all."""
        call, arrived = Call(self._member, text, call_site(), x=x, out=out), self._room.arrived
        with self._cluster.changed, torch.no_grad():
            self._cluster.check_alive()
            for other in arrived.values():
                if other.text != call.text:
                    self._cluster.fail_for_all(f"{other}, but {call}")
                other.awaited.remove(self._member)
            arrived[self.rank] = call
            call.awaited = [member for r, member in enumerate(self.members) if r not in arrived]
            if not call.awaited:
                calls = [arrived[rank] for rank in range(self.size)]
                arrived.clear()
                perform(calls)
            self._cluster.wait(call)
        return Done()

    def _post(self, call: Call, mine: Posted, way: tuple[int, int], partner: int) -> None:
        """Match one message with the oldest on its way that waits for it, or leave it there to be matched."""
        posted = self._room.posted[way]
        if not posted or posted[0].is_send == mine.is_send:
            posted.append(mine)
            call.awaited.append(partner)
            return
        other = posted.popleft()
        other.call.awaited.remove(call.member)
        if describe(other.buffer) != describe(mine.buffer):
            self._cluster.fail_for_all(f"{other.call}, but {call}")
        source, target = (mine, other) if mine.is_send else (other, mine)
        target.buffer.view(-1).copy_(source.buffer.view(-1))


def _all_reduce(op: Op, calls: list[Call]) -> None:
    total = calls[0].x.clone()
    for call in calls[1:]:
        REDUCE[op](total, call.x.view_as(total), out=total)
    for call in calls:
        call.out.copy_(total.view_as(call.out))


def _all_gather(calls: list[Call]) -> None:
    whole = torch.cat([call.x.view(-1) for call in calls])
    for call in calls:
        call.out.view(-1).copy_(whole)


def _reduce_scatter(calls: list[Call]) -> None:
    total = calls[0].x.view(-1).clone()
    for call in calls[1:]:
        total += call.x.view(-1)
    for call, part in zip(calls, total.view(len(calls), calls[0].out.numel()), strict=True):
        call.out.view(-1).copy_(part)


def _all_to_all(calls: list[Call]) -> None:
    size = len(calls)
    parts = [call.x.view(size, call.x.numel() // size).clone() for call in calls]  # an `out` may lie over an `x`
    for rank, call in enumerate(calls):
        call.out.view(-1).copy_(torch.cat([part[rank] for part in parts]))


def _broadcast(root: int, calls: list[Call]) -> None:
    for call in calls:
        call.x.copy_(calls[root].x.view_as(call.x))


def _divide(lines: list[list[int]], calls: list[Call]) -> None:
    for line in lines:
        room = Room(tuple(calls[rank].member for rank in line))
        for rank in line:
            calls[rank].out.append(room)
