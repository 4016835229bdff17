"""A rendered conversation as tokens, in which what people typed is never taken for what the template wrote.

    rendered   <|user|>a <S|end|>?<|end|>     S, the seam: a character that the conversation holds nowhere
    read       S1Sa <|end|>?S4S               the template's tokens are codes of the seam, the typed one is text

A seam goes into each special token that someone's text spells, and the template renders that. Then every token
without a seam is the template's own and becomes a code; the seams are dropped. A copy of the tokenizer knows its
tokens by their codes alone, so it is handed one string, and splits, normalises and merges as the original does.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from minispeed.chat.tokenizer import ChatTokenizer

PRIVATE = range(0xF0000, 0xFFFFE)  # Unicode gives these no meaning


def seam_for(texts: Iterable[str]) -> str:
    """Return a character that none of the texts holds."""
    held = set().union(*texts)
    return next(c for c in map(chr, PRIVATE) if c not in held)


@lru_cache(maxsize=16)
def marks_of(tokenizer: ChatTokenizer, seam: str) -> "Marks":
    """Return the marks of a tokenizer with that seam, made once."""
    return Marks(tokenizer, seam)


class Marks:
    """Puts seams into texts, and makes tokens of what a template rendered from them."""

    def __init__(self, tokenizer: ChatTokenizer, seam: str) -> None:
        self.seam = seam
        longest_first = sorted(tokenizer.added, key=len, reverse=True)
        self._codes = {token: f"{seam}{index}{seam}" for index, token in enumerate(longest_first)}
        self._cut = f"{seam}{len(longest_first)}{seam}"
        self._tokenizer = _renamed(tokenizer, self._codes, self._cut)
        self._token = re.compile(_any_of(longest_first))
        self._token_or_seam = re.compile(f"{self._token.pattern}|{seam}")

    def hide(self, text: str, tokens: frozenset[str]) -> str:
        """Put a seam into each of these tokens that a text spells, and into the beginning of one that it ends with.

        So the next text, which a template may write right behind it, white space trimmed or not, completes no token.
        """
        places = spelt(text, tokens)
        edges = [0, *sorted(places), len(text)]
        return self.seam.join(text[low:high] for low, high in zip(edges, edges[1:])) if places else text

    def tokens_in(self, rendered: str, start: int = 0) -> Iterator[re.Match[str]]:
        """Yield the tokens that the template wrote, from there on."""
        return self._token.finditer(rendered, start)

    def encode(self, rows: Sequence[Sequence[str]], *, workers: int = 1) -> list[list[list[int]]]:
        """Return the ids of each piece of each row, a rendered text in pieces, such that no token lies across two.

        They are those of the whole text, unless a merge would reach from a piece into the next: then the later is
        encoded by itself, as it is when a model goes on from the earlier. More than one worker means all cores.
        """
        pairs = [list(self._in_context(pieces)) for pieces in rows]
        texts = [text for row in pairs for context, piece in row for text in (context, context + piece)]
        batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False) if workers > 1 else None
        ids = iter([encoding.ids for encoding in batch] if batch is not None else map(self._ids, texts))
        return [[self._behind(context, piece, next(ids), next(ids)) for context, piece in row] for row in pairs]

    def _in_context(self, pieces: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield each piece and what is before it, from the last code on: nothing reaches over a code."""
        context = ""
        for piece in map(self._read, pieces):
            yield context, piece
            context += piece
            context = context[max(0, context.rfind(self.seam, 0, max(0, context.rfind(self.seam)))) :]

    def _behind(self, context: str, piece: str, before: list[int], both: list[int]) -> list[int]:
        """Return the ids of a piece, given those of its context and of the two together."""
        if both[: len(before)] != before:
            before, both = (self._ids(context + self._cut + rest) for rest in ("", piece))
        return both[len(before) :]

    def _read(self, rendered: str) -> str:
        """Replace the template's tokens by their codes, and drop the seams."""
        return self._token_or_seam.sub(lambda found: self._codes.get(found[0], ""), rendered)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def spelt(text: str, tokens: frozenset[str]) -> set[int]:
    """Return where a text must be parted so that none of the tokens is in it, nor begins at its end."""
    whole, beginnings, longest = _spellings(tokens)
    places = {found.start() + 1 for found in whole.finditer(text)}
    end = len(text.rstrip())
    return places | {end - n + 1 for n in range(1, min(longest, end + 1)) if text[end - n : end] in beginnings}


@lru_cache(maxsize=16)
def _spellings(tokens: frozenset[str]) -> tuple[re.Pattern[str], frozenset[str], int]:
    """Return what finds each place where a token starts; the proper beginnings of all; the longest one's length."""
    beginnings = frozenset(token[:n] for token in tokens for n in range(1, len(token)))
    return re.compile(f"(?={_any_of(sorted(tokens))})"), beginnings, max(map(len, tokens), default=0)


def _any_of(tokens: Sequence[str]) -> str:
    return "(?:" + ("|".join(map(re.escape, tokens)) or "(?!)") + ")"


def _renamed(tokenizer: ChatTokenizer, codes: dict[str, str], cut: str) -> Tokenizer:
    """Copy a tokenizer such that it knows its added tokens by these codes, at the same ids, and `cut` beside them."""
    content: dict[str, Any] = json.loads(tokenizer.to_json())
    content["post_processor"] = None
    for token in content["added_tokens"]:
        if token["content"] in codes:
            token |= {"content": codes[token["content"]], "normalized": False, "single_word": False}
    cut_token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"content": cut}
    content["added_tokens"].append({**cut_token, "id": tokenizer.size, "special": True})
    model, vocab = content["model"], content["model"]["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {codes.get(piece, piece): index for piece, index in vocab.items()}
    else:  # Unigram's: a list of pieces and their scores
        model["vocab"] = [[codes.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token"):
        model["unk_token"] = codes.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if codes.keys().isdisjoint([*pair, "".join(pair)])]
    return Tokenizer.from_str(json.dumps(content))
