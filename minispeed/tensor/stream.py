"""Lead features into the cut layers and out again: the few moments at which tensor-parallel ranks speak.

Between the cut layers runs a stream: what the embedding put in, and what each layer added. Every rank holds all of it;
with sequence parallelism each holds T/tp of its tokens, and norms, biases and whatever else runs along it is computed
once and not tp times. A message out of a layer and one into the next then take the place of one that did both.

                                     whole rows                      rows cut by tokens
    moment                           forward       backward          forward           backward
    into a cut layer (`enter`)       -             all-reduce        all-gather        reduce-scatter
    out of a cut layer (`leave`)     all-reduce    -                 reduce-scatter    all-gather
    given whole (`mine`)             -             -                 -                 all-gather
    wanted whole (`whole`)           -             -                 all-gather        -
    a shared parameter's gradient                  -                                   all-reduce

An all-reduce sends what a reduce-scatter and an all-gather send: cut rows cost no element more beside the gradients of
norms, and what the stream keeps for the backward is divided by tp. What enters a cut layer is kept gathered; the paper
keeps T/tp of it too, and gathers again.

Megatron-LM, Shoeybi et al. 2019, section 3 (https://arxiv.org/abs/1909.08053); cut by tokens: Korthikanti et al. 2022,
section 4.2.2 (https://arxiv.org/abs/2205.05198). Letters: B batch, T tokens, D model.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from minispeed.collective.autograd import all_gather, all_reduce, copy, reduce_scatter, split
from minispeed.collective.group import Group
from minispeed.errors import UserError

TOKENS = 1  # the dim of the stream that is cut: (B, T, ..)


class Stream:
    """How the stream of one model crosses into its cut layers.

    is_cut  whether a rank holds T/tp tokens of it, or all
    """

    def __init__(self, group: Group, *, is_cut: bool) -> None:
        self.group, self.is_cut = group, is_cut

    def enter(self, x: Tensor) -> Tensor:
        """Hand the stream to layers of which every rank has a part.  (B, T or T/tp, D) -> (B, T, D)

        Sends  backward B T D 2 (tp - 1)/tp elements per rank; cut, half of them forward
        """
        return all_gather(x, self.group, dim=TOKENS, copies=False) if self.is_cut else copy(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Sum what the ranks' parts made, and put it into the stream.  (B, T, D) -> (B, T or T/tp, D)

        Sends   B T D 2 (tp - 1)/tp elements per rank; cut, half of them backward
        Raises  UserError if the rows are to be cut by tokens and tp does not divide T
        """
        self._check(x)
        return reduce_scatter(x, self.group, dim=TOKENS) if self.is_cut else all_reduce(x, self.group)

    def mine(self, x: Tensor) -> Tensor:
        """Return, of what every rank was given whole, what goes with its tokens.  (B, T, ..) -> (B, T or T/tp, ..)"""
        self._check(x)
        return split(x, self.group, dim=TOKENS) if self.is_cut else x

    def my_heads(self, x: Tensor) -> Tensor:
        """Return, of what is of all heads, what is of those on this rank.  (H,) -> (H/tp,)"""
        return x.chunk(self.group.size)[self.group.rank]

    def whole(self, x: Tensor) -> Tensor:
        """Let every rank have all of the stream, and go on alike.  (B, T or T/tp, D) -> (B, T, D)"""
        return all_gather(x, self.group, dim=TOKENS, copies=True) if self.is_cut else x

    def sum_over_tokens(self, gradient: Tensor) -> Tensor:
        """Return the whole gradient of a parameter that each rank applied to its tokens of the stream."""
        return all_reduce(gradient, self.group) if self.is_cut else gradient

    def sum_over_heads(self, gradient: Tensor) -> Tensor:
        """Return the whole gradient of a parameter that each rank applied to its heads."""
        return all_reduce(gradient, self.group)

    def _check(self, x: Tensor) -> None:
        num_tokens, size = x.shape[TOKENS] if x.dim() > TOKENS else 1, self.group.size
        if self.is_cut and num_tokens % size:
            raise UserError(
                f"rows of {num_tokens} tokens, which tp={size} does not divide, cannot be cut by tokens",
                fix=f"rows of {-(-num_tokens // size) * size}, or `with whole_rows(model):` where nothing is trained",
            )


@contextlib.contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """Let every rank hold all tokens of the stream for a while: to generate, one token at a time, or to evaluate.

    The weights are the same ones. A forward and its backward must both lie inside, or both outside.
    """
    found = (getattr(module, "stream", None) for module in model.modules())
    before = {stream: stream.is_cut for stream in found if isinstance(stream, Stream)}
    for stream in before:
        stream.is_cut = False
    try:
        yield
    finally:
        for stream, was_cut in before.items():
            stream.is_cut = was_cut
