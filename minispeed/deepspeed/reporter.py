"""Print and write what a configuration asks for about a run: progress, times, memory, curves.

steps_per_print, wall_clock_breakdown, memory_breakdown, tensorboard, csv_monitor:
https://www.deepspeed.ai/docs/config-json/#logging
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from minispeed.collective.numbers import sums_of
from minispeed.collective.trace import Trace
from minispeed.collective.world import World
from minispeed.config import Config
from minispeed.deepspeed.logging import log_dist, see_memory_usage
from minispeed.deepspeed.monitor import CSVMonitor, Monitors, TensorBoardMonitor
from minispeed.deepspeed.timers import SynchronizedWallClockTimer, ThroughputTimer

TIMES = ("forward", "backward", "step", "communication")


class Reporter:
    """One engine's; `trace` holds the collectives of the steps, where their time is asked for."""

    def __init__(self, config: Config, world: World, trace: Trace) -> None:
        self.config, self.world, self.trace = config, world, trace
        self.timers = SynchronizedWallClockTimer(world.device)
        self.throughput = ThroughputTimer(
            config.batch.train, device=world.device, steps_per_output=config.steps_per_print
        )
        kinds = ((TensorBoardMonitor, config.tensorboard), (CSVMonitor, config.csv_monitor))
        self.monitor = Monitors(*(kind(to.enabled, to.output_path, to.job_name, rank=world.rank) for kind, to in kinds))
        self._losses: list[Tensor] = []

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure what is done inside this."""
        if self.config.memory_breakdown:
            see_memory_usage(f"before {name}", force=True)
        with self.timers(name) if self.config.wall_clock_breakdown else nullcontext():
            yield
        if self.config.memory_breakdown:
            see_memory_usage(f"after {name}", force=True)

    def saw(self, loss: Tensor) -> None:
        """Take note of a micro-batch's loss."""
        if self.monitor.enabled:
            self._losses.append(loss.detach())

    def report(self, step: int, samples: int, *, skipped: int, lr: list[float], mom: list[Any], scale: float) -> None:
        """Say what there is to say after an update; every rank calls this.

        step     updates so far, `skipped` of which changed nothing
        samples  rows so far
        """
        every = self.config.steps_per_print
        if every and step % every == 0:
            log_dist(f"step={step}, skipped={skipped}, lr={lr}, mom={mom}", ranks=[0])
        if self.monitor.enabled:
            mine = sum(loss.item() for loss in self._losses) / max(1, len(self._losses))
            self._losses.clear()
            values = {"train_loss": sums_of(self.world.group, [mine]).item() / self.world.size, "lr": lr[0]}
            self.monitor.write(samples, **values, **({"loss_scale": scale} if self.config.fp16.enabled else {}))
        if self.config.wall_clock_breakdown:
            self.timers("communication").add(sum(event.end - event.start for event in self.trace.events))
            self.trace.clear()
            self.timers.log(TIMES)
