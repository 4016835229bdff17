"""Look back over the tokens: scaled dot-product attention, three times behind one signature.

    attention(q, k, v) = softmax(q k^T / sqrt(K) + mask) v

`reference` is the formula, and holds the (T, S) scores. `tiled` walks over blocks of keys and corrects a running
softmax as it goes, so its extra memory is linear in T; its backward computes the scores again, tile by tile. `fused`
is torch's kernel. All three know grouped-query heads, packed documents and queries that continue a cache of keys; the
first two can drop some of the softmax's weights (`dropout.py`), where torch's kernel draws numbers of its own.

Attention: Vaswani et al. 2017, section 3.2.1 (https://arxiv.org/abs/1706.03762). Online softmax: Milakov & Gimelshein
2018 (https://arxiv.org/abs/1805.02867). Tiles and their backward: FlashAttention, Dao et al. 2022, sections 3.1 and B.4
(https://arxiv.org/abs/2205.14135). Grouped queries: Ainslie et al. 2023 (https://arxiv.org/abs/2305.13245).

Letters: B batch, H heads, G key/value heads (G divides H, R = H / G share one), T queries, S keys, K head dim.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minispeed.errors import UserError, nearest
from minispeed.model.mask import Mask

HALF = (torch.float16, torch.bfloat16)
_told: list[str] = []  # what has been printed once


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Compute the formula as it is written.

    Reads   q (B, H, T, K); k, v (B, G, S, K)
    Holds   the scores for backward, B H T S elements, twice
    Returns (B, H, T, K), in q's dtype; torch's softmax of half precision adds up in fp32
    """
    num_shares = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, num_shares, -1, -1).flatten(1, 2) for x in (k, v))  # -> (B, H, S, K)
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT  # (B, H, T, S)
    bias = mask.bias(scores)
    weights = (scores if bias is None else scores + bias).softmax(dim=-1)
    return mask.drop(weights, slice(0, q.shape[2]), slice(0, k.shape[2])) @ v


def tiled(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, tile: int = 128) -> Tensor:
    """Compute the same from tiles of `tile` queries and `tile` keys, never holding more scores than one tile's.

    Reads   q (B, H, T, K); k, v (B, G, S, K)
    Holds   its inputs, its output and one number per query (the log of the softmax's sum), B H T elements
    Returns (B, H, T, K), in q's dtype; sums are kept in fp32 or wider

    FlashAttention, Dao et al. 2022, algorithm 1 and, backward, algorithm 4.
    """
    if tile < 1:
        raise UserError(f"a tile holds at least 1 token, got {tile}", fix="tile=128")
    return _Tiled.apply(q, k, v, mask, tile)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Let torch choose its kernel: on a GPU documents go to the one for variable lengths, in half precision.

    A dense mask is made only where no kernel does without.

    Raises  UserError if some of the softmax's weights are to be dropped
    """
    if mask.dropout is not None:
        raise UserError("the fused attention cannot drop weights: it never holds them", fix="reference, or tiled")
    if mask.is_plain():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    if q.is_cuda and q.dtype in HALF and mask.runs() is not None:
        from torch.nn.attention.varlen import varlen_attn  # here: it imports torch's compiler, which takes seconds

        return by_documents(q, k, v, mask, varlen_attn)
    bias = mask.bias(q)
    if q.is_cuda and q.shape[1] != k.shape[1]:  # no fast kernel knows both shared heads and a mask
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if q.is_cuda and bias is not None and q.shape[2] > 1 and not _told:
        _told.append("a dense mask")
        print(f"attention: a dense mask of {q.shape[2]} x {k.shape[2]}; in bf16 or fp16 packed rows need none")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])


def by_documents(q: Tensor, k: Tensor, v: Tensor, mask: Mask, kernel: Callable[..., Any]) -> Tensor:
    """Let a kernel for sequences of variable length see each document alone.

    Reads   q (B, H, T, K); k, v (B, G, T, K)
    kernel  (q, k, v (B T, H, K), bounds, bounds, longest, longest, window_size=(-1, 0): causal) -> (B T, H, K)
    Returns (B, H, T, K)
    """
    runs = mask.runs()
    assert runs is not None
    num_shares = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(num_shares, dim=1) if num_shares > 1 else x for x in (k, v))
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B, H, T, K) -> (B T, H, K)
    out: Tensor = kernel(*rows, runs.bounds, runs.bounds, runs.longest, runs.longest, window_size=(-1, 0))
    return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask], Tensor]] = {
    "reference": reference,
    "tiled": tiled,
    "fused": fused,
}


def implementation(name: str) -> Callable[[Tensor, Tensor, Tensor, Mask], Tensor]:
    """Return the attention called `name`; UserError names the nearest if there is none."""
    if name not in IMPLEMENTATIONS:
        alike = nearest(name, IMPLEMENTATIONS) or "fused"
        raise UserError(f"no attention is called {name!r}; there are {', '.join(IMPLEMENTATIONS)}", fix=alike)
    return IMPLEMENTATIONS[name]


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _tile_scores(q: Tensor, k: Tensor, mask: Mask, rows: slice, columns: slice) -> Tensor:
    """Return the masked scores of one tile, in fp32 or wider.  (B, G, R, t, K), (B, G, 1, s, K) -> (B, G, R, t, s)"""
    scores = (q[..., rows, :] @ k[..., columns, :].transpose(-2, -1)) / math.sqrt(q.shape[-1])
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    allowed = mask.allowed(rows, columns, q.device)
    return scores if allowed is None else scores.masked_fill(~allowed[:, :, None], -math.inf)


def _by_group(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Line the query heads up with the key head they share.  -> (B, G, R, T, K), (B, G, 1, S, K) twice"""
    return q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]


def _drop(weights: Tensor, mask: Mask, rows: slice, columns: slice) -> Tensor:
    """Drop out of one tile of the softmax's weights, or of their gradients.  (B, G, R, t, s)"""
    return mask.drop(weights.flatten(1, 2), rows, columns).view_as(weights)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, tile: int) -> Tensor:
        qg, kg, vg = _by_group(q, k, v)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(qg)
        log_sum = qg.new_empty(qg.shape[:-1], dtype=wide)  # (B, G, R, T)
        for rows in _slices(q.shape[2], tile):
            top = qg.new_full(qg[..., rows, 0].shape, -math.inf, dtype=wide)  # largest score so far, (B, G, R, t)
            total = torch.zeros_like(top)  # sum of exp(score - top) so far
            mixed = torch.zeros_like(qg[..., rows, :], dtype=wide)  # the same sum, of values
            for columns in _slices(k.shape[2], tile):
                if not mask.reaches(rows, columns):
                    break
                scores = _tile_scores(qg, kg, mask, rows, columns)
                new_top = torch.maximum(top, scores.amax(-1))
                # a query that has not met an allowed key yet: exp(-inf - 0) = 0 where -inf - -inf would be nan
                base = new_top.masked_fill(new_top == -math.inf, 0)
                weights = (scores - base[..., None]).exp()
                shrink = (top - base).exp()
                total = total * shrink + weights.sum(-1)
                kept = _drop(weights, mask, rows, columns)  # of the sum of values alone: the softmax is whole before
                mixed = mixed * shrink[..., None] + kept @ vg[..., columns, :].to(wide)
                top = new_top
            out[..., rows, :] = (mixed / total[..., None]).to(q.dtype)
            log_sum[..., rows] = top + total.log()
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.mask, ctx.tile = mask, tile
        return out.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        qg, kg, vg = _by_group(q, k, v)
        wide = log_sum.dtype
        grad_out = grad_out.view_as(out).to(wide)
        inner = (grad_out * out).sum(-1, keepdim=True)  # sum of weight x its gradient, per query: (B, G, R, T, 1)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (qg, kg, vg))
        for rows in _slices(q.shape[2], ctx.tile):
            for columns in _slices(k.shape[2], ctx.tile):
                if not ctx.mask.reaches(rows, columns):
                    break
                scores = _tile_scores(qg, kg, ctx.mask, rows, columns)
                weights = (scores - log_sum[..., rows, None]).exp()  # the softmax itself, (B, G, R, t, s)
                kept = _drop(weights, ctx.mask, rows, columns)
                grad_kept = grad_out[..., rows, :] @ vg[..., columns, :].to(wide).transpose(-2, -1)
                grad_weights = _drop(grad_kept, ctx.mask, rows, columns)
                grad_scores = weights * (grad_weights - inner[..., rows, :]) / math.sqrt(q.shape[-1])
                grad_q[..., rows, :] += grad_scores @ kg[..., columns, :].to(wide)
                # the R query heads of a group share a key head: their gradients add up
                grad_k[..., columns, :] += (grad_scores.mT @ qg[..., rows, :].to(wide)).sum(2, keepdim=True)
                grad_v[..., columns, :] += (kept.mT @ grad_out[..., rows, :]).sum(2, keepdim=True)
        return (
            grad_q.view_as(q).to(q.dtype),
            grad_k.view_as(k).to(k.dtype),
            grad_v.view_as(v).to(v.dtype),
            None,
            None,
        )
