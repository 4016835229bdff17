"""Say what travels between two stages: a tuple of tensors, of any dtypes and shapes, the same for all micro-batches.

Who receives must hold memory before anything comes. So the first bundle over each boundary is announced by a header:
dtype, shape, and whether a gradient comes back, of each tensor. A tensor gets a gradient back if it requires one where
it was made: integers, masks, and what nothing trained went into do not. Gradients need no header: they have the dtypes
and shapes of their tensors.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from minispeed.errors import UserError

Bundle: TypeAlias = tuple[Tensor, ...]


class Form(NamedTuple):
    """What a rank must know of a tensor before it comes."""

    dtype: str
    shape: tuple[int, ...]
    has_gradient: bool

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}" + ("" if self.has_gradient else " without gradient")

    def empty(self, device: torch.device) -> Tensor:
        """Return memory for such a tensor, or for its gradient."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device=device)


Forms: TypeAlias = tuple[Form, ...]  # of a bundle


def forms_of(bundle: Bundle) -> Forms:
    """Return the forms of a bundle's tensors."""
    return tuple(Form(str(x.dtype).removeprefix("torch."), tuple(x.shape), x.requires_grad) for x in bundle)


def header_of(forms: Forms) -> Tensor:
    """Return the forms as bytes that can be sent."""
    return torch.tensor(list(json.dumps(forms).encode()), dtype=torch.uint8)


def read_header(header: Tensor) -> Forms:
    """Return the forms that a header tells of."""
    return tuple(Form(dtype, tuple(shape), flag) for dtype, shape, flag in json.loads(bytes(header.tolist())))


def differentiable(bundle: Bundle) -> Bundle:
    """Return those tensors of a bundle that get a gradient back, in order."""
    return tuple(x for x in bundle if x.requires_grad)


def buffers(bundle: Bundle) -> list[Tensor]:
    """Return the bytes of each tensor that has any; those of a contiguous tensor are its memory."""
    return [x.detach().contiguous().view(-1).view(torch.uint8) for x in bundle if x.numel()]


def check_alike(forms: Forms, first: Forms, stage: int, micro: int) -> None:
    """Raise UserError unless a micro-batch leaves a stage in the forms of the first one."""
    if forms != first:
        what = f"stage {stage} gives {_spell(forms)} for micro-batch {micro}, but gave {_spell(first)} before"
        raise UserError(what, fix="micro-batches of one shape: fill the shorter ones up")


def _spell(forms: Sequence[Form]) -> str:
    return f"({', '.join(map(str, forms))})"
