"""Say which learning rate each update has: two schedules of our own, and DeepSpeed's five under DeepSpeed's names.

A schedule is a pure function of the index of the update, 0 for the first. Nothing is stepped, saved or restored: a run
that resumes at update k asks for k.

    a factor on the optimizer's rate    constant, warmup_then, WarmupCosineLR
    the rate itself                     WarmupLR, WarmupDecayLR, OneCycle, LRRangeTest

DeepSpeed steps its schedules after each update that was not skipped and counts from -1: its formulas in a counter `c`
give the rate of update c + 1. Here they stand in the index of the update.

Warm-up: Goyal et al. 2017, section 2.2 (https://arxiv.org/abs/1706.02677). One cycle: Smith 2018, section 4.1
(https://arxiv.org/abs/1803.09820); range test: Smith 2015, section 3.3 (https://arxiv.org/abs/1506.01186). The five's
settings and what they mean: https://deepspeed.readthedocs.io/en/latest/schedulers.html
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from minispeed.errors import UserError, nearest

Schedule = Callable[[int], float]


def constant(step: int) -> float:
    """Return 1: the rate stays."""
    return 1.0


def warmup_then(shape: str, *, warmup: int, total: int, final: float = 0.0) -> Schedule:
    """Return the factor on the learning rate at each step: up in a line, then down to `final`.

    shape   "cosine" (Loshchilov & Hutter 2016, equation 5, https://arxiv.org/abs/1608.03983), "linear" or "constant"
    warmup  steps of the rise; step 0 already has 1 / warmup of the rate
    total   steps in all; the last one stands one step before `final`
    """
    falls: dict[str, Callable[[float], float]] = {
        "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
        "linear": lambda progress: 1 - progress,
        "constant": lambda progress: 1.0,
    }
    if shape not in falls:
        raise UserError(f"no learning-rate schedule is called {shape!r}", fix=" or ".join(falls))
    if warmup < 0 or total < 1:
        raise UserError(f"a schedule of {total} steps with {warmup} of warm-up", fix="total >= 1, warmup >= 0")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return final + (1 - final) * falls[shape](progress)

    return factor


@dataclass(frozen=True, kw_only=True)
class _Warmup:
    """The rise that three schedules begin with.

    warmup_num_steps  updates of the rise; 1 counts as 2
    warmup_type       "log": height log(k) / log(warmup_num_steps) at update k; "linear": (k - 1) / warmup_num_steps
    """

    warmup_num_steps: int = 1000
    warmup_type: str = "log"

    def __post_init__(self) -> None:
        if self.warmup_num_steps < 1:
            raise UserError(f"warmup_num_steps is {self.warmup_num_steps}", fix="warmup_num_steps=1 or more")
        if self.warmup_type not in ("log", "linear"):
            raise UserError(f"no warm-up has the type {self.warmup_type!r}", fix="log or linear")

    def _rise(self, step: int) -> float:
        """Return the height at update `step`: 0 at the first two, 1 when the warm-up is over."""
        if self._past(step) >= 0:
            return 1.0
        num_before, num_steps = max(0, step - 1), max(2, self.warmup_num_steps)
        return math.log(num_before + 1) / math.log(num_steps) if self.warmup_type == "log" else num_before / num_steps

    def _past(self, step: int) -> int:
        """Return how many updates of the fall lie before update `step`; negative in the warm-up."""
        return step - 1 - max(2, self.warmup_num_steps)

    def _span(self, total_num_steps: int) -> int:
        """Return how many updates the fall takes."""
        return total_num_steps - max(2, self.warmup_num_steps)

    def _warn_of_short(self, total_num_steps: int) -> None:
        if total_num_steps < self.warmup_num_steps:
            warnings.warn(
                f"a warm-up of {self.warmup_num_steps} updates is longer than the {total_num_steps} of the run: the "
                f"rate never gets to its height; set warmup_num_steps below total_num_steps",
                stacklevel=4,
            )


@dataclass(frozen=True, kw_only=True)
class WarmupLR(_Warmup):
    """The rate rises from `warmup_min_lr` to `warmup_max_lr` and stays. The first two updates have `warmup_min_lr`.

    The 0.001 is in DeepSpeed's pages; its 0.19.8 takes the optimizer's rate where `warmup_max_lr` is not given.
    """

    warmup_min_lr: float = 0.0
    warmup_max_lr: float = 0.001

    def __call__(self, step: int) -> float:
        """Return the rate of update `step`."""
        return self.warmup_min_lr + (self.warmup_max_lr - self.warmup_min_lr) * self._height(step)

    def _height(self, step: int) -> float:
        return self._rise(step)


@dataclass(frozen=True, kw_only=True)
class WarmupDecayLR(WarmupLR):
    """`WarmupLR`, and then down again in a line, to `warmup_min_lr` at update total_num_steps + 1.

    Warns  if the warm-up is longer than the run
    """

    total_num_steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._warn_of_short(self.total_num_steps)

    def _height(self, step: int) -> float:
        past, span = self._past(step), self._span(self.total_num_steps)
        return self._rise(step) if past < 0 else max(0.0, (span - past) / max(1, span))


@dataclass(frozen=True, kw_only=True)
class WarmupCosineLR(_Warmup):
    """A factor on the optimizer's own rate: up from `warmup_min_ratio` to 1, then down a cosine to `cos_min_ratio`.

    The first update has factor 0 whatever `warmup_min_ratio` is, and the fall begins one update's worth down.

    Warns  if the warm-up is longer than the run
    """

    total_num_steps: int
    warmup_min_ratio: float = 0.0
    cos_min_ratio: float = 0.0001

    def __post_init__(self) -> None:
        super().__post_init__()
        self._warn_of_short(self.total_num_steps)

    def __call__(self, step: int) -> float:
        """Return the factor on the rate at update `step`."""
        past = self._past(step)
        if step == 0:
            return 0.0
        if past < 0:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self._rise(step)
        progress = min(1.0, (past + 1) / max(1, self._span(self.total_num_steps)))
        return max(0.0, self.cos_min_ratio + (1 - self.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """The rate goes up and down once in a line while momentum goes down and up; then the rate falls like 1 / k.

    cycle_min_lr, cycle_max_lr      the rate at both ends of the cycle, and at its peak
    decay_lr_rate, decay_mom_rate   after the cycle the rate is cycle_min_lr / (1 + decay_lr_rate t), t counting
                                    intervals of `decay_step_size` updates; momentum is *multiplied* by such a term
    cycle_first_step_size           updates of the rise
    cycle_second_step_size          updates of the fall; None: as many
    cycle_first_stair_count         the rise goes up so many stairs instead of a line; 0: a line
    cycle_second_stair_count        the same for the fall; None: as many
    decay_step_size                 updates per interval of the decay; 0: none
    cycle_momentum                  whether `momentum` gives anything
    cycle_min_mom, cycle_max_mom    momentum at the peak, and at both ends of the cycle
    """

    cycle_min_lr: float
    cycle_max_lr: float
    decay_lr_rate: float = 0.0
    cycle_first_step_size: int = 2000
    cycle_second_step_size: int | None = None
    cycle_first_stair_count: int = 0
    cycle_second_stair_count: int | None = None
    decay_step_size: int = 0
    cycle_momentum: bool = True
    cycle_min_mom: float = 0.8
    cycle_max_mom: float = 0.9
    decay_mom_rate: float = 0.0

    def __post_init__(self) -> None:
        if min(self._sizes) < 1 or self.decay_step_size < 0:
            raise UserError(
                f"a cycle of {self._sizes[0]} updates up and {self._sizes[1]} down, a decay every "
                f"{self.decay_step_size}",
                fix="sizes of the cycle of 1 or more, decay_step_size=0 or more",
            )

    def __call__(self, step: int) -> float:
        """Return the rate of update `step`."""
        if step <= sum(self._sizes):
            return self.cycle_min_lr + (self.cycle_max_lr - self.cycle_min_lr) * self._height(step)
        return self.cycle_min_lr / (1 + self.decay_lr_rate * self._intervals(step))

    def momentum(self, step: int) -> float | None:
        """Return the momentum (Adam's first beta) of update `step`, None where it is not cycled.

        Update 0 has `cycle_min_mom`, which is what DeepSpeed sets before it counts; and a positive `decay_mom_rate`
        makes momentum grow, past 1 in the end. Where momentum is cycled DeepSpeed also sets the second beta to 0.99.
        """
        if not self.cycle_momentum:
            return None
        if step == 0:
            return self.cycle_min_mom
        if step <= sum(self._sizes):
            return self.cycle_max_mom - (self.cycle_max_mom - self.cycle_min_mom) * self._height(step)
        return self.cycle_max_mom * (1 + self.decay_mom_rate * self._intervals(step))

    @property
    def _sizes(self) -> tuple[int, int]:
        first, second = self.cycle_first_step_size, self.cycle_second_step_size
        return first, first if second is None else second

    def _height(self, step: int) -> float:
        """Return how far up the cycle update `step` stands: 0 at its ends, 1 at the peak."""
        first, second = self._sizes
        num_stairs, way, size = self.cycle_first_stair_count, step, first
        if step > first:
            way, size = first + second - step, second
            if self.cycle_second_stair_count is not None:
                num_stairs = self.cycle_second_stair_count
        return way * num_stairs // size / num_stairs if num_stairs > 0 else way / size

    def _intervals(self, step: int) -> float:
        return (step - sum(self._sizes)) / self.decay_step_size if self.decay_step_size else 0.0


@dataclass(frozen=True, kw_only=True)
class LRRangeTest:
    """The rate grows in a line without end, to find the rate at which training breaks.

    lr_range_test_min_lr      the rate of the first update
    lr_range_test_step_size   updates per interval
    lr_range_test_step_rate   how many times `lr_range_test_min_lr` is added per interval
    lr_range_test_staircase   only whole intervals count
    """

    lr_range_test_min_lr: float = 1e-3
    lr_range_test_step_size: int = 2000
    lr_range_test_step_rate: float = 1.0
    lr_range_test_staircase: bool = False

    def __post_init__(self) -> None:
        if self.lr_range_test_step_size < 1:
            raise UserError(f"lr_range_test_step_size is {self.lr_range_test_step_size}", fix="1 or more")

    def __call__(self, step: int) -> float:
        """Return the rate of update `step`."""
        intervals = step / self.lr_range_test_step_size
        whole = math.floor(intervals) if self.lr_range_test_staircase else intervals
        return self.lr_range_test_min_lr * (1 + self.lr_range_test_step_rate * whole)


SCHEDULES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
}


def set_rates(groups: Iterable[dict[str, Any]], schedule: Schedule, lr: float, update: int) -> float:
    """Give an optimizer's groups the rate of an update, and its momentum where the schedule cycles it.

    groups   one that has an "lr_factor" learns at so many times the rate
    lr       what a schedule of factors multiplies; 1 for a schedule of rates
    Returns  the rate
    """
    rate = lr * schedule(update)
    momentum = schedule.momentum(update) if isinstance(schedule, OneCycle) else None
    for group in groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)
        if momentum is not None:
            group.update({"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum})
    return rate


def schedule_by_name(name: str, **params: Any) -> Schedule:
    """Return DeepSpeed's schedule of that name with these parameters, as its configuration gives them.

    Raises  UserError that names the nearest schedule or parameter, what is missing, or a value that is no number
    """
    if name not in SCHEDULES:
        raise UserError(f"no schedule is called {name!r}", fix=nearest(name, SCHEDULES) or ", ".join(SCHEDULES))
    known = {field.name: field.default for field in fields(SCHEDULES[name])}
    for param, value in params.items():
        if param not in known:
            raise UserError(f"{name} has no parameter {param!r}", fix=nearest(param, known) or ", ".join(known))
        if param != "warmup_type" and not isinstance(value, (int, float)) and value is not known[param]:
            raise UserError(f"{name}'s {param} is {value!r}", fix=f"{param}=NUMBER")
    missing = [param for param, default in known.items() if default is MISSING and param not in params]
    if missing:
        raise UserError(f"{name} lacks {', '.join(missing)}", fix=", ".join(f"{param}=NUMBER" for param in missing))
    schedule: Schedule = SCHEDULES[name](**params)
    return schedule
