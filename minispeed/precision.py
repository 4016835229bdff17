"""Choose the dtypes of a run: parameters and their products in one, the masters that remember small steps in another.

A bf16 number has 8 significant bits: a step of less than 1/256 of a weight is lost when added to it. So parameters
and gradients are kept in the compute dtype, where products are fast, and the optimizer adds to fp32 copies.

Mixed precision: Micikevicius et al. 2017, section 3.1 (https://arxiv.org/abs/1710.03740).
"""

import time
from dataclasses import dataclass

import torch

from minispeed.errors import UserError, nearest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64", "float": "fp32", "double": "fp64"}


@dataclass(frozen=True)
class Precision:
    """Dtypes of parameters (`compute`) and of what the optimizer adds to (`master`), and why they were chosen."""

    compute: torch.dtype
    reason: str = "asked for"

    @property
    def master(self) -> torch.dtype:
        """fp32, or fp64 for a model in fp64."""
        return torch.promote_types(self.compute, torch.float32)

    @property
    def name(self) -> str:
        """The short name that the command line uses."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.compute)


def choose_precision(name: str) -> Precision:
    """Return the precision called "fp32", "bf16" or "fp64"; "auto" measures this processor and takes the fast one."""
    name = ALIASES.get(name, name)
    if name == "auto":
        return _measured()
    if name not in DTYPES:
        raise UserError(f"no dtype is called {name!r}", fix=f"--dtype {nearest(name, [*DTYPES, 'auto']) or 'auto'}")
    return Precision(DTYPES[name])


def _measured(*, least: float = 1.3) -> Precision:
    """Time a product of a small layer's shape in bf16 and fp32, in turn; bf16 must win by `least` to be chosen."""
    slower = {dtype: float("inf") for dtype in (torch.bfloat16, torch.float32)}
    operands = {dtype: (torch.ones(2048, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)) for dtype in slower}
    for _ in range(8):
        for dtype, (x, w) in operands.items():
            start = time.perf_counter()
            x @ w
            slower[dtype] = min(slower[dtype], time.perf_counter() - start)
    ratio = slower[torch.float32] / slower[torch.bfloat16]
    compute = torch.bfloat16 if ratio >= least else torch.float32
    return Precision(compute, f"bf16 products take 1/{ratio:.1f} of fp32's time here")
