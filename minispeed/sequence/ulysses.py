"""Change places before attention and after it: tokens against heads.

Heads do not know of each other, tokens do. So before attention each rank hands out its T/P tokens of all heads, and
gets all tokens of H/P heads; what any attention computes from these is handed back the same way.

                        rank 0        rank 1                     rank 0      rank 1
    head 0              t0 t1         t2 t3     all-to-all       t0 t1 t2 t3
    head 1              t0 t1         t2 t3     <--------->                  t0 t1 t2 t3

A rank sends B T (2 h + 2 h_kv) (P - 1) / P^2 elements forward, h and h_kv the features of all query and key heads, and
as many backward: P times fewer than a gather would. But P must divide the key/value heads.

DeepSpeed Ulysses, Jacobs et al. 2023, section 3 (https://arxiv.org/abs/2309.14509).
Letters: B batch, H heads, G key/value heads, T tokens of whole rows, K head dim, P ranks.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from torch import Tensor

from minispeed.collective.autograd import all_to_all
from minispeed.collective.group import Group
from minispeed.errors import UserError
from minispeed.model.mask import Mask
from minispeed.sequence.masks import PerMask, gather_documents

Core: TypeAlias = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]

HEADS, TOKENS = 1, 2  # dims of (B, H, T, K)


def contiguous(rank: int, size: int) -> tuple[int, ...]:
    """Return which of the `size` chunks of a row a rank holds: one, its own."""
    return (rank,)


def ulysses(core: Core, group: Group, *, whole_mask: PerMask[Mask] | None = None) -> Core:
    """Return an attention that runs `core` on all tokens of this rank's share of the heads.

    core        any attention: (B, H/P, T, K), (B, G/P, T, K) twice, the mask of whole rows -> (B, H/P, T, K)
    whole_mask  what `whole_masks(group)` returned, where several attentions are to share it
    Returns     (q (B, H, T/P, K), k, v (B, G, T/P, K), mask of the rank's tokens) -> (B, H, T/P, K); the ranks'
                tokens follow each other in rank order. It raises UserError if P does not divide G.
    """
    whole = whole_mask or whole_masks(group)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        check_heads(q.shape[HEADS], k.shape[HEADS], group.size)
        q, k, v = (all_to_all(x, group, cut_dim=HEADS, join_dim=TOKENS) for x in (q, k, v))
        return all_to_all(core(q, k, v, whole(mask)), group, cut_dim=TOKENS, join_dim=HEADS)

    return attend


def whole_masks(group: Group) -> PerMask[Mask]:
    """Return what makes the mask of whole rows of a rank's own; its documents are gathered once for each mask."""
    return PerMask(partial(_whole_mask, group))


def check_heads(num_heads: int, num_kv_heads: int, size: int) -> None:
    """Raise UserError, the sizes that would do named, unless the heads can be shared out evenly."""
    if num_kv_heads % size:
        sizes = " or ".join(str(n) for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0)
        what = f"{num_heads} heads with {num_kv_heads} key/value heads, which sp={size} does not divide"
        raise UserError(what, fix=f"sp={sizes}, or ring attention, which cuts no heads")


def _whole_mask(group: Group, mask: Mask) -> Mask:
    parts = gather_documents(group, mask)
    num_tokens = group.size * mask.num_queries
    documents = None if parts is None else parts.transpose(0, 1).flatten(1)  # (P, B, T/P) -> (B, T)
    return Mask(num_tokens, num_tokens, causal=mask.causal, queries=documents, keys=documents)
