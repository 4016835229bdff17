"""Read a HuggingFace config.json as a `GPTConfig`, and write one: no key is passed over.

    {"model_type": "llama", "hidden_size": 2048, ...}   <->   GPTConfig(model_dim=2048, ...)

The tables of `families.py` serve both ways: a family can hold a configuration if reading what would be written gives
the same again. Rotary angles are said in two ways, by transformers 4 (`rope_theta`, `rope_scaling`) and since 5
(`rope_parameters`): both are read, and the first is written, which both understand.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from minispeed.errors import UserError, nearest
from minispeed.model.config import GPTConfig
from minispeed.model.hf.families import FAMILIES, Family

CONFIG = "config.json"
SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_FACTORS = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low",
    "high_freq_factor": "rope_high",
    "original_max_position_embeddings": "rope_original",
}
_NEEDED = {"default": set(), "linear": {"factor"}, "llama3": set(_FACTORS)}
_OF_A_RUN = {"attention", "dropout", "attention_dropout"}  # settings that are no part of what is written


def is_hf(folder: Path) -> bool:
    """Return whether a folder's config.json is a HuggingFace one."""
    if not (folder / CONFIG).is_file():
        return False
    values = _json(folder)
    return "model_type" in values or "architectures" in values


def read_config(folder: Path, *, seq: int | None = None, **changes: Any) -> GPTConfig:
    """Return what a folder's config.json says, with fields changed.

    seq     tokens of the longest row that the model is wanted for
    Raises  UserError naming the key that stops it, its value, and what would be fine
    """
    config = from_json(_json(folder))
    if seq is not None and seq > config.max_positions:
        key = _key_of(family_in(folder), "max_positions")
        what = f"{folder / CONFIG}: {key} is {config.max_positions}, and rows of {seq} tokens are wanted"
        raise UserError(what, fix=f"rows of at most {config.max_positions}")
    return replace(config, **changes)


def from_json(values: Mapping[str, Any]) -> GPTConfig:
    """Return what the keys of a config.json say.

    Raises  UserError naming the key that stops it
    """
    family = family_of(values)
    for key, value in [*values.items(), *_turned(family, values)]:
        if problem := _problem(family, key, value):
            raise UserError(f"{CONFIG}: {problem[0]}", fix=problem[1])
    said = {name: value for key, names in family.says.items() for name, value in _said(family, values, key, names)}
    follows = {
        "num_kv_heads": said["num_heads"],
        "head_dim": said["model_dim"] // said["num_heads"],
        "hidden_dim": 4 * said["model_dim"],
    }
    said |= {name: value for name, value in follows.items() if said.get(name) is None}
    turned = _rope(family, values) if family.has["positions"] == "rotary" else {}
    return GPTConfig(**family.has, **said, **turned)


def to_json(config: GPTConfig, family: Family) -> dict[str, Any]:
    """Return the keys of a config.json that say a configuration, as far as the family has words for it."""
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # or transformers has its own in mind
    named = {"architectures": [family.architecture], "model_type": family.model_type}
    says = {key: getattr(config, names[0]) for key, names in family.says.items()}
    return named | says | _rope_keys(config, family) | dict(family.writes) | tokens


def family_in(folder: Path) -> Family:
    """Return the family of a folder's model; UserError as `family_of`."""
    return family_of(_json(folder))


def family_of(values: Mapping[str, Any]) -> Family:
    """Return the family that a config.json names; UserError lists those there are, and says what did not fit."""
    named = values.get("model_type")
    architectures = values.get("architectures")
    for family in FAMILIES.values():
        fits = architectures in (None, [family.architecture])
        if fits and (named == family.model_type or (named is None and architectures)):
            return family
    like = max(
        FAMILIES.values(), key=lambda one: sum(_problem(one, key, value) is None for key, value in values.items())
    )
    problems = (_problem(like, key, value) for key, value in values.items())
    first = next((found[0] for found in problems if found), f"architectures is {architectures}")
    what = f"{CONFIG} is of model_type {named!r}, architectures {architectures}; as {like.model_type}: {first}"
    known = ", ".join(f"{family.model_type} ({family.architecture})" for family in FAMILIES.values())
    raise UserError(what, fix=f"one of {known}")


def family_for(config: GPTConfig) -> Family:
    """Return the family that can hold a configuration.

    Raises  UserError naming the first setting that none can
    """
    lacks = {family.model_type: _lost(config, family) for family in FAMILIES.values()}
    best = min(lacks, key=lambda name: len(lacks[name]))
    if lacks[best]:
        name = lacks[best][0]
        what = f"none of {', '.join(FAMILIES)} has {name} {getattr(config, name)!r} beside this model's other settings"
        raise UserError(what, fix=f"what {best} has: it differs in {', '.join(lacks[best])}")
    return FAMILIES[best]


def _lost(config: GPTConfig, family: Family) -> list[str]:
    """Return the settings that a family cannot hold, in the order of `GPTConfig`."""
    unit = config.num_heads * (1 if "head_dim" in family.says else config.head_dim)
    if family.divides and config.model_dim % unit:
        return [field.name for field in fields(config)]  # there is not even a shape to compare with
    held = from_json(to_json(config, family))
    unused = {field.name for field in fields(config) if field.name.startswith("rope_")}
    skipped = _OF_A_RUN | (unused if config.positions == "learned" else set())
    names = [field.name for field in fields(config) if field.name not in skipped]
    return [name for name in names if getattr(held, name) != getattr(config, name)]


def _key_of(family: Family, name: str) -> str:
    return next(key for key, names in family.says.items() if name in names)


def _said(family: Family, values: Mapping[str, Any], key: str, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Return the fields that a key says, each with its value."""
    if key not in values and key not in family.missing:
        raise UserError(f"{CONFIG} has no {key}", fix=f"the config.json of a {family.model_type}")
    value = values.get(key, family.missing.get(key))
    if value is None and family.missing.get(key, 0) is not None:
        raise UserError(f"{CONFIG}: {key} is null", fix="a number")
    return [(name, value) for name in names]


def _problem(family: Family, key: str, value: Any) -> tuple[str, str] | None:
    """Return why a key stops the reading, and what would be fine; None if it does not."""
    if key in family.says or (key in ROPE and family.has["positions"] == "rotary"):
        return None
    if key not in family.ignores:
        what = f"{key} is {value!r}, and what that does in a {family.model_type} is not known here"
        alike = nearest(key, [*family.says, *family.ignores])
        return what, (f"{alike}, if that was meant; " if alike else "") + "if it changes nothing, remove it"
    at = family.ignores[key].at
    held = value if isinstance(value, list) else [value]
    if not at or all(one in at for one in held):
        return None
    return f"{key} is {value!r}", f"{' or '.join(map(repr, at))}: {family.ignores[key].why}"


def _turned(family: Family, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the keys that count even where they are not there, each with what is said among the rotary angles, or else
    beside them, or else by nobody.
    """
    said = {**family.unsaid, **values, **(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    return [(key, said[key]) for key in family.unsaid]


def _rope(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields about rotary angles, from either way of saying them."""
    said = [values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key)]
    if len(said) > 1 and said[0] != said[1]:
        raise UserError(f"{CONFIG}: rope_scaling is {said[0]}, and rope_parameters {said[1]}", fix="one of them")
    given = {key: value for key, value in said[0].items() if key not in family.unsaid} if said else {}
    kind = given.pop("rope_type", given.get("type", "default"))
    given.pop("type", None)
    if kind not in SCALINGS:
        raise UserError(f"{CONFIG}: rope_type is {kind!r}", fix=f"one of {', '.join(SCALINGS)}")
    thetas = [of["rope_theta"] for of in (given, values) if of.get("rope_theta") is not None] or [10000.0]
    if thetas[0] != thetas[-1]:
        raise UserError(f"{CONFIG}: rope_theta is {thetas[0]} and {thetas[1]}", fix="one of them")
    given.pop("rope_theta", None)
    for key in sorted(given.keys() ^ _NEEDED[kind]):
        has = f"has {key} {given[key]!r}" if key in given else f"lacks {key}"
        raise UserError(f"{CONFIG}: rope_type {kind!r} {has}", fix=f"{', '.join(_NEEDED[kind]) or 'nothing'} beside it")
    factors = {_FACTORS[key]: value for key, value in given.items()}
    return {"rope_theta": float(thetas[0]), "rope_scaling": SCALINGS[kind], **factors}


def _rope_keys(config: GPTConfig, family: Family) -> dict[str, Any]:
    """Return what `_rope` reads."""
    if family.has["positions"] != "rotary":
        return {}
    kind = next(theirs for theirs, ours in SCALINGS.items() if ours == config.rope_scaling)
    factors = {key: getattr(config, name) for key, name in _FACTORS.items() if key in _NEEDED[kind]}
    scaling = None if kind == "default" else {"rope_type": kind, **factors}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def _json(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / CONFIG} cannot be read: {error}", fix="a folder with a model's config.json"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG} holds no keys", fix="a folder with a model's config.json")
    return values
