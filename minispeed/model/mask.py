"""Say which tokens may look at which: order, packed documents, a cache of keys before.

Letters: B batch, T queries, S keys.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from minispeed.model.dropout import Dropout


@dataclass(frozen=True)
class Mask:
    """Which of T queries may look at which of S keys. Every query must be left at least one key.

    causal      query i looks at keys up to offset + i
    offset      how many keys stand before the first query (a cache), 0 without one
    queries     document of each query, (B, T), or None where every row is one document
    keys        document of each key, (B, S); given exactly when `queries` is
    dropout     which of the softmax's weights are dropped, (B, H, T) x S; None: none
    """

    num_queries: int
    num_keys: int
    causal: bool = True
    offset: int = 0
    queries: Tensor | None = None
    keys: Tensor | None = None
    dropout: Dropout | None = None
    _biases: dict[tuple[torch.dtype, torch.device], Tensor | None] = field(default_factory=dict, repr=False)
    _runs: list["Runs | None"] = field(default_factory=list, repr=False)

    def allowed(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """Return the block of the mask at `rows` x `columns`, (1 or B, 1, t, s) bool, None if all is allowed."""
        seen = None
        if self.causal and columns.stop - 1 > self.offset + rows.start:
            last = torch.arange(self.offset + rows.start, self.offset + rows.stop, device=device)
            seen = (torch.arange(columns.start, columns.stop, device=device) <= last[:, None])[None, None]
        if self.queries is not None and self.keys is not None:
            same = self.queries[:, None, rows, None] == self.keys[:, None, None, columns]  # (B, 1, t, s)
            seen = same if seen is None else seen & same
        return seen

    def bias(self, like: Tensor) -> Tensor | None:
        """Return the whole mask as a term of the scores, 0 or -inf, built once and shared by every layer.

        Returns (1 or B, 1, T, S) in the dtype and on the device of `like`; None if all is allowed
        """
        key = (like.dtype, like.device)
        if key not in self._biases:
            allowed = self.allowed(slice(0, self.num_queries), slice(0, self.num_keys), like.device)
            self._biases[key] = allowed if allowed is None else _bias(allowed, like.dtype)
        return self._biases[key]

    def at(self, layer: int) -> "Mask":
        """Return the mask of a layer: the same, but for what it drops."""
        return self if self.dropout is None else replace(self, dropout=self.dropout.at(layer))

    def drop(self, weights: Tensor, rows: slice, columns: slice) -> Tensor:
        """Drop out of the softmax's weights at `rows` x `columns`.  (B, H, t, s)"""
        return weights if self.dropout is None else self.dropout(weights, rows, columns)

    def runs(self) -> "Runs | None":
        """Return packed rows as documents one after another, worked out once and shared by every layer.

        None where they are not that: no documents, a cache, or a document whose tokens do not lie together.
        """
        if not self._runs:
            self._runs.append(self._find_runs())
        return self._runs[0]

    def _find_runs(self) -> "Runs | None":
        if self.queries is None or not self.causal or self.offset or self.num_queries != self.num_keys:
            return None
        begins = torch.ones_like(self.queries, dtype=torch.bool)
        begins[:, 1:] = self.queries[:, 1:] != self.queries[:, :-1]
        rows = torch.arange(len(self.queries), device=begins.device)[:, None].expand_as(begins)
        documents = torch.stack([rows[begins], self.queries[begins]])
        starts = begins.flatten().nonzero().flatten()
        if documents.unique(dim=1).shape[1] != len(starts):  # one comes again later in its row
            return None
        bounds = torch.cat([starts, starts.new_tensor([begins.numel()])])
        return Runs(bounds.to(torch.int32), int(bounds.diff().max()))

    def is_plain(self) -> bool:
        """Whether the kernel's own causal flag says the same."""
        return self.causal and self.offset == 0 and self.num_queries == self.num_keys and self.queries is None

    def reaches(self, rows: slice, columns: slice) -> bool:
        """Whether any query of `rows` may look at any key of `columns`, by order alone."""
        return not self.causal or columns.start <= self.offset + rows.stop - 1


class Runs(NamedTuple):
    """Documents of all rows, one after another: where each begins, and the end, (documents + 1,) int32; the longest."""

    bounds: Tensor
    longest: int


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -math.inf)
