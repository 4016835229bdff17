"""Declare an option once, as a field of its command's dataclass, and check every value against that.

    @dataclass(frozen=True, kw_only=True)
    class SftOptions(Options):
        '''Fine-tune a model on conversations.

            minispeed sft talks.jsonl --epochs 2
        '''
        epochs: int = option(3, help="passes over the conversations", low=1, metavar="N")

A value is refused with the option, the value and what was expected, whichever way it came in: flag, config
file or Python. Types: int, float, str, bool and Path; `T | None`, `list[T]`, `tuple[T, ...]` of these.
"""

import sys
from collections.abc import Iterable
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from minispeed.errors import UserError, nearest

EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
VALUE_NAMES = {int: "N", float: "X", str: "TEXT", bool: "true|false", Path: "PATH"}


class Kind(NamedTuple):
    """A field's type, taken apart: `many` is list or tuple where it holds several, else None."""

    scalar: type
    many: type | None = None
    optional: bool = False


class Option(NamedTuple):
    """All that is known of one option; `name`, `kind` and `default` come from the field that declares it."""

    help: str
    metavar: str = ""
    unit: str = ""
    group: str = ""
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    positional: bool = False
    by_case: bool = False
    bare: Any = MISSING
    open_to: str = ""
    name: str = ""
    kind: Kind = Kind(str)
    default: Any = MISSING

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the flag alone says true, and `--no-NAME` false."""
        return self.kind.scalar is bool and self.kind.many is None

    @property
    def off(self) -> Any:
        """What `--no-NAME` stands for: false, no value, no values.  MISSING where there is no such flag."""
        if self.is_switch:
            return False
        return None if self.kind.optional else () if self.kind.many else MISSING

    @property
    def value_name(self) -> str:
        """What stands for the value in help, such as N."""
        return self.metavar or (self.name.upper() if self.positional else VALUE_NAMES[self.kind.scalar])

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        return ", ".join(([] if self.choices else [EXPECTED[self.kind.scalar]]) + self.limits)

    @property
    def limits(self) -> list[str]:
        """What a value of the right type must keep to, in words: choices and bounds."""
        limits = [f"one of {', '.join(map(str, self.choices))}"] if self.choices else []
        limits += [f"at least {self.low:g}"] if self.low is not None else []
        return limits + ([f"at most {self.high:g}"] if self.high is not None else [])

    def allows(self, value: Any) -> bool:
        """Whether one value, of the right type already, is among the choices and within the bounds."""
        among = not self.choices or value in self.choices
        return among and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def option(default: Any = MISSING, *, help: str, choices: Iterable[Any] = (), **more: Any) -> Any:
    """Declare an option on a field; without a default it is required.  `more`: the other fields of `Option`.

    unit        of the value, in the plural: "tokens", "seconds"
    metavar     what stands for the value in help
    group       the heading that help lists it under
    low, high   bounds, both of them allowed
    by_case     whether an option that is not set takes a value from the case
    bare        what the flag stands for where no value follows it
    open_to     the option, a list, that takes this one's name where its value is "auto"
    positional  typed without its flag, in the order of the fields; the last may be a list, and takes the rest
    """
    default = tuple(default) if isinstance(default, list) else default
    return field(default=default, metadata={"option": Option(help=help, choices=tuple(choices), **more)})


class Options:
    """What the dataclass of each command inherits: a value given from Python is checked like any other."""

    def __post_init__(self) -> None:
        for name, spec in options_of(type(self)).items():
            value = read(getattr(self, name), spec, f"{type(self).__name__}.{name}", f"{name}={{!r}}")
            object.__setattr__(self, name, value)


def command_of(cls: type[Options]) -> str:
    """Return the command that a class is for: `SftOptions` is for `sft`."""
    return cls.__name__.removesuffix("Options").lower()


def options_of(cls: type[Options]) -> dict[str, Option]:
    """Return what is known of each option of a command, by name, in the order of the fields."""
    hints = get_type_hints(cls)
    fields_of = fields(cls)  # type: ignore[arg-type]  # its heirs are dataclasses
    declared = {one.name: (one.metadata["option"], one.default) for one in fields_of}
    return {
        name: spec._replace(name=name, kind=_kind(hints[name]), default=default)
        for name, (spec, default) in declared.items()
    }


def read(value: Any, spec: Option, label: str, typed: str) -> Any:
    """Return a value, as JSON or Python has it, in the option's type.

    label   how errors name the option, in the place that the value came from
    typed   how a value is typed in that place, such as "--epochs {}"
    Raises  UserError if it does not fit
    """
    if value is None and spec.kind.optional:
        return None
    if spec.kind.many is None:
        return read_one(value, spec, label, typed)
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{label} must be a list; got {value!r}", fix=typed.format([value]))
    return spec.kind.many(read_one(one, spec, label, typed) for one in value)


def read_one(value: Any, spec: Option, label: str, typed: str) -> Any:
    """Return one value, the only one or one of a list's, in the option's type.  Raises as `read` does."""
    scalar = spec.kind.scalar
    if scalar is Path:
        fits = isinstance(value, (str, Path)) and value != ""
    elif scalar is float:  # whole numbers will do; nan, inf and what is beyond the largest float will not
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
    else:
        fits = type(value) is scalar  # so that true is no number
    if fits and spec.allows(scalar(value)):
        return scalar(value)
    close = nearest(str(value), map(str, spec.choices))
    known = spec.default if type(spec.default) is scalar else spec.value_name
    raise UserError(f"{label} must be {spec.expected}; got {value!r}", fix=typed.format(close or known))


def _kind(hint: Any) -> Kind:
    """Take a type hint apart."""
    args = get_args(hint)
    if NoneType in args:
        (inner,) = (one for one in args if one is not NoneType)
        kind = _kind(inner)._replace(optional=True)
    else:
        kind = Kind(args[0], get_origin(hint)) if args else Kind(hint)
    known = kind.scalar in EXPECTED and kind.many in (None, list, tuple)
    assert known and not (kind.many and kind.optional), f"no option can be of type {hint}"
    return kind
