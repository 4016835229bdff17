"""Score predictions when each rank holds the scores of its own part of the vocabulary, and never gather them.

Gathered, the logits would be the run's largest message: B T V. But a loss needs three numbers of them for each token,
and each is a maximum or a sum over the vocabulary, so it can be taken part by part:

    largest     max over ranks of l_r, where l_r = log sum over my v of exp(h . w_v)
    sum         sum over ranks of exp(l_r - largest)
    target      h . w_label, from the rank that holds the label; 0 from the others
    loss        largest + log(sum) - target

The backward needs no message: softmax - onehot(label) for my part of the vocabulary, from the same sum. As in
`minispeed/model/loss.py` only supervised rows are scored, in chunks, whose logits the backward computes again. Messages
are of all rows at once, whatever the chunks: one maximum, one sum.

Megatron-LM, Shoeybi et al. 2019, section 3.  https://arxiv.org/abs/1909.08053
Letters: N supervised tokens, D model, V vocabulary, V/tp rows of it on each rank, the last perhaps padding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minispeed.collective.autograd import copy
from minispeed.collective.group import Group
from minispeed.model.loss import IGNORED, chunks


def token_losses(
    features: Tensor, weight: Tensor, labels: Tensor, *, group: Group, vocab_size: int, chunk: int = 1024
) -> Tensor:
    """Return each token's negative log likelihood, 0 where it is not supervised: on every rank the same.

    Reads    features (B, T, D), the same on every rank; weight (V/tp, D), my rows; labels (B, T), -100 where nothing is
             to be learnt
    Holds    N D features and N numbers for backward; `chunk` x V/tp logits while it runs
    Sends    3 N numbers, all-reduced; backward N D, the gradient of the features
    Returns  (B, T), nats, in fp32 or wider
    """
    supervised = labels != IGNORED  # (B, T)
    rows = copy(features[supervised], group)  # (N, D)
    losses = _CutLoss.apply(rows, weight, labels[supervised], group, vocab_size, chunk)  # (N,)
    return losses.new_zeros(labels.shape).masked_scatter(supervised, losses)


def find_rows(tokens: Tensor, num_rows: int, rank: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return where each token stands among the rows of `rank`, 0 where it does not, and whether it does.

    A token that is in no rank's vocabulary gets a place beyond the rows, so that looking it up fails.
    """
    index = tokens - rank * num_rows
    is_mine = (index >= 0) & (index < num_rows)
    is_known = (tokens >= 0) & (tokens < vocab_size)
    return torch.where(is_known, torch.where(is_mine, index, 0), num_rows), is_mine


class _CutLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, labels: Tensor, group: Group, vocab_size: int, chunk: int
    ) -> Tensor:
        wide = torch.promote_types(features.dtype, torch.float32)
        index, is_mine = find_rows(labels, len(weight), group.rank, vocab_size)
        num_real = vocab_size - group.rank * len(weight)  # rows from there on are padding
        mine = features.new_empty(labels.shape, dtype=wide)  # l_r
        target = torch.empty_like(mine)
        for part in chunks(len(labels), chunk):
            logits = _logits(features[part], weight, num_real, wide)  # (n, D) -> (n, V/tp)
            mine[part] = logits.logsumexp(-1)
            target[part] = logits.gather(1, index[part, None])[:, 0].masked_fill(~is_mine[part], 0)
        largest = mine.clone()
        group.all_reduce(largest, "max").wait()
        sums = torch.stack([(mine - largest).exp(), target])  # (2, N)
        group.all_reduce(sums).wait()
        log_sum = largest + sums[0].log()
        ctx.save_for_backward(features, weight, index, is_mine, log_sum)
        ctx.num_real, ctx.chunk = num_real, chunk
        return log_sum - sums[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, index, is_mine, log_sum = ctx.saved_tensors
        grad_features = torch.empty_like(features)
        grad_weight = torch.zeros_like(weight, dtype=log_sum.dtype)
        for part in chunks(len(index), ctx.chunk):
            logits = _logits(features[part], weight, ctx.num_real, log_sum.dtype)
            grad_logits = (logits - log_sum[part, None]).exp()  # my part of the softmax, (n, V/tp)
            grad_logits.scatter_add_(1, index[part, None], -is_mine[part, None].to(log_sum.dtype))
            grad_logits = (grad_logits * grad_losses[part, None]).to(features.dtype)
            grad_features[part] = grad_logits @ weight
            grad_weight += grad_logits.T @ features[part]
        return grad_features, grad_weight.to(weight.dtype), None, None, None, None


def _logits(features: Tensor, weight: Tensor, num_real: int, dtype: torch.dtype) -> Tensor:
    """Return the scores of my rows, -inf where they are padding.  (n, D), (V/tp, D) -> (n, V/tp)"""
    logits = (features @ weight.T).to(dtype)
    logits[:, max(0, num_real) :] = float("-inf")
    return logits
