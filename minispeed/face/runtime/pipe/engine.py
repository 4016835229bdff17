"""DeepSpeed's `deepspeed.runtime.pipe.engine`."""

from minispeed.deepspeed.pipe_engine import PipelineEngine

__all__ = ["PipelineEngine"]
