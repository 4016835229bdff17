"""A conversation as one sequence of tokens: the one place that knows, for training and for serving.

    <|bos|> <|system|> be brief <|end|> <|user|> hello <|end|> <|assistant|> hi <|end|>
                                                                             ^^ ^^^^^^^ learnt

A special token opens each turn and names its role; `<|end|>` closes it. The text of a turn is encoded by
itself, so no prompt depends on its answer, and a training sequence starts with exactly what serving sends.
A plain document is `<|bos|> text <|end|>`, learnt whole.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from minispeed.chat.conversation import ASSISTANT, SYSTEM, TEXT, USER, Conversation, Turn
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.errors import UserError

TRAIN_ON = ("assistant", "all")


class Encoded(NamedTuple):
    """A conversation's tokens: which are to be predicted, and the lengths at which it may be cut.

    cuts  the length after each whole turn of the assistant; a document has none: it may be cut anywhere
    """

    ids: list[int]
    supervised: list[bool]
    cuts: list[int]


class ChatTemplate(Protocol):
    """What writes conversations as tokens: our own `Template`, or another checkpoint's (`jinja.JinjaTemplate`)."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The special tokens that a tokenizer is to have, and is given where it lacks them."""
        ...

    def encode_rows(
        self, conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, train_on: str = "assistant",
        workers: int = 1,
    ) -> list[list[Encoded]]:  # fmt: skip
        """Return the rows of each conversation: one, or several where a later turn rewrites an earlier one."""
        ...

    def prompt(self, turns: Sequence[Turn], tokenizer: ChatTokenizer) -> list[int]:
        """Return what serving sends; a training row goes on from it with the answer."""
        ...

    def stop_id(self, tokenizer: ChatTokenizer) -> int:
        """Return the id that ends an answer."""
        ...

    def pad_id(self, tokenizer: ChatTokenizer) -> int:
        """Return the id that fills rows."""
        ...

    def dated(self) -> "ChatTemplate":
        """Return the template with its date settled, if it writes one: the same from now on."""
        ...

    def content(self) -> dict[str, Any]:
        """Return what `save` writes: all that the rows depend on."""
        ...

    def save(self, path: Path | str) -> None:
        """Write as a JSON file that `templates.load_template` reads."""
        ...


@dataclass(frozen=True)
class Template:
    """The written form of the six special tokens. `pad` is no other's, so it is never learnt as a stop."""

    bos: str = "<|bos|>"
    system: str = "<|system|>"
    user: str = "<|user|>"
    assistant: str = "<|assistant|>"
    end: str = "<|end|>"
    pad: str = "<|pad|>"

    def __post_init__(self) -> None:
        if len(set(self.tokens)) < len(self.tokens) or not all(self.tokens):
            raise UserError(f"a template's tokens must be six different ones, are {', '.join(map(repr, self.tokens))}")

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(asdict(self).values())

    def encode(self, conversation: Conversation, tokenizer: ChatTokenizer, *, train_on: str = "assistant") -> Encoded:
        """Return the tokens of a conversation.

        train_on  "assistant": text and stop token of the assistant's turns; "all": of every turn
        """
        return self.encode_batch([conversation], tokenizer, train_on=train_on)[0]

    def encode_batch(
        self, conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, train_on: str = "assistant",
        workers: int = 1,
    ) -> list[Encoded]:  # fmt: skip
        """Encode many conversations as `encode` does each; more than one worker means all cores."""
        if train_on not in TRAIN_ON:
            raise UserError(f"train_on is {train_on!r}", fix=" or ".join(map(repr, TRAIN_ON)))
        texts = [turn.text for conversation in conversations for turn in conversation.turns]
        encoded = iter(tokenizer.encode_batch(texts) if workers > 1 else map(tokenizer.encode, texts))
        return [
            self._join([(turn.role, next(encoded)) for turn in conversation.turns], tokenizer, train_on)
            for conversation in conversations
        ]

    def encode_rows(
        self, conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, train_on: str = "assistant",
        workers: int = 1,
    ) -> list[list[Encoded]]:  # fmt: skip
        """Encode many conversations, each as the one row that it is: no turn changes an earlier one."""
        return [[one] for one in self.encode_batch(conversations, tokenizer, train_on=train_on, workers=workers)]

    def prompt(self, turns: Sequence[Turn], tokenizer: ChatTokenizer) -> list[int]:
        """Return what serving sends: the turns so far and the token that opens the assistant's."""
        encoded = self.encode(Conversation(tuple(turns)), tokenizer)
        return [*encoded.ids, self._id(self.assistant, tokenizer)]

    def parse(self, ids: Sequence[int], tokenizer: ChatTokenizer) -> tuple[Turn, ...]:
        """Return the turns of a sequence: the inverse of `encode`. Any ids will do; the last end may lack."""
        roles = {self._id(getattr(self, role), tokenizer): role for role in (SYSTEM, USER, ASSISTANT)}
        outside = {self._id(self.bos, tokenizer), self._id(self.pad, tokenizer)}
        turns: list[Turn] = []
        role, text = TEXT, list[int]()
        for token in [*ids, self.stop_id(tokenizer)]:
            if token in roles or token == self.stop_id(tokenizer):
                if text or role != TEXT:
                    turns.append(Turn(role, tokenizer.decode(text)))
                role, text = roles.get(token, TEXT), []
            elif token not in outside:
                text.append(token)
        return tuple(turns)

    def stop_id(self, tokenizer: ChatTokenizer) -> int:
        """Return the id that ends a turn, at which generation stops."""
        return self._id(self.end, tokenizer)

    def pad_id(self, tokenizer: ChatTokenizer) -> int:
        """Return the id that fills rows, which is never a target."""
        return self._id(self.pad, tokenizer)

    def dated(self) -> "Template":
        """Return the template: it writes no date."""
        return self

    def content(self) -> dict[str, str]:
        """Return the written form of each token."""
        return asdict(self)

    def save(self, path: Path | str) -> None:
        Path(path).write_text(json.dumps(self.content(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> "Template":
        """Read what `save` wrote.  Raises UserError where the file is missing or of another kind."""
        try:
            return cls(**{str(key): str(value) for key, value in json.loads(Path(path).read_text("utf-8")).items()})
        except FileNotFoundError:
            raise UserError(f"there is no template {path}") from None
        except UserError:
            raise
        except (OSError, ValueError, AttributeError, TypeError) as reason:
            raise UserError(f"{path} is not a template: {reason}", fix=f"the keys {', '.join(asdict(cls()))}") from None

    def _join(self, turns: list[tuple[str, list[int]]], tokenizer: ChatTokenizer, train_on: str) -> Encoded:
        """Put encoded turns (role, ids) between their special tokens."""
        joined = Encoded([self._id(self.bos, tokenizer)], [False], [])
        end = self.stop_id(tokenizer)
        for role, text in turns:
            if role != TEXT:
                joined.ids.append(self._id(getattr(self, role), tokenizer))
                joined.supervised.append(False)
            joined.ids.extend([*text, end])
            joined.supervised.extend([role in (ASSISTANT, TEXT) or train_on == "all"] * (len(text) + 1))
            if role == ASSISTANT:
                joined.cuts.append(len(joined.ids))
        return joined

    def _id(self, token: str, tokenizer: ChatTokenizer) -> int:
        if token not in tokenizer.special:
            raise UserError(f"the tokenizer has no special token {token!r}", fix="load it with the template's tokens")
        return tokenizer.special[token]
