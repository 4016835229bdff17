"""What the table knows of a key, and what that makes of the values that were given.

honoured   the value stands in the `Config`; "derived" says where the default comes from where it is no constant
no effect  accepted, and a line says why nothing changes; the line is left out where nothing was asked for
refused    an error that says why, unless the value switches it off
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_type_hints

from minispeed.config.check import DeepSpeedConfigError, Type, read_value, shown, typed

HONOURED, NO_EFFECT, REFUSED = "honoured", "no effect", "refused"
Section = TypeVar("Section")


class Key(NamedTuple):
    """One line of the table.

    what     what it does here, or why it does nothing, or why it is refused
    fix      what to write in place of a key that is refused
    derived  what an honoured key without a constant default takes
    alias    the key that this is another name of; `stands_for` translates its values
    """

    type: Type
    default: Any
    kind: str
    what: str
    fix: str = ""
    derived: str = ""
    alias: str = ""
    stands_for: Mapping[Any, Any] = {}


class Given(NamedTuple):
    """A value, and the name of the key that it was written under."""

    value: Any
    name: str


@dataclass(frozen=True, kw_only=True)
class Sifted:
    """What is left of given values: those that hold, where each is from, and lines about those that do nothing."""

    values: dict[str, Any]
    origins: dict[str, str]
    notes: list[str]


def honoured(type: Type, default: Any, what: str, *, key: str = "", derived: str = "") -> Any:
    """Declare an honoured key on a field; `key`: its name where that is not the field's."""
    return field(metadata={"key": Key(type, default, HONOURED, what, derived=derived), "name": key})


def section(prefix: str) -> Any:
    """Declare a field that holds a section."""
    return field(metadata={"prefix": prefix})


def sift(table: Mapping[str, Key], given: Mapping[str, Given]) -> Sifted:
    """Return what given values come to: all keys of the table that are honoured, by their names in it.

    Raises  DeepSpeedConfigError for a value that does not fit, a key that is refused, or one that is required
    """
    values, origins, silent = dict[str, Any](), dict[str, str](), dict[str, list[str]]()
    for name, key in table.items():
        one = given.get(name)
        if key.kind == REFUSED:
            if one is not None and not _leaves_as_is(one.value, key.default):
                what = f'"{one.name}" is {shown(one.value)}, but {key.what}'
                raise DeepSpeedConfigError(what, fix=key.fix or f'leaving "{one.name}" out')
        elif one is not None:
            value = read_value(one.name, one.value, key.type, example(key))
            if key.kind == HONOURED:
                values[name], origins[name] = value, "config" if one.name == name else f"alias of {one.name}"
            elif not (is_off(value) and is_off(key.default)) and not _is_switched_off(name, table, given):
                silent.setdefault(key.what, []).append(one.name)
        elif key.kind == HONOURED and not key.alias:
            if key.default is MISSING:
                raise DeepSpeedConfigError(f'"{name}" is missing', fix=typed(name, example(key)))
            values[name], origins[name] = key.default, "default"
    notes = [f"{', '.join(names)}: no effect here, {why}" for why, names in silent.items()]
    return Sifted(values=values, origins=origins, notes=notes)


def example(key: Key) -> Any:
    """Return a value that a key may have: its default, or one of its type."""
    return key.type.example if key.default is MISSING or key.default is None else key.default


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing: null, false, 0, nothing in it, or a block that is not enabled."""
    if isinstance(value, Mapping):
        inside = [value["enabled"]] if "enabled" in value else value.values()
        return all(not isinstance(one, Mapping) and is_off(one) for one in inside)
    return value is None or (isinstance(value, (bool, int, float, str, list, tuple)) and not value)


def _leaves_as_is(value: Any, default: Any) -> bool:
    """Whether a value of a refused key asks for what is so anyway."""
    if default is not True and is_off(value):
        return True
    is_plain = type(value) in (bool, int, float, str)
    return is_plain and value == default and isinstance(value, bool) == isinstance(default, bool)


def _is_switched_off(name: str, table: Mapping[str, Key], given: Mapping[str, Given]) -> bool:
    """Whether a key belongs to a block with "enabled", which is not on."""
    switch = f"{name.rpartition('.')[0]}.enabled"
    return switch in table and (switch not in given or is_off(given[switch].value))


def honoured_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Yield the dotted name and the line of each key that a section declares."""
    hints = get_type_hints(cls)
    for one in fields(cls):
        if "key" in one.metadata:
            yield prefix + (one.metadata["name"] or one.name), one.metadata["key"]
        elif "prefix" in one.metadata:
            yield from honoured_keys(_section(hints[one.name]), _inside(prefix, one.metadata["prefix"]))


def build(cls: type[Section], values: Mapping[str, Any], prefix: str = "", **more: Any) -> Section:
    """Build a section from values by dotted name; one whose type is null is None.  more: fields that are no keys"""
    hints = get_type_hints(cls)
    for one in fields(cast(Any, cls)):
        if "key" in one.metadata:
            more[one.name] = values[prefix + (one.metadata["name"] or one.name)]
        elif "prefix" in one.metadata:
            inside = _inside(prefix, one.metadata["prefix"])
            is_there = values.get(f"{inside}type", "") is not None
            more[one.name] = build(_section(hints[one.name]), values, inside) if is_there else None
    return cls(**more)


def values_of(section: object, prefix: str = "") -> dict[str, Any]:
    """Return the value of every honoured key by its dotted name; settings of optimizer and schedule one by one."""
    found = dict[str, Any]()
    for one in fields(cast(Any, section)):
        value, name = getattr(section, one.name), prefix + (one.metadata.get("name") or one.name)
        if "prefix" in one.metadata:
            found |= values_of(value, _inside(prefix, one.metadata["prefix"])) if value is not None else {}
        elif "key" in one.metadata:
            found |= {f"{name}.{key}": of for key, of in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def _inside(prefix: str, name: str) -> str:
    return f"{prefix}{name}." if name else prefix


def _section(hint: Any) -> type:
    """Return the class of a section, from the hint of a field that may be None."""
    return next(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)
