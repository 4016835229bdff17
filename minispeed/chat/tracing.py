"""Write down what the ranks of a run do in a few of its steps, for `minispeed timeline` and other viewers of traces.

Every message and every action of the pipeline has a start and an end, on a clock that the processes of a machine share;
memory is looked at every few milliseconds meanwhile. The first step is left out: it allocates, connects and warms up.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from minispeed.chrome import from_json, to_json, write_trace
from minispeed.collective.group import Group
from minispeed.collective.numbers import texts_of
from minispeed.collective.trace import Trace, Traced
from minispeed.engine import Engine
from minispeed.pipeline.timeline import Event, Timeline
from minispeed.spans import MICRO, Row, Run, Sample, row_of

EVERY = 0.002  # seconds from one look at the memory to the next
STATM = Path("/proc/self/statm")


class Tracer:
    """Writes a trace of so many steps, from the second on, to a file; to none, it does nothing."""

    def __init__(self, path: Path | None, steps: int) -> None:
        self.path, self.left, self.is_first = path, steps if path else 0, True
        self.trace = Trace(is_on=False)
        self.events: list[Event] = []
        self.memory: list[Sample] = []

    def wrap(self, group: Group) -> Group:
        """Return the group to train with: one that notes what is asked of it, if anything is to be written."""
        return group if self.path is None else Traced(group, self.trace)

    @contextlib.contextmanager
    def step(self, engine: Engine) -> Iterator[None]:
        """Note what happens in a step; after the last that is wanted, write the file, every rank its row."""
        if not self.left or self.is_first:
            self.is_first = False
            yield
            return
        self.trace.is_on = True
        with _sampling(self.memory, _memory_of(engine.device)):
            yield
        self.trace.is_on = False
        if engine.runner.timeline is not None:
            self.events += engine.runner.timeline.events
        self.left -= 1
        if not self.left:
            self._write(engine)

    def _write(self, engine: Engine) -> None:
        lines = engine.lines
        row = row_of(
            lines.world.rank,
            timeline=Timeline(lines.pp.size, self.events),
            members=lines.pp.members,
            events=self.trace.events,
            memory=self.memory,
        )
        texts = texts_of(engine.group, json.dumps(to_json(Run([row]))))
        if engine.group.rank == 0:
            rows: list[Row] = [row for text in texts for row in from_json(json.loads(text), "a rank's row").rows]
            assert self.path is not None
            write_trace(self.path, rows)


@contextlib.contextmanager
def _sampling(samples: list[Sample], look: Callable[[], int] | None) -> Iterator[None]:
    """Look at the memory again and again, in a thread."""
    over = threading.Event()

    def sample() -> None:
        while look is not None and not over.wait(EVERY):
            samples.append(Sample(time.perf_counter() * MICRO, look()))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _memory_of(device: torch.device) -> Callable[[], int] | None:
    """Return what tells the bytes in use: of the GPU by torch, else of the process; None where the system is silent."""
    if device.type == "cuda":
        return lambda: torch.cuda.memory_allocated(device)
    if not STATM.exists():
        return None
    return lambda: int(STATM.read_text().split()[1]) * 4096
