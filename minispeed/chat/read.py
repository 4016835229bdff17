"""Read conversations from a file, whatever its dialect: look at the first records, say which, read all.

Six dialects of chat data and one of plain text differ only in their keys, so each is one row of a table: the
keys it is known by and a function from one record to its turns. All that a file can have wrong (types, roles,
empty turns, bytes that are not UTF-8, JSON cut short, endless lines) becomes a line number and a reason.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from minispeed.chat.conversation import ASSISTANT, SYSTEM, TEXT, USER, Conversation, Turn
from minispeed.errors import UserError, nearest

METRICS = ("exact", "label", "opening")
LOOKED_AT = 100  # records that the dialect is told from
LONGEST_LINE = 64 * 2**20  # bytes; a longer line is a file of another kind
SHOWN = 10  # malformed lines that are named one by one
BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A conversation and where it stands: the line of a JSONL file, the record of a JSON array, from 1."""

    number: int
    conversation: Conversation


class Reading(NamedTuple):
    """What a file holds: the dialect by name, the well-formed lines, and (number, reason) for the others."""

    format: str
    lines: list[Line]
    bad: list[tuple[int, str]]


class Malformed(ValueError):
    """Why one record cannot be read; becomes a line of the report or of the error, with its number."""


def detect(path: Path | str) -> str:
    """Say which dialect a file is written in, from its first records.

    Raises  UserError where the file is missing, empty, unreadable or of no known dialect
    """
    return _recognise(Path(path), list(islice(_records(Path(path)), LOOKED_AT))).name


def read(path: Path | str, *, skip_bad: bool = False) -> Reading:
    """Read all conversations of a file; a task that a record does not name is the stem of the file's name.

    Raises  UserError naming the first ten malformed lines, unless `skip_bad`; and as `detect` does
    """
    path = Path(path)
    records = _records(path)
    head = list(islice(records, LOOKED_AT))
    form = _recognise(path, head)
    lines: list[Line] = []
    bad: list[tuple[int, str]] = []
    for number, record in chain(head, records):
        try:
            lines.append(Line(number, _conversation(record, form, stem(path))))
        except Malformed as reason:
            bad.append((number, str(reason)))
    if bad and not skip_bad:
        raise UserError(_complaint(path, bad, len(lines) + len(bad)), fix="mend them, or leave them out: --skip-bad")
    if not lines:
        raise UserError(f"{path} holds no conversation that can be read; {path.name}:{bad[0][0]}: {bad[0][1]}")
    return Reading(form.name, lines, bad)


def stem(path: Path) -> str:
    """Return a file's name up to its first dot: `gsm8k.jsonl.gz` is the task gsm8k."""
    return path.name.split(".")[0] or path.name


# ---- dialects: from one record to its turns


Reader = Callable[[dict[str, Any]], list[Turn]]


class Format(NamedTuple):
    """A dialect: its name as said to the user, the keys it is known by, and how a record becomes turns."""

    name: str
    keys: tuple[str, ...]
    turns: Reader


def _listed(list_key: str, role_key: str, text_key: str, roles: dict[str, str]) -> Reader:
    """Return the reader of a list of {role, text} objects under `list_key`."""

    def turns(record: dict[str, Any]) -> list[Turn]:
        items = record[list_key]
        if not isinstance(items, list) or not items:
            raise Malformed(f'"{list_key}" must be a list of at least one turn, is {_kind(items)}')
        return [turn(index, item) for index, item in enumerate(items, 1)]

    def turn(index: int, item: object) -> Turn:
        if not isinstance(item, dict):
            raise Malformed(f'turn {index} must be an object with "{role_key}" and "{text_key}", is {_kind(item)}')
        try:
            name = _text(item, role_key)
            if name not in roles:
                near = nearest(name, roles)
                known = f"is it {near!r}?" if near else f"known: {', '.join(roles)}"
                raise Malformed(f"role {name[:40]!r} is not known; {known}")
            return Turn(roles[name], _joined(item, text_key))
        except Malformed as reason:
            raise Malformed(f"turn {index}: {reason}") from None

    return turns


def _joined(item: dict[str, Any], key: str) -> str:
    """Return a turn's text, which may also be written as a list of {"type": "text", "text": ...}."""
    parts = item.get(key)
    if not isinstance(parts, list):
        return _text(item, key)
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise Malformed(f'"{key}" has parts that are not text')
    return "".join(_text(part, "text") for part in parts)


def _pair(asked: str, answered: str) -> Reader:
    """Return the reader of one question and one answer, each under its key."""
    return lambda record: [Turn(USER, _text(record, asked)), Turn(ASSISTANT, _text(record, answered))]


def _alpaca(record: dict[str, Any]) -> list[Turn]:
    """An instruction, an input that may be empty or missing, an output."""
    given = _text(record, "input") if record.get("input") is not None else ""
    asked = _text(record, "instruction")
    return [
        Turn(USER, f"{asked}\n\n{given}" if given.strip() else asked),
        Turn(ASSISTANT, _text(record, "output")),
    ]


def _preferred(record: dict[str, Any]) -> list[Turn]:
    """A prompt and its chosen answer; a prompt "Human: ... Assistant:" is cut into its turns."""
    prompt, chosen = _text(record, "prompt"), _text(record, "chosen")
    if not (marked := re.fullmatch(r"\s*Human:(.*)\sAssistant:\s*", prompt, re.DOTALL)):
        return [Turn(USER, prompt), Turn(ASSISTANT, chosen)]
    first, *more = re.split(r"\n\s*(Human|Assistant):", marked[1])  # text, name, text, name, text, ...
    roles = [USER if name == "Human" else ASSISTANT for name in ("Human", *more[::2], "Assistant")]
    return [Turn(role, text.strip()) for role, text in zip(roles, [first, *more[1::2], chosen], strict=True)]


OPENAI_ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT}
SHAREGPT_ROLES = {"system": SYSTEM, "human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT}
FORMATS = (
    Format("OpenAI messages", ("messages",), _listed("messages", "role", "content", OPENAI_ROLES)),
    Format("ShareGPT", ("conversations",), _listed("conversations", "from", "value", SHAREGPT_ROLES)),
    Format("Alpaca", ("instruction", "output"), _alpaca),
    Format("DeepSpeed-Chat prompt/chosen", ("prompt", "chosen"), _preferred),
    Format("prompt/response", ("prompt", "response"), _pair("prompt", "response")),
    Format("question/answer", ("question", "answer"), _pair("question", "answer")),
    Format("plain text", ("text",), lambda record: [Turn(TEXT, _text(record, "text"))]),
)


def _recognise(path: Path, head: list[tuple[int, object]]) -> Format:
    """Return the dialect of the first record that has one."""
    if not head:
        raise UserError(f"{path} is empty: it holds no record")
    for _, record in head:
        for form in FORMATS:
            if isinstance(record, dict) and record.keys() >= set(form.keys):
                return form
    number, record = head[0]
    if isinstance(record, Malformed):
        what = f"{path} is neither JSON Lines nor a JSON array: line {number}: {record}"
    elif isinstance(record, dict):
        what = f"{path} is of no known dialect: its first record has the keys {_some(sorted(map(str, record)))}"
    else:
        what = f"{path} is of no known dialect: its first record is {_kind(record)}"
    raise UserError(what, fix="one of: " + "; ".join(f"{form.name} ({', '.join(form.keys)})" for form in FORMATS))


def _conversation(record: object, form: Format, task: str) -> Conversation:
    """Read one record in the file's dialect, with the optional keys that all dialects share."""
    if isinstance(record, Malformed):
        raise record
    if not isinstance(record, dict):
        raise Malformed(f"must be an object, is {_kind(record)}")
    if missing := [key for key in form.keys if key not in record]:
        keys = _some(sorted(record))
        raise Malformed(f'lacks "{missing[0]}", which all of {form.name} has; its keys are {keys}')
    turns = form.turns(record)
    if form.name != "plain text" and isinstance(record.get("system"), str) and record["system"].strip():
        turns = [Turn(SYSTEM, _text(record, "system")), *turns]
    for index, turn in enumerate(turns, 1):
        if not turn.text.strip():
            raise Malformed(f"turn {index} ({turn.role}) is empty")
    named = _text(record, "task") if "task" in record else task
    metric = _text(record, "metric") if "metric" in record else METRICS[0]
    if metric not in METRICS:
        raise Malformed(f'"metric" must be one of {", ".join(METRICS)}, is {metric[:40]!r}')
    return Conversation(tuple(turns), named, metric)


def _text(record: dict[str, Any], key: str) -> str:
    """Return the text under a key; Malformed where it is missing, no text, or no Unicode."""
    if key not in record:
        raise Malformed(f'"{key}" is missing')
    value = record[key]
    if not isinstance(value, str):
        raise Malformed(f'"{key}" must be text, is {_kind(value)}')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Malformed(f'"{key}" holds half of a surrogate pair, which no text can hold') from None
    return value


# ---- records: from a file to (number, JSON value or the reason why not)


def _records(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (number, value) for each record of a file: JSON Lines or one JSON array, compressed or not."""
    try:
        with _open(path) as file:
            start = cast(Any, file).peek(4096).removeprefix(BOM).lstrip()
            yield from _array(path, file.read()) if start[:1] == b"[" else _lines(file)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as reason:
        raise UserError(f"{path} is not a whole gzip file: {reason}", fix="copy or download it again") from None
    except OSError as reason:
        raise UserError(f"{path} cannot be read: {reason.strerror or reason}") from None


def _open(path: Path) -> BinaryIO:
    """Open for reading bytes; compressed files are known by their first two."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb") if compressed else open(path, "rb"))


def _array(path: Path, content: bytes) -> Iterable[tuple[int, object]]:
    """Parse a whole file as one array; a mistake there cannot be skipped: what follows is unknown."""
    value = _parsed(content)
    if isinstance(value, Malformed):
        raise UserError(f"{path} is a JSON array with a mistake: {value}", fix="mend it, or write one record per line")
    return enumerate(cast(list[object], value), 1)


def _lines(file: BinaryIO) -> Iterator[tuple[int, object]]:
    """Parse line by line, passing over blank ones, never holding more than the longest line allowed."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, Malformed(f"is longer than {LONGEST_LINE} bytes")
        elif line.strip().removeprefix(BOM):
            yield number, _parsed(line)


def _parsed(content: bytes) -> object:
    """Return the JSON value of some bytes, or the reason why they have none."""
    try:
        return json.loads(content.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        line, column = (
            content.count(b"\n", 0, error.start) + 1,
            error.start - content.rfind(b"\n", 0, error.start),
        )
        return Malformed(f"is not UTF-8: byte 0x{content[error.start]:02x}{_place(line, column)}")
    except json.JSONDecodeError as error:
        return Malformed(f"is not JSON: {error.msg}{_place(error.lineno, error.colno)}")
    except RecursionError:
        return Malformed("is nested too deeply")
    except ValueError:  # an integer of more digits than Python will parse
        return Malformed("holds a number of thousands of digits")


def _place(line: int, column: int) -> str:
    return f" at line {line}, column {column}" if line > 1 else f" at column {column}"


def _kind(value: object) -> str:
    """Name a JSON value's type."""
    if isinstance(value, (list, dict)) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    kinds = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")


def _some(keys: list[str]) -> str:
    return (", ".join(repr(key[:40]) for key in keys[:8]) or "none") + (", ..." if len(keys) > 8 else "")


def _complaint(path: Path, bad: list[tuple[int, str]], total: int) -> str:
    shown = [f"  {path.name}:{number}: {reason}" for number, reason in bad[:SHOWN]]
    more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return "\n".join([f"{path}: {len(bad)} of {total} records are malformed", *shown, *more])
