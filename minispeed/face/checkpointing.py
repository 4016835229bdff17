"""DeepSpeed's `deepspeed.checkpointing`."""

from minispeed.deepspeed.checkpointing import checkpoint, configure, is_configured, non_reentrant_checkpoint, reset

__all__ = ["checkpoint", "configure", "is_configured", "non_reentrant_checkpoint", "reset"]
