"""The state of all stages together: every rank of a pipeline has it whole, or its stage's part of it replaced.

What one stage holds the ranks of its pipeline are sent. A buffer, as a norm's running mean, is the stage's that first
uses it; another pipeline may have another one, and the first pipeline's are saved.

https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minispeed.collective.numbers import sums_of
from minispeed.deepspeed import saving
from minispeed.errors import UserError

if TYPE_CHECKING:
    from minispeed.deepspeed.pipe_engine import PipelineEngine


def save_checkpoint(
    self: "PipelineEngine",
    save_dir: str | Path,
    tag: str | None = None,
    client_state: Mapping[str, Any] = {},
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """Write a checkpoint together, which goes on with any number of stages; see `saving.save_checkpoint`."""
    _share_buffers(self)
    return saving.save_checkpoint(self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters)


def module_state_dict(
    self: "PipelineEngine",
    destination: dict[str, Any] | None = None,
    prefix: str = "",
    keep_vars: bool = False,
    exclude_frozen_parameters: bool = False,
) -> dict[str, Any]:
    """Return the parameters and buffers of all stages, whole, on every rank, on its device.

    keep_vars  means nothing here: what is another rank's can only be a copy
    Sends      each parameter over its pipeline
    """
    _share_buffers(self)
    names = {p: name for name, p in self.module.named_parameters()}
    parameters = _whole_parameters(self)
    found: dict[str, Any] = {} if destination is None else destination
    for key, value in self.module.state_dict(keep_vars=True).items():
        if not isinstance(value, nn.Parameter):
            found[prefix + key] = value.detach().to(self.device)
        elif value.requires_grad or not exclude_frozen_parameters:
            found[prefix + key] = parameters[names[value]]
    return found


@torch.no_grad()
def load_module_state_dict(self: "PipelineEngine", state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Replace parameters and buffers of all stages by what `module_state_dict` returned; the masters follow.

    Raises  UserError, if `strict`, where the names are not the module's
    """
    (part,) = self._trained().parts
    expected = self.module.state_dict(keep_vars=True).keys()
    for name in sorted(expected ^ state_dict.keys()) if strict else ():
        who = "the state dict" if name in expected else "the module"
        raise UserError(f"{who} lacks {name}", fix="strict=False, or a state dict of this model")
    with part.sharded.gathered() as chunk:
        here = chunk.state_dict(keep_vars=True)
        chunk.load_state_dict({name: state_dict[name] for name in here if name in state_dict}, strict=False)
        for unit in part.sharded.units:
            unit.take(0)


def _share_buffers(engine: "PipelineEngine") -> None:
    """Let the ranks of a pipeline have the buffers of each other's stages."""
    for stage, buffer in engine.module.buffers_by_stage():
        travels = buffer.detach().cpu().contiguous()
        engine.lines.pp.broadcast(travels, stage).wait()
        buffer.copy_(travels)


@torch.no_grad()
def _whole_parameters(engine: "PipelineEngine") -> dict[str, Tensor]:
    """Return copies of all stages' parameters, by their names in the whole."""
    core, pipeline = engine._trained(), engine.lines.pp
    (part,) = core.parts
    mine = {of.name: local for local, of in part.logical.items() if of.counts}
    whole: dict[str, Tensor] = {}
    with part.sharded.gathered() as chunk:
        held = dict(chunk.named_parameters())
        for name, shape in engine.module.shapes.items():
            room = torch.empty(shape, dtype=core.precision.compute, device=engine.device)
            whole[name] = held[mine[name]].detach().clone() if name in mine else room
    owners = sums_of(pipeline, [pipeline.rank * (name in mine) for name in whole]).long().tolist()
    for (name, x), owner in zip(whole.items(), owners):
        pipeline.broadcast(x, owner).wait()
    return whole
