"""Rows of a fixed length from documents of any: best fit, documents apart, every step a pure function.

A document of n tokens makes n - 1 pairs (token, the next one). A row holds T pairs; those of one document lie
together, with positions of their own and a number in the row, so that attention can keep documents apart.
All of this is attached here, before any rank cuts its share: no later cut can lose a pair.

Best-fit decreasing needs at most 11/9 of the fewest rows, plus 4 (Johnson et al. 1974,
https://doi.org/10.1137/0203025); to train without truncation: Ding et al. 2024, https://arxiv.org/abs/2404.10830.

Letters: B rows of a batch, T pairs of a row (the context length), P pieces.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minispeed.chat.documents import Documents, Ints, cut_to_fit, shortest_context
from minispeed.errors import UserError

IGNORED = -100  # the label of what is not to be learnt, as in torch's cross-entropy


class Batch(NamedTuple):
    """B rows of T pairs, all int64 of shape (B, T).

    inputs     tokens; `pad` where the row is empty
    labels     the token after each; -100 where it is not supervised
    positions  from 0 in each document
    documents  which document of its row a pair belongs to, from 0; -1 where the row is empty
    tasks      index into the documents' `tasks`; -1 where the row is empty
    """

    inputs: Ints
    labels: Ints
    positions: Ints
    documents: Ints
    tasks: Ints


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group lengths into rows of at most `capacity`; returns the indices in each row.

    Longest first, each goes where the least space is left after it. Spaces left are bits of one integer, so
    that the smallest that fits is found at once: the time is that of the sort.
    """
    row, count = _rows(np.asarray(lengths, dtype=np.int64), capacity)
    groups: list[list[int]] = [[] for _ in range(count)]
    for index, number in enumerate(row.tolist()):
        groups[number].append(index)
    return groups


def _rows(lengths: Ints, capacity: int) -> tuple[Ints, int]:
    """Return the row of each length, (P,), and the number of rows: `best_fit` without a list per row."""
    assert not len(lengths) or 0 < lengths.min() <= lengths.max() <= capacity, "a piece must fit a row"
    order = np.argsort(-lengths, kind="stable")
    row = np.empty(len(lengths), dtype=np.int64)
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the space left in them
    spaces = count = 0  # bit s of `spaces`: a row with s left is waiting
    for index, length in zip(order.tolist(), lengths[order].tolist()):
        if fits := spaces >> length:
            space = length + (fits & -fits).bit_length() - 1
            row[index] = number = waiting[space].pop()
            spaces ^= (not waiting[space]) << space
        else:
            space, row[index], number, count = capacity, count, count, count + 1
        if space > length:
            waiting[space - length].append(number)
            spaces |= 1 << (space - length)
    return row, count


class Packing:
    """The batches of an epoch: step k is a pure function of (documents, seq, seed, batch, weights, epoch, k).

    waste      the share of epoch 0's rows that holds no pair, without the empty rows that fill the last batch
    truncated  what the context is too short for

    Without weights every document comes once per epoch. With weights, one per source, an epoch draws as many
    documents as there are, from each source in proportion to its weight. A source is drawn in whole
    permutations, one after another through all epochs: no document comes again before all of them have come.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        seq: int,
        batch: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Plan rows of `seq` pairs in batches of `batch` rows.

        Raises  UserError where nothing fits the context, or weights do not fit the sources
        """
        if batch < 1 or seed < 0:
            what = "a batch holds at least 1 row and a seed is 0 or more"
            raise UserError(f"{what}, got {batch} rows and seed {seed}")
        self.documents, self.seq, self.num_rows, self.seed = documents, seq, batch, seed
        self.pieces = cut_to_fit(documents, seq)
        self.truncated = self.pieces.truncated
        self._fitting = np.unique(self.pieces.document)  # documents that have a piece
        if not len(self._fitting):
            raise UserError(_too_short(documents, seq), fix=f"a context of {shortest_context(documents)} or more")
        self._shares = None if weights is None else self._share_out(weights)
        self._planned: tuple[int, Ints, Ints] | None = None
        order, starts = self._plan(0)
        pairs = (self.pieces.stop - self.pieces.start)[order].sum()
        self.waste = 1 - int(pairs) / ((len(starts) - 1) * seq)

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Return the number of batches; with weights it may differ between epochs."""
        return -(-(len(self._plan(epoch)[1]) - 1) // self.num_rows)

    def batch(self, epoch: int, step: int) -> Batch:
        """Return the rows of a step; the last step of an epoch may end in empty rows.

        Raises  IndexError where the epoch has no such step
        """
        if not 0 <= step < self.steps_per_epoch(epoch):
            raise IndexError(f"epoch {epoch} has {self.steps_per_epoch(epoch)} steps, asked for step {step}")
        order, starts = self._plan(epoch)
        shape = (self.num_rows, self.seq)
        empty = (self.documents.pad, IGNORED, 0, -1, -1)
        rows = Batch(*(np.full(shape, value, dtype=np.int64) for value in empty))
        last = min((step + 1) * self.num_rows, len(starts) - 1)
        for row, first in enumerate(range(step * self.num_rows, last)):
            self._fill(rows, row, order[starts[first] : starts[first + 1]])
        return rows

    def _fill(self, rows: Batch, row: int, pieces: Ints) -> None:
        """Lay pieces one after the other into a row."""
        low = 0
        for number, piece in enumerate(pieces.tolist()):
            document, start, stop = (int(column[piece]) for column in self.pieces[:3])
            ids, learnt = self.documents.ids(document), self.documents.supervised(document)
            span = (row, slice(low, low + stop - start))
            rows.inputs[span] = ids[start:stop]
            target = ids[start + 1 : stop + 1].astype(np.int64)
            rows.labels[span] = np.where(learnt[start + 1 : stop + 1], target, IGNORED)
            rows.positions[span] = np.arange(stop - start)
            rows.documents[span] = number
            rows.tasks[span] = self.documents.task[document]
            low += stop - start

    def _plan(self, epoch: int) -> tuple[Ints, Ints]:
        """Return the pieces of an epoch in row order, (P,), and where each row starts, (rows + 1,)."""
        planned = self._planned  # read once: threads share this object
        if planned is None or planned[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            drawn = rng.permutation(self._drawn(epoch))  # which of equally long pieces meet in a row
            row, count = _rows((self.pieces.stop - self.pieces.start)[drawn], self.seq)
            row = rng.permutation(count)[row]  # which rows meet in a step
            order = np.argsort(row, kind="stable")
            self._planned = planned = (epoch, drawn[order], np.searchsorted(row[order], np.arange(count + 1)))
        return planned[1:]

    def _drawn(self, epoch: int) -> Ints:
        """Return the pieces of the documents that an epoch draws."""
        if self._shares is None:
            return np.arange(len(self.pieces.document))
        sources = self.documents.source[self._fitting]
        draws = [
            _from_permutations(self._fitting[sources == source], epoch * share, share, [self.seed, source])
            for source, share in self._shares
        ]
        documents = np.concatenate(draws)
        low, high = (np.searchsorted(self.pieces.document, documents, side) for side in ("left", "right"))
        # the pieces of a document stand together: arange, moved so that it runs from low to high for each
        behind = np.repeat(np.cumsum(high - low) - high, high - low)
        return np.arange(len(behind)) - behind

    def _share_out(self, weights: Sequence[float]) -> list[tuple[int, int]]:
        """Return (source, documents per epoch) where the weight is above 0, by largest remainder."""
        present = np.bincount(self.documents.source[self._fitting], minlength=len(weights))
        if len(present) != len(weights):
            what = f"{len(weights)} weights for {len(present)} data files"
            raise UserError(what, fix="one weight per file")
        given = np.asarray(weights, dtype=np.float64)
        if not np.isfinite(given).all() or (given < 0).any() or not given.any():
            raise UserError(f"weights must be numbers of 0 or more, not all 0, are {list(weights)}")
        if (lacking := np.flatnonzero((given > 0) & (present == 0))).size:
            what = f"data file {lacking[0] + 1} has weight {given[lacking[0]]:g} but nothing that fits"
            raise UserError(what, fix="a longer context, or weight 0")
        exact = given / given.sum() * len(self._fitting)
        shares = np.floor(exact).astype(np.int64)
        shares[np.argsort(shares - exact, kind="stable")[: len(self._fitting) - shares.sum()]] += 1
        return [(source, int(share)) for source, share in enumerate(shares) if share]


def _from_permutations(items: Ints, first: int, count: int, seed: list[int]) -> Ints:
    """Return draws first ... first + count from an endless row of permutations, each drawn by its number."""
    numbers = range(first // len(items), -(-(first + count) // len(items)))
    drawn = [np.random.default_rng([*seed, number, 1]).permutation(items) for number in numbers]
    return np.concatenate(drawn)[first % len(items) :][:count]


def _too_short(documents: Documents, seq: int) -> str:
    if not len(documents):
        return "there is no document to train on"
    needed = shortest_context(documents)
    return f"a context of {seq} tokens is shorter than the shortest conversation's first exchange: {needed}"
