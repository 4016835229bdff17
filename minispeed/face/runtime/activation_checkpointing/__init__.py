"""DeepSpeed's `deepspeed.runtime.activation_checkpointing`."""

from minispeed.deepspeed.lazily import lazily

HERE = "minispeed.runtime.activation_checkpointing"
__getattr__, __dir__ = lazily(HERE, {"checkpointing": f"{HERE}.checkpointing"})
