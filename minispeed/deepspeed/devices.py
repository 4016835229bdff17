"""Tensors that are born in another dtype or on another device: `OnDevice`, and the dtype of `zero.Init`.

    with OnDevice(dtype=torch.float16, device="meta"):      shapes without elements
        model = Model()

Reaches what torch's functions make on this thread (`torch.empty`, `torch.randn`, ...), and so what torch's modules are
made of; not `torch.Tensor(2, 3)`. A dtype that the call names stays.

https://deepspeed.readthedocs.io/en/latest/inference-init.html
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

BIRTHS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.tensor, torch.linspace}


class Born(TorchFunctionMode):
    """Floating-point tensors made inside this, on this thread, have `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in BIRTHS or (kwargs or {}).get("dtype") is not None or not made.is_floating_point():
            return made
        return made.detach().to(self.dtype).requires_grad_(made.requires_grad)


@contextlib.contextmanager
def OnDevice(dtype: torch.dtype | None, device: str = "meta", enabled: bool = True) -> Iterator[None]:  # noqa: N802
    """Let tensors made inside this be of `dtype`, on `device`; not enabled, as everywhere."""
    with contextlib.ExitStack() as stack:
        if enabled:
            stack.enter_context(torch.device(device))
            if dtype is not None:
                stack.enter_context(Born(dtype))
        yield
