"""What ctrl-C and SIGTERM mean in a run: finish the step, save, and say how to go on; a second one stops at once.

ctrl-C comes from a person, SIGTERM from a machine that wants its node back. The exit code is what shells report of a
process that a signal ended, 128 + its number: 130 and 143.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from typing import Any, NoReturn

import torch

from minispeed.collective.group import CollectiveError, Group

AGAIN = 1.0  # seconds; a SIGTERM that comes sooner is the first one, which came by another way too


class Stop:
    """Whether this process was asked to stop: the signal's number, 0 as long as nobody has, and when that was."""

    number = 0
    since = 0.0

    def agreed(self, group: Group) -> int:
        """Return the signal by which any rank was asked to stop, the same on all ranks; 0 where none was."""
        largest = torch.tensor([float(self.number)])
        group.all_reduce(largest, "max").wait()
        return int(largest.item())


def exit_code(number: int) -> int:
    """Return the exit code of a run that a signal of this number ended."""
    return 128 + number


@contextmanager
def signals_left_to_ranks() -> Iterator[None]:
    """In the process that waits for the ranks: leave ctrl-C to them, hand SIGTERM on to them, and end as they end.

    A signal that is ignored would be ignored in the ranks too, until they train and look for it.
    """
    told = []

    def hand_on(number: int, frame: Any) -> None:
        told.append(number)
        for rank in active_children():
            rank.terminate()

    before = signal.signal(signal.SIGINT, lambda number, frame: None), signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    except CollectiveError:
        if told:  # they had not begun to train, and a SIGTERM ends such a process
            raise SystemExit(exit_code(signal.SIGTERM)) from None
        raise
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """End the process in order, with its exit code, at a SIGTERM that nobody else waits for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: end_now(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred_stop(*, quiet: bool = False) -> Iterator[Stop]:
    """Let the first ctrl-C or SIGTERM wait until somebody looks, between steps; the second one stops at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if not stop.number:
            stop.number, stop.since = number, time.monotonic()
            if not quiet:
                print(f"\nstopping after this step ({called(number)} again: at once)", flush=True)
        elif number == signal.SIGINT or time.monotonic() - stop.since > AGAIN:
            end_now(number)

    before = [signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield stop
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)


def end_now(number: int) -> NoReturn:
    """Stop where this process is, with the exit code of that signal."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(exit_code(number))


def called(number: int) -> str:
    """Return what people call a signal."""
    return "ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
