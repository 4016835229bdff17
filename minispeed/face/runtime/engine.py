"""DeepSpeed's `deepspeed.runtime.engine`."""

from minispeed.deepspeed.lazily import lazily

__getattr__, __dir__ = lazily("minispeed.runtime.engine", {"DeepSpeedEngine": "minispeed.deepspeed.engine"})
