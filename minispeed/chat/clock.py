"""Decide how long a run is, in steps and in seconds, and what is due after each step.

A run is given a number of steps, or a time. With a time the number is open at first; once the learning rate has risen
it is fixed to what fills the time, and from then on the run is the same as one that was given this number.

    open      each update's seconds are kept
    measured  after `patience` updates, or 3 that took more than 15 % of the time: the number can be fixed
    fixed     to the updates that still fit at the median pace of the later half: the first ones, of a machine that is
              still warming up, count only as time that is gone
    over      fixed, and 110 % of the time is gone: the machine has become slower than it was

Only updates count as time: evaluating, answering and saving come on top.
"""

import math
import statistics
from dataclasses import dataclass, replace

LEAST_MEASURED = 5  # updates
FIRST_SAMPLE = 25  # steps; then at every doubling


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The length of a run and how far it has come: a state; `after` gives the next one.

    total     steps in all, 0 while the number is open
    budget    seconds that the updates may take together, infinite where a number of steps was given
    patience  updates after which the pace is known
    spent     seconds that the updates have taken so far
    pace      seconds of each update that was made while the number was open
    """

    total: int = 0
    budget: float = math.inf
    patience: int = LEAST_MEASURED
    spent: float = 0.0
    pace: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert self.total or math.isfinite(self.budget), "a run without an end"

    @classmethod
    def of(cls, total: int, minutes: float | None, *, warmup: int) -> "Clock":
        """Return the clock of a run of `total` steps, or, if that is 0, of so many minutes.

        warmup  steps over which the learning rate rises
        """
        if total:
            return cls(total=total)
        budget = math.inf if minutes is None else 60 * minutes
        return cls(budget=budget, patience=max(LEAST_MEASURED, warmup))

    def after(self, seconds: float) -> "Clock":
        """Return the state after one more update."""
        return replace(self, spent=self.spent + seconds, pace=(*self.pace, seconds) if self.is_open else self.pace)

    def fixed(self, total: int) -> "Clock":
        """Return the state once the number of steps is known."""
        return replace(self, total=total)

    @property
    def is_open(self) -> bool:
        """Whether the number of steps is not known yet."""
        return not self.total

    @property
    def is_measured(self) -> bool:
        """Whether the pace is known, or updates are so slow that the time would be gone before it is."""
        is_slow = len(self.pace) >= 3 and self.spent > 0.15 * self.budget
        return is_slow or len(self.pace) >= self.patience

    @property
    def steps_left(self) -> int:
        """How many updates fit what is left of the time, at the pace measured; at least 1."""
        later_half = self.pace[len(self.pace) // 2 :]
        return max(1, round((self.budget - self.spent) / statistics.median(later_half)))

    @property
    def is_over(self) -> bool:
        """Whether a tenth more than the time is gone, and the number of steps turns out to have been too high."""
        return not self.is_open and self.spent > 1.1 * self.budget

    def is_due(self, step: int, every: int | None) -> bool:
        """Whether what happens every so many steps happens after this one; after the last step it never does.

        every  steps; None stands for about eight times in all
        """
        return step < self.total and step % (every or max(1, self.total // 8)) == 0


def sample_is_due(step: int) -> bool:
    """Whether held-out prompts are answered after this step: early on, and at every doubling."""
    doublings, rest = divmod(step, FIRST_SAMPLE)
    return rest == 0 and doublings.bit_count() == 1
