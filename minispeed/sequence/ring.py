"""Let keys and values travel round a ring of ranks, while each rank's queries stay and look at what passes by.

In step s a rank holds the keys and values of the rank s places before it: it attends to them while they are already
on their way to the next. Beside its own it holds those of two ranks at a time, so a row may be as long as all ranks
together can hold, and nothing needs to divide the heads. The backward is the same ring: with the keys and values
travel their gradients, to which each rank adds what its queries say, until they are home.

With order, half of all looks back are excluded. If rank r held the r-th run of tokens, the last rank would have most
to do, and all wait for it. So a row is cut into 2 P chunks, and rank r holds the r-th from the start and the r-th from
the end. Every rank then computes 3 blocks of chunk x chunk in the first step (two of them only half), and 2 in each
other one. With P = 4:

    rank        0   1   2   3   3   2   1   0
    chunk       0   1   2   3   4   5   6   7

A rank sends 2 B T h_kv (P - 1)/P elements forward, h_kv the features of all key heads, whatever the query heads; and
backward twice as many, half of them gradients, in fp32 or wider. Gradients of a rank's own queries never travel.

Ring attention: Liu et al. 2023, section 3 (https://arxiv.org/abs/2310.01889). Balance under order: Brandon et al.
2023, Striped attention (https://arxiv.org/abs/2311.09431), which deals out single tokens; pairs of chunks as here:
Grattafiori et al. 2024, The Llama 3 herd of models, section 3.3.2 (https://arxiv.org/abs/2407.21783).

Letters: B batch, H heads, G key/value heads, R = H / G, T tokens of whole rows, K head dim, P ranks.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minispeed.collective.group import Done, Group, Work
from minispeed.errors import UserError
from minispeed.model.mask import Mask
from minispeed.sequence.block import Block, Gradients, Passed, RunningSoftmax, tile_scores
from minispeed.sequence.masks import PerMask, gather_documents


def zigzag(rank: int, size: int) -> tuple[int, ...]:
    """Return which of the 2 `size` chunks of a row a rank holds: one from the start, one from the end."""
    return rank, 2 * size - 1 - rank


def ring(group: Group, *, tile: int = 512) -> Callable[[Tensor, Tensor, Tensor, Mask], Tensor]:
    """Return an attention whose keys and values travel; `tile` bounds the scores held at once, B H tile^2.

    Returns  (q (B, H, T/P, K), k, v (B, G, T/P, K), mask of the rank's tokens) -> (B, H, T/P, K), in q's dtype; a
             rank's tokens are its `zigzag` chunks. For backward it holds q, k, v, the output and B H T/P numbers.
             It raises UserError if a rank's tokens are not two chunks of one length.
    Sends    documents, where the mask has any, once for each mask: B T/P (P - 1) integers per rank
    """
    if tile < 1:
        raise UserError(f"a tile holds at least 1 token, got {tile}", fix="tile=512")
    documents = PerMask(partial(gather_documents, group))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        if mask.num_queries % 2:
            what = f"a rank holds two chunks of one length, and {mask.num_queries} tokens are not"
            raise UserError(what, fix=f"rows of a multiple of {2 * group.size} tokens, as `cut.share` pads them")
        blocks = partial(blocks_of, group.rank, size=group.size, mask=mask, documents=documents(mask))
        return _Ring.apply(q, k, v, blocks, group, tile)

    return attend


def blocks_of(rank: int, source: int, *, size: int, mask: Mask, documents: Tensor | None) -> Iterator[Block]:
    """Yield what a rank's two chunks of queries may see of the two chunks of keys of rank `source`.

    mask       that of any rank's tokens: how many there are, and whether order counts
    documents  of every rank's tokens, (P, B, T/P)
    """
    length = mask.num_queries // 2
    halves = slice(0, length), slice(length, 2 * length)
    mine, theirs = (list(zip(halves, zigzag(r, size), strict=True)) for r in (rank, source))
    for (rows, row_chunk), (columns, column_chunk) in product(mine, theirs):
        queries = None if documents is None else documents[rank, :, rows]
        keys = None if documents is None else documents[source, :, columns]
        offset = (row_chunk - column_chunk) * length
        part = Mask(length, length, causal=mask.causal, offset=offset, queries=queries, keys=keys)
        if part.reaches(halves[0], halves[0]):
            yield Block(rows, columns, part)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Callable[[int], Iterator[Block]], group: Group, tile: int
    ) -> Tensor:
        qg = _by_group(q, k)
        seen = RunningSoftmax.before(qg)
        for source, (keys, values) in _travel(torch.stack((k, v)).contiguous(), group):
            for block in blocks(source):
                for rows, columns, scores in tile_scores(qg, keys[:, :, None], block, tile):
                    seen.add(rows, scores, values[:, :, None, columns])
        mean, log_sum = seen.result()
        out = mean.flatten(1, 2).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.blocks, ctx.group, ctx.tile = blocks, group, tile
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        wide = log_sum.dtype
        qg, grad = _by_group(q, k), _by_group(grad_out.to(wide), k)
        passed = Passed(grad, log_sum, (grad * _by_group(out, k)).sum(-1))
        grad_q = torch.zeros_like(qg, dtype=wide)
        home = _Homebound(ctx.group)
        for source, kv in _travel(torch.stack((k, v)).contiguous(), ctx.group):
            grad_kv = torch.zeros_like(kv, dtype=wide)  # (2, B, G, T/P, K): what my queries say of them
            gradients = Gradients(grad_q, *grad_kv[:, :, :, None])
            keys, values = kv[:, :, :, None]
            for block in ctx.blocks(source):
                gradients.add(qg, keys, values, passed, block, ctx.tile)
            home.add(grad_kv)
        grad_k, grad_v = home.result()
        return grad_q.flatten(1, 2).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _travel(x: Tensor, group: Group) -> Iterator[tuple[int, Tensor]]:
    """Yield each rank's `x`, mine first, then those of the ranks before me; the next is under way meanwhile."""
    for step in range(group.size):
        coming, work = (x, Done()) if step == group.size - 1 else _pass_on(x, group)
        yield (group.rank - step) % group.size, x
        work.wait()
        x = coming


class _Homebound:
    """Gradients that follow the keys and values round the ring, one step behind.

    What a rank says of its own stays. The rest of a rank's gradient starts at the rank after it and ends at home: with
    P ranks P - 1 messages, as for the keys and values.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.own: Tensor | None = None
        self.coming: tuple[Tensor, Work] | None = None

    def add(self, x: Tensor) -> None:
        """Add to the gradient that is here now what my queries say of it, and send it on; `x` is taken over."""
        if self.own is None:
            self.own = x
            return
        self.coming = _pass_on(self._arrived(x), self.group)

    def result(self) -> Tensor:
        """Return the whole gradient of my own keys and values."""
        assert self.own is not None
        return self._arrived(self.own)

    def _arrived(self, x: Tensor) -> Tensor:
        if self.coming is not None:
            came, work = self.coming
            work.wait()
            x += came
        return x


def _pass_on(x: Tensor, group: Group) -> tuple[Tensor, Work]:
    """Send `x` to the next rank; return where that of the rank before will be, once the work is done."""
    coming = torch.empty_like(x)
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    return coming, group.exchange([(x, after)], [(coming, before)])


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """Line the query heads up with the key head they share.  (B, H, T/P, K) -> (B, G, R, T/P, K)"""
    return x.unflatten(1, (k.shape[1], -1))
