"""Attend to a row's keys a block at a time, in any order: one chunk of queries and one chunk of keys.

A softmax over keys that are not all here yet keeps three things for each query: the largest score so far, the sum of
exp(score - largest), and that sum of values. A block that brings a larger score shrinks both sums first. The backward
needs no order at all: with the whole softmax's log-sum, any tile's weights are exp(score - log-sum).

Online softmax: Milakov & Gimelshein 2018 (https://arxiv.org/abs/1805.02867). Tiles and their backward: FlashAttention,
Dao et al. 2022, sections 3.1 and B.4 (https://arxiv.org/abs/2205.14135).

Letters: B batch, G key/value heads, R query heads that share one, T queries, S keys of a rank, K head dim; t and s
queries and keys of a tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minispeed.model.mask import Mask


class Block(NamedTuple):
    """One chunk of this rank's queries and one chunk of a rank's keys.

    rows, columns  where the chunks lie among the tokens of their ranks
    mask           which of these queries may look at which of these keys
    """

    rows: slice
    columns: slice
    mask: Mask


def tile_scores(q: Tensor, k: Tensor, block: Block, tile: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield a block's masked scores, at most `tile` x `tile` at once, without the tiles that order excludes.

    Reads   q (B, G, R, T, K); k (B, G, 1, S, K)
    Yields  rows and columns of the tile among all T and S, and its scores (B, G, R, t, s), in fp32 or wider
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    for rows in _slices(block.mask.num_queries, tile):
        for columns in _slices(block.mask.num_keys, tile):
            if not block.mask.reaches(rows, columns):
                break
            here, there = _moved(rows, block.rows.start), _moved(columns, block.columns.start)
            scores = ((q[..., here, :] @ k[..., there, :].mT) / math.sqrt(q.shape[-1])).to(wide)
            allowed = block.mask.allowed(rows, columns, q.device)
            yield here, there, scores if allowed is None else scores.masked_fill(~allowed[:, :, None], -math.inf)


@dataclass
class RunningSoftmax:
    """What T queries have seen so far, in fp32 or wider.

    top    largest score, (B, G, R, T), -inf before the first
    total  sum of exp(score - top), likewise
    mixed  sum of exp(score - top) x value, (B, G, R, T, K)
    """

    top: Tensor
    total: Tensor
    mixed: Tensor

    @classmethod
    def before(cls, q: Tensor) -> "RunningSoftmax":
        """Return what queries (B, G, R, T, K) know before the first key."""
        wide = torch.promote_types(q.dtype, torch.float32)
        top = q.new_full(q.shape[:-1], -math.inf, dtype=wide)
        return cls(top, torch.zeros_like(top), torch.zeros_like(q, dtype=wide))

    def add(self, rows: slice, scores: Tensor, values: Tensor) -> None:
        """Let the queries at `rows` see some keys more.  (B, G, R, t, s), (B, G, 1, s, K)"""
        top = torch.maximum(self.top[..., rows], scores.amax(-1))
        # a query that has met no allowed key yet: exp(-inf - 0) = 0 where -inf - -inf would be nan
        base = top.masked_fill(top == -math.inf, 0)
        weights = (scores - base[..., None]).exp()
        shrink = (self.top[..., rows] - base).exp()
        self.top[..., rows] = top
        self.total[..., rows] = self.total[..., rows] * shrink + weights.sum(-1)
        seen = self.mixed[..., rows, :] * shrink[..., None]
        self.mixed[..., rows, :] = seen + weights @ values.to(weights.dtype)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the weighted mean of values (B, G, R, T, K), and the log of the sum of exp(score) (B, G, R, T)."""
        return self.mixed / self.total[..., None], self.top + self.total.log()


class Gradients(NamedTuple):
    """Where a backward adds up, in fp32 or wider: queries (B, G, R, T, K), keys and values (B, G, 1, S, K)."""

    q: Tensor
    k: Tensor
    v: Tensor

    def add(self, q: Tensor, k: Tensor, v: Tensor, passed: "Passed", block: Block, tile: int) -> None:
        """Add what one block says.  q (B, G, R, T, K); k, v (B, G, 1, S, K)"""
        wide = passed.log_sum.dtype
        for rows, columns, scores in tile_scores(q, k, block, tile):
            grad_out = passed.grad_out[..., rows, :]
            weights = (scores - passed.log_sum[..., rows, None]).exp()  # the softmax itself, (B, G, R, t, s)
            grad_weights = grad_out @ v[..., columns, :].to(wide).mT
            grad_scores = weights * (grad_weights - passed.inner[..., rows, None]) / math.sqrt(q.shape[-1])
            self.q[..., rows, :] += grad_scores @ k[..., columns, :].to(wide)
            # the R query heads of a group share a key head: their gradients add up
            self.k[..., columns, :] += (grad_scores.mT @ q[..., rows, :].to(wide)).sum(2, keepdim=True)
            self.v[..., columns, :] += (weights.mT @ grad_out).sum(2, keepdim=True)


class Passed(NamedTuple):
    """What the backward knows of each query, in fp32 or wider.

    grad_out  gradient of its output, (B, G, R, T, K)
    log_sum   log of the sum of exp(score), (B, G, R, T)
    inner     sum over keys of weight x the weight's gradient, which is output . grad_out, (B, G, R, T)
    """

    grad_out: Tensor
    log_sum: Tensor
    inner: Tensor


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
