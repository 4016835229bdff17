"""ZeRO: the same training run with parameters, gradients and optimizer states cut over the ranks of a group.

`minispeed.zero` is also where scripts written for DeepSpeed look for `zero.Init` and its like: those names are passed
on to `minispeed.deepspeed.zero`, which is built on this room, and are imported when they are first asked for.
"""

from importlib import import_module
from typing import Any

_DEEPSPEEDS = {"Init", "GatheredParameters", "register_external_parameter", "unregister_external_parameter"}


def __getattr__(name: str) -> Any:
    if name not in _DEEPSPEEDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("minispeed.deepspeed.zero"), name)
