"""Checkpoints of a DeepSpeed-style run: `DIR/TAG/` and the file `DIR/latest`, which says the last tag.

    engine.save_checkpoint("runs", client_state={"epoch": 3})
    path, client_state = engine.load_checkpoint("runs")

What lies in DIR/TAG is a checkpoint of ours (`minispeed.checkpoint`): tensors by name as safetensors, all else as JSON.
So a client state holds what JSON can, and tuples, tensors and numpy arrays; nothing in the file is ever executed.
The layout may be another when it is loaded; DeepSpeed wants the same number of ranks.

https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from minispeed.checkpoint import INDEX, Checkpoint, Piece, save, write_whole
from minispeed.collective.agree import agree
from minispeed.collective.group import CollectiveError
from minispeed.collective.numbers import barrier
from minispeed.deepspeed.logging import print_rank_0
from minispeed.deepspeed.mpu import check_places, is_cut_by_caller
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.placement import WHOLE, Slice
from minispeed.scaler import LossScaler

if TYPE_CHECKING:
    from minispeed.deepspeed.engine import DeepSpeedEngine

LATEST = "latest"
COUNTS = ("global_steps", "skipped_steps", "global_samples")


def save_checkpoint(
    self: "DeepSpeedEngine",
    save_dir: str | Path,
    tag: str | None = None,
    client_state: Mapping[str, Any] = {},
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """Write a checkpoint together; every rank calls this.

    tag           name of the directory; "global_step" and the number when not given
    client_state  whatever the caller wants back
    Returns       True
    Raises        UserError if ranks bring different tags and the configuration says "Fail", if the disk is full, or if
                  the client state holds what cannot be stored, or the caller's slices do not say of what they are
    """
    core = self._trained()
    check_places(core)
    tag = f"global_step{self.global_steps}" if tag is None else str(tag).strip()
    _validate(self, tag)
    if any(unit.gradient is not None or unit.full is not None for unit in core.sharded.units):
        print_rank_0("warning: gradients that no update has used yet are in no checkpoint; try: save after a step")
    tensors: dict[str, Tensor] = {}
    scheduler = self.lr_scheduler.state_dict() if hasattr(self.lr_scheduler, "state_dict") else None
    rates = [{k: v for k, v in group.items() if k != "params"} for group in core.optimizer.param_groups]
    state = {
        "client": _encode(dict(client_state), "client_state", tensors),
        "scheduler": _encode(scheduler, "lr_scheduler", tensors),
        "groups": _encode(rates, "param_groups", tensors),
        "optimizer": type(core.optimizer).__name__,
        "scaler": core.scaler.state(),
        "step": core.step,
        "num_updates": core.num_updates,
        **{name: getattr(self, name) for name in COUNTS},
    }
    is_first = core.group.rank == 0
    pieces = [*core.pieces(), *(_whole(f"buffers/{n}", self.module.get_buffer(n), is_first) for n in _buffers(self))]
    if exclude_frozen_parameters:
        frozen = {f"parameters/{name}" for name, p in self.module.named_parameters() if not p.requires_grad}
        pieces = [piece for piece in pieces if piece.name not in frozen]
    pieces += [_whole(f"state/{name}", x, is_first) for name, x in tensors.items()]
    save(Path(save_dir) / tag, pieces, state, core.group)
    if save_latest and core.group.rank == 0:
        write_whole(Path(save_dir) / LATEST, lambda path: path.write_text(tag + "\n"))
    barrier(core.group)  # nobody goes on before `latest` stands
    return True


def load_checkpoint(
    self: "DeepSpeedEngine",
    load_dir: str | Path,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Callable[..., None] | None = None,
) -> tuple[str | None, dict[str, Any] | None]:
    """Go on from a checkpoint; every rank calls this.

    tag                 which; the last one when not given
    load_module_strict  False: parameters that the checkpoint lacks stay as they are
    load_module_only    parameters and buffers alone
    Returns             the checkpoint's path and the client state; None and None if there is none
    """
    if custom_load_fn is not None:
        raise UserError("custom_load_fn: a checkpoint holds no state dict of a rank", fix="load_module_state_dict")
    core, folder = self._trained(), Path(load_dir)
    check_places(core)
    if tag is None:
        if not (folder / LATEST).exists():
            print_rank_0(f"warning: there is no {folder / LATEST}: no checkpoint is loaded; try: tag=...")
            return None, None
        tag = (folder / LATEST).read_text().strip()
    if not (folder / str(tag).strip() / INDEX).exists():
        there = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{INDEX}")))
        raise UserError(
            f"there is no checkpoint {tag} in {folder}", fix=f"tag= one of {there}" if there else "save one"
        )
    stored = Checkpoint(folder / str(tag).strip())
    if load_module_strict:
        _check_all_known(self, stored)
    state, source = stored.state, _Lenient(stored, self, strict=load_module_strict)
    with_optimizer = load_optimizer_states and not load_module_only
    if with_optimizer:
        _check_optimizer(core.optimizer, state)
    core.load(source, step=state["step"], num_updates=state["num_updates"], with_optimizer=with_optimizer)
    _put_buffers(self, stored)
    client = _decode(state["client"], stored)
    if load_module_only:
        return str(stored.directory), client
    for name in COUNTS:
        setattr(self, name, state[name])
    self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
    if load_optimizer_states:
        core.scaler = LossScaler(**state["scaler"])
        for group, saved in zip(core.optimizer.param_groups, _decode(state["groups"], stored)):
            group.update(saved)
    if load_lr_scheduler_states and self.lr_scheduler is not None and state["scheduler"] is not None:
        self.lr_scheduler.load_state_dict(_decode(state["scheduler"], stored))
    self._expect()
    return str(stored.directory), client


def save_16bit_model(
    self: "DeepSpeedEngine",
    save_dir: str | Path,
    save_filename: str = "pytorch_model.bin",
    exclude_frozen_parameters: bool = False,
) -> bool:
    """Write the module's whole state dict, in the compute dtype, for `load_state_dict` of an ordinary module.

    save_filename  ending in .safetensors: as such; else by torch.save
    Returns        False if nothing was written: stage 3, and the configuration does not allow to gather
    Raises         UserError if the caller has cut the model himself (mpu)
    """
    if self.core is not None and is_cut_by_caller(self.core):
        what = "save_16bit_model of a model that an mpu says is cut: only its author can put its modules together"
        raise UserError(what, fix="save_checkpoint, or module_state_dict() of each model-parallel rank")
    zero = self.config.zero
    if zero.stage == 3 and not zero.gather_16bit_weights_on_model_save:
        key = '"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": true}'
        print_rank_0(f"warning: nothing saved: at stage 3 no rank has the whole model; try: {key}")
        return False
    found = self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
    if self.world.rank == 0:
        tensors = {name: x.detach().cpu().clone() for name, x in found.items()}
        write = save_file if save_filename.endswith(".safetensors") else torch.save
        write_whole(Path(save_dir) / save_filename, lambda path: write(tensors, path))
    barrier(self.world.group)
    return True


def _validate(engine: "DeepSpeedEngine", tag: str) -> None:
    """Compare the ranks' tags, as the configuration asks."""
    how = engine.config.checkpoint.tag_validation
    if how == "Ignore":
        return
    try:
        agree(engine.world.group, {"the checkpoint's tag": tag})
    except CollectiveError:
        raise
    except UserError as error:
        if how == "Fail":
            raise
        print_rank_0(f"warning: {error}")


def _check_all_known(engine: "DeepSpeedEngine", stored: Checkpoint) -> None:
    """Raise UserError if the checkpoint holds a parameter or buffer that the module has not, or lacks a buffer."""
    here = {f"parameters/{name}" for name, _ in engine.module.named_parameters()}
    buffers = {f"buffers/{name}" for name in _buffers(engine)}
    there = {name for name in stored.shapes if name.startswith(("parameters/", "buffers/"))}
    for name in sorted(there - here - buffers):
        raise UserError(f"the checkpoint holds {name}, which the module has not", fix="load_module_strict=False")
    for name in sorted(buffers - there):
        raise UserError(f"the checkpoint holds no {name}", fix="load_module_strict=False")


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise UserError if the states are another optimizer's, or of other groups."""
    mine = type(optimizer).__name__, len(optimizer.param_groups)
    theirs = state["optimizer"], len(state["groups"])
    if mine != theirs:
        what = f"the checkpoint is of {theirs[0]} with {theirs[1]} parameter groups, here is {mine[0]} with {mine[1]}"
        raise UserError(what, fix="load_optimizer_states=False")


def _whole(name: str, x: Tensor, is_first: bool) -> Piece:
    """Return a tensor that all ranks have, to be written by the first."""
    return Piece(name, tuple(x.shape), Interval(0, x.numel()), x, is_copy=not is_first)


def _buffers(engine: "DeepSpeedEngine") -> list[str]:
    """Return the names of the buffers that a state dict of the module would hold."""
    owners = engine.module.named_modules()
    passing = {f"{where}.{name}".lstrip(".") for where, module in owners for name in module._non_persistent_buffers_set}
    return [name for name, _ in engine.module.named_buffers() if name not in passing]


def _put_buffers(engine: "DeepSpeedEngine", stored: Checkpoint) -> None:
    for name in _buffers(engine):
        found, buffer = stored.tensor(f"buffers/{name}"), engine.module.get_buffer(name)
        if found is not None and found.shape != buffer.shape:
            what = f"buffer {name} has the shape {tuple(found.shape)} in the checkpoint, {tuple(buffer.shape)} here"
            raise UserError(what, fix="the checkpoint of a run of this model")
        if found is not None:
            buffer.copy_(found)


class _Lenient:
    """A checkpoint in which, unless `strict`, a parameter that it lacks has the value it has now."""

    def __init__(self, stored: Checkpoint, engine: "DeepSpeedEngine", *, strict: bool) -> None:
        self.shapes, self._stored = stored.shapes, stored
        self._now = {} if strict else {p.name: p.tensor.clone() for p in engine._trained().pieces()}

    def read(self, name: str, elements: Interval, part: Slice = WHOLE) -> Tensor | None:
        """Return what the checkpoint has, else what there was."""
        found = self._stored.read(name, elements, part)
        return self._now.get(name) if found is None else found


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Return what JSON can hold of a value; tensors are put aside under the place where they were found."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        is_tensor, name = isinstance(value, Tensor), f"{len(tensors)} {where}"
        tensors[name] = value.detach().clone() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return {"tensor" if is_tensor else "array": name}
    if isinstance(value, (list, tuple)):
        inside = [_encode(one, f"{where}.{index}", tensors) for index, one in enumerate(value)]
        return inside if isinstance(value, list) else {"tuple": inside}
    if isinstance(value, Mapping):
        pairs = [[_encode(key, where, tensors), _encode(one, f"{where}.{key}", tensors)] for key, one in value.items()]
        return {"dict": pairs}
    what = f"{where} is a {type(value).__name__}, which is no number, text, list, tuple, dict, tensor or array"
    raise UserError(what, fix="its state as such, or as text")


def _decode(value: Any, stored: Checkpoint) -> Any:
    """Return what `_encode` was given."""
    if isinstance(value, list):
        return [_decode(one, stored) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tuple":
        return tuple(_decode(held, stored))
    if kind == "dict":
        return {_decode(key, stored): _decode(one, stored) for key, one in held}
    found = stored.tensor(f"state/{held}")
    assert found is not None
    return found if kind == "tensor" else found.numpy()
