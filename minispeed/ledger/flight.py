"""Say which micro-batches a rank of a pipeline has in flight when, from the very programs that it runs.

A pair of stage and micro-batch is in flight from its forward to the end of its backward; where the backward is split,
its second half keeps part of it. Of all moments only those matter at which no other of their kind has as much of
everything.

Letters: p ranks, m micro-batches, v stages on each rank.
"""

from functools import lru_cache
from typing import NamedTuple

from minispeed.pipeline.actions import LAST, Program
from minispeed.pipeline.schedule import SCHEDULES

CAP = 4  # times p v micro-batches: with more, a schedule that begins backwards early repeats what it did before


class Moment(NamedTuple):
    """An action that begins.

    kind      "F", "B", "BI" or "BW"
    chunk     of the rank's stages, which
    whole     micro-batches in flight of each of them, this one too
    halves    of each of them, those that wait for their second half
    is_last   whether it is the stage's last micro-batch
    reduced   of each of the rank's stages, whether a gradient of it has been reduced
    finished  of each of them, whether the backward of its last micro-batch is over
    """

    kind: str
    chunk: int
    whole: tuple[int, ...]
    halves: tuple[int, ...]
    is_last: bool
    reduced: tuple[bool, ...]
    finished: tuple[bool, ...]


@lru_cache(maxsize=4096)
def moments(schedule: str, ranks: int, micros: int, virtual: int, rank: int) -> tuple[Moment, ...]:
    """Return the moments of a rank's program at which it may hold most."""
    program = _programs(schedule, ranks, _few(schedule, ranks, micros, virtual), virtual)[rank]
    last = 1 + max(action.micro for action in program)
    whole, halves = [0] * virtual, [0] * virtual
    found: list[Moment] = []
    reduced = [False] * virtual
    finished = [False] * virtual
    for kind, stage, micro in program:
        chunk = stage // ranks
        whole[chunk] += kind == "F"
        state = (tuple(so_far) for so_far in (reduced, finished))
        found.append(Moment(kind, chunk, tuple(whole), tuple(halves), micro == last - 1, *state))
        reduced[chunk] |= kind in LAST
        whole[chunk] -= kind in ("B", "BI")
        finished[chunk] |= kind in LAST and micro == last - 1
        halves[chunk] += (kind == "BI") - (kind == "BW")
    return _most(found)


def _few(schedule: str, ranks: int, micros: int, virtual: int) -> int:
    """Return a number of micro-batches with the same moments."""
    return micros if schedule == "gpipe" else min(micros, CAP * ranks * virtual)


@lru_cache(maxsize=256)
def _programs(schedule: str, ranks: int, micros: int, virtual: int) -> list[Program]:
    return SCHEDULES[schedule](ranks, micros, virtual)


def _most(found: list[Moment]) -> tuple[Moment, ...]:
    """Return the moments that no other of their kind exceeds."""
    unique = list(dict.fromkeys(found))
    return tuple(one for one in unique if not any(_exceeds(other, one) for other in unique if other is not one))


def _exceeds(one: Moment, other: Moment) -> bool:
    same = ("kind", "chunk", "is_last", "reduced", "finished")
    is_alike = all(getattr(one, name) == getattr(other, name) for name in same)
    return is_alike and all(a >= b for a, b in zip(one.whole + one.halves, other.whole + other.halves))
