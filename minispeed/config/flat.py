"""The flat dialect: settings by names of one level, train_lr, train_fp16, ..., each another name of a DeepSpeed key.

    minispeed.initialize(model=model, train_batch_size=32, train_micro_batch_size=8, train_fp16=True, ...)

Two things are read with care. `train_init_scale` and `train_loss_scale` with one value mean a loss scale that starts
there and is then found while training (DeepSpeed's `loss_scale` would keep it, and 2^24 overflows at every fp16 step).
And `train_lr_schedule_type` names the rise: nothing says how many steps the rate could fall over, so it stays.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from minispeed.config.check import (
    AMOUNT,
    DTYPES,
    MISFIT,
    POSITIVE,
    DeepSpeedConfigError,
    Type,
    choice,
    read_value,
)
from minispeed.config.key import Given
from minispeed.errors import nearest

SCALE, STATIC, POWER = "train_init_scale", "train_loss_scale", "fp16.initial_scale_power"
RISE = "train_lr_schedule_type"


class Flat(NamedTuple):
    """A flat name: the key that it stands for; `type`, where it takes other values than the key; a line about it."""

    key: str
    type: Type | None = None
    what: str = ""


def _read_power(value: Any) -> Any:
    """Return the exponent of a power of two that fp16.initial_scale_power can be."""
    size = POSITIVE.read(value)
    mantissa, exponent = math.frexp(size) if size is not MISFIT else (0.0, 0)
    return exponent - 1 if mantissa == 0.5 and 1 <= exponent <= 128 else MISFIT


def _read_compression(value: Any) -> Any:
    return {"none": None}.get(value, choice(*DTYPES).read(value)) if isinstance(value, str) else MISFIT


FLAT = {
    "train_batch_size": Flat("train_batch_size"),
    "train_micro_batch_size": Flat("train_micro_batch_size_per_gpu"),
    "train_gradient_accumulation_steps": Flat("gradient_accumulation_steps"),
    "train_use_amp": Flat("fp16.enabled", None, "mixed precision is fp16 with fp32 masters"),
    "train_fp16": Flat("fp16.enabled"),
    SCALE: Flat(POWER, Type("a power of two, from 1 to 2^127", _read_power, 65536), "its power of two"),
    STATIC: Flat("fp16.loss_scale", None, "with the value of train_init_scale it says no more than that"),
    "train_lr": Flat("optimizer.params.lr"),
    "train_optimizer": Flat("optimizer.type"),
    RISE: Flat("scheduler.params.warmup_type", None, "of WarmupLR: the rate rises so, and stays"),
    "train_warmup_steps": Flat("scheduler.params.warmup_num_steps", None, "of WarmupLR where no schedule is named"),
    "train_weight_decay": Flat("optimizer.params.weight_decay"),
    "train_fp16_compression": Flat(
        "communication_data_type",
        Type(f"one of none, {', '.join(DTYPES)}", _read_compression, "none"),
        "none: the compute dtype",
    ),
}


def unflatten(flat: Mapping[str, Any]) -> tuple[list[tuple[str, Given]], list[str]]:
    """Return the keys that flat names stand for, with their values, and lines about what was read with care.

    Raises  DeepSpeedConfigError for a name that is none, a value that is none of its type, or two loss scales
    """
    for name in flat:
        if name not in FLAT:
            close = nearest(str(name), FLAT) or ", ".join(FLAT)
            raise DeepSpeedConfigError(f'"{name}" is no flat name of a setting', fix=close)
    left, notes = {name: Given(_translated(name, value), name) for name, value in flat.items()}, list[str]()
    if SCALE in left and STATIC in left:
        start, static = 2.0 ** left[SCALE].value, read_value(STATIC, left[STATIC].value, AMOUNT, 0)
        if static == start:
            left[STATIC] = Given(0.0, STATIC)
            notes.append(f"{SCALE} and {STATIC} are both {start:.0f}: a loss scale that starts there and changes")
        elif static:
            what = f"{SCALE} is {start:g}, where a loss scale starts, but {STATIC} is {static:g}, one that stays"
            raise DeepSpeedConfigError(what, fix="one of the two, or both with one value")
    return [(FLAT[name].key, one) for name, one in left.items()], notes


def _translated(name: str, value: Any) -> Any:
    own = FLAT[name].type
    return value if own is None else read_value(name, value, own, None)
