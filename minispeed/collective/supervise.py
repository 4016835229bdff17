"""Start one process for each rank, watch over them, and when one fails say which, and where.

The error of a rank frees the others: its process ends, their connections break, they give up. So of all that
went wrong only one thing is told: who was killed; else who raised an error of its own; else who did not come
to the operation in which the others waited until their timeout.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from minispeed.collective.flight import last_operation
from minispeed.collective.group import MACHINERY, CollectiveError
from minispeed.collective.processes import connect
from minispeed.collective.world import World, inside
from minispeed.errors import UserError

T = TypeVar("T")
GRACE = 3.0  # seconds that the other ranks have to give up, once one has failed


@dataclass(frozen=True, kw_only=True)
class Post:
    """Where a process stands and how it meets the others. Seconds; `folder` holds rendezvous and records."""

    rank: int
    size: int
    backend: str
    timeout: float
    folder: Path
    num_threads: int

    @property
    def record(self) -> Path:
        """The file with this rank's last operation."""
        return self.folder / f"rank-{self.rank}"

    @property
    def stack(self) -> Path:
        """The file where this rank writes, when asked by a signal, which line it is at."""
        return self.folder / f"stack-{self.rank}"

    def join(self) -> World:
        """Meet the other processes, from within the process of this rank."""
        torch.set_num_threads(self.num_threads)
        faulthandler.register(signal.SIGUSR1, self.stack.open("w"), all_threads=False)
        cuda = self.backend == "nccl"
        device = torch.device("cuda", self.rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        rendezvous = f"file://{self.folder / 'rendezvous'}"
        place = {"rank": self.rank, "size": self.size}
        group = connect(self.backend, rendezvous, **place, timeout=self.timeout, record=self.record)
        return World(group, device)


class RankTraceback(Exception):
    """The traceback of an error in another process, as text: the cause of the error raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class Rank:
    """One process, and the pipe over which it says how it ended."""

    post: Post
    process: SpawnProcess
    pipe: Connection


@dataclass(frozen=True)
class _Ending:
    """How a rank ended: it returned a value, raised an error, or died without a word."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    exit_code: int = 0

    @property
    def is_good(self) -> bool:
        return self.error is None and self.exit_code == 0


def run_processes(fn: Callable[..., T], args: tuple[Any, ...], *, posts: list[Post]) -> list[T]:
    """Run `fn(world, *args)` in one new process for each post; return what they returned, in rank order.

    Raises  UserError if `fn` cannot be shipped; the error of the rank that raised; CollectiveError naming the
            rank that was killed or that the others waited for
    """
    check_shippable(fn, args)
    ranks = [start(post, _live, fn, args) for post in posts]
    try:
        values = results(ranks)
        for rank in ranks:
            rank.pipe.send_bytes(b"leave")  # all have returned: now no connection breaks too early
            rank.process.join(GRACE)
        return values
    finally:
        stop(ranks)


def start(post: Post, live: Callable[..., None], *args: Any) -> Rank:
    """Start the process that stands at `post` and runs `live(post, pipe, *args)`."""
    context = get_context("spawn")
    pipe, far_end = context.Pipe()
    name, whole = f"rank {post.rank}", (live, post, far_end, *args)
    process = context.Process(target=_live_with_launcher, args=whole, name=name, daemon=True)
    process.start()
    far_end.close()  # so that the pipe ends with the process
    return Rank(post, process, pipe)


def results(ranks: list[Rank], *, timeout: float | None = None) -> list[Any]:
    """Wait until all ranks have told how they ended, and return their values.

    Raises  the one error that explains the others, if any failed or `timeout` seconds have passed
    """
    endings = _watch(ranks, timeout)
    if not all(rank.post.rank in endings and endings[rank.post.rank].is_good for rank in ranks):
        _judge(ranks, endings)
    return [endings[rank.post.rank].value for rank in ranks]


def stop(ranks: list[Rank]) -> None:
    """End the processes, at once."""
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        rank.process.join()
        rank.pipe.close()


def tell(pipe: Connection, call: Callable[[], Any]) -> None:
    """In the process of a rank: make the call, tell the launcher its value; or its error, and end."""
    try:
        pipe.send_bytes(pickle.dumps(_Ending(value=call())))
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send_bytes(_pickled(error, traceback.format_exc()))
        sys.stdout.flush()
        os._exit(1)  # at once: threads that wait for other ranks would hold an ordinary exit


def check_shippable(fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise UserError if another process could not find the function or its arguments."""
    try:
        pickle.dumps((fn, args))
        file = getattr(sys.modules[fn.__module__], "__file__", None)  # "<stdin>" where Python reads a pipe
        is_lost = fn.__module__ == "__main__" and not (file and Path(file).exists())
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(f"{fn!r} cannot go to another process: {error}", fix=_FIX) from error
    if is_lost:
        raise UserError(f"{fn!r} was defined at the prompt, and another process cannot import it", fix=_FIX)


_FIX = 'backend="threads", which runs any function, or a function at the top level of a file'


def _live_with_launcher(live: Callable[..., None], *args: Any) -> None:
    """Live, but not longer than the launcher: who is killed stops nobody."""

    def follow() -> None:
        launcher = multiprocessing.parent_process()
        assert launcher is not None
        launcher.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    live(*args)


def _live(post: Post, pipe: Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Be one rank, from its first moment to its last."""

    def whole_run() -> Any:
        with inside(post.join()) as world:
            return fn(world, *args)

    tell(pipe, whole_run)
    with contextlib.suppress(EOFError):
        pipe.recv_bytes()
    dist.destroy_process_group()


def _pickled(error: BaseException, trace: str) -> bytes:
    """Return the ending for the launcher; an error that would not survive the journey travels as its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return pickle.dumps(_Ending(error=error, trace=trace))


def _watch(ranks: list[Rank], timeout: float | None) -> dict[int, _Ending]:
    """Return how the ranks ended, once all have, or GRACE seconds after one failed."""
    endings: dict[int, _Ending] = {}
    pipes = {rank.pipe: rank for rank in ranks}
    deadline = time.monotonic() + timeout if timeout else math.inf
    while pipes and time.monotonic() < deadline:
        patience = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        for pipe in connection.wait(list(pipes), patience):
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            endings[rank.post.rank] = _hear(rank)
            if not endings[rank.post.rank].is_good:
                deadline = min(deadline, time.monotonic() + GRACE)
    return endings


def _hear(rank: Rank) -> _Ending:
    """Return what a rank said at its end, or its exit code if it died without a word."""
    try:
        ending: _Ending = pickle.loads(rank.pipe.recv_bytes())
    except (EOFError, OSError):
        rank.process.join(GRACE)
        return _Ending(exit_code=rank.process.exitcode or 1)
    return ending


def _judge(ranks: list[Rank], endings: dict[int, _Ending]) -> NoReturn:
    """Raise the one error that explains the others."""
    for rank, ending in sorted(endings.items()):
        if ending.exit_code:
            code = ending.exit_code
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise CollectiveError(f"rank {rank} {how}\n{_log(ranks)}")
    for rank, ending in sorted(endings.items()):
        if ending.error is not None and not isinstance(ending.error, CollectiveError):
            raise ending.error from RankTraceback(f"on rank {rank}:\n{ending.trace}")
    raise CollectiveError(f"{_culprit(ranks, endings)}\n{_log(ranks)}")


def _culprit(ranks: list[Rank], endings: dict[int, _Ending]) -> str:
    """Name the rank that the others waited for: one elsewhere, else one in an operation of its own."""
    for rank in ranks:
        if rank.post.rank not in endings:
            where = _present_line(rank)
            return f"rank {rank.post.rank} stopped at {where}, and the other ranks gave up waiting"
    for number, ending in sorted(endings.items()):
        if ending.is_good:
            return f"rank {number} returned, and the other ranks gave up waiting for it"
    last = {rank.post.rank: last_operation(rank.post.record) for rank in ranks}
    calls = {number: (op.number, op.text) if op else (0, "") for number, op in last.items()}
    crowd = Counter(calls.values())
    odd = min(calls, key=lambda number: (crowd[calls[number]], calls[number], number))
    return f"rank {odd} stopped in an operation that the others were not in: {last[odd] or 'none'}"


def _log(ranks: list[Rank]) -> str:
    """Return the last operation of every rank, a line each."""
    last = {rank.post.rank: last_operation(rank.post.record) or "no collective yet" for rank in ranks}
    return "last operations:" + "".join(f"\n  rank {number}: {operation}" for number, operation in last.items())


def _present_line(rank: Rank) -> str:
    """Ask a running process where it is, by a signal that writes its stack; return the user's line."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank.process.pid or 0, signal.SIGUSR1)
        time.sleep(0.3)  # the handler runs at once, whatever the process is doing
    frames = re.findall(r'File "(.*)", line (\d+) in (.*)', rank.post.stack.read_text())
    users = [frame for frame in frames if not frame[0].startswith(MACHINERY)] or frames
    return "{}:{} in {}".format(*users[0]) if users else "a line that it does not tell"
