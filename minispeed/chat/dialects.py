"""Seven dialects of chat data: from one record of a file to the turns of a conversation.

Six dialects of conversations and one of plain text differ only in their keys, so each is one row of a table: the
keys it is known by and a function from one record to its turns. All that a record can have wrong (types, roles,
empty turns, half characters) becomes a reason in words.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from minispeed.chat.conversation import ASSISTANT, SYSTEM, TEXT, USER, Conversation, Turn
from minispeed.errors import UserError, nearest

METRICS = ("exact", "label", "opening")


class Malformed(ValueError):
    """Why one record cannot be read; becomes a line of the report or of the error, with its number."""


Reader = Callable[[dict[str, Any]], list[Turn]]


class Format(NamedTuple):
    """A dialect: its name as said to the user, the keys it is known by, and how a record becomes turns."""

    name: str
    keys: tuple[str, ...]
    turns: Reader


def recognise(path: Path, head: list[tuple[int, object]]) -> Format:
    """Return the dialect of the first of the (number, record) that has one.

    Raises  UserError saying what the file holds instead
    """
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


def conversation_of(record: object, form: Format, task: str) -> Conversation:
    """Read one record in the file's dialect, with the optional keys that all dialects share.

    task    of a record that names none
    Raises  Malformed where the record cannot be read, or could not even be parsed
    """
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
