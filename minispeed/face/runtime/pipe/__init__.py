"""DeepSpeed's `deepspeed.runtime.pipe`."""

from minispeed.deepspeed.lazily import lazily

HERE = "minispeed.runtime.pipe"
LAYERS, MODULE, TOPOLOGY = (f"minispeed.deepspeed.{name}" for name in ("pipe_layers", "pipe", "topology"))
HOMES = {"LayerSpec": LAYERS, "TiedLayerSpec": LAYERS, "PipelineModule": MODULE, "ProcessTopology": TOPOLOGY}
PARTS = {name: f"{HERE}.{name}" for name in ("engine", "module", "topology")}
__getattr__, __dir__ = lazily(HERE, HOMES | PARTS)
