"""Compute a rank's part of a Linear or an Embedding, and speak where the parts must meet.

    x -> ColumnLinear -> something element by element, or head by head -> RowLinear -> y

The first is cut by output features: each rank makes features of its own from the whole input. The second is cut by the
input features that the same rank made, so that the ranks' outputs are terms of one sum. Between the two nobody speaks.
The vocabulary is cut by its rows: a token that is not mine contributes zeros to the embedding, and in the head each
rank scores the tokens it holds.

Beside either there may be an adapter, B A x (`model/lora.py`), cut so that it adds no message between the two: of a
column B is cut, and A x is made whole on every rank; of a row A is cut, and every rank adds B times its own term of A x
to the term that it has, before the one sum. What is whole has gradients that are parts, to be summed.

Megatron-LM, Shoeybi et al. 2019, section 3.  https://arxiv.org/abs/1909.08053
Letters: B batch, T tokens, D model, F features, V vocabulary, V/tp rounded up.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minispeed.collective.autograd import all_gather, copy
from minispeed.errors import UserError
from minispeed.tensor.loss import find_rows, token_losses
from minispeed.tensor.stream import Stream


class ColumnLinear(nn.Module):
    """x W^T + b for my slice of the output features: weight (F/tp, D), bias (F/tp,).

    enters      whether it takes its input from the stream itself, or is inside a module that has (`Enter`)
    transposed  the weight is (D, F/tp)
    lora        an adapter whose B is cut as the weight is
    """

    def __init__(
        self,
        stream: Stream,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        enters: bool,
        transposed: bool = False,
        lora: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stream, self.enters, self.transposed = stream, enters, transposed
        self.weight, self.bias, self.lora = weight, bias, lora

    def forward(self, x: Tensor) -> Tensor:
        """Read the stream, or, inside what has entered it, (B, T, D).  -> (B, T, F/tp)"""
        x = self.stream.enter(x) if self.enters else x
        y = F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)
        return y if self.lora is None else y + self.lora(x)


class RowLinear(nn.Module):
    """x W^T summed over my slice of the input features, then over ranks, + b: weight (D, F/tp), bias (D,), whole.

    leaves      whether it writes to the stream, or is inside a row that does: then its output is a term
    transposed  the weight is (F/tp, D)
    lora        an adapter whose A is cut as the weight is
    """

    def __init__(
        self,
        stream: Stream,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        leaves: bool = True,
        transposed: bool = False,
        lora: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stream, self.leaves, self.transposed = stream, leaves, transposed
        self.weight, self.bias, self.lora = weight, bias, lora

    def forward(self, x: Tensor) -> Tensor:
        """Write to the stream, (B, T, F/tp) -> (B, T or T/tp, D), or return my term, (B, T, D)."""
        y = F.linear(x, self.weight.t() if self.transposed else self.weight)
        y = y if self.lora is None else y + self.lora(x)
        y = self.stream.leave(y) if self.leaves else y
        return y if self.bias is None else y + self.bias  # after the sum, or it would count tp times


class SharedLinear(nn.Module):
    """x W^T between cut layers: weight (F, D), whole on every rank, whose gradient is a part on each.

    The sum of the parts is made in the backward, where the weight comes from: what puts gradients of weights off
    (`pipeline/deferred.py`) makes this one at once.
    """

    def __init__(self, stream: Stream, weight: nn.Parameter) -> None:
        super().__init__()
        self.stream, self.weight = stream, weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply it.  (B, T, D) -> (B, T, F)

        Sends  backward F D 2 (tp - 1)/tp elements per rank
        """
        return F.linear(x, copy(self.weight, self.stream.group))


class VocabEmbedding(nn.Module):
    """The vectors of my tokens: weight (V/tp, D)."""

    def __init__(self, stream: Stream, weight: nn.Parameter, *, vocab_size: int) -> None:
        super().__init__()
        self.stream, self.vocab_size = stream, vocab_size
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Write every token's vector to the stream.  (B, T) -> (B, T or T/tp, D)"""
        index, is_mine = find_rows(tokens, self.weight.shape[0], self.stream.group.rank, self.vocab_size)
        return self.stream.leave(F.embedding(index, self.weight).masked_fill(~is_mine[..., None], 0))


class VocabHead(nn.Module):
    """The scores of my tokens: weight (V/tp, D), bias (V/tp,). Reads features that every rank holds whole."""

    def __init__(self, stream: Stream, weight: nn.Parameter, bias: nn.Parameter | None, *, vocab_size: int) -> None:
        super().__init__()
        self.stream, self.vocab_size = stream, vocab_size
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of all tokens, on every rank.  (.., D) -> (.., V)

        Sends  rows x V (tp - 1)/tp elements per rank (all-gather): for a few rows; `losses` is for many
        """
        logits = F.linear(copy(x, self.stream.group), self.weight, self.bias)
        return all_gather(logits, self.stream.group, dim=-1, copies=True)[..., : self.vocab_size]

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each token's prediction: see `token_losses`.  (B, T, D), (B, T) -> (B, T)

        Raises  UserError if the head has a bias
        """
        if self.bias is not None:
            raise UserError("the loss over a cut vocabulary knows no bias of the head", fix="a head without bias")
        group = self.stream.group
        return token_losses(features, self.weight, labels, group=group, vocab_size=self.vocab_size)
