"""Put what a checkpoint holds into an engine: masters, buffers, what the optimizer keeps; or what a caller makes of it.

    put_into(engine, Checkpoint(path), strict=True, with_optimizer=True)

What is not put stays as it is: an engine that takes over parameters alone goes on with its own moments.

https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minispeed.checkpoint import Checkpoint, Piece
from minispeed.deepspeed.encoded import decode
from minispeed.deepspeed.stored import buffer_names, read_all, stored_tensors
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.placement import WHOLE, Slice
from minispeed.scaler import LossScaler

if TYPE_CHECKING:
    from minispeed.deepspeed.engine import DeepSpeedEngine

Load = Callable[..., Any]


def put_into(
    engine: "DeepSpeedEngine", stored: Checkpoint, custom: Load | None = None, *, strict: bool, with_optimizer: bool
) -> None:
    """Load parameters and buffers, and, if asked for, the optimizer's moments and settings, and the loss scale.

    custom  called with src=, the checkpoint's whole tensors, and dst=, the module, whole, in place of loading by name
    strict  False: parameters that the checkpoint lacks stay as they are, and it may hold others
    Raises  UserError naming what is not the module's or not the optimizer's
    """
    core, strict, any_shape = engine.core, strict and custom is None, custom is not None
    if strict:
        _check_names(engine, stored)
    if core is not None:
        _put_masters(core, stored, strict=strict, any_shape=any_shape, with_optimizer=with_optimizer)
    if custom is not None:
        with engine.gathered() as module, torch.no_grad():
            custom(src=read_all(stored_tensors(stored)), dst=module)
            for unit in () if core is None else core.sharded.units:
                unit.take(0)
    elif core is None:
        engine.module.load_state_dict(read_all(stored_tensors(stored)), strict=False)
    else:
        _put_buffers(engine, stored)


def _put_masters(core: Engine, stored: Checkpoint, *, strict: bool, any_shape: bool, with_optimizer: bool) -> None:
    state = stored.state
    if any_shape and core.lines.model.size > 1:
        what = f"custom_load_fn: each of the {core.lines.model.size} ranks of a copy holds a part of the model"
        raise UserError(what, fix="load_checkpoint without it, or engine.load_module_state_dict")
    if with_optimizer:
        _check_optimizer(core.optimizer, state)
    if with_optimizer or not any_shape:
        _check_shapes(core, stored)
    kept = {} if with_optimizer else dict(core.optimizer.state)
    source = _Lenient(stored, core, strict=strict, any_shape=any_shape and not with_optimizer)
    core.load(source, step=core.step, num_updates=core.num_updates, with_optimizer=with_optimizer)
    core.optimizer.state.update(kept)
    if with_optimizer:
        core.scaler = LossScaler(**state["scaler"])
        for group, saved in zip(core.optimizer.param_groups, decode(state["groups"], stored)):
            group.update(saved)


def _check_names(engine: "DeepSpeedEngine", stored: Checkpoint) -> None:
    """Raise UserError if checkpoint and module do not hold the same parameters and buffers."""
    here = {f"parameters/{name}" for name, _ in engine.module.named_parameters()}
    here |= {f"buffers/{name}" for name in buffer_names(engine.module)}
    there = {name for name in stored.shapes if name.startswith(("parameters/", "buffers/"))}
    for name in sorted(there - here):
        raise UserError(f"the checkpoint holds {name}, which the module has not", fix="load_module_strict=False")
    empty = {f"parameters/{name}" for name, p in engine.module.named_parameters() if not p.numel()}
    for name in sorted(here - empty - there):
        raise UserError(f"the checkpoint holds no {name}", fix="load_module_strict=False")


def _check_shapes(core: Engine, stored: Checkpoint) -> None:
    """Raise UserError, on all ranks of a stage alike, if a parameter has another shape in the checkpoint."""
    for of in (of for part in core.parts for of in part.logical.values()):
        if (held := stored.shapes.get(f"parameters/{of.name}", of.shape)) != of.shape:
            what = f"parameters/{of.name} has the shape {held} in the checkpoint, {of.shape} here"
            raise UserError(what, fix="the checkpoint of a run of this model, or load_module_only and custom_load_fn")


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise UserError if the states are another optimizer's, or of other groups."""
    mine = type(optimizer).__name__, len(optimizer.param_groups)
    theirs = state["optimizer"], len(state["groups"])
    if mine != theirs:
        what = f"the checkpoint is of {theirs[0]} with {theirs[1]} parameter groups, here is {mine[0]} with {mine[1]}"
        raise UserError(what, fix="load_optimizer_states=False")


def _put_buffers(engine: "DeepSpeedEngine", stored: Checkpoint) -> None:
    for name in buffer_names(engine.module):
        found, buffer = stored.tensor(f"buffers/{name}"), engine.module.get_buffer(name)
        if found is not None and found.shape != buffer.shape:
            what = f"buffer {name} has the shape {tuple(found.shape)} in the checkpoint, {tuple(buffer.shape)} here"
            raise UserError(what, fix="the checkpoint of a run of this model")
        if found is not None:
            buffer.copy_(found)


class _Lenient:
    """A checkpoint in which, unless `strict`, a parameter that it lacks has the value it has now.

    any_shape  one that has another shape here, too
    """

    def __init__(self, stored: Checkpoint, core: Engine, *, strict: bool, any_shape: bool) -> None:
        self._stored = stored
        pieces = [] if strict else core.pieces()
        here = {piece.name: piece.shape for piece in pieces} if any_shape else {}
        self.shapes = {name: shape for name, shape in stored.shapes.items() if here.get(name, shape) == shape}
        self._now = {piece.name: piece.tensor.clone() for piece in pieces if piece.name not in self.shapes}

    def read(self, name: str, elements: Interval, part: Slice = WHOLE) -> Tensor | None:
        """Return what the checkpoint has, else what there was."""
        return self._stored.read(name, elements, part) if name in self.shapes else self._now.get(name)

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Put in what the checkpoint has of each."""
        self._stored.fill(pieces)
