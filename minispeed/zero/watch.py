"""Notice that an operation is about to read a tensor, whoever made it.

Two ways, for one alone would miss some: a mode that sees the arguments of each function of torch's, and hooks on what
autograd saves, which see it when it is taken out again. (A backward is handed to the modes that are on, and runs
without them.)

torch's extension by `__torch_function__`: https://docs.pytorch.org/docs/stable/notes/extending.html
"""

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Touch = Callable[[Tensor], None]


class Touching(TorchFunctionMode):
    """Call `touch` on every tensor that an operation is given, before the operation."""

    def __init__(self, touch: Touch) -> None:
        super().__init__()
        self.touch = touch

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tensors_in((args, kwargs or {})):
            self.touch(one)
        return func(*args, **(kwargs or {}))


def touching_saved(touch: Touch) -> torch.autograd.graph.saved_tensors_hooks:
    """Call `touch` on every tensor that autograd saves inside this, when it is taken out again."""

    def unpack(x: Tensor) -> Tensor:
        touch(x)
        return x

    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among (nested) arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif is_dataclass(value):
        yield from tensors_in(vars(value))
