"""Choose the dtypes of a run: parameters and their products in one, the masters that remember small steps in another.

A bf16 number has 8 significant bits: a step of less than 1/256 of a weight is lost when added to it. So parameters
and gradients are kept in the compute dtype, where products are fast, and the optimizer adds to fp32 copies.

Mixed precision: Micikevicius et al. 2017, section 3.1 (https://arxiv.org/abs/1710.03740).
"""

import time
from dataclasses import dataclass

import torch

from minispeed.errors import UserError, nearest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ALIASES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float64": "fp64",
    "double": "fp64",
}


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run, and why they were chosen.

    compute     parameters, products, and the gradients that autograd makes
    reduce      gradients on their way between ranks; the compute dtype when None
    accumulate  gradients added up over micro-batches; the masters' dtype when None
    """

    compute: torch.dtype
    reason: str = "asked for"
    reduce: torch.dtype | None = None
    accumulate: torch.dtype | None = None

    @property
    def master(self) -> torch.dtype:
        """What the optimizer adds to: fp32, or fp64 for a model in fp64."""
        return torch.promote_types(self.compute, torch.float32)

    @property
    def needs_scaler(self) -> bool:
        """Whether small gradients fall below the smallest number: fp16's is 6e-8, the others' 1e-38 or less."""
        return torch.float16 in (self.compute, self.reduce)

    @property
    def name(self) -> str:
        """The short name that the command line uses."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.compute)


def choose_precision(name: str) -> Precision:
    """Return the precision called "fp32", "bf16", "fp16" or "fp64".

    "auto" takes, on a GPU, bf16 where it is native and else fp16; on a CPU it measures, and takes the fast one.
    """
    name = ALIASES.get(name, name)
    if name == "auto" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = f"this GPU {'has' if native else 'lacks'} bf16 products"
        return Precision(torch.bfloat16 if native else torch.float16, reason)
    if name == "auto":
        return _measured()
    if name not in DTYPES:
        raise UserError(f"no dtype is called {name!r}", fix=f"--dtype {nearest(name, [*DTYPES, 'auto']) or 'auto'}")
    if name == "fp16" and not torch.cuda.is_available():
        return Precision(torch.float16, "asked for: right on a CPU, and several times slower than fp32 there")
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
