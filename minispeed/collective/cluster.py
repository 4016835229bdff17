"""Know of every rank that is a thread what it waits for: who meets whom, who left, whose turn it is.

Each rank waits in at most one call, for all of the ranks that the call awaits. So who waits for whom is a
graph, and a run is lost as soon as the graph has a circle, or an edge to a rank that has returned: no timeout
is needed to see it.

The graph is the wait-for graph of databases: Coffman, Elphick & Shoshani 1971, System deadlocks.
"""

import contextlib
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from minispeed.collective.group import CollectiveError

ALIKE = "the same collectives, in one order, with the same size and dtype, on every rank of the group"


@dataclass(eq=False)
class Call:
    """What one rank is doing: its part in a collective, its buffers, and whom it still waits for."""

    member: int
    text: str
    site: str
    x: Any = None
    out: Any = None
    awaited: list[int] = field(default_factory=list)  # numbers of the world; one for each message of an exchange

    def __str__(self) -> str:
        return f"rank {self.member} called {self.text} at {self.site}"


class Posted(NamedTuple):
    """One message that waits for its partner."""

    call: Call
    buffer: Tensor
    is_send: bool


class Room:
    """Where the ranks of one group meet."""

    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.arrived: dict[int, Call] = {}  # rank -> its part in the collective that is gathering
        self.posted: defaultdict[tuple[int, int], deque[Posted]] = defaultdict(deque)  # (from, to) -> unmatched


class Cluster:
    """What all ranks of one launch share: who waits, who left, who failed first, whose turn it is.

    Every field is read and written under `changed`; that lock is also held while a collective is performed.
    """

    def __init__(self, size: int, lockstep: bool) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.waiting: dict[int, Call] = {}
        self.left: set[int] = set()
        self.failure: BaseException | None = None
        self.failed: int | None = None
        self.turn = 0 if lockstep else None

    def wait_for_turn(self, rank: int) -> None:
        """In lockstep, hold until it is this rank's turn to begin; after a failure it never is."""
        with self.changed:
            self.changed.wait_for(lambda: self.failure or self._is_turn(rank))
            if not self._is_turn(rank):
                self.check_alive()

    def wait(self, call: Call) -> None:
        """Hold until everybody that the call awaits has come, and it is my turn again.

        Raises  CollectiveError, here and on every rank, if that cannot happen any more
        """
        self.waiting[call.member] = call
        self._check_hope(call)
        self._pass_turn(call.member)
        self.changed.notify_all()
        self.changed.wait_for(lambda: self.failure or (not call.awaited and self._is_turn(call.member)))
        del self.waiting[call.member]
        if call.awaited or not self._is_turn(call.member):
            self.check_alive()

    def check_alive(self) -> None:
        """Raise CollectiveError if the run has failed: no collective can complete any more."""
        if isinstance(self.failure, CollectiveError):
            raise CollectiveError(self.failure.what, fix=self.failure.fix)
        if self.failure is not None:
            who = "the run was interrupted" if self.failed is None else f"rank {self.failed} raised"
            raise CollectiveError(f"{who}: {self.failure!r}; this collective cannot complete")

    def fail(self, rank: int | None, error: BaseException) -> None:
        """Note the first error of the run, and free all ranks that wait."""
        with self.changed:
            if self.failure is None:
                self.failed, self.failure = rank, error
            self.changed.notify_all()

    def fail_for_all(self, what: str) -> NoReturn:
        """Fail because of all ranks' calls taken together: the same error everywhere."""
        self.fail(None, CollectiveError(what, fix=ALIKE))
        raise CollectiveError(what, fix=ALIKE)

    def leave(self, rank: int) -> None:
        """Note that a rank has returned: who waits for it waits in vain."""
        with self.changed:
            self.left.add(rank)
            if self.failure is None:
                with contextlib.suppress(CollectiveError):  # it is the others' to raise
                    for call in self.waiting.values():
                        self._check_hope(call)
            self._pass_turn(rank)
            self.changed.notify_all()

    def _check_hope(self, call: Call) -> None:
        """Fail if a rank that the call awaits, directly or through others, has left or awaits the caller."""
        paths = {call.member: [call]}
        reached = [call]
        for current in reached:
            path = paths[current.member]
            for member in current.awaited:
                if member in self.left:
                    self.fail_for_all(f"{current}, but rank {member} has returned")
                if member == call.member:
                    self.fail_for_all("ranks wait for each other: " + ", ".join(map(str, path)))
                if member in self.waiting and member not in paths:
                    paths[member] = [*path, self.waiting[member]]
                    reached.append(self.waiting[member])

    def _is_turn(self, rank: int) -> bool:
        return self.turn is None or self.turn == rank

    def _pass_turn(self, rank: int) -> None:
        """In lockstep, give the turn to the next rank, in a circle, that can go on."""
        if self.turn is not None:
            circle = [(rank + step) % self.size for step in range(1, self.size + 1)]
            able = [r for r in circle if r not in self.left and not (r in self.waiting and self.waiting[r].awaited)]
            self.turn = able[0] if able else self.turn
