"""What ctrl-C means in a run: finish the step, save, and say how to go on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_left_to_ranks() -> Iterator[None]:
    """Do nothing at ctrl-C in the process that waits for the ranks: they stop, and it ends with them.

    A signal that is ignored would be ignored in the ranks too, until they train and look for it.
    """
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deferred_interrupt(*, quiet: bool = False) -> Iterator[threading.Event]:
    """Turn the first ctrl-C into an event that is looked at between steps; the second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        if not quiet:
            print("\nstopping after this step (ctrl-C again: at once)", flush=True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
