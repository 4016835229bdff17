"""Settle which ranks share what: each has rows of its own, unless one of these says otherwise.

    "tensor_parallel": {"autotp_size": 2}     two neighbours share each layer's width, and are given the same rows
    tp_model_init(model, tp_size=2, ...)      the same, said before `initialize`
    initialize(mpu=...)                       as the caller says, who has cut the model himself

An mpu beside an `autotp_size` must describe the same neighbours.

https://www.deepspeed.ai/tutorials/autotp-training/
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minispeed.axes import Layout
from minispeed.collective.group import Group
from minispeed.config import Config, DeepSpeedConfigError
from minispeed.config.load import load
from minispeed.deepspeed.autotp import SameRows, plan_for
from minispeed.deepspeed.groups import AnyGroup, group_of
from minispeed.deepspeed.mpu import Cut, join
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.mesh import line_of
from minispeed.precision import DTYPES
from minispeed.tensor.plan import Plan
from minispeed.zero.absent import owner_of


@dataclass(frozen=True)
class Asked:
    """What `tp_model_init` was given for a model."""

    size: int
    dtype: torch.dtype
    group: AnyGroup


_asked: "weakref.WeakKeyDictionary[nn.Module, Asked]" = weakref.WeakKeyDictionary()


def tp_model_init(
    model: nn.Module,
    tp_size: int,
    dtype: torch.dtype,
    config: Any = None,
    tp_group: AnyGroup = None,
    **more: Any,
) -> nn.Module:
    """Note that `initialize` is to cut a model by width; return it as it is.

    tp_size   ranks that share each layer's width
    dtype     the compute dtype, which the configuration says too
    tp_group  those ranks; they must be the neighbours that `initialize` takes
    """
    _asked[model] = Asked(tp_size, dtype, tp_group)
    return model


def with_asked(model: nn.Module, source: Mapping[str, Any] | str | Path | None) -> Any:
    """Return a configuration with what `tp_model_init` was given for a model.

    Raises  DeepSpeedConfigError if the configuration has another size
    """
    if model not in _asked:
        return source
    size, config = _asked[model].size, dict(load(source))
    block = dict(config.get("tensor_parallel") or {})
    if block.setdefault("autotp_size", size) != size:
        what = f'"tensor_parallel.autotp_size" is {block["autotp_size"]}, and tp_model_init was given {size}'
        raise DeepSpeedConfigError(what, fix="one of the two, or both with one value")
    return {**config, "tensor_parallel": block}


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How an engine's ranks share its model.

    group   those that the engine speaks to
    layout  how it cuts the model over them, `plan` by which names
    cut     the caller's groups, where he has cut it
    """

    group: Group
    layout: Layout
    plan: Plan | None
    cut: Cut | None

    @property
    def replicas(self) -> int:
        """How many ranks, or lines of them, are given rows of their own."""
        return self.group.size // self.layout.ranks

    def settle(self, core: Engine) -> None:
        """Tell the engine of the caller's groups; compare rows where ranks must be given the same."""
        if self.cut is not None:
            join(core, self.cut)
        if self.layout.tp > 1:
            SameRows(core.model, core.lines.tp)


def share(model: nn.Module, settings: Config, cut: Cut | None, world: Group) -> Sharing:
    """Return how the ranks share a model.

    world   all ranks
    Raises  UserError if mpu, `tp_model_init` and configuration disagree, or the model cannot be cut
    """
    layout = Layout(tp=settings.tensor_parallel.ranks)
    if layout.tp == 1:
        return Sharing(group=world if cut is None else cut.data, layout=layout, plan=None, cut=cut)
    mesh = layout.mesh(world.size)
    if cut is not None:
        _check_members("mpu's data-parallel group", cut.data, line_of(world.rank, mesh.lines("dp")))
    asked = _asked.get(model)
    if asked is not None:
        _check_dtype(asked.dtype, settings)
        if asked.group is not None:
            group = group_of(asked.group)
            _check_members("tp_model_init's tp_group", group, line_of(world.rank, mesh.lines("tp")))
    if any(owner_of(p) is not None for p in model.parameters()):
        what = f"a model born in pieces (zero.Init) is to be cut over {layout.tp} ranks"
        raise UserError(what, fix="a model built outside zero.Init")
    return Sharing(group=world, layout=layout, plan=plan_for(model), cut=None)


def _check_members(what: str, group: Group, line: tuple[int, ...]) -> None:
    if tuple(sorted(group.members)) != line:
        found = f"{what} is of ranks {list(group.members)}, with the configuration's autotp_size it is {list(line)}"
        raise UserError(found, fix="neighbouring ranks in one tensor-parallel group")


def _check_dtype(dtype: torch.dtype, settings: Config) -> None:
    if dtype not in (DTYPES[settings.dtype], torch.float64):
        what = f"tp_model_init was given {dtype}, and the configuration computes in {settings.dtype}"
        raise UserError(what, fix="one dtype")
