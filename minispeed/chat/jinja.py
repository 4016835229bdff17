"""The chat template that another checkpoint came with: its conversations rendered by its own rules, as tokens.

    render(turns so far, generation prompt)   <|im_start|>user\\nhello<|im_end|>\\n<|im_start|>assistant\\n
    render(turns so far and the answer)       ... hi<|im_end|>\\n
                                                  ^^^^^^^^^^ learnt: what is new, up to the stop token

Holds: the ids are those that `transformers` makes of the rendering (`apply_chat_template`), with two exceptions. What
someone typed never becomes a special token, nor, outside answers, any other added token (`<think>` in an answer is the
model's own); the template sees such text with a character inside the token. And no merge reaches from a generation
prompt into the answer: a row goes on from exactly the ids that serving sends.

A template may write an answer otherwise once more turns follow (Qwen3 drops its thinking): such a conversation becomes
several rows. A date that it asks for is settled once and kept with it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from minispeed.chat.conversation import ASSISTANT, TEXT, USER, Conversation, Turn
from minispeed.chat.marks import Marks, marks_of, seam_for
from minispeed.chat.sandbox import compile_template
from minispeed.chat.template import TRAIN_ON, Encoded
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.errors import UserError

CONFIG, SOURCE, SPECIALS = "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"
GENERATION = "generation_config.json"  # kept for those who load what becomes of the checkpoint
OURS = "--template ours"


class Answer(NamedTuple):
    """An assistant's turn in the rendering that ends with it: from the prompt's length to behind the stop token."""

    rendered: str
    prompt: int
    stop: int

    def is_in(self, rendered: str) -> bool:
        """Whether a longer conversation's rendering holds the turn as it was."""
        return rendered.startswith(self.rendered[: self.stop])


@dataclass(frozen=True)
class JinjaTemplate:
    """A checkpoint's template: the files that it is in, by name, as they came, and the date that it writes."""

    files: tuple[tuple[str, str], ...]
    date: str | None = None

    @classmethod
    def read(cls, folder: Path, *, source: str | None = None, date: str | None = None) -> "JinjaTemplate | None":
        """Read the template of a checkpoint; None where it has none.

        source  a template to take in place of the checkpoint's
        date    "2026-11-22", for a template that writes one; today where it is first used, when absent
        Raises  UserError where a file cannot be read, or is not what its name says
        """
        names = [name for name in (CONFIG, SOURCE, SPECIALS, GENERATION) if (folder / name).is_file()]
        found = {name: (folder / name).read_text("utf-8") for name in names}
        template = cls(tuple((found | ({SOURCE: source} if source is not None else {})).items()), date)
        if template.source is None:
            return None
        compile_template(template.source, template.date)
        return template

    @cached_property
    def source(self) -> str | None:
        """The template in jinja's language: a file of its own goes before the configuration's."""
        files = dict(self.files)
        found = files.get(SOURCE) or _values(files, CONFIG).get("chat_template")
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}.get("default")
        return found

    @cached_property
    def variables(self) -> dict[str, str]:
        """The tokens that a template may name: bos_token, eos_token and so on."""
        files = dict(self.files)
        named = _values(files, SPECIALS) | _values(files, CONFIG)
        written = {name: one.get("content") if isinstance(one, dict) else one for name, one in named.items()}
        return {name: one for name, one in written.items() if name.endswith("_token") and isinstance(one, str)}

    @property
    def tokens(self) -> tuple[str, ...]:
        """None: the checkpoint's tokenizer has what the template needs."""
        return ()

    def encode_rows(
        self, conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, train_on: str = "assistant",
        workers: int = 1,
    ) -> list[list[Encoded]]:  # fmt: skip
        """Return the rows of each conversation: one, unless a turn changes how an earlier answer is written.

        train_on  "assistant": what the model must say behind each generation prompt, its stop token included;
                  "all": all but the first token of the whole rendering, which is then the one row
        workers   rendering takes one core; more than one tokenises on all
        Raises    UserError where the template refuses a conversation, or an answer does not go on from its prompt
        """
        if train_on not in TRAIN_ON:
            raise UserError(f"train_on is {train_on!r}", fix=" or ".join(map(repr, TRAIN_ON)))
        marks = self._marks([turn for one in conversations for turn in one.turns], tokenizer)
        planned = [self._plan(one.turns, marks, tokenizer, train_on) for one in conversations]
        encoded = iter(marks.encode([_pieces(*row) for rows in planned for row in rows], workers=workers))
        return [
            [_join(next(encoded), train_on) for _ in rows] or [self._document(one.turns[0].text, tokenizer)]
            for one, rows in zip(conversations, planned, strict=True)
        ]

    def prompt(self, turns: Sequence[Turn], tokenizer: ChatTokenizer) -> list[int]:
        """Return what serving sends: the turns so far and the generation prompt."""
        marks = self._marks(turns, tokenizer)
        messages = self._messages(turns, marks, tokenizer)
        rendered = self._render(messages, prompt=True)
        kept = [answer for answer in self._answers(messages, marks, tokenizer) if answer.is_in(rendered)]
        return _join(marks.encode([_pieces(rendered, kept)])[0]).ids

    def stop_id(self, tokenizer: ChatTokenizer) -> int:
        """Return the id of the token that the template writes right behind an answer."""
        return tokenizer.added[_stop_of(self, tokenizer)]

    def pad_id(self, tokenizer: ChatTokenizer) -> int:
        """Return the id that fills rows, which is never a target; a checkpoint without one is given its stop token."""
        return tokenizer.added.get(self.variables.get("pad_token", ""), self.stop_id(tokenizer))

    def dated(self) -> "JinjaTemplate":
        """Return the template with today's date, if it writes one and has none."""
        asks = "strftime_now" in (self.source or "")
        return replace(self, date=date.today().isoformat()) if asks and self.date is None else self

    def content(self) -> dict[str, Any]:
        """Return files and date, and the word by which `templates.load_template` knows them."""
        return {"kind": "jinja", "files": dict(self.files), "date": self.date}

    def save(self, path: Path | str) -> None:
        Path(path).write_text(json.dumps(self.content(), indent=2) + "\n", encoding="utf-8")

    def _plan(
        self, turns: Sequence[Turn], marks: Marks, tokenizer: ChatTokenizer, train_on: str
    ) -> list[tuple[str, list[Answer]]]:
        """Return the rows of one conversation, rendered, and the answers in each; none for a plain text.

        An answer is in the row of the next, if it is there as it was; else it has one that ends with it.
        """
        if turns[0].role == TEXT:
            return []
        messages = self._messages(turns, marks, tokenizer)
        answers = self._answers(messages, marks, tokenizer)
        whole = answers[-1].rendered if turns[-1].role == ASSISTANT else self._render(messages)
        if train_on == "all":
            return [(whole, [answer for answer in answers if answer.is_in(whole)])]
        rows: list[tuple[str, list[Answer]]] = [(whole, [])]
        for answer in reversed(answers):
            if not answer.is_in(rows[0][0]):
                rows.insert(0, (answer.rendered, []))
            rows[0][1].insert(0, answer)
        return [row for row in rows if row[1] or not answers]

    def _document(self, text: str, tokenizer: ChatTokenizer) -> Encoded:
        """Encode a plain text, learnt whole, between the tokens that begin and end a sequence, where there are such."""
        ids = [tokenizer.added.get(self.variables.get(name, "")) for name in ("bos_token", "eos_token")]
        end = self.stop_id(tokenizer) if ids[1] is None else ids[1]
        head = [] if ids[0] is None else [ids[0]]
        body = [*tokenizer.encode(text), end]
        return Encoded(head + body, [False] * len(head) + [True] * len(body), [])

    def _answers(self, messages: list[dict[str, str]], marks: Marks, tokenizer: ChatTokenizer) -> list[Answer]:
        """Render up to each of the assistant's turns, without it and with it.  Raises UserError where these part"""
        stop = _stop_of(self, tokenizer)
        places = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        return [_answer(*self._both(messages[: index + 1], marks), stop, marks) for index in places]

    def _both(self, messages: list[dict[str, str]], marks: Marks) -> tuple[str, str]:
        """Return the generation prompt before the last message and the rendering with it, which goes on from it."""
        asked, said = self._render(messages[:-1], prompt=True), self._render(messages)
        if not said.startswith(asked):
            part = len(os.path.commonprefix([asked, said]))
            shown = [repr(text[max(0, part - 20) : part + 40].replace(marks.seam, "")) for text in (asked, said)]
            what = "the checkpoint's chat template cannot be learnt from: an answer does not go on from its prompt"
            raise UserError(f"{what}; after {part} characters it is {shown[0]}, with the answer {shown[1]}", fix=OURS)
        return asked, said

    def _marks(self, turns: Sequence[Turn], tokenizer: ChatTokenizer) -> Marks:
        return marks_of(tokenizer, seam_for([turn.text for turn in turns] + [self.source or ""]))

    def _messages(self, turns: Sequence[Turn], marks: Marks, tokenizer: ChatTokenizer) -> list[dict[str, str]]:
        """Return the turns as a template takes them, special tokens in their texts parted by a seam."""
        hidden = {ASSISTANT: _hidden_of(self, tokenizer)}
        return [{"role": one, "content": marks.hide(text, hidden.get(one, tokenizer.every))} for one, text in turns]

    def _render(self, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        given = {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None}
        try:
            return compile_template(self.source or "", self.date).render(self.variables | given)
        except Exception as reason:  # what a template does with its messages may fail in any way
            roles = ", ".join(message["role"] for message in messages) or "no turn"
            what = f"the checkpoint's chat template refuses a conversation ({roles}): {reason}"
            raise UserError(what, fix=OURS) from None


@lru_cache(maxsize=8)
def _stop_of(template: JinjaTemplate, tokenizer: ChatTokenizer) -> str:
    """Return the token that follows an answer, found by rendering one.  Raises UserError where there is none"""
    said, seam = "Yes", seam_for([template.source or ""])
    marks = marks_of(tokenizer, seam)
    messages = [{"role": USER, "content": "Is it?"}, {"role": ASSISTANT, "content": said}]
    asked, rendered = template._both(messages, marks)
    behind = rendered.rfind(said, len(asked)) + len(said)
    found = next(marks.tokens_in(rendered, behind), None)
    if behind < len(said) or found is None or rendered[behind : found.start()].strip():
        what = f"the checkpoint's chat template writes no special token behind an answer: {rendered[len(asked) :]!r}"
        raise UserError(f"{what}; nothing would tell the model to stop", fix=OURS)
    return found[0]


@lru_cache(maxsize=8)
def _hidden_of(template: JinjaTemplate, tokenizer: ChatTokenizer) -> frozenset[str]:
    """Return the tokens that an answer cannot spell."""
    return frozenset([*tokenizer.special, _stop_of(template, tokenizer)])


def _answer(asked: str, said: str, stop: str, marks: Marks) -> Answer:
    found = next((one for one in marks.tokens_in(said, len(asked)) if one[0] == stop), None)
    if found is None:
        raise UserError(f"the checkpoint's chat template writes no {stop} behind {said[len(asked) :]!r}", fix=OURS)
    return Answer(said, len(asked), found.end())


def _pieces(rendered: str, answers: Sequence[Answer]) -> list[str]:
    """Cut a rendering at its answers: every second piece is one."""
    edges = [0, *(edge for answer in answers for edge in (answer.prompt, answer.stop)), len(rendered)]
    return [rendered[low:high] for low, high in zip(edges, edges[1:])]


def _join(pieces: Sequence[list[int]], train_on: str = "assistant") -> Encoded:
    """Return the row of such pieces' ids."""
    row = Encoded([], [], [])
    for number, ids in enumerate(pieces):
        is_answer = number % 2 == 1
        row.ids.extend(ids)
        row.supervised.extend([is_answer or train_on == "all"] * len(ids))
        row.cuts.extend([len(row.ids)] * is_answer)
    row.supervised[:1] = [False] * bool(row.ids)  # nothing predicts the first token
    return row


def _values(files: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return what a JSON file of the checkpoint holds."""
    try:
        found = json.loads(files.get(name, "{}"))
    except ValueError as reason:
        raise UserError(f"the checkpoint's {name} is no JSON: {reason}") from None
    return found if isinstance(found, dict) else {}
