"""Show what may be typed: `--help` of a command, and the page of all options (docs/options.md)."""

import inspect
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from minispeed.options.declare import Kind, Option, Options, command_of, options_of
from minispeed.options.foreign import FOREIGN

INDENT = 28  # columns before what an option means

EVERYWHERE = {
    "config": Option(
        name="config",
        kind=Kind(Path, optional=True),
        metavar="FILE",
        default=None,
        group="everywhere",
        help="read options from this command's block of a JSON file; flags win over it",
    ),
    "debug": Option(
        name="debug",
        kind=Kind(bool),
        default=False,
        group="everywhere",
        help="show where in the code an error arose",
    ),
    "help": Option(
        name="help", kind=Kind(bool), default=False, group="everywhere", help="show this and stop (also -h)"
    ),
}


def usage(cls: type[Options]) -> str:
    """Return how a command is typed: minispeed show [options] RUN"""
    words = [f"minispeed {command_of(cls)} [options]"]
    for spec in options_of(cls).values():
        if spec.positional:
            word = _typed(spec)
            words.append(word if spec.default is MISSING else f"[{word}]")
    return " ".join(words)


def help_text(cls: type[Options]) -> str:
    """Return what `--help` prints: the docstring, then the options by group, as wide as the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    lines = [_about(cls), "", f"usage: {usage(cls)}"]
    for group, specs in _groups(cls).items():
        lines += ["", f"{group}:"]
        for spec in specs:
            text = " ".join(filter(None, [spec.help, _remarks(spec)]))
            body = textwrap.wrap(text, max(width - INDENT, 30))
            left = "  " + _typed(spec)
            if len(left) >= INDENT:
                lines.append(left)
                left = ""
            lines += [f"{left:{INDENT}}{body[0]}", *(" " * INDENT + line for line in body[1:])]
    return "\n".join(lines)


def page(commands: Mapping[str, type[Options]]) -> str:
    """Return the page of every option of every command, in Markdown."""
    parts = [
        "# Every option of every command",
        "Made from the code by `make options`; `minispeed COMMAND --help` shows the same. Any of them can "
        'stand in a config file, `{"COMMAND": {"option": value}}`, which `--config FILE` reads; flags win '
        "over it. `-` and `_` are one in names.",
    ]
    for command, cls in commands.items():
        parts += [f"## minispeed {command}", _about(cls), f"`{usage(cls)}`"]
        rows = [
            f"| `{_typed(spec)}` | {_cell(spec.help)} | {_cell(_remarks(spec).strip('()'))} |"
            for specs in _groups(cls, every=False).values()
            for spec in specs
        ]
        parts.append("\n".join(["| option | what it is | values |", "|---|---|---|", *rows]))
    known = {name for cls in commands.values() for name in options_of(cls)}
    rows = [
        f"| `--{ours.replace('_', '-')}` | {', '.join(f'`{name}`' for name in theirs.split())} |"
        for ours, theirs in FOREIGN.items()
        if ours.split()[0] in known
    ]
    parts += ["## If you know another tool", "\n".join(["| here | elsewhere |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _about(cls: type[Options]) -> str:
    """Return the docstring; a line of it that starts with `minispeed` is an example, and stands indented."""
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    return "\n".join(f"    {line.strip()}" if line.strip().startswith("minispeed ") else line for line in lines)


def _groups(cls: type[Options], *, every: bool = True) -> dict[str, list[Option]]:
    """Sort a command's options by heading: positional ones first, those of every command last."""
    table = options_of(cls).values()
    groups: dict[str, list[Option]] = {}
    for spec in [
        *sorted(table, key=lambda spec: not spec.positional),
        *(EVERYWHERE.values() if every else ()),
    ]:
        groups.setdefault("what it works on" if spec.positional else spec.group or "options", []).append(spec)
    return groups


def _typed(spec: Option) -> str:
    """Return how an option is typed: --lr NUMBER"""
    if spec.positional:
        return spec.value_name + ("..." if spec.kind.many else "")
    if spec.is_switch:
        return spec.flag if spec.group == "everywhere" else f"{spec.flag}, --no-{spec.flag[2:]}"
    return f"{spec.flag} {spec.value_name}"


def _remarks(spec: Option) -> str:
    """Return unit, limits and default of an option, in brackets."""
    unit = f"in {spec.unit}" if spec.unit else ""
    several = "one or more" if spec.kind.many and not spec.positional else ""
    default = "" if spec.group == "everywhere" else _default(spec)
    return f"({'; '.join(filter(None, [unit, *spec.limits, several, default]))})".replace("()", "")


def _default(spec: Option) -> str:
    if spec.default is MISSING:
        return "required"
    shown: Any = spec.default
    if spec.is_switch and shown is not None:
        shown = "on" if shown else "off"
    elif isinstance(shown, (list, tuple)):
        shown = ", ".join(map(str, shown)) or "none"
    return (
        f"default: {'chosen by the case' if shown is None and spec.by_case else 'not set' if shown is None else shown}"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
