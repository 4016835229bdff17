"""Say who I am: what `launch` hands to the function that it runs on every rank.

The world is an argument everywhere but in scripts written for DeepSpeed, whose calls name no group
(`zero.Init()`): for those, and for nothing else, the world of this thread can be looked up.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from minispeed.collective.group import Group, SoloGroup


@dataclass(frozen=True)
class World:
    """All ranks, seen from one of them, and the device that this one computes on."""

    group: Group
    device: torch.device

    @property
    def rank(self) -> int:
        """My number among all ranks."""
        return self.group.rank

    @property
    def size(self) -> int:
        """The number of all ranks."""
        return self.group.size

    def subgroup(self, lines: Sequence[Sequence[int]]) -> Group:
        """Return the group of the line of ranks that holds me: `world.subgroup(mesh.lines("dp"))`.

        Every rank calls this with the same lines, which hold every rank once.
        """
        return self.group.subgroup(lines)


_this_thread = threading.local()


def current_world() -> World:
    """Return the world that `launch` runs this thread in; outside of it, a world of one rank on the best device."""
    return getattr(_this_thread, "world", None) or World(SoloGroup(), best_device())


def best_device() -> torch.device:
    """Return the first GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def inside(world: World) -> Iterator[World]:
    """Let `world` be this thread's world, and let the backward run in this thread.

    On a GPU, the backwards of all threads otherwise share one device thread, where a hook that waits for
    another rank hangs them all.
    """
    outer = getattr(_this_thread, "world", None)
    _this_thread.world = world
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield world
    finally:
        _this_thread.world = outer
