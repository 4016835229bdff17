"""Say which earlier outputs each block reads, and what has to travel over a cut between layers: arithmetic alone.

    X_0 the embedding, X_i the output of block i        Y_i = sum over j <= i of alpha[i, j] X_j

Block i + 1 reads Y_i; after the last block the final norm does. A mask says which entries of alpha are learned; a row
without learned entries reads X_i.

    none   no entry: a plain GPT                                x0    the embedding feeds every block
    unet   block m feeds block L + 1 - m, its mirror image      dwa   all earlier outputs feed whoever reads

Where the layers are cut in two, the entries that cross have their column before the cut and their row behind it. An
entry is served by sending its X_j, or by sending as much of its Y_i as is known by then: the fewest tensors that serve
all are a minimum vertex cover. Of several we take, at every cut, the one with most columns: these nest, so that each
bundle of tensors can be made from the one before.

dwa: DenseFormer, Pagliardini et al. 2024, section 3 (https://arxiv.org/abs/2402.02622). unet: Bao et al. 2022, figure 1
(https://arxiv.org/abs/2209.12152). Covers: Koenig 1931; which of them is extremal: Dulmage & Mendelsohn 1958.

Letters: L blocks.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

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
