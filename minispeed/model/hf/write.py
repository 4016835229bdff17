"""Write a GPT as a HuggingFace folder: config.json, and *.safetensors in one file or several with an index.

The tensors are taken one after another, in the model's order, and a file is written as soon as it is full: no more than
one file's tensors are held beside those that are given. The folder appears in one move, when all is on the disk.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minispeed.errors import UserError
from minispeed.model.config import GPTConfig
from minispeed.model.hf.config import CONFIG, family_for, from_json, to_json
from minispeed.model.hf.read import INDEX, WEIGHTS
from minispeed.model.hf.weights import EMBEDDING, HEAD, Stored, names_of, stored


def save(
    folder: Path,
    config: GPTConfig,
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Any] = {},
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model that `transformers` loads, of the first architecture that can hold it.

    Reads   weights by our names, each once, in the model's order; a tied head may be among them
    dtype   of the tensors in the files; None: as they are
    extra   more keys of config.json: eos_token_id, bos_token_id, pad_token_id, ...
    Writes  folder, which is not there yet, or empty
    Raises  UserError naming the first setting that no architecture has, the first parameter that is missing, too many
            or of another shape, or the key of `extra` that `read_config` would not take
    """
    family = family_for(config)
    parameters = stored(config, family, base=names_of(family).base)
    _check(config, parameters, weights)
    keys = to_json(config, family)
    for key in extra.keys() & (family.says.keys() | {"model_type", "architectures"}):
        raise UserError(f"{key} is the configuration's to say, and extra has {extra[key]!r}", fix=f"no {key} in extra")
    dtype_name = str(dtype or weights[EMBEDDING].dtype).removeprefix("torch.")
    written = keys | {"torch_dtype": dtype_name} | dict(extra)
    from_json(written)
    with _whole(folder) as aside:
        _write_files(aside, _theirs(parameters, weights, dtype), shard_bytes)
        (aside / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def _check(config: GPTConfig, parameters: Mapping[str, Stored], weights: Mapping[str, Tensor]) -> None:
    """Compare the names of what there is with what there should be."""
    for name in parameters:
        if name not in weights:
            raise UserError(f"the weights lack {name}", fix="all parameters of the model")
    for name in weights:
        if name == HEAD and config.tied:
            if not torch.equal(weights[HEAD], weights[EMBEDDING]):
                raise UserError(f"{HEAD} is tied to {EMBEDDING}, and differs from it", fix="tied=False")
        elif name not in parameters:
            raise UserError(f"the weights have {name}, and the model has no such parameter", fix="its parameters alone")


def _theirs(
    parameters: Mapping[str, Stored], weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the files, each in memory of its own, on the CPU."""
    for name, of in parameters.items():
        ours = weights[name].detach()
        if tuple(ours.shape) != of.shape:
            what = f"{name} has the shape {tuple(ours.shape)}, and the configuration says {of.shape}"
            raise UserError(what, fix="the weights of a model of this configuration")
        for theirs, rows in zip(of.names, ours.split(of.rows), strict=True):
            turned = rows.t() if of.is_transposed else rows
            yield theirs, turned.clone(memory_format=torch.contiguous_format).to("cpu", dtype)


def _shards(tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in lots of at most so many bytes, but at least one tensor."""
    held: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            yield held
            held, size = {}, 0
        held[name] = tensor
        size += tensor.nbytes
    yield held


def _write_files(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write one file, or several and their index."""
    sizes: list[dict[str, int]] = []
    for number, shard in enumerate(_shards(tensors, shard_bytes)):
        save_file(shard, folder / str(number), metadata={"format": "pt"})
        sizes.append({name: tensor.nbytes for name, tensor in shard.items()})
    stem, kind = WEIGHTS.split(".")
    parts = [f"{stem}-{number:05d}-of-{len(sizes):05d}.{kind}" for number in range(1, len(sizes) + 1)]
    files = parts if len(parts) > 1 else [WEIGHTS]
    for number, file in enumerate(files):
        (folder / str(number)).rename(folder / file)
    if len(files) > 1:
        total = sum(sum(shard.values()) for shard in sizes)
        where = {name: file for file, shard in zip(files, sizes, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a folder beside to write into, and move it into its place once all is on the disk; on an error, nothing.

    Raises  UserError if something is in that place, or the disk refuses
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already, and not empty", fix="a folder that is not there yet")
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        os.replace(aside, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"could not write {folder}: {error}", fix="a folder on a disk with room") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
