"""How far a run is: where in the data, how good it was, how many of its last steps came to nothing.

It goes into each checkpoint as JSON, and comes back out of it.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Where in the data a run stands, when it was best, and how many steps in a row no loss scale could save."""

    epoch: int = 0
    step_of_epoch: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    skipped: int = 0

    def advance(self, steps_of_epoch: int) -> None:
        """Move on by a step, into the next epoch where this one is over."""
        self.step_of_epoch += 1
        if self.step_of_epoch == steps_of_epoch:
            self.epoch, self.step_of_epoch = self.epoch + 1, 0

    def state(self) -> dict[str, Any]:
        """Return what JSON can hold (it has no infinity)."""
        return {**vars(self), "best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """Return what `state` described."""
        return cls(**{**state, "best_loss": math.inf if state["best_loss"] is None else state["best_loss"]})
