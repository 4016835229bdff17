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
from minispeed.parts import Lines, Part

SMALLEST_FP16 = 2.0**-24


def norm_of(parts: Sequence[Part], lines: Lines) -> tuple[float, bool]:
    """Return the global norm of the gradient, and whether all its elements are finite: the same on all ranks.

    At stage 0 every rank holds all elements of its parts, else each holds its shards.
    """
    gradients = [gradient for part in parts for gradient in part.counted_gradients()]
    squares = _squares(gradients, torch.float32)
    # a finite sum has finite terms; one that is not may have overflowed itself: look at every element
    bad = not math.isfinite(squares) and not all(gradient.isfinite().all() for gradient in gradients)
    if not math.isfinite(squares) and not bad:
        squares = _squares(gradients, torch.float64)
    is_finite = not any_of(lines.world, bad)
    holders = lines.model if parts[0].sharded.stage == 0 else lines.world
    return math.sqrt(sums_of(holders, [squares]).item()), is_finite


def clip_factor(norm: float, most: float) -> float:
    """Return what brings a gradient of this norm down to `most`: 1 if it is below, or `most` is 0."""
    return most / norm if most and norm > most else 1.0


def too_small(parts: Sequence[Part], lines: Lines, scale: float, names: Sequence[str]) -> dict[str, float]:
    """Return by module the share of the gradient's elements that fp16 could not hold without the loss scale.

    scale  what the gradient was multiplied by; an element counts that is not zero and over `scale` below 2**-24
    names  of all parameters of the whole model
    """
    modules = {name: name.rpartition(".")[0] for name in names}
    counts = {module: [0.0, 0.0] for module in modules.values()}  # of small elements, of all
    for part, unit in ((part, unit) for part in parts for unit in part.units):
        gradient = unit.gradient
        for name, elements, place in unit.layout.pieces(unit.part) if gradient is not None else ():
            assert gradient is not None
            size = gradient[slice(*place)].abs().to(torch.float64) / scale
            of = counts[modules[part.logical[name].name]]
            of[0] += int(((size > 0) & (size < SMALLEST_FP16)).sum())
            of[1] += elements.size
    flat = [number for pair in counts.values() for number in pair]
    small, every = sums_of(lines.world, flat).view(-1, 2).unbind(1)  # of copies all count: the share is the same
    return {module: float(a / b) for module, a, b in zip(counts, small, every) if b}


def _squares(gradients: Sequence[Tensor], at_least: torch.dtype) -> float:
    """Return the sum of the squares of all elements, added up in `at_least` or wider."""
    wide = [torch.promote_types(gradient.dtype, at_least) for gradient in gradients]
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient, dtype in zip(gradients, wide)]
    return sum(norm.item() ** 2 for norm in norms)
