"""The parameters and buffers of a checkpoint, under all their names, each read when it is asked for.

What was in half precision is given in fp32; a run in fp64 stays in it, and integers stay integers. A checkpoint holds a
tensor of several names once; its state says them (`tied`, and which parameters were `frozen`).

DeepSpeed's `GatheredTensor`: https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from minispeed.checkpoint import Checkpoint
from minispeed.errors import UserError
from minispeed.layout import Interval


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor on disk, whole.

    name  in the checkpoint: parameters/NAME or buffers/NAME
    wish  the dtype to give it in if it is a floating-point one; None: fp32, or fp64 if it is held so
    """

    checkpoint: Checkpoint
    name: str
    wish: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:
        """Return the whole shape."""
        return torch.Size(self.checkpoint.shapes[self.name])

    @cached_property
    def dtype(self) -> torch.dtype:
        """Return what `contiguous` has; reads an element, of a tensor that was cut by width all."""
        first = self.checkpoint.read(self.name, Interval(0, min(1, prod(self.shape))))
        assert first is not None
        return self._wished(first.dtype)

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes in memory."""
        return prod(self.shape) * self.dtype.itemsize

    def contiguous(self) -> Tensor:
        """Read it, onto the CPU.  Raises UserError if it is damaged"""
        found = self.checkpoint.tensor(self.name)
        assert found is not None
        return found.to(self._wished(found.dtype)).contiguous()

    def _wished(self, held: torch.dtype) -> torch.dtype:
        if not held.is_floating_point:
            return held
        return self.wish or torch.promote_types(held, torch.float32)


def stored_tensors(
    stored: Checkpoint, *, exclude_frozen: bool = False, wish: torch.dtype | None = None
) -> dict[str, StoredTensor]:
    """Return a checkpoint's parameters and buffers by name; the names of one tensor have one object.

    Raises  UserError if frozen ones are to be left out, and the checkpoint does not say which are
    """
    if exclude_frozen and "frozen" not in stored.state:
        what = f"{stored.directory} does not say which parameters were frozen"
        raise UserError(what, fix="exclude_frozen_parameters=False")
    left_out = stored.state["frozen"] if exclude_frozen else ()
    names = {full.partition("/")[2]: full for full in stored.shapes if full.startswith(("parameters/", "buffers/"))}
    found = {name: StoredTensor(stored, full, wish) for name, full in names.items() if name not in left_out}
    tied = stored.state.get("tied", {})
    return found | {name: found[first] for name, first in tied.items() if first in found}


def read_all(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Read tensors; the names of one share its memory."""
    read = {tensor: tensor.contiguous() for tensor in dict.fromkeys(tensors.values())}
    return {name: read[tensor] for name, tensor in tensors.items()}


def tied_names(module: nn.Module) -> dict[str, str]:
    """Return, for each further name of a parameter or buffer, its first, under which a checkpoint holds it."""
    parameters = module.named_parameters(remove_duplicate=False)
    first: dict[Tensor, str] = {}
    named = [*parameters, *module.named_buffers(remove_duplicate=False)]
    return {name: found for name, x in named if (found := first.setdefault(x, name)) != name}


def buffer_names(module: nn.Module) -> list[str]:
    """Return the names of the buffers that a state dict of the module would hold, each buffer once."""
    owners = module.named_modules()
    passing = {f"{where}.{name}".lstrip(".") for where, owner in owners for name in owner._non_persistent_buffers_set}
    return [name for name, _ in module.named_buffers() if name not in passing]
