"""DeepSpeed's `deepspeed.runtime`."""

from minispeed.deepspeed.lazily import lazily

NAMES = ("activation_checkpointing", "config", "dataloader", "engine", "lr_schedules", "pipe", "utils", "zero")
__getattr__, __dir__ = lazily("minispeed.runtime", {name: f"minispeed.runtime.{name}" for name in NAMES})
