"""Say who I am: what `launch` hands to the function that it runs on every rank.

The world is an argument everywhere but in scripts written for DeepSpeed, whose calls name no group
(`zero.Init()`): for those, and for nothing else, the world of this thread can be looked up. `launch` gives a thread
its world for as long as a function runs; a script that runs by itself settles in one for good.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

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
_this_process = SimpleNamespace(world=None)


def current_world() -> World:
    """Return the world of this thread: that of `launch`, else that of `settle`, else one rank on the best device."""
    return launched_world() or settled_world() or World(SoloGroup(), best_device())


def launched_world() -> World | None:
    """Return the world that `launch` runs this thread in, None outside of it."""
    world: World | None = getattr(_this_thread, "world", None)
    return world


def settled_world() -> World | None:
    """Return the world that `settle` gave this process, None where it gave none."""
    world: World | None = _this_process.world
    return world


def settle(world: World | None) -> None:
    """Let `world` be the world of all of this process that runs outside `launch`; None: of nothing any more.

    The backward runs in the calling thread from then on, as it does inside `launch`.
    """
    _this_process.world = world
    torch.autograd.set_multithreading_enabled(world is None)


def best_device() -> torch.device:
    """Return the first GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def inside(world: World) -> Iterator[World]:
    """Let `world` be this thread's world, and let the backward run in this thread.

    On a GPU, the backwards of all threads otherwise share one device thread, where a hook that waits for
    another rank hangs them all.
    """
    outer = launched_world()
    _this_thread.world = world
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield world
    finally:
        _this_thread.world = outer
