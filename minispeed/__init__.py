"""DeepSpeed you can read: chat fine-tuning and the techniques under it, in pure PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minispeed.collective.launch import launch as launch

__version__ = "0.1.0"

_HOMES = {"launch": "minispeed.collective.launch"}  # imported when first asked for: torch takes a second


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
