"""Count what a run says: a group that writes down every call before it passes it on.

Two things are of interest and both are exact. What is held: the bytes of the call's whole buffer. What is
sent: the bytes that leave this rank when the collective runs as the ring or tree of `rings.py`, which is the
least that any algorithm sends in all (for all-reduce, 2 n (N - 1) over all ranks), whatever backend carries
it.

Patarasu & Yuan 2009, Bandwidth optimal all-reduce algorithms, for the lower bounds.
Letters: N ranks of the group, n elements of the whole buffer.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from minispeed.collective.group import Group, Message, Op, Work
from minispeed.collective.rings import part_bounds, tree_children


class Event(NamedTuple):
    """One collective, or one message of an exchange, on one rank."""

    kind: str  # all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send, recv
    group: str  # the name given to the traced group: "dp"
    rank: int  # of the world
    peer: int | None  # of the world: the other end of a message, the root of a broadcast
    bytes: int  # of the whole buffer
    sent: int  # bytes that leave this rank
    start: float  # seconds, on a clock that all processes of a machine share
    end: float  # when `wait` returned


@dataclass
class Trace:
    """The events of one rank, or of several that are threads, in the order in which they ended.

    is_on  whether calls are written down
    """

    events: list[Event] = field(default_factory=list)
    is_on: bool = True

    def sent(self, kind: str | None = None, *, group: str | None = None) -> int:
        """Return the bytes sent, by calls of one kind or all, in one group or all."""
        return sum(e.sent for e in self.events if kind in (None, e.kind) and group in (None, e.group))

    def count(self, kind: str | None = None, *, group: str | None = None) -> int:
        """Return the number of events, likewise."""
        return sum(1 for e in self.events if kind in (None, e.kind) and group in (None, e.group))

    def clear(self) -> None:
        """Forget the events."""
        self.events.clear()


class Traced:
    """A group that records what is asked of the one it wraps; a call ends when its `wait` returns."""

    def __init__(self, group: Group, trace: Trace, *, name: str = "world") -> None:
        """Wrap `group`; `name` tells its events from those of other groups in the same trace."""
        self.rank, self.size, self.members = group.rank, group.size, group.members
        self.trace, self.name = trace, name
        self._group = group

    def all_reduce(self, x: Tensor, op: Op = "sum") -> Work:
        """Record and pass on; a ring sends the buffer less one part, twice."""
        parts = [(stop - start) * x.element_size() for start, stop in part_bounds(x.numel(), self.size)]
        sent = 2 * x.nbytes - parts[self.rank] - parts[(self.rank + 1) % self.size]
        return self._record("all_reduce", x.nbytes, sent, lambda: self._group.all_reduce(x, op))

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """Record and pass on; a ring sends N - 1 parts."""
        sent = x.nbytes * (self.size - 1)
        return self._record("all_gather", out.nbytes, sent, lambda: self._group.all_gather(out, x))

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        """Record and pass on; a ring sends N - 1 parts."""
        sent = out.nbytes * (self.size - 1)
        return self._record("reduce_scatter", x.nbytes, sent, lambda: self._group.reduce_scatter(out, x))

    def all_to_all(self, out: Tensor, x: Tensor) -> Work:
        """Record and pass on; every part but my own is sent."""
        sent = x.nbytes - x.nbytes // self.size
        return self._record("all_to_all", x.nbytes, sent, lambda: self._group.all_to_all(out, x))

    def broadcast(self, x: Tensor, root: int) -> Work:
        """Record and pass on; in a tree the buffer is sent once for each child."""
        sent = x.nbytes * len(tree_children(self.rank, root, self.size))
        return self._record("broadcast", x.nbytes, sent, lambda: self._group.broadcast(x, root), peer=root)

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Work:
        """Record every message and pass all on; one to myself is not sent anywhere."""
        begun = [self._begin("send", x.nbytes, x.nbytes * (peer != self.rank), peer) for x, peer in sends]
        begun += [self._begin("recv", x.nbytes, 0, peer) for x, peer in recvs]
        return _TracedWork(self._group.exchange(sends, recvs), begun if self.trace.is_on else [], self.trace.events)

    def subgroup(self, lines: Sequence[Sequence[int]]) -> "Traced":
        """Return the subgroup, traced under this group's name."""
        return Traced(self._group.subgroup(lines), self.trace, name=self.name)

    def _record(self, kind: str, held: int, sent: int, call: Callable[[], Work], *, peer: int | None = None) -> Work:
        begun = self._begin(kind, held, sent, peer)
        return _TracedWork(call(), [begun] if self.trace.is_on else [], self.trace.events)

    def _begin(self, kind: str, held: int, sent: int, peer: int | None) -> Event:
        rank, other = self.members[self.rank], None if peer is None else self.members[peer]
        return Event(kind, self.name, rank, other, held, sent, start=time.perf_counter(), end=math.nan)


@dataclass
class _TracedWork:
    """Work whose events are written down when it ends."""

    work: Work
    begun: list[Event]
    events: list[Event]

    def wait(self) -> None:
        self.work.wait()
        end = time.perf_counter()
        self.events.extend(event._replace(end=end) for event in self.begun)
        self.begun = []
