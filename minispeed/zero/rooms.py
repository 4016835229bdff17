"""Memory that is used again: fresh memory costs a page fault for every 4 KiB, every time."""

import torch
from torch import Tensor


class Rooms:
    """Buffers that are not in use now, kept for the next who needs one."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised buffer, (size,)."""
        nbytes = size * dtype.itemsize
        fitting = [room for room in self._free if room.numel() >= nbytes and room.device == device]
        if not fitting:
            return torch.empty(nbytes, dtype=torch.uint8, device=device).view(dtype)
        room = min(fitting, key=Tensor.numel)
        self._free = [other for other in self._free if other is not room]
        return room[:nbytes].view(dtype)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back, whole, that nobody uses any more."""
        storage = buffer.untyped_storage()
        self._free.append(torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(storage))
