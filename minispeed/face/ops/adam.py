"""DeepSpeed's `deepspeed.ops.adam`."""

from minispeed.deepspeed.adam import DeepSpeedCPUAdam, FusedAdam

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]
