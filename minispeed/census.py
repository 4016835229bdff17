"""Count the bytes that are alive while a piece of code runs, autograd's saved tensors among them.

Python's garbage collector does not see what autograd holds, and the process's size does not shrink when a tensor is
freed. So every operation is watched, the storage of each result is remembered weakly, and after each operation the
sizes of those still alive are added up: a storage that was shrunk counts as what is left of it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Census(TorchDispatchMode):
    """The storages that operations make inside `with census:`, on this thread (the backward runs in it too).

    peak  most bytes alive after any operation so far
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Count also the storages of `known` tensors, which were there before."""
        super().__init__()
        self.peak = 0
        self._weak: dict[int, Any] = {}
        for tensor in known:
            self._remember(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._remember(value)
        self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Return the bytes that are alive now."""
        total = 0
        for key, weak in list(self._weak.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
            if storage is None:
                del self._weak[key]
            else:
                total += storage.nbytes()
        return total

    def _remember(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weak or self._weak[storage._cdata].expired():
            self._weak[storage._cdata] = StorageWeakRef(storage)


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of the storages under these tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
