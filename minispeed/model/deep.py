"""Let a block read a learned sum of all earlier outputs, where a plain GPT reads the last one.

    X_0 the embedding, X_i the output of block i        Y_i = sum over j <= i of alpha[i, j] X_j

Block i + 1 reads Y_i; after the last block the final norm does. alpha is lower triangular, learned, and the identity
at the start, where the model is a plain GPT to the last bit. A mask says which of its entries are learned; a row
without learned entries reads X_i.

    none   no entry: a plain GPT                                x0    the embedding feeds every block
    unet   block m feeds block L + 1 - m, its mirror image      dwa   all earlier outputs feed whoever reads

Where the layers are cut in two, the entries that cross have their column before the cut and their row behind it. An
entry is served by sending its X_j, or by sending as much of its Y_i as is known by then: the fewest tensors that serve
all are a minimum vertex cover. Of several we take, at every cut, the one with most columns: these nest, so that each
bundle of tensors can be made from the one before.

dwa: DenseFormer, Pagliardini et al. 2024, section 3 (https://arxiv.org/abs/2402.02622). unet: Bao et al. 2022, figure 1
(https://arxiv.org/abs/2209.12152). Covers: Koenig 1931; which of them is extremal: Dulmage & Mendelsohn 1958.

Letters: B batch, T tokens, D model, L blocks, E learned entries.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKS = ("none", "x0", "unet", "dwa")
TOKENS = -1  # the place of the tokens in the chain of outputs, before the embedding's

Entry: TypeAlias = tuple[int, int]  # row i, column j


class Cover(NamedTuple):
    """What travels over a cut: X_j for each column, then of Y_i, for each row, the terms whose X_j does not travel."""

    columns: tuple[int, ...]
    rows: tuple[int, ...]


def learned_entries(mask: str, num_layers: int, *, dilation: int = 1, period: int = 1) -> list[Entry]:
    """Return the entries of alpha that a mask has, row by row.

    dilation, period  of dwa: every `period`-th row has entries, in every `dilation`-th column up to its own
    """
    L = num_layers
    rows: Mapping[str, Mapping[int, Iterable[int]]] = {
        "none": {},
        "x0": {i: (0, i) for i in range(1, L)},
        "unet": {i: (L - i, i) for i in range(L // 2 + 1, L)},
        "dwa": {i: range(i % dilation, i + 1, dilation) for i in range(period, L + 1, period)},
    }
    return [(i, j) for i, columns in rows[mask].items() for j in columns]


def crossing(entries: Iterable[Entry], after: int) -> list[Entry]:
    """Return the entries that cross a cut after layer `after`: rows from there on, columns up to there."""
    return [(i, j) for i, j in entries if j <= after <= i]


def minimum_cover(entries: Iterable[Entry]) -> Cover:
    """Return the fewest rows and columns that together have all entries; of several sets, the one with most columns.

    Koenig: match as many columns with rows as can be. What is reached from an unmatched column, by any entry to a row
    and by the matching back to a column: of that the rows, of the rest the columns. No smaller set of rows would do,
    for no minimum cover has an unmatched column.
    """
    rows_of: dict[int, list[int]] = {}
    for row, column in entries:
        rows_of.setdefault(column, []).append(row)
    partner: dict[int, int] = {}  # of a matched row, its column
    for column in rows_of:
        _match(column, rows_of, partner, set())
    reached_columns = [column for column in rows_of if column not in partner.values()]
    reached_rows: list[int] = []
    for column in reached_columns:  # which grows
        new = [row for row in rows_of[column] if row not in reached_rows]
        reached_rows += new
        reached_columns += [partner[row] for row in new]
    return Cover(tuple(sorted(rows_of.keys() - set(reached_columns))), tuple(sorted(reached_rows)))


def _match(column: int, rows_of: Mapping[int, Sequence[int]], partner: dict[int, int], tried: set[int]) -> bool:
    """Find a row for a column, moving other columns to other rows where needed; False if there is none."""
    for row in rows_of[column]:
        if row not in tried:
            tried.add(row)
            if row not in partner or _match(partner[row], rows_of, partner, tried):
                partner[row] = column
                return True
    return False


class Connections:
    """Who reads what, in the chain of outputs X_-1 (the tokens), X_0, ..., X_L, X_(L+1) (after the final norm).

    entries  place in a task's weights of each learned entry; None for those fixed at 1
    readers  of each output, the last row that reads it
    """

    def __init__(self, num_layers: int, learned: Sequence[Entry]) -> None:
        self.learned = tuple(learned)
        rows = {i for i, _ in learned}
        fixed = [(i, i) for i in range(TOKENS, num_layers + 2) if i not in rows]
        self.entries: dict[Entry, int | None] = {**dict.fromkeys(fixed), **{e: k for k, e in enumerate(learned)}}
        self.readers = {column: row for row, column in sorted(self.entries)}
        self._covers: dict[int, Cover] = {}

    def cover(self, after: int) -> Cover:
        """Return what travels over a cut after layer `after`: -1 before the embedding, L + 1 behind the norm."""
        if after not in self._covers:
            self._covers[after] = minimum_cover(crossing(self.entries, after))
        return self._covers[after]


class Deep(nn.Module):
    """The learned entries of alpha, (tasks x E,): one set after another where each task has its own.

    A vector, so that it is not decayed.
    """

    def __init__(self, connections: Connections, num_tasks: int) -> None:
        super().__init__()
        self.connections, self.num_tasks = connections, num_tasks
        self.register_parameter("alpha", None)
        if connections.learned:
            self.alpha = nn.Parameter(torch.empty(num_tasks * len(connections.learned), device="meta"))

    def identity(self) -> Tensor:
        """Return the values to start from: 1 on the diagonal, 0 elsewhere.  (tasks x E,)"""
        return torch.tensor([float(i == j) for i, j in self.connections.learned]).repeat(self.num_tasks)

    def forward(self, tasks: Tensor | None) -> Tensor | None:
        """Return the weights of each token.  (B, T) -> (B, T, E); without tasks (1, 1, E); None if none is learned

        Tokens of no task, -1, are padding, and have the first one's.
        """
        if self.alpha is None:
            return None
        if tasks is None:
            tasks = torch.zeros(1, 1, dtype=torch.int64, device=self.alpha.device)
        return F.embedding(tasks.clamp(min=0), self.alpha.view(self.num_tasks, -1))


class Outputs:
    """What a run of layers has of the outputs before: raw as far as it is still to be read, and sums already begun.

    weights  of the learned entries, (B or 1, T or 1, E)
    after    the last layer that has run
    bundle   what came from there, as `bundle` returned it; the tokens alone where no layer has run
    """

    def __init__(self, connections: Connections, weights: Tensor | None, after: int, bundle: Sequence[Tensor]) -> None:
        self.connections, self.weights, self.after = connections, weights, after
        self.entries = connections.entries
        columns, rows = connections.cover(after)
        self.raw = dict(zip(columns, bundle[: len(columns)], strict=True))
        self.sums = dict(zip(rows, bundle[len(columns) :], strict=True))

    def read(self) -> Tensor:
        """Return what the next layer reads, Y_after.  (B, T, D); to the embedding the tokens, (B, T)"""
        return self._sum(self.after, self.raw)

    def add(self, x: Tensor) -> None:
        """Take the output of the next layer, and let go what no later one reads."""
        self.raw = {j: held for j, held in self.raw.items() if self.connections.readers[j] > self.after}
        self.after += 1
        self.raw[self.after] = x

    def bundle(self) -> tuple[Tensor, ...]:
        """Return what layers behind a cut here need, and no more tensors than a minimum cover has."""
        columns, rows = self.connections.cover(self.after)
        others = {j: x for j, x in self.raw.items() if j not in columns}
        return *(self.raw[j] for j in columns), *(self._sum(row, others) for row in rows)

    def _sum(self, row: int, raw: Mapping[int, Tensor]) -> Tensor:
        """Add to what is known of Y_row its terms among `raw`, first column first."""
        begun = [self.sums[row]] if row in self.sums else []
        return reduce(torch.add, begun + [self._term(row, j, x) for j, x in raw.items() if (row, j) in self.entries])

    def _term(self, row: int, column: int, x: Tensor) -> Tensor:
        place = self.entries[row, column]
        return x if place is None or self.weights is None else self.weights[..., place, None] * x
