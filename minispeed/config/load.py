"""Bring everything that was given under its one name: a dict, a JSON file, flat names, other names of a key.

A name that is not in the table is an error that says the nearest, and one key under two names may not have two values.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from minispeed.config.check import DeepSpeedConfigError, read_value, shown, typed
from minispeed.config.flat import RISE, unflatten
from minispeed.config.key import Given, example
from minispeed.config.table import BLOCKS, OPEN, TABLE
from minispeed.errors import nearest

PLAIN = (bool, int, float, str, NoneType)


def load(source: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any]:
    """Return the dict that a source is, or holds.

    Raises  DeepSpeedConfigError if there is no such file, it is not JSON (with line and column), has a key twice in one
            object, or is no object
    """
    if source is None or isinstance(source, Mapping):
        return dict(source or {})
    if not isinstance(source, (str, Path)):
        raise DeepSpeedConfigError(f"a configuration is a dict or the path of a JSON file; got {shown(source)}")
    try:
        found = json.loads(Path(source).read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except OSError as error:
        what = f"the configuration {shown(str(source))} cannot be read: {error.strerror}"
        raise DeepSpeedConfigError(what, fix="the path of a JSON file") from None
    except json.JSONDecodeError as error:
        what = f"{source} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        raise DeepSpeedConfigError(what, fix="JSON has no comments, and no comma before } or ]") from None
    except (ValueError, RecursionError) as error:  # not text, a key twice, a number or a nesting beyond all bounds
        raise DeepSpeedConfigError(f"{source} cannot be read: {error}", fix="mending it there") from None
    if not isinstance(found, dict):
        raise DeepSpeedConfigError(f"{source} holds no object: {shown(found)}", fix='{"train_batch_size": 32}')
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object with one key twice (json would keep the last without a word)."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'the key "{name}" is there twice')
    return dict(pairs)


def gather(raw: Mapping[str, Any], flat: Mapping[str, Any]) -> tuple[dict[str, Given], list[str]]:
    """Return all that was given, by the dotted names of the table, and lines about what was read with care."""
    found: dict[str, Given] = {}
    named, notes = unflatten(flat)
    for name, one in [*_leaves(raw), *named]:
        name, one = _by_its_name(name, one)
        if name in found and not _is_equal(found[name].value, one.value):
            both = " and ".join(f'{shown(value)} as "{written}"' for value, written in (found[name], one))
            raise DeepSpeedConfigError(f'"{name}" is given twice: {both}', fix="one of the two")
        found.setdefault(name, one)
    if any(name.startswith("scheduler.") for name, _ in named) and "scheduler.type" not in found:
        found["scheduler.type"] = Given("WarmupLR", RISE)
        notes.append('the learning rate rises and stays (WarmupLR): "scheduler" in a config names one that falls')
    return found, notes


def _leaves(block: Mapping[Any, Any], inside: str = "") -> Iterator[tuple[str, Given]]:
    """Yield the values in a dict by their dotted names."""
    for key, value in block.items():
        name = f"{inside}.{key}" if inside else str(key)
        if not isinstance(key, str) or "." in key or not (name in TABLE or name in BLOCKS or inside in OPEN):
            raise _unknown(name, key)
        if name not in BLOCKS:
            yield name, Given(value, name)
        elif value is not None:
            first = next((key for key in TABLE if key.startswith(f"{name}.")), f"{name}.lr")
            if not isinstance(value, Mapping):
                what = f'"{name}" must be an object; got {shown(value)}'
                raise DeepSpeedConfigError(what, fix=typed(first, example(TABLE[first]) if first in TABLE else 1e-3))
            yield from _leaves(value, name)


def _by_its_name(name: str, one: Given) -> tuple[str, Given]:
    """Return the key that another name stands for, and its value there."""
    key = TABLE.get(name)
    if key is None or not key.alias:
        return name, one
    value = key.stands_for[read_value(one.name, one.value, key.type, None)] if key.stands_for else one.value
    return key.alias, Given(value, one.name)


def _is_equal(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and all(type(one) in PLAIN for one in (a, b)) and bool(a == b)


def _unknown(name: str, key: Any) -> DeepSpeedConfigError:
    """Say that there is no such key, and which was meant: one of that name elsewhere, else one that is spelt alike."""
    same = [one for one in TABLE if one.rpartition(".")[2] == key]
    close = same[0] if same else nearest(name, TABLE)
    fix = typed(close, example(TABLE[close])) if close else "a key that `minispeed explain --keys` lists"
    return DeepSpeedConfigError(f'"{name}" is no key of DeepSpeed\'s configuration', fix=fix)
