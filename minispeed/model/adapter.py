"""Write a GPT's adapters as the files that `peft` reads beside a transformers model, and read such files.

    blocks.3.attention.qkv.lora.a.weight    (r, D)                   q_proj.lora_A = k_proj.lora_A = v_proj.lora_A = A
    blocks.3.attention.qkv.lora.b.weight    ((H + 2 G) K, r)    =    q_proj.lora_B, k_proj.lora_B and v_proj.lora_B, one
                                                                     below the other

Our query, key and value are one Linear with one A: theirs are three, which are then given the same A. The other way
they must have it already: three different ones would need three times our rank. All else is a name for a name.

Embedding and head may be trained whole beside adapters, where a tokenizer was given tokens: peft's `modules_to_save`,
which it puts in the place of the base's. The base is to have as many rows: `resize_token_embeddings` before.

The files: https://huggingface.co/docs/peft/developer_guides/checkpoint
Letters: D model, H heads, G key/value heads, K head dim, r the adapters' rank.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minispeed.errors import UserError, nearest
from minispeed.model.config import GPTConfig
from minispeed.model.hf.config import family_for
from minispeed.model.hf.families import FAMILIES
from minispeed.model.hf.weights import EMBEDDING, HEAD, THEIR_HEAD, Names, names_of
from minispeed.model.lora import LoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before the names of the model that it wraps
OUR_NAME = re.compile(r"blocks\.(\d+)\.(.+)\.lora\.[ab]\.weight")
DOUBLE = re.compile(r"(\.modules_to_save|\.original_module)(?=\.weight$)")  # what peft may write of an end once more
THEIR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
SAYS = ("r", "lora_alpha", "lora_dropout", "target_modules")
# keys that change nothing of what is computed, at the values named, or at all
HARMLESS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "task_type": ("CAUSAL_LM", None),
    "init_lora_weights": (True, False, "gaussian"),
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"), ()),
    **dict.fromkeys(("fan_in_fan_out", "megatron_core", "qalora_group_size", "layers_to_transform"), ()),
    **dict.fromkeys(("layers_pattern", "exclude_modules"), ()),
    "modules_to_save": (None, [], ["embed_tokens", "lm_head"], ["wte", "lm_head"]),
}


class Part(NamedTuple):
    """What one of their Linears is: part number `place` of so many of our Linear `ours`."""

    ours: str
    place: int
    num_parts: int


def save_adapter(
    folder: Path,
    weights: Mapping[str, Tensor],
    lora: LoRA,
    config: GPTConfig,
    *,
    base: str | None = None,
    ends: bool = False,
) -> None:
    """Write the adapters of a model of a HuggingFace family.

    weights  named tensors, the adapters' among them; the others are left out
    base     name or folder of the model that they are for, which peft loads when it is not given one
    ends     whether embedding and head were trained too: then they are written, whole
    Writes   folder/adapter_config.json, folder/adapter_model.safetensors
    Raises   UserError if there are no adapters, or no family has such a model
    """
    family = family_for(config)
    names = names_of(family)
    modules = _their_modules(names)
    found: dict[str, Tensor] = {}
    for home in sorted({name.rpartition(".lora.")[0] for name in weights if OUR_NAME.fullmatch(name)}):
        number, of = home.split(".")[1], ".".join(home.split(".")[2:])
        theirs = [module.replace("*", number) for module, part in modules.items() if part.ours == of]
        a, b = (weights[f"{home}.lora.{part}.weight"] for part in "ab")
        for module, rows in zip(theirs, b.split(_rows(config, len(theirs), b.shape[0])), strict=True):
            found |= {f"{PREFIX}{module}.lora_A.weight": a.clone(), f"{PREFIX}{module}.lora_B.weight": rows.clone()}
    if not found:
        raise UserError(f"none of the {len(weights)} tensors is an adapter's", fix="those of a model with adapters")
    says = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _target_modules(found, config.num_layers),
        "bias": "none",
        "modules_to_save": [name.split(".")[-2] for name in ENDS[names.base]] if ends else None,
        "fan_in_fan_out": bool(names.transposed),
        "inference_mode": True,
    }
    for name, ours in ENDS[names.base].items() if ends else ():
        found[name] = weights[EMBEDDING if config.tied else ours].clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(says, indent=2) + "\n")


def load_adapter(folder: Path) -> tuple[LoRA, dict[str, Tensor]]:
    """Read what peft has written, or `save_adapter`: settings for `add_lora`, and tensors for `put_adapters`.

    Returns  with the adapters, embedding and head where they were trained whole
    Raises  UserError naming what is missing, what we would compute otherwise, or the layer whose q, k and v differ in A
    """
    says = _read_config(folder)
    halves: dict[tuple[str, str], dict[int, Tensor]] = {}  # A or B of one of our Linears: of each part of it
    counts: dict[str, int] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if (end := DOUBLE.sub("", name)) in OUR_ENDS:
            if end == name:
                weights[OUR_ENDS[name]] = tensor
            continue
        home, half, part = _our_name(name)
        halves.setdefault((home, half), {})[part.place] = tensor
        counts[home] = part.num_parts
    homes = sorted(counts)
    for home in homes:
        for half in "AB":
            parts = halves.get((home, half), {})
            weights[f"{home}.lora.{half.lower()}.weight"] = _join(home, half, parts, count=counts[home])
    lora = LoRA(rank=says["r"], alpha=says["lora_alpha"], dropout=says["lora_dropout"], targets=tuple(homes))
    return lora, weights


def _their_modules(names: Names) -> dict[str, Part]:
    """Return, by what a family calls each Linear of a block, which part it is of which of ours."""
    return {
        f"{names.base}{theirs}": Part(ours.removeprefix("blocks.*."), place, len(modules))
        for ours, modules in names.modules.items()
        for place, theirs in enumerate(modules)
        if ours.startswith("blocks.*.") and not ours.endswith("_norm")
    }


KNOWN = {module: part for family in FAMILIES.values() for module, part in _their_modules(names_of(family)).items()}

# by a family's base: what peft calls embedding and head, and what we do
ENDS = {
    names.base: {
        f"{PREFIX}{names.base}{names.modules['embed.tokens'][0]}.weight": EMBEDDING,
        f"{PREFIX}{THEIR_HEAD}": HEAD,
    }
    for names in map(names_of, FAMILIES.values())
}
OUR_ENDS = {theirs: ours for of in ENDS.values() for theirs, ours in of.items()}


def _our_name(name: str) -> tuple[str, str, Part]:
    """Return, of a tensor of theirs, our Linear, "A" or "B", and which part of it; UserError if there is none."""
    match = THEIR_NAME.fullmatch(name)
    module = re.sub(r"\d+", "*", match[1]) if match else name
    if match is None or module not in KNOWN:
        what = f"{name} belongs to no Linear of a block of {', '.join(FAMILIES)}"
        raise UserError(what, fix=nearest(module, KNOWN) or ", ".join(KNOWN))
    number, part = re.sub(r"\D", "", match[1]), KNOWN[module]
    return f"blocks.{number}.{part.ours}", match[2], part


def _rows(config: GPTConfig, count: int, rows: int) -> list[int]:
    """Return how many rows of a weight each of `count` modules has."""
    if count == 1:
        return [rows]
    narrow = config.num_kv_heads * config.head_dim
    return [config.num_heads * config.head_dim, narrow, narrow]


def _join(home: str, half: str, parts: Mapping[int, Tensor], *, count: int) -> Tensor:
    """Return our A or B of modules of theirs."""
    if not parts:
        raise UserError(f"the adapter of {home} has no lora_{half}", fix="lora_A and lora_B of each")
    if len(parts) < count:
        what = f"the adapter of {home} is of {len(parts)} of query, key and value, which are one Linear here"
        raise UserError(what, fix="an adapter of q_proj, k_proj and v_proj, all with one lora_A")
    if half == "B":
        return torch.cat([parts[place] for place in range(count)])
    if any(not torch.equal(parts[0], part) for part in parts.values()):
        what = f"query, key and value of {home} have adapters of different lora_A, and are one Linear with one A here"
        raise UserError(what, fix="merge the adapter into its model with peft, and load that")
    return parts[0]


def _target_modules(found: Mapping[str, Tensor], num_layers: int) -> list[str]:
    """Return the ends of the modules' names where every layer has them, else whole names."""
    modules = sorted({match[1] for name in found if (match := THEIR_NAME.fullmatch(name))})
    ends = sorted({".".join(module.split(".")[-2:]) for module in modules})
    return ends if len(ends) * num_layers == len(modules) else modules


def _read_config(folder: Path) -> dict[str, Any]:
    """Return what the configuration says, as `SAYS`; UserError for a key that would make another model."""
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}", fix="a folder that peft has written") from error
    for key in SAYS:
        if key not in values:
            raise UserError(f"{folder / CONFIG} has no {key}", fix="a folder that peft has written, of kind LORA")
    for key, value in values.items():
        allowed = HARMLESS.get(key, ()) if key in HARMLESS else (None, False, [], {})
        if key not in SAYS and allowed and value not in allowed:
            what = f"{folder / CONFIG}: {key} is {value!r}, and what that does to an adapter is not known here"
            raise UserError(what, fix=" or ".join(map(repr, allowed)))
    return {key: values[key] for key in SAYS}
