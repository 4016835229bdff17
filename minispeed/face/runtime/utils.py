"""DeepSpeed's `deepspeed.runtime.utils`."""

from minispeed.deepspeed.logging import see_memory_usage, set_random_seed

__all__ = ["see_memory_usage", "set_random_seed"]
