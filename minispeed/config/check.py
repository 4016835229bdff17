"""Say what a value of a configuration must be, and refuse what it is not, in one sentence that names the key.

A type is words for people and a function for values. JSON knows one kind of number, so 5e8 is a whole number too;
true is none. "auto", which DeepSpeed leaves to whoever called it, is a value of no type.
"""

import json
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from minispeed.errors import UserError, nearest

MISFIT = object()
DTYPES = ("fp32", "bf16", "fp16", "fp64")
SPELT = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float64": "fp64"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class DeepSpeedConfigError(UserError):
    """A mistake in a DeepSpeed configuration: `what` names the key and the value, `fix` what to write instead."""


class Type(NamedTuple):
    """What a value must be.

    words    such as "a whole number, at least 1"
    read     returns a value in Python's type, MISFIT where it is none of these
    example  a value that will do
    """

    words: str
    read: Callable[[Any], Any]
    example: Any


def whole(low: int | None = 0, high: int | None = None) -> Type:
    """Return the type of whole numbers from `low` (None: any) to `high`."""
    read = _within(lambda value: int(value) if value == int(value) else MISFIT, low, high)
    return Type(f"a whole number{_bounds(low, high)}", read, max(low or 0, 8))


def number(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Type:
    """Return the type of finite numbers from `low` (or above `above`) to `high`."""
    read = _within(lambda value: float(value) if above is None or value > above else MISFIT, low, high)
    return Type(f"a number{_bounds(low, high)}{'' if above is None else f', above {above:g}'}", read, 1.0)


def _bounds(low: float | None, high: float | None) -> str:
    return "".join(f", {word} {bound}" for word, bound in (("at least", low), ("at most", high)) if bound is not None)


def _within(convert: Callable[[Any], Any], low: float | None, high: float | None) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:  # nan is not, nor is what no float can hold
            return MISFIT
        return convert(value) if (low is None or value >= low) and (high is None or value <= high) else MISFIT

    return read


def choice(*names: str) -> Type:
    """Return the type of these words, in whatever case they are given."""
    spelt = {name.lower(): name for name in names}
    read = lambda value: spelt.get(value.lower(), MISFIT) if isinstance(value, str) else MISFIT  # noqa: E731
    return Type(f"one of {', '.join(names)}", read, names[0])


def maybe(kind: Type) -> Type:
    """Return the type of what `kind` allows, or null."""
    return Type(f"{kind.words}, or null", lambda value: None if value is None else kind.read(value), kind.example)


def _read_dtype(value: Any) -> Any:
    name = value.lower().removeprefix("torch.") if isinstance(value, str) else value
    return choice(*DTYPES).read(SPELT.get(name, name) if isinstance(name, str) else name)


def _read_betas(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return MISFIT
    betas = tuple(FRACTION.read(beta) for beta in value)
    return MISFIT if MISFIT in betas or 1.0 in betas else betas


def _is_setting(value: Any) -> bool:
    many = value if isinstance(value, (list, tuple)) else [] if value is None or isinstance(value, bool) else [value]
    return all(number().read(one) is not MISFIT for one in many)


BOOLEAN = Type("true or false", lambda value: value if isinstance(value, bool) else MISFIT, True)
TEXT = Type("text", lambda value: value if isinstance(value, str) else MISFIT, "name")
WORDS = Type(
    "a list of texts",
    lambda value: (
        list(value) if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value) else MISFIT
    ),
    ["name"],
)
BLOCK = Type("an object", lambda value: dict(value) if isinstance(value, Mapping) else MISFIT, {})
DTYPE = Type(f"one of {', '.join(DTYPES)}", _read_dtype, "fp32")
COUNT, ONE_OR_MORE, POSITIVE, AMOUNT, FRACTION = whole(), whole(1), number(above=0), number(0), number(0, 1)
SETTING = Type(
    "a number, true, false, null, or a list of numbers", lambda value: value if _is_setting(value) else MISFIT, 1.0
)
BETAS = Type("two numbers, at least 0, below 1", _read_betas, [0.9, 0.999])


def read_value(name: str, value: Any, kind: Type, default: Any) -> Any:
    """Return a value in Python's type.

    name     of the key, as it was written
    default  what a fix may suggest; None: the type's example
    Raises   DeepSpeedConfigError if it does not fit
    """
    suggested = kind.example if default is None else default
    if isinstance(value, str) and value == "auto":
        raise DeepSpeedConfigError(f'"{name}" is "auto", and nothing here fills it in', fix=typed(name, suggested))
    found = kind.read(value)
    if found is MISFIT:
        close = nearest(value, kind.words.removeprefix("one of ").split(", ")) if isinstance(value, str) else ""
        fix = typed(name, close if kind.read(close) is not MISFIT and close else suggested)
        raise DeepSpeedConfigError(f'"{name}" must be {kind.words}; got {shown(value)}', fix=fix)
    return found


def typed(name: str, value: Any) -> str:
    """Return how a value of a dotted key is typed in JSON: "a": {"b": value}"""
    *blocks, last = name.split(".")
    return "".join(f'"{block}": {{' for block in blocks) + f'"{last}": {json.dumps(value)}' + "}" * len(blocks)


def shown(value: Any) -> str:
    """Return a value as Python has it, cut to a line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a whole number of thousands of digits"
