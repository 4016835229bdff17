"""Make of a checkpoint what anybody can load: a state dict of whole tensors in fp32, on the CPU.

    state = get_fp32_state_dict_from_zero_checkpoint("runs")            # the last one, or tag="global_step100"
    model.load_state_dict(state)

    python -m minispeed.utils.zero_to_fp32 runs exported                # exported/pytorch_model.bin

Parameters are the run's masters, whatever layout wrote them; buffers are as they were. A run in fp64 stays in it.

DeepSpeed's `deepspeed.utils.zero_to_fp32`: https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from minispeed.checkpoint import Checkpoint, write_whole
from minispeed.deepspeed.logging import print_rank_0
from minispeed.deepspeed.stored import StoredTensor, read_all, stored_tensors
from minispeed.deepspeed.tags import place_of
from minispeed.errors import UserError
from minispeed.precision import ALIASES, DTYPES
from minispeed.zero.absent import owner_of

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
FILES = (".bin", ".pt", ".pth", ".safetensors")  # an output path that ends so is a file


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """Return a checkpoint's parameters and buffers, whole, on the CPU, under all their names.

    checkpoint_dir  what `save_checkpoint` was given, or the checkpoint itself, or the directory of a `minispeed sft`
    tag             which; the last one when not given
    lazy_mode       in place of each tensor one that is read by its `contiguous()`: only what is asked for takes memory
    Raises          UserError naming the file that is missing or damaged, and the newest checkpoint that is whole
    """
    found = _opened(checkpoint_dir, tag, exclude_frozen_parameters)
    return dict(found) if lazy_mode else read_all(found)


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """Move a model to the CPU, load a checkpoint's parameters and buffers into it, and return it.

    What only one of the two has is named in a warning; DeepSpeed says nothing.
    Raises  UserError if an engine has the model, or no name is in both
    """
    if any(owner_of(p) is not None for p in model.parameters()):
        what = "the model is an engine's, whose masters would not follow"
        raise UserError(what, fix="engine.load_checkpoint, or engine.destroy() first")
    state = read_all(_opened(checkpoint_dir, tag))
    held = model.cpu().state_dict(keep_vars=True)
    if not held.keys() & state.keys():
        what = f"no tensor of {checkpoint_dir} has a name of the model's: {min(state)} there, {min(held)} here"
        raise UserError(what, fix="the model that was trained")
    model.load_state_dict(state, strict=False)
    loaded = {id(held[name]) for name in held.keys() & state.keys()}
    lacking = {
        "checkpoint": [name for name, tensor in held.items() if id(tensor) not in loaded],
        "model": [name for name in state if name not in held],
    }
    for who, names in lacking.items():
        if names:
            print_rank_0(f"warning: the {who} has no {', '.join(names)}")
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write what `get_fp32_state_dict_from_zero_checkpoint` returns, for `torch.load` and `load_state_dict`.

    output_dir          a directory, for pytorch_model.bin or model.safetensors; where it is more than `max_shard_size`,
                        for files NAME-00001-of-0000N and an index, as transformers reads them. A path that ends in
                        .bin, .pt, .pth or .safetensors: one file, as DeepSpeed once took it
    max_shard_size      bytes of a file, but for a larger tensor: a number, or one with KB, MB, GB or TB; None: any
    safe_serialization  safetensors, which holds a tensor of several names once for each; else by torch.save
    Holds               the tensors of one file
    """
    _convert(_opened(checkpoint_dir, tag, exclude_frozen_parameters), output_dir, max_shard_size, safe_serialization)


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    dtype: str | torch.dtype = torch.float32,
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Do as `convert_zero_checkpoint_to_fp32_state_dict` in another dtype.

    dtype  of floating-point tensors: torch's, or its name or short name, as "bfloat16" or "bf16"
    """
    name = str(dtype).removeprefix("torch.").lower()
    wish = DTYPES.get(ALIASES.get(name, name))
    if wish is None:
        raise UserError(f"dtype is {dtype}", fix=f"one of {', '.join(DTYPES)}")
    found = _opened(checkpoint_dir, tag, exclude_frozen_parameters, wish)
    _convert(found, output_dir, max_shard_size, safe_serialization)


def main(words: Sequence[str] | None = None) -> int:
    """Run DeepSpeed's script: zero_to_fp32 CHECKPOINT_DIR OUTPUT_DIR, and return the exit code.

    words  without the program's name; default: this process's
    """
    parser = argparse.ArgumentParser("zero_to_fp32", description="Write a checkpoint's parameters and buffers in fp32.")
    parser.add_argument("checkpoint_dir", help="what save_checkpoint was given, or a run of minispeed sft")
    parser.add_argument("output_dir", help="a directory; or a file, ending in .bin, .pt, .pth or .safetensors")
    parser.add_argument("--max_shard_size", default="5GB", help="the most that a file holds, as 500MB (default: 5GB)")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors, not by torch.save")
    parser.add_argument("-t", "--tag", help="which checkpoint, as global_step100 (default: the last one)")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out what was not trained")
    parser.add_argument("-d", "--debug", action="store_true", help="show a mistake's traceback")
    given = parser.parse_args(words)
    try:
        found = _opened(given.checkpoint_dir, given.tag, given.exclude_frozen_parameters)
        for path in _convert(found, given.output_dir, given.max_shard_size, given.safe_serialization):
            print(f"written: {path} ({path.stat().st_size:,} bytes)")
    except UserError as error:
        if given.debug:
            raise
        parser.exit(2, f"zero_to_fp32: {error.what}\n  try: {error.fix}\n")
    return 0


def _opened(
    directory: str | Path, tag: str | None, exclude_frozen: bool = False, wish: torch.dtype | None = None
) -> dict[str, StoredTensor]:
    stored = Checkpoint(place_of(Path(directory), tag))
    return stored_tensors(stored, exclude_frozen=exclude_frozen, wish=wish)


def _convert(
    tensors: Mapping[str, StoredTensor], output: str | Path, max_shard_size: int | str | None, is_safe: bool
) -> list[Path]:
    """Write the files, one after the other, and return them."""
    limit, out = _bytes_of(max_shard_size), Path(output)
    if out.suffix in FILES and not out.is_dir():
        return [_write(out, tensors)]
    stem, suffix = ("model", ".safetensors") if is_safe else ("pytorch_model", ".bin")
    shards = _shards(tensors, limit, with_copies=is_safe)
    if len(shards) == 1:
        return [_write(out / f"{stem}{suffix}", tensors)]
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" for number in range(1, len(shards) + 1)]
    written = [_write(out / file, {name: tensors[name] for name in names}) for file, names in zip(files, shards)]
    total = sum(tensor.nbytes for tensor in (tensors.values() if is_safe else {*tensors.values()}))
    homes = {name: file for file, names in zip(files, shards) for name in names}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": homes}, indent=2, sort_keys=True) + "\n"
    write_whole(out / f"{stem}{suffix}.index.json", lambda path: path.write_text(text))
    return written


def _shards(tensors: Mapping[str, StoredTensor], limit: float, *, with_copies: bool) -> list[list[str]]:
    """Return the names that go into each file: in their order while they fit, the names of one tensor together.

    limit        bytes
    with_copies  each name of a tensor takes its bytes
    """
    names_of: dict[StoredTensor, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(tensor, []).append(name)
    shards: list[list[str]] = [[]]
    room = limit
    for tensor, names in names_of.items():
        size = tensor.nbytes * (len(names) if with_copies else 1)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1] += names
        room -= size
    return shards


def _write(file: Path, tensors: Mapping[str, StoredTensor]) -> Path:
    """Read tensors and write them into one file."""
    if file.suffix == ".safetensors":  # which knows no shared memory
        alone = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(file, lambda path: save_file(alone, path, metadata={"format": "pt"}))
    else:
        state = read_all(tensors)
        write_whole(file, lambda path: torch.save(state, path))
    return file


def _bytes_of(size: int | str | None) -> float:
    """Return a size in bytes.  Raises UserError on what is none"""
    if size is None:
        return float("inf")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", str(size), re.IGNORECASE)
    if found is None:
        raise UserError(f"max_shard_size is {size!r}", fix='"5GB", or a number of bytes')
    return float(found[1]) * UNITS[(found[2] or "").upper()]
