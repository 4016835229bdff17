"""Cut the model's layers into stages: the slowest stage sets the pace of all, so make it as fast as possible.

The best cut of the first n layers into k stages has some last stage, and before it the best cut of the rest into
k - 1. The longer that rest, the slower it is, and the faster the last stage: what is best lies where the two cross,
and a bisection finds it. In all that takes about k n log n comparisons.

Pinar & Aykanat 2004, Fast optimal load balancing algorithms for 1D partitioning, has this and faster ones.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate

from minispeed.errors import UserError
from minispeed.pipeline.timeline import Time


def partition(costs: Sequence[Time], stages: int) -> list[int]:
    """Return boundaries b[0] = 0, ..., b[stages] = n: stage s has the layers from b[s] to b[s + 1], and at least one.

    No other cut has a faster slowest stage. `costs` has the time of each of the n layers, in order; embedding and
    head are layers too.

    Raises  UserError on a negative cost, on less than one stage, or on more stages than layers
    """
    _check(costs, stages)
    before = list(accumulate(costs, initial=0))  # before[n]: the time of the first n layers
    slowest: Mapping[int, Time] = dict(enumerate(before))  # n -> of the best cut of n layers into as many stages as yet
    cuts = []
    for k in range(2, stages + 1):
        begins = {n: _last_begin(slowest, before, k, n) for n in range(k, len(before))}
        slowest = {n: max(slowest[begin], before[n] - before[begin]) for n, begin in begins.items()}
        cuts.append(begins)
    boundaries = [len(costs)]
    for begins in reversed(cuts):
        boundaries.append(begins[boundaries[-1]])
    return [0, *reversed(boundaries)]


def _last_begin(slowest: Mapping[int, Time], before: Sequence[Time], k: int, n: int) -> int:
    """Return where the last of k stages begins in the best cut of n layers; `slowest` is of k - 1 stages."""
    able = range(k - 1, n)
    crossing = bisect_left(able, True, key=lambda begin: slowest[begin] >= before[n] - before[begin])
    around = able[max(0, crossing - 1) : crossing + 1]
    return min(around, key=lambda begin: max(slowest[begin], before[n] - before[begin]))


def _check(costs: Sequence[Time], stages: int) -> None:
    if stages < 1:
        raise UserError(f"a cut into {stages} stages", fix="1 or more")
    if stages > len(costs):
        raise UserError(f"{len(costs)} layers cannot fill {stages} stages", fix=f"{len(costs)} stages or fewer")
    for layer, cost in enumerate(costs):
        if cost < 0:
            raise UserError(f"layer {layer} has the cost {cost}", fix="0 or more")
