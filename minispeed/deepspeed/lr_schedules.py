"""DeepSpeed's five learning-rate schedules with a counter and an optimizer, as its scripts use them.

    scheduler = WarmupLR(optimizer, warmup_max_lr=1e-3, warmup_num_steps=100)      sets the first update's rate
    optimizer.step(); scheduler.step()                                             sets the next one's

The curves are `minispeed.schedules`, pure functions of the index of the update; here stands who asks them. DeepSpeed's
counter `last_batch_iteration` is -1 before the first update, so what it sets is the rate of update counter + 1.
Every setting may be a list, one value for each of the optimizer's groups.

https://deepspeed.readthedocs.io/en/latest/schedulers.html
"""

import warnings
from typing import Any

import torch

from minispeed.errors import UserError
from minispeed.schedules import Schedule, WarmupCosineLR as CosineFactor, schedule_by_name

SECOND_BETA = 0.99  # what DeepSpeed sets beside a cycled momentum


class Scheduler:
    """What the five share. `settings` are DeepSpeed's names in its order, for those who give them without names."""

    settings: tuple[str, ...] = ()

    def __init__(self, optimizer: Any, *values: Any, last_batch_iteration: int = -1, **named: Any) -> None:
        """Set the rates of the first update, if none has been made.

        optimizer             an optimizer, or something that holds one as `optimizer`
        last_batch_iteration  the index of the last update that was made
        Raises                UserError that names the setting which is missing, unknown, given twice or of a wrong
                              value, or whose list has another length than the optimizer has groups
        """
        self.optimizer: Any = optimizer if hasattr(optimizer, "param_groups") else getattr(optimizer, "optimizer", ())
        if not hasattr(self.optimizer, "param_groups"):
            raise UserError(f"{type(optimizer).__name__} is no optimizer", fix="an optimizer of torch.optim's kind")
        given = _by_name(type(self).__name__, (*self.settings, "last_batch_iteration"), values, named)
        self.last_batch_iteration: int = given.pop("last_batch_iteration", last_batch_iteration)
        self._curves = [self._curve(given, index) for index in range(len(self.optimizer.param_groups))]
        if self.last_batch_iteration == -1:
            self._set()

    def get_lr(self) -> list[float]:
        """Return the rate of the coming update, for each of the optimizer's groups."""
        return [base * schedule(self.last_batch_iteration + 1) for base, schedule in self._curves]

    def get_last_lr(self) -> list[float]:
        """Return the rates that the optimizer has."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Count an update, or up to a given one, and set the rates of the next."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._set()

    def state_dict(self) -> dict[str, int]:
        """Return the counter."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, sd: dict[str, int]) -> None:
        """Go on from a counter; the optimizer's rates are in its own state."""
        self.last_batch_iteration = sd["last_batch_iteration"]

    def _curve(self, given: dict[str, Any], index: int) -> tuple[float, Schedule]:
        """Return what one group's schedule is multiplied by, and the schedule."""
        group = self.optimizer.param_groups[index]
        own = {name: self._of_group(name, value, index) for name, value in given.items()}
        if own.get("warmup_max_lr", 0) is None:
            own["warmup_max_lr"] = float(group["lr"])
        schedule = schedule_by_name(type(self).__name__, **own)
        return float(group["lr"]) if isinstance(schedule, CosineFactor) else 1.0, schedule

    def _of_group(self, name: str, value: Any, index: int) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        num_groups = len(self.optimizer.param_groups)
        if len(value) != num_groups:
            what = f"{name} has {len(value)} values, and the optimizer {num_groups} groups of parameters"
            raise UserError(what, fix="one value, or one for each group")
        return value[index]

    def _set(self) -> None:
        """Give the optimizer the rates of the coming update."""
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


class LRRangeTest(Scheduler):
    """`minispeed.schedules.LRRangeTest`: up without end."""

    settings = (
        "lr_range_test_min_lr",
        "lr_range_test_step_size",
        "lr_range_test_step_rate",
        "lr_range_test_staircase",
    )


class OneCycle(Scheduler):
    """`minispeed.schedules.OneCycle`: up, down, decay; with Adam's first beta in the other direction.

    Warns  where momentum is to be cycled and the optimizer has no betas
    """

    settings = (
        "cycle_min_lr",
        "cycle_max_lr",
        "decay_lr_rate",
        "cycle_first_step_size",
        "cycle_second_step_size",
        "cycle_first_stair_count",
        "cycle_second_stair_count",
        "decay_step_size",
        "cycle_momentum",
        "cycle_min_mom",
        "cycle_max_mom",
        "decay_mom_rate",
    )

    def get_mom(self) -> list[tuple[float, float]] | None:
        """Return the betas of the coming update for each group, None where they are not cycled."""
        moments = [schedule.momentum(self.last_batch_iteration + 1) for _, schedule in self._curves]  # type: ignore[attr-defined]
        return None if None in moments else [(moment, SECOND_BETA) for moment in moments]

    def _set(self) -> None:
        super()._set()
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or []):
            if "betas" in group:
                group["betas"] = betas
            elif self.last_batch_iteration == -1:
                name = type(self.optimizer).__name__
                warnings.warn(f"OneCycle cycles no momentum: {name} has no betas", stacklevel=4)


class WarmupLR(Scheduler):
    """`minispeed.schedules.WarmupLR`: up, and stay; without `warmup_max_lr` up to the rate that each group has."""

    settings = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type")

    def _curve(self, given: dict[str, Any], index: int) -> tuple[float, Schedule]:
        return super()._curve({"warmup_max_lr": None, **given}, index)


class WarmupDecayLR(Scheduler):
    """`minispeed.schedules.WarmupDecayLR`: up, and down in a line."""

    settings = ("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type")


class WarmupCosineLR(Scheduler):
    """`minispeed.schedules.WarmupCosineLR`: up and down a cosine, as a factor on the rate that each group has."""

    settings = ("total_num_steps", "warmup_min_ratio", "warmup_num_steps", "cos_min_ratio", "warmup_type")


SCHEDULERS = {kind.__name__: kind for kind in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)}
VALID_LR_SCHEDULES = list(SCHEDULERS)


def _by_name(kind: str, names: tuple[str, ...], values: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Join the settings given in order with those given by name."""
    if len(values) > len(names):
        raise UserError(f"{kind} got {len(values)} settings", fix=f"at most {len(names)}: {', '.join(names)}")
    given = dict(zip(names, values))
    for name in given.keys() & named.keys():
        raise UserError(f"{kind} got {name} twice", fix=f"{name}={named[name]} alone")
    return {**given, **named}
