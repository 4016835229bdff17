"""DeepSpeed's `deepspeed.runtime.dataloader`."""

from minispeed.deepspeed.loader import RepeatingLoader

__all__ = ["RepeatingLoader"]
