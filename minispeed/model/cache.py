"""Keep the keys and values of tokens already read, so that generating one more token costs one token's work.

Rows of a batch may have prompts of unequal length: they are padded on the left, so that the next token of every row
stands in the same column, and padding is a document of its own that no token looks at.

Letters: B batch, T new tokens, S tokens held, G key/value heads, K head dim.
"""

import torch
from torch import Tensor

from minispeed.errors import UserError


class Cache:
    """Room for `capacity` tokens of each attention that appends to it: 2 x B G capacity K elements for each."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.documents: Tensor | None = None
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, by layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values of one layer and return all so far.  (B, G, T, K) -> (B, G, S, K)

        The length moves only in `advance`, after the last layer.
        """
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise UserError(f"the cache holds {self.capacity} tokens, and {end} were given", fix=f"capacity={end}")
        if layer not in self._held:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self._held[layer] = k.new_zeros(shape), v.new_zeros(shape)
        keys, values = self._held[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def all_documents(self, documents: Tensor) -> Tensor:
        """Return the documents of the tokens held and of the new ones.  (B, T) -> (B, S)"""
        if self.length and self.documents is None:
            raise UserError("the first tokens were read without documents, these with", fix="documents in every call")
        return documents if self.documents is None else torch.cat((self.documents, documents), dim=1)

    def advance(self, num_tokens: int, documents: Tensor | None) -> None:
        """Count `num_tokens` more as held, once every layer has appended theirs."""
        if documents is not None:
            self.documents = self.all_documents(documents)
        self.length += num_tokens
