"""Where a rank stands in a pipeline, asked by DeepSpeed's names: `engine.grid.get_data_parallel_rank()`.

Megatron's word for ranks that hold one copy of the model together is "model parallel", for those that share the width
of its layers "slice parallel"; of the latter there is one here.

https://deepspeed.readthedocs.io/en/latest/pipeline.html#module-deepspeed.runtime.pipe.topology
"""

from dataclasses import dataclass

from minispeed.collective.group import Group
from minispeed.deepspeed.topology import ProcessTopology
from minispeed.parts import Lines


@dataclass(frozen=True)
class Grid:
    """The groups of one rank of an engine, and the topology of all."""

    lines: Lines
    ranks: ProcessTopology

    def topology(self) -> ProcessTopology:
        """Return where every rank stands."""
        return self.ranks

    def stage_to_global(self, stage_id: int) -> int:
        """Return the rank that has a stage of this pipeline."""
        return self.lines.pp.members[stage_id]

    def get_global_rank(self) -> int:
        """Return my number among all ranks."""
        return self.lines.world.rank

    def get_pipe_parallel_rank(self) -> int:
        """Return my stage."""
        return self.lines.pp.rank

    def get_pipe_parallel_world_size(self) -> int:
        """Return the number of stages."""
        return self.lines.pp.size

    def get_pipe_parallel_group(self) -> Group:
        """Return the ranks of this pipeline."""
        return self.lines.pp

    def get_data_parallel_rank(self) -> int:
        """Return which pipeline this is."""
        return self.lines.dp.rank

    def get_data_parallel_world_size(self) -> int:
        """Return the number of pipelines."""
        return self.lines.dp.size

    def get_data_parallel_group(self) -> Group:
        """Return the ranks with my stage in all pipelines."""
        return self.lines.dp

    def get_slice_parallel_rank(self) -> int:
        """Return 0: layers are whole."""
        return self.lines.tp.rank

    def get_slice_parallel_world_size(self) -> int:
        """Return 1."""
        return self.lines.tp.size

    def get_slice_parallel_group(self) -> Group:
        """Return the group of this rank alone."""
        return self.lines.tp

    get_stage_id = get_pipe_parallel_rank
    get_data_parallel_id = get_data_parallel_rank
    get_model_parallel_rank = get_pipe_parallel_rank
    get_model_parallel_world_size = get_pipe_parallel_world_size
    get_model_parallel_group = get_pipe_parallel_group
    get_tensor_model_parallel_rank = get_slice_parallel_rank
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size
