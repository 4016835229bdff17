"""DeepSpeed's `deepspeed.runtime.pipe.topology`."""

from minispeed.deepspeed.topology import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology

__all__ = ["PipeDataParallelTopology", "PipeModelDataParallelTopology", "ProcessTopology"]
