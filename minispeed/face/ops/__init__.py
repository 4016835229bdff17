"""DeepSpeed's `deepspeed.ops`."""

from minispeed.deepspeed.lazily import lazily

__getattr__, __dir__ = lazily("minispeed.ops", {"adam": "minispeed.ops.adam"})
