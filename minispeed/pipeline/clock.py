"""Tell the time in a pipeline that runs: by the wall, or by a clock that only counts what actions are said to cost.

The second makes a run comparable with a simulation, to the last digit. Each rank's clock goes on by the cost of what
it computes; the two ends of a message tell each other when they came to it, and it begins at the later of the two
times: clocks that travel with the messages, as Lamport's.

Lamport 1978, Time, clocks, and the ordering of events in a distributed system.
"""

import struct
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol, get_args

import torch
from torch import Tensor

from minispeed.collective.group import Group
from minispeed.collective.numbers import everyones
from minispeed.pipeline.actions import Action, Kind, partner
from minispeed.pipeline.timeline import Event, Time, Timeline

KINDS: tuple[Kind, ...] = get_args(Kind)


class Clock(Protocol):
    """The clock of one rank."""

    def now(self) -> Time:
        """Return the time."""

    def compute(self, action: Action) -> None:
        """Notice that the rank has run an action that is no message."""

    def stamp(self, start: Time, device: torch.device) -> list[Tensor]:
        """Return what goes with a message that the rank came to at `start`, to whom it goes to and comes from."""

    def meet(self, message: Action, start: Time, stamp: list[Tensor]) -> Time:
        """Return when a message ended, given the stamp of its other end."""


class WallClock:
    """Seconds of this machine; on a GPU, whose work is only queued, of whoever queues it."""

    def now(self) -> Time:
        """Return the seconds since some moment that all processes of the machine share."""
        return time.perf_counter()

    def compute(self, action: Action) -> None:
        """Do nothing: the time has passed."""

    def stamp(self, start: Time, device: torch.device) -> list[Tensor]:
        """Return nothing."""
        return []

    def meet(self, message: Action, start: Time, stamp: list[Tensor]) -> Time:
        """Return the time."""
        return self.now()


class LogicalClock:
    """A clock from 0 on that goes by what `cost` says, however long things took; of a message, its sender's counts.

    Costs are all floats, or all int and Fraction, which stay exact (up to 63 bits above and below the line).
    """

    def __init__(self, cost: Callable[[Action], Time]) -> None:
        self.cost = cost
        self.time: Time = 0

    def now(self) -> Time:
        """Return the sum of what the rank has run and waited for."""
        return self.time

    def compute(self, action: Action) -> None:
        """Go on by the cost of the action."""
        self.time += self.cost(action)

    def stamp(self, start: Time, device: torch.device) -> list[Tensor]:
        """Return `start`, in 16 bytes."""
        return [torch.tensor(packed(start), device=device)]

    def meet(self, message: Action, start: Time, stamp: list[Tensor]) -> Time:
        """Begin at the later of two times, end after the cost, and set the clock to that if it is not later already."""
        sent = message if message.kind.startswith("SEND") else partner(message)
        end = max(start, unpacked(stamp[0].tolist())) + self.cost(sent)
        self.time = max(self.time, end)
        return end


def gather(timeline: Timeline, group: Group) -> Timeline:
    """Return on every rank the events of all, each rank having brought its own.

    Sends  56 bytes for each event of the rank that has most
    """
    rows = [
        [KINDS.index(action.kind), action.stage, action.micro, *packed(start), *packed(end)]
        for _, action, start, end in timeline.of(group.rank)
    ]
    counts = everyones(group, [len(rows)])[:, 0].tolist()
    filled = rows + [[0] * 7] * (max(counts) - len(rows))
    by_rank = everyones(group, [number for row in filled for number in row]).view(group.size, -1, 7).tolist()
    events = [_event(rank, row) for rank, count in enumerate(counts) for row in by_rank[rank][:count]]
    return Timeline(group.size, events)


def packed(moment: Time) -> tuple[int, int]:
    """Return a time as two numbers of 64 bits: a fraction, or the bits of a float over 0."""
    if isinstance(moment, float):
        return struct.unpack("q", struct.pack("d", moment))[0], 0
    return moment.numerator, moment.denominator


def unpacked(pair: Sequence[int]) -> Time:
    """Return the time that was packed."""
    above, below = pair
    return Fraction(above, below) if below else struct.unpack("d", struct.pack("q", above))[0]


def _event(rank: int, row: Sequence[int]) -> Event:
    kind, stage, micro, *times = row
    return Event(rank, Action(KINDS[kind], stage, micro), unpacked(times[:2]), unpacked(times[2:]))
