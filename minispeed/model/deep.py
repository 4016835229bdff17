"""Let a block read a learned sum of all earlier outputs, where a plain GPT reads the last one.

    X_0 the embedding, X_i the output of block i        Y_i = sum over j <= i of alpha[i, j] X_j

alpha is lower triangular, learned, and the identity at the start, where the model is a plain GPT to the last bit. Which
of its entries are learned, and what travels where the layers are cut, `connections.py` says.

DenseFormer, Pagliardini et al. 2024, section 3 (https://arxiv.org/abs/2402.02622).
Letters: B batch, T tokens, D model, E learned entries.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minispeed.model.connections import Connections


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
