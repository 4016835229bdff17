"""Keep a few gloo processes for the tests: started once, each test costs milliseconds, not seconds.

Every process holds a world of each size up to the pool's; a task goes to the first `ranks` of them, as the
name of a function and plain arguments. A task that fails or takes too long ends all processes; the next one
finds new ones.
"""

import atexit
import functools
import importlib
import tempfile
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed import distributed_c10d

from minispeed.collective.supervise import Post, Rank, results, start, stop, tell
from minispeed.collective.world import World, inside


class GlooPool:
    """`size` processes that run functions on worlds of 1 to `size` ranks."""

    def __init__(self, size: int = 4, *, timeout: float = 20.0) -> None:
        """Start nothing yet; `timeout` (seconds) is how long a collective may wait."""
        self.size, self.timeout = size, timeout
        self._ranks: list[Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, fn: Callable[..., Any], *args: Any, ranks: int, timeout: float = 60.0) -> list[Any]:
        """Run `fn(world, *args)`, a function at the top level of a module, on `ranks` processes.

        Returns  what the ranks returned, in rank order
        Raises   what `launch` raises; after that, and after `timeout` seconds, the processes are new ones
        """
        assert 1 <= ranks <= self.size, f"{ranks} ranks of a pool of {self.size}"
        chosen = (self._ranks or self._start())[:ranks]
        for rank in chosen:
            rank.pipe.send((fn.__module__, fn.__qualname__, args, ranks))
        try:
            return results(chosen, timeout=timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        stop(self._ranks)
        if self._folder is not None:
            self._folder.cleanup()
        self._ranks, self._folder = [], None

    def _start(self) -> list[Rank]:
        self._folder = tempfile.TemporaryDirectory(prefix="minispeed-pool-")
        folder = Path(self._folder.name)
        common = functools.partial(Post, backend="gloo", timeout=self.timeout, folder=folder, num_threads=1)
        self._ranks = [start(common(rank=rank, size=self.size), _serve) for rank in range(self.size)]
        return self._ranks


@functools.cache
def shared_pool() -> GlooPool:
    """Return the pool of this test run; its processes end with it."""
    pool = GlooPool()
    atexit.register(pool.close)
    return pool


def _serve(post: Post, pipe: Connection) -> None:
    """Be one process of the pool: run tasks until the pipe ends."""
    _count_groups_by_members()
    whole = post.join()
    cuts = {size: [list(range(size)), list(range(size, post.size))] for size in range(1, post.size + 1)}
    groups = {size: whole.subgroup([line for line in cut if line]) for size, cut in cuts.items()}
    worlds = {size: World(group, whole.device) for size, group in groups.items()}
    while True:
        try:
            module, name, args, size = pipe.recv()
        except EOFError:
            return
        tell(pipe, functools.partial(_run, module, name, args, worlds[size]))


def _run(module: str, name: str, args: tuple[Any, ...], world: World) -> Any:
    with inside(world):
        return getattr(importlib.import_module(module), name)(world, *args)


def _count_groups_by_members() -> None:
    """Let torch number the groups that the same ranks make by themselves.

    It numbers all groups of a process, and ranks that take no part in a task make fewer: their names would no longer
    be those of the others.
    """
    made: Counter[tuple[int, ...]] = Counter()

    def name_of(ranks: list[int]) -> str:
        made[tuple(ranks)] += 1
        return f"ranks {ranks}, number {made[tuple(ranks)]}"

    distributed_c10d._hash_ranks_to_str = name_of
