"""DeepSpeed's `deepspeed.pipe`."""

from minispeed.deepspeed.lazily import lazily

LAYERS = "minispeed.deepspeed.pipe_layers"
HOMES = {"LayerSpec": LAYERS, "TiedLayerSpec": LAYERS, "PipelineModule": "minispeed.deepspeed.pipe"}
__getattr__, __dir__ = lazily("minispeed.pipe", HOMES)
