"""DeepSpeed's `deepspeed.utils.logging`."""

from minispeed.deepspeed.logging import log_dist, logger, print_dist

__all__ = ["log_dist", "logger", "print_dist"]
