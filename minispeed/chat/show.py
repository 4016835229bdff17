"""What a person sees of conversations: their tokens in colour, what looks wrong, and the report as text.

Each token is special, learnt, or context. On a terminal that is a colour; elsewhere what is learnt stands
between [+ and +]. What looks like a mistake in the data is counted and placed; nothing is removed for it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from minispeed.chat.conversation import ASSISTANT, TEXT, Conversation, Turn
from minispeed.chat.template import ChatTemplate, Encoded
from minispeed.chat.tokenizer import ChatTokenizer

CONTEXT, LEARNT, SPECIAL, SPECIAL_LEARNT = "context", "learnt", "special", "special, learnt"
COLOURED = {CONTEXT: "\x1b[2m{}\x1b[0m", LEARNT: "\x1b[32m{}\x1b[0m", SPECIAL: "\x1b[36m{}\x1b[0m",
            SPECIAL_LEARNT: "\x1b[1;32m{}\x1b[0m"}  # fmt: skip
PLAIN = {CONTEXT: "{}", LEARNT: "[+{}+]", SPECIAL: "{}", SPECIAL_LEARNT: "[+{}+]"}
WHERE = 5  # places named per notice
LEFTOVERS = re.compile(
    r"### (Response|Instruction):|\[/?INST\]|<\|(im_start|im_end|eot_id|user|assistant)\|>|<start_of_turn>"
)


def show(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, template: ChatTemplate, *, colour: bool,
    train_on: str = "assistant",
) -> str:  # fmt: skip
    """Return conversations as the model sees them, each under its task and its numbers of tokens.

    What terminals would obey in a text (escape sequences) is written out instead.
    """
    style = COLOURED if colour else PLAIN
    legend = "  ".join(style[kind].format(kind) for kind in style)
    return "\n".join([legend, *(_one(c, tokenizer, template, style, train_on) for c in conversations)])


def _one(
    conversation: Conversation,
    tokenizer: ChatTokenizer,
    template: ChatTemplate,
    style: Mapping[str, str],
    train_on: str,
) -> str:
    """Show a conversation: in one row, or in as many as its template makes of it."""
    (rows,) = template.encode_rows([conversation], tokenizer, train_on=train_on)
    return "".join(_row(conversation.task, row, tokenizer, template, style) for row in rows)


def _row(task: str, row: Encoded, tokenizer: ChatTokenizer, template: ChatTemplate, style: Mapping[str, str]) -> str:
    ids, supervised, _ = row
    end, specials = template.stop_id(tokenizer), set(tokenizer.special.values())
    kinds = {
        (False, False): CONTEXT,
        (False, True): LEARNT,
        (True, False): SPECIAL,
        (True, True): SPECIAL_LEARNT,
    }
    out = [f"\n--- {task or 'conversation'}: {len(ids)} tokens, {sum(supervised)} learnt\n"]
    # by `token == end` too: the line breaks between a stop and the next role, which are both special
    for (special, learnt, stop), run in groupby(zip(ids, supervised), lambda t: (t[0] in specials, t[1], t[0] == end)):
        text = printable(tokenizer.decode([token for token, _ in run], special=True))
        out.append(style[kinds[special, learnt]].format(text) + ("\n" if stop else ""))
    return "".join(out)


def printable(text: str) -> str:
    """Write control characters out, except line breaks and tabs: shown text cannot steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class Entry(NamedTuple):
    """A conversation and whence it comes: index of the file in its part, and `file:line`."""

    conversation: Conversation
    source: int
    where: str


class Notices:
    """What looks like a mistake in the data, counted and placed; nothing is removed for it."""

    def __init__(self, train: list[Entry], evaluation: list[Entry]) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        seen: set[bytes] = set()
        asked = {content_digest(_prompt(entry.conversation)) for entry in train}
        for entry in [*train, *evaluation]:
            digest = content_digest(entry.conversation.turns)
            if digest in seen:
                self.add("exact duplicates", entry.where)
            seen.add(digest)
            for name in _oddities(entry.conversation):
                self.add(name, entry.where)
        for entry in evaluation:
            if (prompt := _prompt(entry.conversation)) and content_digest(prompt) in asked:
                self.add("evaluation prompts that are also in training", entry.where)

    def add(self, name: str, where: str) -> None:
        """Count one more; the first few are named."""
        found = self.found.setdefault(name, {"count": 0, "where": []})
        found["count"] += 1
        found["where"] += [where][: WHERE - len(found["where"])]


def _prompt(conversation: Conversation) -> tuple[Turn, ...]:
    """Return the turns before the first answer."""
    roles = [turn.role for turn in conversation.turns]
    return conversation.turns[: roles.index(ASSISTANT) if ASSISTANT in roles else None]


def _oddities(conversation: Conversation) -> Iterator[str]:
    """Name what is odd in one conversation."""
    turns = conversation.turns
    if turns[-1].role not in (ASSISTANT, TEXT):
        yield "conversations whose last turn is not the assistant's"
    if any(turn.role == ASSISTANT and not re.search(r"\w", turn.text) for turn in turns):
        yield "conversations with a near-empty answer: no letter, no digit"
    if any(LEFTOVERS.search(turn.text) for turn in turns):
        yield "conversations with leftovers of another template"


def content_digest(value: object) -> bytes:
    """Return 16 bytes that stand for a JSON value."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()


def report_text(report: Mapping[str, Any]) -> str:
    """Return the report of `prepare` for reading."""
    lines = ["already prepared: same data, same options"] if report["reused"] else []
    lines.append(f"vocabulary {report['vocabulary']}, context {report['seq']}, trained on {report['train_on']}")
    for part in ("train", "eval"):
        lines += [
            f"{part}{' (held out)' if part == 'eval' and report['held_out'] else ''}",
            *_part_lines(report[part]),
        ]
    for name, found in report["notices"].items():
        shown = ", ".join(found["where"]) + (", ..." if found["count"] > len(found["where"]) else "")
        lines.append(f"notice: {found['count']} {name} ({shown})")
    return "\n".join(map(printable, lines))


def _part_lines(part: Mapping[str, Any]) -> list[str]:
    """Return the lines of train or eval."""
    lines = []
    for file in part["files"]:
        places = ", ".join(map(str, file["malformed_at"]))
        left_out = f", {file['malformed']} malformed left out (line {places})" if places else ""
        lines.append(f"  {file['name']}: {file['format']}, {file['conversations']} conversations{left_out}")
    share = part["supervised"] / max(1, part["tokens"])
    counts = ", ".join(f"{part[name]} {name}" for name in ("conversations", "turns", "tokens", "supervised"))
    lines.append(f"  {counts} ({share:.1%})")
    if any(part["truncated"].values()):
        whole = "{conversations} conversations cut between turns, {dropped} dropped whole"
        lost = "{turns} answers and {tokens} supervised tokens lost"
        lines.append(f"  longer than the context: {whole}; {lost}".format(**part["truncated"]))
    if "waste" in part:
        lines.append(f"  packed into {part['rows']} rows of {part['seq']}, {part['waste']:.2%} padding")
    most = max(part["lengths"].values(), default=1)
    for length, count in part["lengths"].items():
        lines.append(f"  {length:>7} tokens or fewer {count:>8}  {'#' * -(-40 * count // most)}")
    return lines
