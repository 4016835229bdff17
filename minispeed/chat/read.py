"""Read conversations from a file, whatever its dialect: look at the first records, say which, read all.

A file is a stream of numbered records, JSON Lines or one JSON array, compressed or not. All that it can have wrong
(bytes that are not UTF-8, JSON cut short, endless lines, a record that its dialect does not know) becomes a line
number and a reason.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from minispeed.chat.conversation import Conversation
from minispeed.chat.dialects import Malformed, conversation_of, recognise
from minispeed.errors import UserError

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


def detect(path: Path | str) -> str:
    """Say which dialect a file is written in, from its first records.

    Raises  UserError where the file is missing, empty, unreadable or of no known dialect
    """
    return recognise(Path(path), list(islice(_records(Path(path)), LOOKED_AT))).name


def read(path: Path | str, *, skip_bad: bool = False) -> Reading:
    """Read all conversations of a file; a task that a record does not name is the stem of the file's name.

    Raises  UserError naming the first ten malformed lines, unless `skip_bad`; and as `detect` does
    """
    path = Path(path)
    records = _records(path)
    head = list(islice(records, LOOKED_AT))
    form = recognise(path, head)
    lines: list[Line] = []
    bad: list[tuple[int, str]] = []
    for number, record in chain(head, records):
        try:
            lines.append(Line(number, conversation_of(record, form, stem(path))))
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


def _complaint(path: Path, bad: list[tuple[int, str]], total: int) -> str:
    shown = [f"  {path.name}:{number}: {reason}" for number, reason in bad[:SHOWN]]
    more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return "\n".join([f"{path}: {len(bad)} of {total} records are malformed", *shown, *more])
