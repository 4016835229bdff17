"""Draw each parameter from (seed, its name), so that no layout changes what a model starts from.

A generator shared by all parameters would give a model cut over 8 ranks other weights than the whole one. Here each
is drawn whole, on the CPU, in fp32, from a generator of its own, then cast (and, elsewhere, cut). Matrices follow
the small initialisation sqrt(2 / 5D) of Nguyen & Salazar 2019, section 2.2 (https://arxiv.org/abs/1910.05895): at
D = 768 that is 0.023, GPT-2's 0.02. Those that write into the residual stream are divided by sqrt(2 x layers), as
in GPT-2 (Radford et al. 2019, section 2.3).
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn


def seed_of(seed: int, *names: object) -> int:
    """Return 63 bits that depend on every argument, the same on every machine."""
    text = "\0".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def draw(seed: int, name: str, shape: Iterable[int], std: float) -> Tensor:
    """Return the normal numbers that belong to the parameter `name`.  (shape), fp32, on the CPU"""
    generator = torch.Generator().manual_seed(seed_of(seed, name))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32) * std


def initialise(
    model: nn.Module, *, seed: int, model_dim: int, num_layers: int, given: Mapping[str, Tensor] | None = None
) -> None:
    """Make every parameter of a model that was built on the meta device, one after the other, by its name's last parts.

    Biases start at 0, gains of norms at 1, matrices at sqrt(2 / 5D), those named `out` or `down` smaller; those in
    `given` at the values there. A parameter with several homes (a tied head) is made once.
    """
    given = given or {}

    def value(name: str, p: Tensor) -> Tensor:
        if name in given:
            return given[name]
        return first_value(seed, name, p.shape, model_dim=model_dim, num_layers=num_layers)

    _make(model, value)


def hollow(model: nn.Module, device: torch.device) -> None:
    """Give every parameter of a model that was built on the meta device its shape and no memory: all zeros are one.

    For values that are read from elsewhere, slice by slice, once it is known who holds what.
    """
    _make(model, lambda name, p: torch.zeros((), device=device).expand(p.shape))


def first_value(seed: int, name: str, shape: Iterable[int], *, model_dim: int, num_layers: int) -> Tensor:
    """Return what the parameter `name` of a new model starts as, by the rules above.  (shape), fp32"""
    shape = tuple(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    writes_to_stream = name.rpartition(".")[0].endswith((".out", ".down"))
    shrink = math.sqrt(2 * num_layers) if writes_to_stream else 1.0
    return draw(seed, name, shape, math.sqrt(2 / (5 * model_dim)) / shrink)


def _make(model: nn.Module, value: Callable[[str, Tensor], Tensor]) -> None:
    """Put a parameter of such a value in every parameter's place, the same object in all places of the same."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        home, _, kind = name.rpartition(".")
        if p not in made:
            made[p] = nn.Parameter(value(name, p))
        setattr(model.get_submodule(home), kind, made[p])
