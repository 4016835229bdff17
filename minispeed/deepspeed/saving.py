"""Checkpoints of a DeepSpeed-style run: `DIR/TAG/` and the file `DIR/latest`, which says the last tag.

    engine.save_checkpoint("runs", client_state={"epoch": 3})
    path, client_state = engine.load_checkpoint("runs")

What lies in DIR/TAG is a checkpoint of ours (`minispeed.checkpoint`): tensors by name as safetensors, all else as JSON.
So a client state holds what JSON can, and tuples, tensors and numpy arrays; nothing in the file is ever executed.
The layout may be another when it is loaded; DeepSpeed wants the same number of ranks.

https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minispeed.checkpoint import Checkpoint, Piece, save, write_whole
from minispeed.collective.numbers import barrier, texts_of
from minispeed.deepspeed.encoded import decode, encode
from minispeed.deepspeed.loading import put_into
from minispeed.deepspeed.logging import print_rank_0
from minispeed.deepspeed.mpu import check_places, is_cut_by_caller
from minispeed.deepspeed.stored import buffer_names, tied_names
from minispeed.deepspeed.tags import LATEST, place_of, target_of
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.layout import Interval

if TYPE_CHECKING:
    from minispeed.deepspeed.engine import DeepSpeedEngine

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

    tag           name of the directory; "global_step" and the number when not given. Where ranks bring others, rank 0's
                  counts, and `checkpoint.tag_validation` says what follows: "Ignore", "Warn" or "Fail"
    client_state  whatever the caller wants back
    Returns       True
    Raises        UserError if ranks bring different tags and the configuration says "Fail", if a tag leads out of
                  `save_dir`, if the disk is full, or if the client state holds what cannot be stored, or the caller's
                  slices do not say of what they are
    """
    core = self._trained()
    check_places(core)
    name = _agreed_tag(self, f"global_step{self.global_steps}" if tag is None else str(tag).strip())
    target = target_of(save_dir, name)
    if any(unit.gradient is not None or unit.full is not None for unit in core.sharded.units):
        print_rank_0("warning: gradients that no update has used yet are in no checkpoint; try: save after a step")
    tensors: dict[str, Tensor] = {}
    scheduler = self.lr_scheduler.state_dict() if hasattr(self.lr_scheduler, "state_dict") else None
    rates = [{k: v for k, v in group.items() if k != "params"} for group in core.optimizer.param_groups]
    frozen = [name for name, p in self.module.named_parameters() if not p.requires_grad]
    state = {
        "client": encode(dict(client_state), "client_state", tensors),
        "scheduler": encode(scheduler, "lr_scheduler", tensors),
        "groups": encode(rates, "param_groups", tensors),
        "optimizer": type(core.optimizer).__name__,
        "scaler": core.scaler.state(),
        "step": core.step,
        "num_updates": core.num_updates,
        "frozen": frozen,
        "tied": tied_names(self.module),
        **{name: getattr(self, name) for name in COUNTS},
    }
    is_first = core.group.rank == 0
    pieces = [*core.pieces(), *_without_elements(core)]
    pieces += [_whole(f"buffers/{n}", self.module.get_buffer(n), is_first) for n in buffer_names(self.module)]
    if exclude_frozen_parameters:
        left_out = {f"parameters/{name}" for name in frozen}
        pieces = [piece for piece in pieces if piece.name not in left_out]
    pieces += [_whole(f"state/{name}", x, is_first) for name, x in tensors.items()]

    def point_to_it() -> None:
        if save_latest:
            write_whole(Path(save_dir) / LATEST, lambda path: path.write_text(name + "\n"))

    save(target, pieces, state, core.group, point_to_it)
    return True


def load_checkpoint(
    self: "DeepSpeedEngine",
    load_dir: str | Path,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Callable[..., Any] | None = None,
) -> tuple[str | None, dict[str, Any] | None]:
    """Go on from a checkpoint; every rank calls this.

    tag                    which; the last one when not given
    load_module_strict     False: parameters that the checkpoint lacks, as those of one that was saved with
                           `exclude_frozen_parameters`, stay as they are
    load_optimizer_states  False: the optimizer's moments and settings, and the loss scale, stay as they are
    load_module_only       parameters and buffers alone; all else stays as it is
    custom_load_fn         called with src=, all parameters and buffers of the checkpoint, whole and in fp32, and dst=,
                           the module, whole: what it changes there is what is loaded, as rank 0 has it
    Returns                the checkpoint's path and the client state; None and None if there is none
    Raises                 UserError naming what is missing or damaged and the newest checkpoint that is whole, or what
                           in the checkpoint is not the module's or the optimizer's
    """
    folder = Path(load_dir)
    if self.core is not None:
        check_places(self.core)
    if tag is None and not (folder / LATEST).exists():
        print_rank_0(f"warning: there is no {folder / LATEST}: no checkpoint is loaded; try: tag=...")
        return None, None
    path = place_of(folder, tag)
    stored = Checkpoint(path)
    if "client" not in stored.state:
        what = f"{path} was written by no save_checkpoint"
        raise UserError(what, fix="zero_to_fp32.load_state_dict_from_zero_checkpoint, before initialize")
    with_optimizer = load_optimizer_states and not load_module_only
    put_into(self, stored, custom_load_fn, strict=load_module_strict, with_optimizer=with_optimizer)
    client = decode(stored.state["client"], stored)
    if load_module_only:
        return str(path), client
    if self.core is not None:
        self.core.step, self.core.num_updates = stored.state["step"], stored.state["num_updates"]
    for name in COUNTS:
        setattr(self, name, stored.state[name])
    self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
    if load_lr_scheduler_states and self.lr_scheduler is not None and stored.state["scheduler"] is not None:
        self.lr_scheduler.load_state_dict(decode(stored.state["scheduler"], stored))
    self._expect()
    return str(path), client


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


def _agreed_tag(engine: "DeepSpeedEngine", tag: str) -> str:
    """Return rank 0's tag: a checkpoint is one directory. Where another rank has another, do as the configuration says.

    Raises  UserError on every rank
    """
    how, tags = engine.config.checkpoint.tag_validation, texts_of(engine.world.group, tag)
    other = next((rank for rank, one in enumerate(tags) if one != tags[0]), 0)
    what = f"the checkpoint's tag is {tags[0]} on rank 0, {tags[other]} on rank {other}"
    if other and how == "Fail":
        raise UserError(what, fix="one tag on every rank")
    if other and how == "Warn":
        print_rank_0(f"warning: {what}; rank 0's counts")
    return tags[0]


def _without_elements(core: Engine) -> Iterator[Piece]:
    """Yield the parameters of no elements, of which no shard has a piece, but a state dict has the name."""
    for part in core.parts:
        for of in part.logical.values():
            if not prod(of.shape):
                is_copy = not of.counts or core.lines.shards.rank > 0
                nothing = torch.empty(0, dtype=core.precision.master)
                yield Piece(f"parameters/{of.name}", of.shape, Interval(0, 0), nothing, is_copy, of.part)


def _whole(name: str, x: Tensor, is_first: bool) -> Piece:
    """Return a tensor that all ranks have, to be written by the first."""
    return Piece(name, tuple(x.shape), Interval(0, x.numel()), x, is_copy=not is_first)
