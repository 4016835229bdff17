"""Words and config files -> options; options <-> JSON.

A command line is flags in any order, and positional words. `-` and `_` are one in names. A switch is `--name`
or `--no-name`; a list is several words after its flag, or the flag several times; `--no-name` also empties a list
and unsets an optional value. `--config FILE` reads the command's block of a JSON file, {"sft": {"epochs": 2}};
flags win over it. Nothing is guessed: an unknown name is an error that says which one was meant.
"""

import json
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from minispeed.errors import UserError, nearest
from minispeed.options.declare import Option, Options, command_of, options_of, read, read_one
from minispeed.options.foreign import FOREIGN
from minispeed.options.page import EVERYWHERE, help_text, usage

AUTO = "auto"  # the value of an option that is left to whoever its `open_to` names
PROVENANCE = "provenance"  # the block in which a run's config file says where it came from; no command reads it

Chosen = TypeVar("Chosen", bound=Options)


def parse(argv: Sequence[str], cls: type[Chosen], *, commands: Collection[str] = ()) -> Chosen:
    """Read a command's options from its words: flags win over the block of `--config`, that over defaults.

    commands  the names that may head a block of the config file, besides this command's
    Raises    UserError for whatever the user can mend; SystemExit(0) once `--help` is printed
    """
    given = _command_line(argv, cls)
    config = given.pop("config", None)
    if config is not None:
        given = {**_config_block(config, cls, {*commands, command_of(cls)}), **given}
    for name, spec in options_of(cls).items():
        if spec.default is MISSING and name not in given:
            wanted = spec.value_name if spec.positional else f"{spec.flag} {spec.value_name}"
            what = f"{command_of(cls)} needs {wanted}: {spec.help}"
            raise UserError(what, fix=f"minispeed {command_of(cls)} {wanted}")
    return cls(**given)


def from_json(cls: type[Chosen], block: Mapping[str, Any], *, where: str = "the config") -> Chosen:
    """Build a command's options from a block of JSON values; `where` names the block's home in errors."""
    return cls(**_read_block(cls, block, where))


def to_json(options: Options) -> dict[str, Any]:
    """Return all values in JSON's types, such that `from_json` gives equal options back."""
    return {name: _plain(getattr(options, name)) for name in options_of(type(options))}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.as_posix() if isinstance(value, Path) else value


def _command_line(argv: Sequence[str], cls: type[Options]) -> dict[str, Any]:
    """Sort a command's words into values by option, `config` among them.  Raises as `parse` does."""
    table = {**options_of(cls), **EVERYWHERE}
    found: dict[str, list[Any]] = {}
    loose: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        if word == "--":
            loose.extend(words)
            words.clear()
        elif word in ("-h", "--help"):
            print(help_text(cls))
            raise SystemExit(0)
        elif word == "-" or not word.startswith("-"):
            loose.append(word)
        else:
            spec, value = _flag(word, words, table, command_of(cls))
            found.setdefault(spec.name, []).append(value)
            while spec.kind.many and value != () and "=" not in word and words and not words[0].startswith("-"):
                found[spec.name].append(_read_text(words.popleft(), spec, spec.flag))
    for name, values in _placed(loose, cls).items():
        found.setdefault(name, []).extend(values)
    given = {name: _joined(values, table[name]) for name, values in found.items()}
    given.pop("debug", None)  # __main__ has looked at it
    return given


def _flag(word: str, words: deque[str], table: Mapping[str, Option], command: str) -> tuple[Option, Any]:
    """Return a flag's option and value; a value that follows as the next of `words` is taken from them."""
    flag, equals, text = word.partition("=")
    name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
    spec = table.get(name) or table.get(name.removeprefix("no_"))
    if spec is None or (name != spec.name and spec.off is MISSING):
        raise _unknown(flag, flag.lstrip("-").replace("-", "_"), table, command, lambda spec: spec.flag)
    if name != spec.name or spec.is_switch:
        if equals:
            what = f"{flag} takes no value, got {text!r}"
            raise UserError(what, fix=f"{spec.flag} or --no-{spec.flag[2:]}, without a value")
        return spec, True if name == spec.name else spec.off
    if not equals and (not words or words[0].startswith("--")):
        if spec.bare is not MISSING:
            return spec, spec.bare
        what = f"{flag} takes a value, but {words[0] + ' follows it' if words else 'nothing follows it'}"
        raise UserError(what, fix=f"{flag}={spec.value_name}")
    text = text if equals else words.popleft()
    return (
        (table[spec.open_to], spec.name) if spec.open_to and text == AUTO else (spec, _read_text(text, spec, spec.flag))
    )


def _placed(loose: list[str], cls: type[Options]) -> dict[str, list[Any]]:
    """Give the words that follow no flag to the positional options, in their order."""
    places: dict[str, list[Any]] = {}
    for spec in options_of(cls).values():
        if spec.positional and loose:
            count = len(loose) if spec.kind.many else 1
            places[spec.name] = [_read_text(text, spec, spec.value_name) for text in loose[:count]]
            loose = loose[count:]
    if loose:
        what = f"{command_of(cls)} has no place for {loose[0]!r}"
        raise UserError(what, fix=f"{usage(cls)}, and a flag before each option's value")
    return places


def _read_text(text: str, spec: Option, label: str) -> Any:
    """Read one value as it was typed; text that is none of the option's type is refused as that text."""
    value: Any = text
    try:
        if spec.kind.scalar is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif spec.kind.scalar in (int, float):
            value = spec.kind.scalar(text)
    except (ValueError, KeyError):
        pass  # read_one refuses it, with all that was expected
    return read_one(value, spec, label, f"{spec.flag} {{}}")


def _joined(values: list[Any], spec: Option) -> Any:
    """Return an option's one value, or the list of its values where it takes several."""
    if spec.kind.many and () not in values:
        return values
    if len(values) > 1:
        what = f"{spec.flag} is given {len(values)} times: {', '.join(str(one) for one in values)}"
        raise UserError(what, fix="giving it once")
    return values[0]


def _config_block(path: Path, cls: type[Options], commands: Collection[str]) -> dict[str, Any]:
    """Return the values that the config file has for this command."""
    try:
        blocks = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}", fix="--config <FILE>") from None
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"the config file {path} is not JSON: {error}", fix="mending it there") from None
    command = command_of(cls)
    shape = f'{{"{command}": {{"<option>": <value>}}}}'
    if not isinstance(blocks, dict):
        raise UserError(f"the config file {path} holds no object but {type(blocks).__name__}", fix=shape)
    for name in blocks:
        if name not in commands and name != PROVENANCE:
            raise UserError(f'"{name}" in the config file {path} is no command', fix=nearest(name, commands) or shape)
    if not isinstance(blocks.get(command), dict):
        raise UserError(f'the config file {path} has no block "{command}"', fix=shape)
    return _read_block(cls, blocks[command], str(path))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that has one key twice (json would keep the last without a word)."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'the key "{name}" is there twice')
    return dict(pairs)


def _read_block(cls: type[Options], block: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a block's keys and values, and give the values their types."""
    table, values, opened = options_of(cls), dict[str, Any](), dict[str, list[str]]()
    for key, value in block.items():
        name, label = key.replace("-", "_"), f'"{key}" (in the block "{command_of(cls)}" of {where})'
        if name not in table:
            raise _unknown(label, name, table, command_of(cls), lambda spec: f'"{spec.name}":')
        if name in values:
            raise UserError(f"{label} is there twice, once with - and once with _", fix="giving it once")
        if value is True and table[name].bare is not MISSING:
            value = [table[name].bare]
        if table[name].open_to and value == AUTO:
            opened.setdefault(table[name].open_to, []).append(name)
        else:
            values[name] = read(value, table[name], label, f'"{name}": {{}}')
    return values | {name: [*values.get(name, ()), *names] for name, names in opened.items()}


def _unknown(
    label: str, name: str, table: Mapping[str, Option], command: str, spell: Callable[[Option], str]
) -> UserError:
    """Say that there is no such option, and which was meant: by its name elsewhere, else by its spelling."""
    for ours, theirs in FOREIGN.items():
        here, _, value = ours.partition(" ")
        spec = table.get(here)
        if spec and name in theirs.split() and (not spec.choices or value in ("", *spec.choices)):
            what = f"{label} is {spell(spec).rstrip(':')} here"
            return UserError(what, fix=f"{spell(spec)} {value or spec.value_name}  # {spec.help}")
    what = f"{command} has no option {label}"
    close = nearest(name, table)
    if not close:
        return UserError(what, fix=f"minispeed {command} --help")
    value = "" if table[close].is_switch else f" {table[close].value_name}"
    return UserError(what, fix=f"{spell(table[close])}{value}  # {table[close].help}")
