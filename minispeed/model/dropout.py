"""Drop features at random, and the same ones however ranks share the work: what is drawn is a function, not a state.

A generator that is asked once per tensor gives other numbers to a model cut over 8 ranks. Here whether an element is
dropped is an integer hash of where it stands:

    (seed, step) -> (row in the step's global batch, column) -> layer -> place in it -> feature

so every rank that has an element knows, asks nobody, and knows it again when a forward is recomputed. Each arrow is
SplitMix64: what it returns as number n in one state is the next arrow's state. Attention's weights are drawn likewise,
by head and key.

Dropout: Srivastava et al. 2014, section 4 (https://jmlr.org/papers/v15/srivastava14a.html); where a GPT has it: Radford
et al. 2018, section 4.1. SplitMix64: Steele, Lea & Flood 2014 (https://doi.org/10.1145/2660193.2660195), with the
constants of https://prng.di.unimi.it/splitmix64.c. Numbers by place and not by order: Salmon et al. 2011
(https://doi.org/10.1145/2063384.2063405).

Letters: B batch, T tokens, D model, H heads, S keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from minispeed.errors import UserError
from minispeed.model.init import seed_of

LANES = 4  # elements that share a number of 64 bits, 16 for each
PARTS = 2**16  # the probability is rounded to one in so many


def _signed(bits: int) -> int:
    """Return 64 bits as the number that int64 reads in them."""
    return bits - 2**64 if bits >= 2**63 else bits


GAMMA = _signed(0x9E3779B97F4A7C15)


def numbered(states: Tensor | int, numbers: Tensor) -> Tensor:
    """Return the output number `numbers` of the generators in `states`.  int64, broadcast; sums and products wrap"""
    return _mixed(states + numbers * GAMMA)


def _mixed(x: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift to the right and fill with zeros, where int64 would fill with its sign."""
    return (x >> by) & (2 ** (64 - by) - 1)


@cache
def number_of(name: str) -> int:
    """Return the number that a layer, or a place in one, is hashed by."""
    return seed_of(0, name)


EMBEDDING, ATTENTION, MLP = map(number_of, ("tokens", "attention", "mlp"))  # places: what they add to the stream


@dataclass(frozen=True, eq=False)
class Dropout:
    """What is dropped of tensors (.., n) whose leading elements are in `states`, (..): each element with probability p.

    What is kept is divided by the kept share, so that its mean stays.
    """

    p: float
    states: Tensor

    def at(self, place: int) -> "Dropout":
        """Return another one for the same tokens."""
        return replace(self, states=_mixed(self.states + place))

    def dropped(self, rows: slice, columns: slice) -> Tensor:
        """Return which of a tensor's elements are dropped, at `rows` of its last dim but one.  (.., t, n) bool"""
        first, last = columns.start // LANES, -(-columns.stop // LANES)
        states = self.states[..., rows, None]
        bits = numbered(states, torch.arange(first, last, device=states.device)).view(torch.int16)
        bits = bits[..., columns.start - first * LANES : columns.stop - first * LANES]
        return bits < _parts(self.p) - PARTS // 2

    def __call__(self, x: Tensor, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """Drop out of `x`, which stands at `rows` and `columns` of the whole tensor.  (.., t, n)

        Holds  a byte per element for the backward
        """
        dropped = self.dropped(rows, columns or slice(0, x.shape[-1]))
        return (x * (PARTS / (PARTS - _parts(self.p)))).masked_fill(dropped, 0)


def _parts(p: float) -> int:
    return min(round(p * PARTS), PARTS - 1)


class Dropping(nn.Module):
    """A model's dropout: says for one forward what is dropped.

    stream, weights  the probabilities: in the stream, and among the weights of attention
    seed             of all that is drawn
    cells, heads     are given what every rank knows, and return what of it concerns this one: all, unless tensor
                     parallelism cuts it there
    """

    def __init__(self, *, stream: float, weights: float, num_heads: int, seed: int) -> None:
        super().__init__()
        self.stream, self.weights, self.num_heads, self.seed = stream, weights, num_heads, seed
        self.cells, self.heads = nn.Identity(), nn.Identity()

    @property
    def is_on(self) -> bool:
        """Whether anything is ever dropped."""
        return self.stream > 0 or self.weights > 0

    def forward(self, cells: Tensor | None, step: int | None) -> tuple[Dropout | None, Dropout | None]:
        """Return what a step drops of the stream, and of attention's weights; None where nothing is dropped.

        cells   as `cells_of`, of the tokens here, (B, T); on every rank of tensor parallelism the same
        step    None: it is not training, and nothing is dropped
        Raises  UserError if there is dropout to draw, and no cells
        """
        if step is None or not self.is_on:
            return None, None
        if cells is None:
            what = "dropout is drawn by a token's row in the step and its column, and no cells are given"
            raise UserError(what, fix="cells=cells_of(range(B), T), and in place of range(B) the rows that these are")
        key = seed_of(self.seed, step)
        stream = weights = None
        if self.stream:
            stream = Dropout(self.stream, numbered(key, self.cells(cells)))
        if self.weights:
            heads = self.heads(torch.arange(self.num_heads, device=cells.device))
            weights = Dropout(self.weights, numbered(numbered(key, cells)[:, None], heads[:, None]))  # (B, H, T)
        return stream, weights


def cells_of(rows: Sequence[int], num_tokens: int) -> Tensor:
    """Return the cell of each token: row in the step's global batch x T + column.  (rows, T) int64"""
    return torch.tensor(rows, dtype=torch.int64)[:, None] * num_tokens + torch.arange(num_tokens)


def drops_out(module: nn.Module) -> bool:
    """Return whether a model needs to know of its tokens' cells, and of the step, when it trains."""
    return any(isinstance(one, Dropping) and one.is_on for one in module.modules())
