"""Score every candidate and find the best that fits: of all, and of those with each value of each choice.

Time comes first: of the settings that a layout leaves open, a part of a step depends on two or three, so the times of
all of a layout's candidates are sums of a few columns, a `Table`. Then candidates are looked at from the fastest on,
and the memory of one is computed only where it could be the best of something: of its mesh and stage, or of a value.
More rows in a micro-batch never take less memory, as long as there are several micro-batches: so where the smallest of
a stage and offload do not fit, the others are not looked at.

`score` scores one candidate by itself. The tests hold the search equal to looking at each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minispeed.axes import Layout
from minispeed.ledger.job import Job
from minispeed.ledger.memory import Memory, peak
from minispeed.ledger.sharded import Sharded
from minispeed.plan.estimate import Estimate, Estimator
from minispeed.plan.request import Request
from minispeed.plan.space import Refusal, Settings, is_able, job_of, layouts, settings
from minispeed.plan.step import step

Value = tuple[str, Any]  # a choice, and what it was
RANKED = 20  # meshes and ZeRO stages of which the best is kept, and simulated


class Scored(NamedTuple):
    """A candidate, what the rank with most holds, and the time of its step."""

    job: Job
    memory: Memory
    step: Estimate

    @property
    def tokens_per_second(self) -> float:
        """What the run as a whole reads."""
        return self.job.rows * self.job.tokens / self.step.total


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    ranked    of the twenty fastest pairs of mesh and ZeRO stage the fastest candidate that fits; by simulated time
    best      likewise of each value of each choice
    least     of the values of which no candidate fits, the one that needs least memory
    refusals  lengths of axes that no layout can have
    count     of candidates, all scored
    """

    request: Request
    ranked: list[Scored]
    best: Mapping[Value, Scored]
    least: Mapping[Value, Scored]
    refusals: list[Refusal]
    count: int


class _Candidate(NamedTuple):
    seconds: float
    table: "Table"
    place: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Table:
    """The times of all candidates of a layout, seconds, by zero, offload, recompute and micro_batch.

    Infinite where a stage cannot offload so much.
    """

    request: Request
    layout: Layout
    settings: Settings
    seconds: NDArray[np.float64]

    def job(self, place: tuple[int, ...]) -> Job:
        """Return the candidate at a place."""
        chosen: dict[str, Any] = {name: of[at] for name, of, at in zip(Settings._fields, self.settings, place)}
        return job_of(self.request, self.layout, **chosen)

    def values(self, place: tuple[int, ...]) -> list[Value]:
        """Return every choice of the candidate at a place."""
        return self.of_layout + [(name, of[at]) for name, of, at in zip(Settings._fields, self.settings, place)]

    @cached_property
    def of_layout(self) -> list[Value]:
        """The choices that all candidates share."""
        return _of_layout(self.layout, self.layout.mesh(self.request.devices).dp)


def score(request: Request, job: Job) -> Scored:
    """Return what a candidate holds and takes."""
    return Scored(job, peak(job), Estimator(request).of(job))


def least_held(job: Job) -> int:
    """Return bytes that some rank surely holds, sooner known than its peak: parameters and optimizer states."""
    held = [Sharded.of(job, rank).states[0] for rank in {0, job.layout.pp - 1}]
    return max(one.parameters + one.optimizer for one in held)


def simulated(request: Request, one: Scored) -> Scored:
    """Return a candidate with the time that its schedule takes on virtual ranks."""
    return one._replace(step=Estimate(**step(one.job, request.profile).breakdown))


def fits(request: Request, memory: Memory, job: Job) -> bool:
    """Whether the devices have the memory, and their machines that for what is offloaded."""
    together = memory.host * min(request.devices, request.profile.per_machine)
    return memory.total <= request.memory and together <= request.profile.host_memory


def search(request: Request, *, ranked: int = RANKED, of_values: bool = True) -> Found:
    """Score every candidate, and find the best.

    ranked     of how many pairs of mesh and stage
    of_values  also of each value of each choice; without it, `best` and `least` are empty
    """
    able, refusals = layouts(request)
    open_ones = [(layout, settings(request, layout)) for layout in able]
    estimator = Estimator(request)
    tables = [tabulate(request, layout, of, estimator) for layout, of in open_ones if all(of)]
    looking = _Looking(request, estimator, ranked, of_values)
    for candidate in _fastest_first(tables):
        looking.at(candidate)
    fastest = sorted((simulated(request, one) for one in looking.groups.values()), key=lambda one: one.step.total)
    count = sum(int(np.isfinite(table.seconds).sum()) for table in tables)
    return Found(request, fastest, looking.best, looking.least, refusals, count)


def tabulate(request: Request, layout: Layout, of: Settings, estimator: Estimator) -> Table:
    """Time all candidates of a layout."""

    able = np.array([[is_able(zero, offload) for offload in of.offload] for zero in of.zero])
    times = np.where(able[:, :, None, None], estimator.totals(layout, of), np.inf)
    return Table(request, layout, of, times)


def _fastest_first(tables: list[Table]) -> Iterator[_Candidate]:
    """Yield all candidates, the fastest first; of equals those that come first in their tables."""
    times = np.concatenate([table.seconds.ravel() for table in tables]) if tables else np.zeros(0)
    ends = np.cumsum([table.seconds.size for table in tables])
    order = np.argsort(times, kind="stable")
    order = order[np.isfinite(times[order])]
    owners = np.searchsorted(ends, order, side="right")
    for index, owner in zip(order.tolist(), owners.tolist()):
        table = tables[owner]
        flat = index - (int(ends[owner]) - table.seconds.size)
        place = np.unravel_index(flat, table.seconds.shape)
        yield _Candidate(float(times[index]), table, tuple(map(int, place)))  # type: ignore[arg-type]


class _Looking:
    """What is known so far: the best of each group and value, and what is known not to fit."""

    def __init__(self, request: Request, estimator: Estimator, ranked: int, of_values: bool) -> None:
        self.request, self.estimator = request, estimator
        self.ranked, self.of_values = ranked, of_values
        self.groups: dict[tuple[Any, ...], Scored] = {}
        self.best: dict[Value, Scored] = {}
        self.least: dict[Value, Scored] = {}
        self._too_large: set[tuple[Any, ...]] = set()
        self._able: dict[tuple[int, int, int], bool] = {}

    def at(self, candidate: _Candidate) -> None:
        """Look at the next candidate, if it could be the best of something."""
        _, table, place = candidate
        values = table.values(place)
        group = tuple(value for name, value in values if name in ("dp", "pp", "sp", "tp", "zero"))
        unknown = [value for value in values if value not in self.best] if self.of_values else []
        is_known = group in self.groups or len(self.groups) == self.ranked
        if (is_known and not unknown) or not self._can_fit(table, place):
            return
        found = self._score(table.job(place))
        if not fits(self.request, found.memory, found.job):
            self._too_large.add((id(table), *place))
            return
        if not is_known:
            self.groups[group] = found
        for value in unknown:
            self.best[value] = found
            self.least.pop(value, None)

    def _score(self, job: Job) -> Scored:
        return Scored(job, peak(job), self.estimator.of(job))

    def _can_fit(self, table: Table, place: tuple[int, int, int, int]) -> bool:
        """Whether it is not known already that a candidate needs too much."""
        z, o, r, b = place
        adds_up = b < len(table.settings.micro_batch) - 1  # gradients of one micro-batch are kept in fewer bytes
        if adds_up and any((id(table), z, o, r, fewer) in self._too_large for fewer in range(b)):
            return False
        slab = (id(table), z, o)
        if slab not in self._able:
            last = len(table.settings.micro_batch) - 1
            smallest = [(z, o, r, b) for r in reversed(range(len(table.settings.recompute))) for b in {0, last}]
            self._able[slab] = any(self._fits(table, one) for one in smallest)
        return self._able[slab]

    def _fits(self, table: Table, place: tuple[int, int, int, int]) -> bool:
        """Look at a candidate that needs little; keep it where its values have none that fits."""
        job = table.job(place)
        open_ones = [value for value in table.values(place) if value not in self.best] if self.of_values else []
        most = max((self.least[value].memory.total for value in open_ones if value in self.least), default=0)
        is_first = any(value not in self.least for value in open_ones)
        held = least_held(job)
        if held > self.request.memory and held >= most and not is_first:
            return False
        memory = peak(job)
        if fits(self.request, memory, job):
            return True
        for value in open_ones:
            if value not in self.least or memory.total < self.least[value].memory.total:
                self.least[value] = self._score(job)
        return False


def _of_layout(layout: Layout, dp: int) -> list[Value]:
    """Return the choices of a layout; of how its axes cut, where they have several ranks."""
    found: list[Value] = [("dp", dp), ("pp", layout.pp), ("sp", layout.sp), ("tp", layout.tp)]
    found += [("schedule", layout.schedule), ("virtual", layout.virtual)] if layout.pp > 1 else []
    found += [("sequence", layout.sequence)] if layout.sp > 1 else []
    return found + ([("tokens", layout.tokens)] if layout.tp > 1 else [])
