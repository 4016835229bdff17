"""Encoded conversations end to end: how they are kept, and where they are cut when the context is too short.

A document of n tokens makes n - 1 pairs (token, the next one), and a context holds T of them. A conversation that is
longer is cut behind the last answer that fits, and what lies behind is counted; plain text goes on in the next piece.

Letters: P pieces.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minispeed.errors import UserError

Ints = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Encoded conversations end to end; memory-mapped, so that only what is read is in memory.

    tokens, learnt     of all documents, (tokens,): ids, and whether each is supervised
    offsets            where each document starts, and the end, (documents + 1,)
    cuts, cut_offsets  lengths a document may be cut to; where each document's start, (documents + 1,)
    task, source       index into `tasks` and index of the file, (documents,)
    pad                the id that fills rows
    """

    tokens: NDArray[np.unsignedinteger]
    learnt: NDArray[np.bool_]
    offsets: Ints
    cuts: Ints
    cut_offsets: Ints
    task: Ints
    source: Ints
    tasks: list[str]
    pad: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """Tokens of each document, (documents,)."""
        return np.diff(self.offsets)

    def ids(self, index: int) -> NDArray[np.unsignedinteger]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def supervised(self, index: int) -> NDArray[np.bool_]:
        return self.learnt[self.offsets[index] : self.offsets[index + 1]]

    def save(self, folder: Path) -> None:
        """Write each array as a file of its name; tasks and pad stand in the report."""
        folder.mkdir(parents=True)
        for field in fields(self)[:-2]:
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def open(cls, folder: Path, tasks: list[str], pad: int) -> "Documents":
        """Map what `save` wrote into memory."""
        names = [field.name for field in fields(cls)[:-2]]
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
        return cls(**arrays, tasks=tasks, pad=pad)


class Truncated(NamedTuple):
    """What the context is too short for.

    turns          answers of the assistant that lie behind a cut
    tokens         supervised tokens that lie behind a cut
    conversations  how many were cut
    dropped        how many have a first exchange that does not fit: all of theirs is counted above
    """

    turns: int
    tokens: int
    conversations: int
    dropped: int


class Pieces(NamedTuple):
    """Pairs [start, stop) of a document, (P,) each, by document; `truncated` is what lies in none of them."""

    document: Ints
    start: Ints
    stop: Ints
    truncated: Truncated


def cut_to_fit(documents: Documents, seq: int) -> Pieces:
    """Cut documents to at most `seq` pairs: conversations after the last answer that fits, text anywhere.

    Plain text loses nothing: it goes on in the next piece.  Raises UserError where seq < 1.
    """
    if seq < 1:
        raise UserError(f"the context must hold at least 1 token, is {seq}", fix="512")
    pairs = documents.lengths - 1
    keep = pairs.copy()
    long = np.flatnonzero(pairs > seq)
    turns = tokens = dropped = cut = 0
    for index in long.tolist():
        low, high = documents.cut_offsets[index : index + 2].tolist()
        if low == high:
            continue  # plain text
        fitting = int(np.searchsorted(documents.cuts[low:high], seq + 1, side="right"))
        keep[index] = documents.cuts[low + fitting - 1] - 1 if fitting else 0
        turns += high - low - fitting
        tokens += int(documents.supervised(index)[keep[index] + 1 :].sum())
        dropped += not fitting
        cut += bool(fitting)
    count = -(-keep // seq)  # pieces per document
    document = np.repeat(np.arange(len(documents)), count)
    first = np.repeat(np.cumsum(count) - count, count)
    start = (np.arange(len(document)) - first) * seq
    stop = np.minimum(start + seq, keep[document])
    return Pieces(document, start, stop, Truncated(turns, tokens, cut, dropped))


def shortest_context(documents: Documents) -> int:
    """Return the shortest context that any document's first exchange fits."""
    return int(documents.cuts[documents.cut_offsets[:-1]].min()) - 1 if len(documents.cuts) else 1
