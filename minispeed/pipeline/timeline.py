"""Keep what happened when: the actions of all ranks with their times, whoever measured or computed them.

The bubble is the share of the ranks' time in which they did not compute: GPipe, Huang et al. 2019, section 2.3.
https://arxiv.org/abs/1811.06965
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeAlias

from minispeed.pipeline.actions import COMPUTE, LAST, Action

Time: TypeAlias = float | Fraction  # of any unit; int and Fraction stay exact


class Event(NamedTuple):
    """One action of one rank; a message starts when its rank is ready for it, and ends when it has met the other."""

    rank: int
    action: Action
    start: Time
    end: Time


@dataclass(frozen=True)
class Timeline:
    """The events of `ranks` ranks, those of each in the order of its program."""

    ranks: int
    events: list[Event]

    @property
    def length(self) -> Time:
        """The time from the first start to the last end."""
        return max(event.end for event in self.events) - min(event.start for event in self.events)

    @property
    def bubble(self) -> Time:
        """The share of all ranks' time in which they do not compute, 0 to 1; a Fraction where the times are exact."""
        return 1 - Fraction(_busy(self.events)) / (self.ranks * self.length)

    def busy(self, rank: int) -> Time:
        """Return how long a rank computes: without messages, reductions and waiting."""
        return _busy(self.of(rank))

    def peak_in_flight(self, rank: int) -> int:
        """Return the most pairs of stage and micro-batch held at once, from their F to the end of their B or BW."""
        held = peak = 0
        for event in self.of(rank):
            held += (event.action.kind == "F") - (event.action.kind in LAST)
            peak = max(peak, held)
        return peak

    def of(self, rank: int) -> list[Event]:
        """Return the events of one rank."""
        return [event for event in self.events if event.rank == rank]


def _busy(events: Sequence[Event]) -> Time:
    return sum(event.end - event.start for event in events if event.action.kind in COMPUTE)
