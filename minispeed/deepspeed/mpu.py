"""Train a model that its caller has cut by width himself: `initialize(mpu=...)`, Megatron's interface.

    mpu.get_data_parallel_group()      ranks with equal slices and other rows: ZeRO and the mean gradient are theirs
    mpu.get_model_parallel_group()     ranks that hold one copy of the model together

The slices are the caller's, and so are their layers and messages. What the engine must know of each parameter stands on
it, as Megatron marks it: `tensor_model_parallel` (or `model_parallel`) True where it is a slice, `partition_dim` along
which dim. A slice counts in the norm on every rank, what is not marked is a copy and counts on the first; a checkpoint
puts slices together, so that the caller may load it under another cut.

A parameter in the module is the caller's own: `module_state_dict` and `safe_get_full_*` give it as it is on this rank.

Megatron-LM, Shoeybi et al. 2019, section 3 (https://arxiv.org/abs/1909.08053);
https://deepspeed.readthedocs.io/en/latest/initialize.html
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.numbers import everyones
from minispeed.deepspeed.groups import AnyGroup, group_of
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.optim import check_elementwise
from minispeed.parts import Logical
from minispeed.placement import WHOLE, Shard, Slice

MODEL_GROUPS = ("get_model_parallel_group", "get_tensor_model_parallel_group", "get_slice_parallel_group")
MARKS = ("tensor_model_parallel", "model_parallel")


@dataclass(frozen=True)
class Cut:
    """The groups of a caller who has cut the model: the world's, of ranks with other rows, of ranks of one copy."""

    world: Group
    data: Group
    model: Group


def groups_of(mpu: Any, world: Group) -> Cut | None:
    """Return the groups that an mpu describes, None without one; every rank calls this.

    Sends   8 bytes per rank and group
    Raises  UserError if it has no data-parallel group, or ranks along more than those two axes
    """
    if mpu is None:
        return None
    if not hasattr(mpu, "get_data_parallel_group"):
        what = f"mpu is a {type(mpu).__name__} without get_data_parallel_group"
        raise UserError(what, fix="an object with get_data_parallel_group and get_model_parallel_group")
    asked: list[Callable[[], AnyGroup]] = [getattr(mpu, name) for name in MODEL_GROUPS if hasattr(mpu, name)]
    data = _regroup(world, mpu.get_data_parallel_group())
    model = _regroup(world, asked[0]()) if asked else SoloGroup(world.members[world.rank])
    if data.size * model.size != world.size:
        sides = f"{data.size} data-parallel x {model.size} model-parallel"
        raise UserError(f"mpu has {sides} ranks, and the world {world.size}", fix="those two axes alone")
    return Cut(world, data, model)


def _regroup(world: Group, given: AnyGroup) -> Group:
    """Return our group of the ranks that are in a group of the caller's."""
    members = sorted(group_of(given).members)
    first = everyones(world, [members[0]]).flatten().tolist()
    lines = [[rank for rank in range(world.size) if first[rank] == root] for root in sorted({*first})]
    if members not in lines:
        what = f"rank {world.rank} is in the mpu's group {members}, and other ranks do not agree"
        raise UserError(what, fix="groups that hold every rank once")
    return world.subgroup(lines)


def join(core: Engine, cut: Cut) -> None:
    """Let an engine of the data-parallel ranks take the norm, and write checkpoints, together with the other ranks.

    Raises  UserError if the optimizer looks at whole matrices
    """
    check_elementwise(core.optimizer, core.sharded.stage, tp=cut.model.size)
    (part,) = core.parts
    named = core.model.named_parameters()
    logical = {name: _logical(part.logical[name], p, cut.model) for name, p in named}
    core.parts = [replace(part, logical=logical)]
    core.lines = replace(core.lines, world=cut.world, model=cut.model)
    core.group = cut.world


def is_cut_by_caller(core: Engine) -> bool:
    """Return whether more ranks hold one copy of the model than the engine itself has cut it over."""
    return core.lines.model.size > core.layout.tp * core.layout.pp


def check_places(core: Engine) -> None:
    """Raise UserError if a slice does not say of what, so that no checkpoint can hold it."""
    if not is_cut_by_caller(core):
        return
    for name, p in core.model.named_parameters():
        if _is_slice(p) and core.parts[0].logical[name].part == WHOLE:
            what = f"{name} is marked as a slice, and nothing says of which dim: no checkpoint can put it together"
            raise UserError(what, fix="p.partition_dim = 0 or 1, and partition_stride = 1, before initialize")


def _logical(local: Logical, p: torch.Tensor, model: Group) -> Logical:
    """Return what a parameter of this rank is to the whole model."""
    if not _is_slice(p):
        return replace(local, counts=model.rank == 0)
    dim = getattr(p, "partition_dim", -1)
    if not 0 <= dim < len(local.shape) or getattr(p, "partition_stride", 1) != 1:
        return local
    shape = tuple(length * (model.size if at == dim else 1) for at, length in enumerate(local.shape))
    return Logical(local.name, shape, Slice(Shard("tp", dim), model.rank, model.size))


def _is_slice(p: torch.Tensor) -> bool:
    return any(getattr(p, mark, False) for mark in MARKS)
