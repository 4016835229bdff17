"""Write what a caller wants back as JSON and tensors, and read it: nothing in a file is ever executed.

Numbers, text, lists, tuples, dicts with any such keys; tensors and numpy arrays are put aside, by the place where they
were found. What is none of these is named and refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minispeed.checkpoint import Checkpoint
from minispeed.errors import UserError


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Return what JSON can hold of a value.

    where   what the value is called
    Writes  tensors: each under a name that begins with its number
    Raises  UserError naming the place of what cannot be stored
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        is_tensor, name = isinstance(value, Tensor), f"{len(tensors)} {where}"
        tensors[name] = value.detach().clone() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return {"tensor" if is_tensor else "array": name}
    if isinstance(value, (list, tuple)):
        inside = [encode(one, f"{where}.{index}", tensors) for index, one in enumerate(value)]
        return inside if isinstance(value, list) else {"tuple": inside}
    if isinstance(value, Mapping):
        pairs = [[encode(key, where, tensors), encode(one, f"{where}.{key}", tensors)] for key, one in value.items()]
        return {"dict": pairs}
    what = f"{where} is a {type(value).__name__}, which is no number, text, list, tuple, dict, tensor or array"
    raise UserError(what, fix="its state as such, or as text")


def decode(value: Any, stored: Checkpoint) -> Any:
    """Return what `encode` was given; its tensors are the checkpoint's state/NAME."""
    if isinstance(value, list):
        return [decode(one, stored) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tuple":
        return tuple(decode(held, stored))
    if kind == "dict":
        return {decode(key, stored): decode(one, stored) for key, one in held}
    found = stored.tensor(f"state/{held}")
    assert found is not None
    return found if kind == "tensor" else found.numpy()
