"""DeepSpeed's `deepspeed.accelerator`."""

from minispeed.deepspeed.accelerator import get_accelerator

__all__ = ["get_accelerator"]
