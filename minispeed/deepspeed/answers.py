"""What a script may ask the engine at any time: sizes of the batch, settings, counts, how the last update went.

Names and answers are DeepSpeed's; most are read from the config, and nothing here changes anything.

https://deepspeed.readthedocs.io/en/latest/training.html
"""

from typing import Any

from torch import nn

from minispeed.config import Config
from minispeed.engine import Engine
from minispeed.errors import UserError


class Answers(nn.Module):
    """The half of `DeepSpeedEngine` that only answers.

    global_steps, skipped_steps  updates so far, and those of them that changed nothing
    micro_steps, global_samples  micro-batches of this rank, and rows of all
    """

    def __init__(self, config: Config, core: Engine | None) -> None:
        """Start to count; `core` is what trains, None where there is no optimizer."""
        super().__init__()
        self.config, self.core = config, core
        self.global_steps = self.micro_steps = self.skipped_steps = self.global_samples = 0
        self._norm: float | None = None

    def _trained(self) -> Engine:
        if self.core is None:
            what = "this engine has no optimizer, so it only runs forwards"
            raise UserError(what, fix='"optimizer": {"type": "AdamW"} in the config, or initialize(optimizer=...)')
        return self.core

    def train_batch_size(self) -> int:
        """Return the rows of a step, all ranks together."""
        return self.config.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return the rows that go through a rank's module at once."""
        return self.config.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Return the micro-batches of a step."""
        return self.config.batch.accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """Return the sizes of a step, of a micro-batch, and how many micro-batches make a step."""
        return self.config.batch.train, self.config.batch.micro, self.config.batch.accumulation

    def gradient_clipping(self) -> float:
        """Return the largest norm of the gradient; 0 leaves it alone."""
        return self.config.gradient_clipping

    def fp16_enabled(self) -> bool:
        """Return whether parameters are fp16."""
        return self.config.fp16.enabled

    def bfloat16_enabled(self) -> bool:
        """Return whether parameters are bf16."""
        return self.config.bf16.enabled

    def zero_optimization(self) -> bool:
        """Return whether anything is cut."""
        return self.config.zero.stage > 0

    def zero_optimization_stage(self) -> int:
        """Return the stage of ZeRO."""
        return self.config.zero.stage

    def steps_per_print(self) -> int | None:
        """Return how many steps lie between lines of progress."""
        return self.config.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        """Return whether times are printed."""
        return self.config.wall_clock_breakdown

    def dynamic_loss_scale(self) -> bool:
        """Return whether the loss scale changes."""
        return self._trained().scaler.dynamic

    def get_lr(self) -> list[float]:
        """Return the learning rate of each parameter group."""
        return [group["lr"] for group in self._trained().optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """Return the betas, or the momentum, of each parameter group."""
        groups = self._trained().optimizer.param_groups
        return [group.get("betas", group.get("momentum", 0.0)) for group in groups]

    def get_global_grad_norm(self) -> float | None:
        """Return the gradient's norm in the last update, before clipping; None before the first."""
        return self._norm

    def was_step_applied(self) -> bool:
        """Return whether the last update changed the parameters."""
        return self.global_steps > 0 and not self._trained().skipped
