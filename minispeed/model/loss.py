"""Score predictions without ever holding the logits of every token.

Logits are the largest tensor of a small run: B T V, where V may be 150,000. Two things make them unnecessary. Rows
whose label is -100 (what the user said, padding) are dropped before the head's matrix product. The rest goes through
in chunks, each chunk's logits computed, used and freed; the backward computes them again, as tiled attention does with
its scores.

    loss = log sum_v exp(h . w_v) - h . w_label        its gradient by the logits: softmax - onehot(label)

Letters: N supervised tokens, D model, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # torch's own value for "no label here"


def token_losses(features: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 1024) -> Tensor:
    """Return each token's negative log likelihood, 0 where it is not supervised.

    Reads    features (B, T, D); weight (V, D); labels (B, T), -100 where nothing is to be learnt
    Holds    N D features and N numbers for backward; `chunk` x V logits while it runs
    Returns  (B, T), nats, in fp32 or wider
    """
    supervised = labels != IGNORED  # (B, T)
    losses = _ChunkedLoss.apply(features[supervised], weight, labels[supervised], chunk)  # (N,)
    return losses.new_zeros(labels.shape).masked_scatter(supervised, losses)


def chunks(total: int, size: int) -> Iterator[slice]:
    """Cut `total` rows; one chunk at least: a rank with nothing to learn reads the same weights as the others."""
    for start in range(0, max(1, total), size):
        yield slice(start, start + size)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(features.dtype, torch.float32)
        log_sum = features.new_empty(labels.shape, dtype=wide)
        chosen = torch.empty_like(log_sum)
        for part in chunks(len(labels), chunk):
            logits = (features[part] @ weight.T).to(wide)  # (n, D) -> (n, V)
            log_sum[part] = logits.logsumexp(-1)
            chosen[part] = logits.gather(1, labels[part, None])[:, 0]
        ctx.save_for_backward(features, weight, labels, log_sum)
        ctx.chunk = chunk
        return log_sum - chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, labels, log_sum = ctx.saved_tensors
        grad_features = torch.empty_like(features)
        grad_weight = torch.zeros_like(weight, dtype=log_sum.dtype)
        for part in chunks(len(labels), ctx.chunk):
            logits = (features[part] @ weight.T).to(log_sum.dtype)
            grad_logits = (logits - log_sum[part, None]).exp()  # the softmax, (n, V)
            grad_logits.scatter_add_(1, labels[part, None], -torch.ones_like(log_sum[part, None]))
            grad_logits = (grad_logits * grad_losses[part, None]).to(features.dtype)
            grad_features[part] = grad_logits @ weight
            grad_weight += grad_logits.T @ features[part]
        return grad_features, grad_weight.to(weight.dtype), None, None
