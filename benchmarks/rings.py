"""Are rings of messages faster than gloo's own collectives on one machine?

    python benchmarks/rings.py

Sum (all-reduce), reduce-scatter and all-gather of 1 to 64 MB on 2 and 4 processes: ours, written from `exchange`,
beside gloo's and beside the gathering at one rank that both replace. The contestants take turns; the figures are
medians of ratios within a turn, below 1 where ours is faster. Patarasu & Yuan 2009, Bandwidth optimal all-reduce
algorithms.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from report import report

import minispeed
from minispeed.collective import rings
from minispeed.collective.processes import _all_gather, _reduce_scatter
from minispeed.collective.world import World

REPEATS = 7


def measure(world: World, megabytes: int) -> list[dict[str, object]]:
    """Time every contestant on a buffer of that size, in turn; seconds of the slowest rank count."""
    group, n = world.group, megabytes * 2**20 // 4
    whole, part = torch.ones(n), torch.ones(n // group.size)
    contests = {
        "all-reduce": {
            "gloo": lambda: dist.all_reduce(whole),
            "ring": lambda: rings.all_reduce(group, whole),
            "through rank 0": lambda: rings.central_all_reduce(group, whole),
        },
        "reduce-scatter": {
            "gloo": lambda: _reduce_scatter(part, whole),
            "ring": lambda: rings.reduce_scatter(group, part, whole),
        },
        "all-gather": {
            "gloo": lambda: _all_gather(whole, part),
            "ring": lambda: rings.all_gather(group, whole, part),
        },
    }
    rows = []
    for kind, contestants in contests.items():
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for repeat in range(REPEATS + 1):
            for name, call in contestants.items():
                whole.fill_(1.0)
                took = torch.tensor([timed(group, call)])
                group.all_reduce(took, "max").wait()
                if repeat:  # the first warms up
                    seconds[name].append(took.item())
        ratios = {name: [a / b for a, b in zip(seconds[name], seconds["gloo"])] for name in contestants}
        for name in contestants:
            if name != "gloo":
                rows.append(
                    {
                        "collective": kind,
                        "how": name,
                        "ranks": group.size,
                        "MB": megabytes,
                        "gloo ms": statistics.median(seconds["gloo"]) * 1e3,
                        "of gloo's time": statistics.median(ratios[name]),
                        "lowest": min(ratios[name]),
                        "highest": max(ratios[name]),
                    }
                )
    return rows


def timed(group, call) -> float:
    """Return the seconds of a call that all ranks start together."""
    group.all_reduce(torch.zeros(1)).wait()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    rows = []
    for ranks in (2, 4):
        for megabytes in (1, 4, 16, 64):
            rows += minispeed.launch(measure, megabytes, ranks=ranks, backend="gloo")[0]
    report("rings", rows)


if __name__ == "__main__":
    main()
