"""The device that this rank computes on, asked by DeepSpeed's names: `get_accelerator()`.

    device = get_accelerator().device_name(local_rank)          "cuda:0", or "cpu" on every rank

One class serves both kinds of device, since torch itself names things alike in `torch.cuda` and `torch.cpu`. Which
device it is, this thread's world says. Memory is in bytes; on a CPU it is that of the whole process.

https://www.deepspeed.ai/tutorials/accelerator-abstraction-interface/
"""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minispeed.collective.world import current_world
from minispeed.errors import nearest

TENSORS = {  # what `FloatTensor([1, 2])` makes
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "DoubleTensor": torch.float64,
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
}


def get_accelerator() -> "Accelerator":
    """Return the device of this thread's world."""
    return Accelerator(current_world().device)


@dataclass(frozen=True)
class Accelerator:
    """A GPU or the CPU."""

    device: torch.device

    # -------------------------------------------------------------------------------------- which one

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    def device_name(self, device_index: int | None = None) -> str:
        """Return what torch calls it: "cuda", "cuda:1", or "cpu" whatever the index."""
        return f"cuda:{device_index}" if self.is_cuda and device_index is not None else self.device.type

    def current_device(self) -> int | str:
        """Return the index of this thread's GPU, or "cpu"."""
        return torch.cuda.current_device() if self.is_cuda else "cpu"

    def current_device_name(self) -> str:
        """Return the name of this thread's device: "cuda:0" or "cpu"."""
        return f"cuda:{torch.cuda.current_device()}" if self.is_cuda else "cpu"

    def set_device(self, device_index: int) -> None:
        """Make this GPU the thread's own; the CPU is anyhow."""
        if self.is_cuda:
            torch.cuda.set_device(device_index)

    def device_count(self) -> int:
        """Return the number of GPUs of this machine; of CPUs there is one."""
        return torch.cuda.device_count() if self.is_cuda else 1

    def is_available(self) -> bool:
        """Whether it can be computed with."""
        return torch.cuda.is_available() if self.is_cuda else True

    def is_synchronized_device(self) -> bool:
        """Whether a call is complete when it returns."""
        return not self.is_cuda

    def communication_backend_name(self) -> str:
        """Return who carries messages between such devices."""
        return "nccl" if self.is_cuda else "gloo"

    def on_accelerator(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on such a device."""
        return tensor.device.type == self.device.type

    # -------------------------------------------------------------------------------------- what it can

    def is_bf16_supported(self) -> bool:
        """Whether it computes in bfloat16."""
        return torch.cuda.is_bf16_supported() if self.is_cuda else True

    def is_fp16_supported(self) -> bool:
        """Whether it computes in float16: a GPU from capability 7 on; a CPU does, slowly."""
        return torch.cuda.get_device_capability(self.device)[0] >= 7 if self.is_cuda else True

    def supported_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that a model may have here."""
        half = {torch.float16: self.is_fp16_supported(), torch.bfloat16: self.is_bf16_supported()}
        return [torch.float32, *(dtype for dtype, is_supported in half.items() if is_supported)]

    # -------------------------------------------------------------------------------------- time

    def synchronize(self, device_index: int | None = None) -> None:
        """Return when all that was begun is done."""
        if self.is_cuda:
            torch.cuda.synchronize(device_index)

    def current_stream(self, device_index: int | None = None) -> Any:
        """Return the stream that operations go to."""
        return self._torch.current_stream(device_index)

    def stream(self, stream: Any) -> Any:
        """Return a context in which operations go to a stream."""
        return self._torch.stream(stream)

    @property
    def Stream(self) -> Any:  # noqa: N802 DeepSpeed's name
        """The class of streams."""
        return self._torch.Stream

    @property
    def Event(self) -> Any:  # noqa: N802 DeepSpeed's name
        """The class of events."""
        return self._torch.Event

    def range_push(self, msg: str) -> None:
        """Begin a named range in the GPU's profile."""
        if self.is_cuda:
            torch.cuda.nvtx.range_push(msg)

    def range_pop(self) -> None:
        """End the range begun last."""
        if self.is_cuda:
            torch.cuda.nvtx.range_pop()

    # -------------------------------------------------------------------------------------- memory

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Return the bytes in use: of tensors on a GPU, of the process on a CPU."""
        return torch.cuda.memory_allocated(device_index) if self.is_cuda else _resident()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Return the most bytes in use so far."""
        return torch.cuda.max_memory_allocated(device_index) if self.is_cuda else _most_resident()

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Return the bytes that torch holds on a GPU, free ones too; on a CPU those in use."""
        return torch.cuda.memory_reserved(device_index) if self.is_cuda else _resident()

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        """Return the most bytes held so far."""
        return torch.cuda.max_memory_reserved(device_index) if self.is_cuda else _most_resident()

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Let the most be what is in use now. A process's own most is not forgotten: on a CPU nothing happens."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(device_index)

    def empty_cache(self) -> None:
        """Give back what torch holds of a GPU's memory without using it."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def total_memory(self, device_index: int | None = None) -> int:
        """Return the bytes that there are."""
        if self.is_cuda:
            return torch.cuda.get_device_properties(self.device if device_index is None else device_index).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def available_memory(self, device_index: int | None = None) -> int:
        """Return the bytes that nobody uses."""
        if self.is_cuda:
            return torch.cuda.mem_get_info(device_index)[0]
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def pin_memory(self, tensor: Tensor) -> Tensor:
        """Return a copy in memory that a GPU can read by itself; without a GPU, the tensor."""
        return tensor.pin_memory() if self.is_cuda else tensor

    # -------------------------------------------------------------------------------------- random numbers

    def random(self) -> Any:
        """Return the module of random states."""
        return torch.random

    def manual_seed(self, seed: int) -> None:
        """Start the device's default generator afresh."""
        (torch.cuda if self.is_cuda else torch).manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Start those of all devices afresh."""
        (torch.cuda.manual_seed_all if self.is_cuda else torch.manual_seed)(seed)

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        """Return the state of the device's default generator."""
        return torch.cuda.get_rng_state(self._index(device_index)) if self.is_cuda else torch.get_rng_state()

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        """Put the default generator back into a state."""
        if self.is_cuda:
            torch.cuda.set_rng_state(new_state, self._index(device_index))
        else:
            torch.set_rng_state(new_state)

    def __getattr__(self, name: str) -> Any:
        """Return a constructor of tensors on this device: `get_accelerator().LongTensor([1, 2])`."""
        if name in TENSORS:
            return partial(torch.tensor, dtype=TENSORS[name], device=self.device)
        known = [*TENSORS, *(word for word in dir(type(self)) if not word.startswith("_"))]
        near = nearest(name, known)
        raise AttributeError(f"the accelerator has no {name!r}" + (f"; try: {near}" if near else ""))

    @property
    def _torch(self) -> Any:
        return torch.cuda if self.is_cuda else torch.cpu

    def _index(self, device_index: int | None) -> int:
        return torch.cuda.current_device() if device_index is None else device_index


def _resident() -> int:
    """Return the bytes of memory that this process occupies; where the system does not tell, the most so far."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else _peak()


def _most_resident() -> int:
    """Return the most bytes of memory that this process has occupied; the system's own count lags a little."""
    return max(_peak(), _resident())


def _peak() -> int:
    import resource  # not on every system

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # Linux counts in kilobytes
