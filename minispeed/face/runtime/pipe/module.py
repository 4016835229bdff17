"""DeepSpeed's `deepspeed.runtime.pipe.module`."""

from minispeed.deepspeed.pipe import PipelineModule
from minispeed.deepspeed.pipe_layers import LayerSpec, PipelineError, TiedLayerSpec

__all__ = ["LayerSpec", "PipelineError", "PipelineModule", "TiedLayerSpec"]
