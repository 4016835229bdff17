"""Write numbers of the training where they can be looked at: TensorBoard, and CSV files.

    monitors = Monitors(CSVMonitor(True, "logs", "run1", rank=rank))
    monitors.write(samples, train_loss=2.5, lr=1e-3)        Train/Samples/train_loss, Train/Samples/lr

The x of every curve is the number of samples trained on, so that runs with other batch sizes lie over one another.
Rank 0 alone writes.

https://www.deepspeed.ai/docs/config-json/#monitoring-module-tensorboard-wandb-comet-csv
"""

import csv
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from minispeed.errors import UserError

Event: TypeAlias = tuple[str, Any, int]  # name of the curve, value, number of samples
PREFIX = "Train/Samples/"
JOB_NAME = "DeepSpeedJobName"  # DeepSpeed's default


class Monitor(Protocol):
    """Something that writes."""

    enabled: bool

    def write_events(self, event_list: Iterable[Event]) -> None:
        """Write each value."""


class CSVMonitor:
    """A file for each curve, `output_path/job_name/Train_Samples_lr.csv`: a head of "step" and its name, then rows.

    A run that is resumed adds to the files.
    """

    def __init__(self, enabled: bool, output_path: str = "", job_name: str = JOB_NAME, *, rank: int) -> None:
        self.enabled = enabled
        self.log_dir = Path(output_path) / job_name if enabled and rank == 0 else None
        if self.log_dir:
            self.log_dir.mkdir(parents=True, exist_ok=True)

    def write_events(self, event_list: Iterable[Event]) -> None:
        """Add a row for each."""
        if self.log_dir is None:
            return
        for name, value, samples in event_list:
            path = self.log_dir / f"{name.replace('/', '_').replace(' ', '_')}.csv"
            is_new = not path.exists()
            with path.open("a", newline="") as file:
                rows = csv.writer(file)
                if is_new:
                    rows.writerow(["step", name.split("/")[-1]])
                rows.writerow([samples, float(value)])


class TensorBoardMonitor:
    """The curves for `tensorboard --logdir output_path`.

    Raises  UserError, on every rank, where tensorboard is not installed
    """

    def __init__(self, enabled: bool, output_path: str = "", job_name: str = JOB_NAME, *, rank: int) -> None:
        self.enabled, self.summary_writer = enabled, None
        if enabled and find_spec("tensorboard") is None:
            fix = 'python -m pip install "minispeed[tensorboard]", or {"tensorboard": {"enabled": false}}'
            raise UserError("the configuration asks for tensorboard, which is not installed", fix=fix)
        if enabled and rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.summary_writer = SummaryWriter(log_dir=str(Path(output_path) / job_name))

    def write_events(self, event_list: Iterable[Event]) -> None:
        """Write each, so that it can be seen at once."""
        if self.summary_writer is None:
            return
        for name, value, samples in event_list:
            self.summary_writer.add_scalar(name, float(value), samples)
        self.summary_writer.flush()


class Monitors:
    """Several at once: `engine.monitor`."""

    def __init__(self, *monitors: Monitor) -> None:
        self.monitors = [monitor for monitor in monitors if monitor.enabled]
        self.enabled = bool(self.monitors)

    def write_events(self, event_list: Iterable[Event]) -> None:
        """Write each value to each monitor: [("Train/Samples/eval_loss", 2.5, samples)]."""
        events = list(event_list)
        for monitor in self.monitors:
            monitor.write_events(events)

    def write(self, samples: int, **values: Any) -> None:
        """Write values of the training: train_loss, lr, loss_scale."""
        self.write_events((PREFIX + name, value, samples) for name, value in values.items())
