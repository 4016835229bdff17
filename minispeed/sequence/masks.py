"""Know the documents of whole rows where each rank was told only those of its own tokens.

Every layer of a forward is handed one mask, and so is its recomputation. What a mask leads to is therefore worked out
once, in the first layer, and forgotten when the mask is.

Letters: B batch, T tokens of whole rows, P ranks of the group.
"""

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from minispeed.collective.group import Group
from minispeed.errors import UserError
from minispeed.model.mask import Mask

V = TypeVar("V")


class PerMask(Generic[V]):
    """Call `make(mask)` once for each mask, and keep what it returned for as long as that mask lives."""

    def __init__(self, make: Callable[[Mask], V]) -> None:
        self.make = make
        self.made: dict[int, V] = {}  # by identity: a mask cannot be hashed

    def __call__(self, mask: Mask) -> V:
        """Return what belongs to `mask`; it must hold no reference to `mask` itself."""
        key = id(mask)
        if key not in self.made:
            self.made[key] = self.make(mask)
            weakref.finalize(mask, self.made.pop, key)
        return self.made[key]


def gather_documents(group: Group, mask: Mask) -> Tensor | None:
    """Return every rank's documents, None where rows are one document each.  (B, T/P) -> (P, B, T/P)

    Sends   B T/P (P - 1) integers per rank (all-gather)
    Raises  UserError if the mask is that of queries which continue a cache
    """
    if mask.offset or mask.num_queries != mask.num_keys:
        what = f"{mask.num_keys} keys for {mask.num_queries} queries: a cache of keys belongs to whole rows"
        raise UserError(what, fix="`with cut.whole_rows():` around what generates")
    if mask.queries is None:
        return None
    mine = mask.queries.contiguous()
    parts = mine.new_empty(group.size, *mine.shape)
    group.all_gather(parts, mine).wait()
    return parts
