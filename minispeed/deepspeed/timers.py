"""Time: how many samples a second, and how long each part of a step takes.

    tput_timer.start(); ...; tput_timer.stop(global_step=True)      prints every `steps_per_output` steps
    with timers("forward"): ...                                     adds up
    timers.log(["forward", "backward"], normalizer=steps)           prints one line, and begins again

What a GPU was told to do is waited for at both ends of a measurement; on a CPU nothing is. Seconds inside,
milliseconds where DeepSpeed has them.
"""

import time
from collections.abc import Callable, Iterable
from types import TracebackType

import torch

from minispeed.deepspeed.accelerator import Accelerator, get_accelerator
from minispeed.deepspeed.logging import print_dist, print_rank_0

GIGABYTE = 2**30


class ThroughputTimer:
    """Samples per second, from step `start_step` on: the first ones are slow for reasons of their own.

    batch_size  samples of a whole step, over all ranks and micro-batches
    """

    def __init__(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        start_step: int = 2,
        steps_per_output: int | None = None,
        printing: Callable[[str], None] = print_rank_0,
    ) -> None:
        self.batch_size, self.start_step, self.steps_per_output = batch_size, start_step, steps_per_output
        self.epoch_count = self.micro_step_count = self.global_step_count = 0
        self.total_elapsed_time = self.step_elapsed_time = 0.0  # seconds
        self._accelerator, self._printing = _accelerator(device), printing
        self._started: float | None = None
        self._num_timed = 0

    def update_epoch_count(self) -> None:
        """Begin another epoch: micro-steps count from 0."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def start(self) -> None:
        """Begin a micro-step."""
        if self.global_step_count >= self.start_step:
            self._accelerator.synchronize()
        self._started = time.perf_counter()

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """End a micro-step; with `global_step` the step too, and print where `steps_per_output` says so."""
        if self._started is None:
            return
        self.micro_step_count += 1
        is_timed = self.global_step_count >= self.start_step
        if is_timed:
            self._accelerator.synchronize()
            self.step_elapsed_time += time.perf_counter() - self._started
        self._started = None
        if global_step:
            self.global_step_count += 1
            if is_timed:
                self._end_step(report_speed)

    def avg_samples_per_sec(self) -> float:
        """Return the samples per second of all timed steps; minus infinity before the first."""
        if not self._num_timed:
            return float("-inf")
        return self.batch_size * self._num_timed / self.total_elapsed_time

    def _end_step(self, report_speed: bool) -> None:
        seconds, self.step_elapsed_time = self.step_elapsed_time, 0.0
        self.total_elapsed_time += seconds
        self._num_timed += 1
        if report_speed and self.steps_per_output and self.global_step_count % self.steps_per_output == 0:
            held, most = self._accelerator.memory_allocated(), self._accelerator.max_memory_allocated()
            self._printing(
                f"epoch={self.epoch_count}/micro_step={self.micro_step_count}/global_step={self.global_step_count}, "
                f"RunningAvgSamplesPerSec={self.avg_samples_per_sec():.4g}, "
                f"CurrSamplesPerSec={self.batch_size / seconds:.4g}, "
                f"MemAllocated={held / GIGABYTE:.2f}GB, MaxMemAllocated={most / GIGABYTE:.2f}GB"
            )


class Timer:
    """One named stop-watch, which adds up until it is reset."""

    def __init__(self, name: str, accelerator: Accelerator) -> None:
        self.name, self._accelerator = name, accelerator
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Begin to measure."""
        assert self._started is None, f"the timer {self.name!r} runs already"
        self._accelerator.synchronize()
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Add what has passed since `start`."""
        assert self._started is not None, f"the timer {self.name!r} does not run"
        self._accelerator.synchronize()
        self.add(time.perf_counter() - self._started)
        self._started = None

    def add(self, seconds: float) -> None:
        """Add what somebody else has measured."""
        self._seconds += seconds

    def reset(self) -> None:
        """Forget all."""
        self._seconds, self._started = 0.0, None

    def elapsed(self, reset: bool = True) -> float:
        """Return the milliseconds measured; a measurement that runs on is begun anew."""
        is_running = self._started is not None
        if is_running:
            self.stop()
        milliseconds = 1000 * self._seconds
        if reset:
            self.reset()
        if is_running:
            self.start()
        return milliseconds

    def __enter__(self) -> "Timer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class SynchronizedWallClockTimer:
    """Stop-watches by name: `timers("forward").start()`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._accelerator = _accelerator(device)
        self.timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        """Return the stop-watch of that name, a new one where there is none."""
        if name not in self.timers:
            self.timers[name] = Timer(name, self._accelerator)
        return self.timers[name]

    def get_timers(self) -> dict[str, Timer]:
        """Return all of them."""
        return self.timers

    def log(
        self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True, ranks: list[int] | None = None
    ) -> None:
        """Print the milliseconds of each that was ever used, on rank 0 or on these ranks.

        normalizer  what they are divided by: the number of steps
        """
        times = ((name, self.timers[name].elapsed(reset) / normalizer) for name in names if name in self.timers)
        print_dist("time (ms)" + "".join(f" | {name}: {took:.2f}" for name, took in times), ranks or [0])


def _accelerator(device: torch.device | None) -> Accelerator:
    return get_accelerator() if device is None else Accelerator(device)
