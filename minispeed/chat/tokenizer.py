"""Text to numbers and back: byte-level BPE whose special tokens no text can write.

A special token (`<|end|>`) is an id that only the template sets. Text that happens to spell one is encoded as
ordinary pieces, and every text has an encoding: the vocabulary starts from the 256 bytes. Digits stand alone,
so that all numbers are spelt alike.

Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909); on bytes, Radford et al. 2019, section 2.2.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from minispeed.errors import UserError

SPECIALS = ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")


class ChatTokenizer:
    """A tokenizer of the `tokenizers` library, of which text reaches the ordinary part only.

    size     number of ids, special ones included
    special  the special tokens: written form -> id
    added    these and the others that the library finds in a text before it is split (`<think>`); `every` is their
             written forms. White space and single characters are no such: they are part of any text
    lacked   how many special tokens `load` had to add, at the end of the ids
    digest   SHA-256 of the whole, in hex: equal digests encode equally
    """

    def __init__(self, tokenizer: Tokenizer, *, lacked: int = 0) -> None:
        """Take over a tokenizer that already has its special tokens; `train` and `load` are the ways in."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._whole = tokenizer
        self._text = _without_specials(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self.special: Mapping[str, int] = {token.content: i for i, token in added.items() if token.special}
        written = {token.content: i for i, token in added.items() if token.content.strip()}
        self.added: Mapping[str, int] = {token: i for token, i in written.items() if len(token) > 1}
        self.every = frozenset(self.added)
        self._unreachable = set(written.values())
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.lacked = lacked
        self.digest = hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special: Sequence[str] = SPECIALS) -> "ChatTokenizer":
        """Learn merges from texts, the same from the same; few texts fill only a part of the size.

        Raises  UserError where the size has no room for 256 bytes and the special tokens
        """
        if vocab_size < 256 + len(special):
            what = f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(special)} special tokens"
            raise UserError(what, fix=f"{256 + len(special)} or more")
        tokenizer = Tokenizer(models.BPE())
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(special),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path | str, special: Sequence[str] = SPECIALS) -> "ChatTokenizer":
        """Read a `tokenizer.json` or the folder that holds one; special tokens that it lacks are added.

        Raises  UserError where there is none, or the library cannot read it
        """
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for token in content["added_tokens"]:  # one of ours, listed there as ordinary, becomes special
                token["special"] |= token["content"] in special
            tokenizer = Tokenizer.from_str(json.dumps(content))
        except FileNotFoundError:
            raise UserError(
                f"there is no tokenizer {path}", fix="a tokenizer.json or the folder that holds it"
            ) from None
        except OSError as reason:
            raise UserError(f"{path} cannot be read: {reason.strerror or reason}") from None
        except Exception as reason:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {reason}") from None
        lacked = [token for token in special if tokenizer.token_to_id(token) is None]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        return cls(tokenizer, lacked=len(lacked))

    def to_json(self) -> str:
        """Return what a `tokenizer.json` holds."""
        return str(self._whole.to_str())

    def save(self, path: Path | str) -> None:
        """Write as a `tokenizer.json` that `tokenizers` and `transformers` load."""
        Path(path).write_text(self._whole.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, none of them special."""
        return self._checked(text, self._text.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts, on all cores: the ids that `encode` gives, one by one."""
        encodings = self._text.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._checked(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of ids; special tokens are dropped, or written out where `special`.

        Bytes that are no UTF-8 become U+FFFD. What `encode` made of a text comes back as that text.
        """
        return self._whole.decode(list(ids), skip_special_tokens=not special)

    def byte_lengths(self) -> list[int]:
        """Return how many bytes of text each id stands for, 0 for added tokens.  (size,)

        Exact for byte-level vocabularies, which write each byte as one character; others count their written form.
        """
        byte_level = isinstance(self._whole.decoder, decoders.ByteLevel)
        added = self._whole.get_added_tokens_decoder()
        lengths = [0] * self.size
        for written, i in self._whole.get_vocab(with_added_tokens=True).items():
            if i not in added:
                lengths[i] = len(written) if byte_level else len(written.encode())
        return lengths

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        """Return ids if none is special, else (Unigram finds them) those of the text cut inside them."""
        if self._unreachable.isdisjoint(ids):
            return ids
        written = [self._whole.id_to_token(i) or "" for i in sorted(self._unreachable)]
        inside = "|".join(f"(?<={re.escape(token[:1])})(?={re.escape(token[1:])})" for token in written if token[1:])
        parts = [self._text.encode(part, add_special_tokens=False).ids for part in re.split(inside, text)]
        ids = [i for part in parts for i in part]
        if not self._unreachable.isdisjoint(ids):
            what = f"the tokenizer reads a special token in the text {text[:60]!r}"
            raise UserError(what, fix="a byte-level BPE tokenizer, or train one: leave --tokenizer out")
        return ids


class Stream:
    """Text of ids that come one at a time: what is returned is whole characters, never half of one.

    Joined, the returned pieces and `flush()` are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, special: bool = False) -> None:
        self.tokenizer, self.special = tokenizer, special
        self._window: list[int] = []  # from the last id that ended a character
        self._returned = 0  # characters of the window's text that are out

    def feed(self, ids: int | Iterable[int]) -> str:
        """Take one id or several; return the text that became complete, which may be empty."""
        self._window += [ids] if isinstance(ids, int) else ids
        text = self.tokenizer.decode(self._window, special=self.special)
        complete = text.rstrip("\ufffd")  # a character's first bytes alone read as U+FFFD
        new = complete[self._returned :]
        self._returned = max(self._returned, len(complete))
        if len(complete) == len(text):
            self._window = self._window[-1:]  # some decoders treat a first token apart: keep one before
            self._returned = len(self.tokenizer.decode(self._window, special=self.special))
        return new

    def flush(self) -> str:
        """Return what is left, with U+FFFD for a character that never got its last byte; start anew."""
        left = self.tokenizer.decode(self._window, special=self.special)[self._returned :]
        self._window, self._returned = [], 0
        return left


def _without_specials(tokenizer: Tokenizer) -> Tokenizer:
    """Copy a tokenizer so that text spelling an added token is ordinary text; white space stays tokens.

    The library passes over special tokens in text when told to; added tokens that are not special
    (`<tool_call>` in some vocabularies) are made so in this copy.
    """
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] |= bool(token["content"].strip())
    text = Tokenizer.from_str(json.dumps(content))
    text.encode_special_tokens = True
    return text
