"""Settle which ranks have which stages of a `PipelineModule`: pp = its number of stages, and what is left is dp."""

from torch import nn

from minispeed.axes import Layout
from minispeed.collective.group import Group
from minispeed.config import Config
from minispeed.deepspeed.mpu import Cut
from minispeed.deepspeed.pipe import PipelineModule
from minispeed.deepspeed.sharing import Sharing
from minispeed.errors import UserError


def num_pipelines(model: nn.Module, ranks: int) -> int:
    """Return how many copies of a model the ranks hold; of one that is no PipelineModule, each rank one.

    Raises  UserError if the stages do not divide the ranks
    """
    return Layout(pp=model.num_stages).mesh(ranks).dp if isinstance(model, PipelineModule) else ranks


def share_stages(model: PipelineModule, settings: Config, cut: Cut | None, world: Group) -> Sharing:
    """Return how the ranks share a PipelineModule.

    Raises  UserError if its topology has ranks elsewhere, or something else is to be cut too
    """
    if cut is not None or settings.tensor_parallel.ranks > 1:
        what = "mpu" if cut is not None else '"tensor_parallel"'
        raise UserError(f"a PipelineModule and {what}: its layers are not cut by width", fix="one of them")
    layout = Layout(pp=model.num_stages, schedule=settings.pipeline.schedule)
    mesh, topology = layout.mesh(world.size), model.topology()
    lines = [list(line) for line in mesh.lines("pp")]
    if topology.get_axis_comm_lists("pipe") != lines or topology.get_dim("data") not in (0, mesh.dp):
        what = f"the topology is {dict(zip(topology.get_axis_names(), topology.dims))}, of {world.size} ranks"
        raise UserError(what, fix=f"PipeDataParallelTopology(num_pp={mesh.pp}, num_dp={mesh.dp})")
    return Sharing(group=world, layout=layout, plan=None, cut=None)
