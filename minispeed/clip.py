"""Look at the whole gradient before the optimizer does: its norm, whether it is finite, what fp16 could not hold.

The gradient lies in the units, in pieces over the ranks; each of its elements counts once, so that one norm, one clip
and one decision hold for all.

Clipping by the global norm: Pascanu et al. 2013, section 3.2 (https://arxiv.org/abs/1211.5063).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minispeed.collective.numbers import any_of, sums_of
from minispeed.zero.sharded import ShardedModel

SMALLEST_FP16 = 2.0**-24


def norm_of(sharded: ShardedModel) -> tuple[float, bool]:
    """Return the global norm of the gradient, and whether all its elements are finite: the same on all ranks.

    At stage 0 every rank holds all elements, else each holds its shard.
    """
    gradients = [unit.gradient for unit in sharded.units if unit.gradient is not None]
    squares = _squares(gradients, torch.float32)
    # a finite sum has finite terms; one that is not may have overflowed itself: look at every element
    bad = not math.isfinite(squares) and not all(gradient.isfinite().all() for gradient in gradients)
    if not math.isfinite(squares) and not bad:
        squares = _squares(gradients, torch.float64)
    is_finite = not any_of(sharded.group, bad)
    squares = squares if sharded.stage == 0 else sums_of(sharded.group, [squares]).item()
    return math.sqrt(squares), is_finite


def clip_factor(norm: float, most: float) -> float:
    """Return what brings a gradient of this norm down to `most`: 1 if it is below, or `most` is 0."""
    return most / norm if most and norm > most else 1.0


def too_small(sharded: ShardedModel, scale: float) -> dict[str, float]:
    """Return by module the share of the gradient's elements that fp16 could not hold without the loss scale.

    scale  what the gradient was multiplied by; an element counts that is not zero and over `scale` below 2**-24
    """
    modules = {name: name.rpartition(".")[0] for unit in sharded.units for name in unit.parameters}
    counts = {module: [0.0, 0.0] for module in modules.values()}  # of small elements, of all
    for unit in sharded.units:
        gradient = unit.gradient
        for name, elements, place in unit.layout.pieces(unit.part) if gradient is not None else ():
            assert gradient is not None
            size = gradient[slice(*place)].abs().to(torch.float64) / scale
            counts[modules[name]][0] += int(((size > 0) & (size < SMALLEST_FP16)).sum())
            counts[modules[name]][1] += elements.size
    flat = [number for pair in counts.values() for number in pair]
    small, every = sums_of(sharded.group, flat).view(-1, 2).unbind(1)  # at stage 0 each rank counts all: same share
    return {module: float(a / b) for module, a, b in zip(counts, small, every) if b}


def _squares(gradients: Sequence[Tensor], at_least: torch.dtype) -> float:
    """Return the sum of the squares of all elements, added up in `at_least` or wider."""
    wide = [torch.promote_types(gradient.dtype, at_least) for gradient in gradients]
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient, dtype in zip(gradients, wide)]
    return sum(norm.item() ** 2 for norm in norms)
