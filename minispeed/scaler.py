"""Scale the loss so that small fp16 gradients do not become zero, and find the scale while training.

fp16 has no number between 0 and 6e-8, and gradients often lie below. The loss is multiplied by the scale before the
backward, so every gradient is; the optimizer divides by it again, in fp32. Too high a scale overflows: such a step is
skipped on every rank and the scale is halved; after a while without overflow it is doubled.

    good, window steps since the last overflow    scale x 2, patience back to `hysteresis`
    overflow, patience left is 1                  scale / 2, not below `floor`
    overflow, patience left is more               patience - 1

Loss scaling: Micikevicius et al. 2017, section 3.2 (https://arxiv.org/abs/1710.03740). The settings and what they mean
are DeepSpeed's (`fp16` in its configuration).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from minispeed.errors import UserError

FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class LossScaler:
    """A scale and what it needs to know to change: a state; `after` gives the next one.

    scale                   what the loss is multiplied by now
    dynamic                 False: it never changes (a static scale)
    window                  steps without overflow after which it doubles
    hysteresis              overflows that it takes to halve it
    consecutive_hysteresis  a good step restores the patience; else only the doubling does
    floor                   the scale never goes below
    iteration               steps so far
    last_overflow           the iteration of the last overflow, -1 before the first
    patience                overflows left before it halves
    """

    scale: float = 2.0**16
    dynamic: bool = True
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    floor: float = 1.0
    iteration: int = 0
    last_overflow: int = -1
    patience: int = -1

    def __post_init__(self) -> None:
        if self.patience == -1:
            object.__setattr__(self, "patience", self.hysteresis)
        for name in ("window", "hysteresis"):
            if getattr(self, name) < 1:
                raise UserError(f"a loss scaler's {name} is {getattr(self, name)}", fix=f"{name}=1 or more")
        if not self.scale > 0 or not self.floor > 0:
            raise UserError(f"a loss scale of {self.scale} with a floor of {self.floor}", fix="both above 0")

    @classmethod
    def static(cls, scale: float) -> "LossScaler":
        """Return a scaler that never changes."""
        return cls(scale=scale, dynamic=False, floor=min(1.0, scale))

    @property
    def is_at_floor(self) -> bool:
        """Whether another overflow could not lower the scale any more."""
        return not self.dynamic or self.scale <= self.floor

    def after(self, overflow: bool) -> "LossScaler":
        """Return the state after one step, which overflowed or did not."""
        later = replace(self, iteration=self.iteration + 1)
        if not self.dynamic:
            return later
        if overflow:
            halves = self.patience == 1
            return replace(
                later,
                scale=max(self.floor, self.scale / FACTOR) if halves else self.scale,
                patience=self.patience if halves else self.patience - 1,
                last_overflow=self.iteration,
            )
        grows = (self.iteration - self.last_overflow) % self.window == 0
        return replace(
            later,
            scale=self.scale * FACTOR if grows else self.scale,
            patience=self.hysteresis if grows or self.consecutive_hysteresis else self.patience,
        )

    def state(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)
