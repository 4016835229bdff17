"""Count what the parts of a GPT do: FLOPs of products, operations, and the elements that element-wise ones move.

FLOPs alone do not tell how long a small model takes: products of 128 x 128 are over before a processor has found the
next, and what lies between the products only moves memory. So four counts, each with a rate of its own
(`profiles.Rates`):

    seconds  =  FLOPs / products  +  FLOPs of attention / its kernel  +  operations x overhead  +  bytes / memory

An operation is one that torch carries out and that touches memory; views are none. An element-wise one reads its inputs
and writes its output. Both are counted off `model/gpt.py`, part by part, for the fused attention; dropout and deep
connections are left out.

Williams, Waterman & Patterson 2009, Roofline: the last of the three. https://doi.org/10.1145/1498765.1498785
Letters: D model, H heads, G key/value heads, K head dim, F hidden, V vocabulary, T tokens of a row, n tokens in all.
"""

from dataclasses import dataclass

from minispeed.model.config import GPTConfig
from minispeed.profiles import Rates

CHUNK = 1024  # tokens whose logits the head holds at once
COUNTS = ("flops", "attention", "operations", "bytes")
WIDE = 4  # bytes of a logit, in whatever dtype the model computes


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is done, by one rank.

    flops       of matrix products, attention's own left out
    attention   FLOPs of attention's own
    operations  products and element-wise ones
    bytes       read and written by element-wise ones
    """

    flops: float = 0
    attention: float = 0
    operations: float = 0
    bytes: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in COUNTS})

    def times(self, count: float) -> "Work":
        """Return the same, so many times."""
        return Work(**{name: count * getattr(self, name) for name in COUNTS})

    def seconds(self, rates: Rates, dtype: str) -> float:
        """Return how long it takes at these rates, with products in this dtype.

        Raises  KeyError for a dtype that the machine has no products in
        """
        products = rates.flops[dtype]
        computing = self.flops / products + self.attention / rates.attention.get(dtype, products)
        return computing + self.operations * rates.overhead + self.bytes / rates.between.get(dtype, rates.bandwidth)


@dataclass(frozen=True, kw_only=True)
class Both:
    """A forward and its backward."""

    forward: Work
    backward: Work

    def __add__(self, other: "Both") -> "Both":
        return Both(forward=self.forward + other.forward, backward=self.backward + other.backward)


def block(
    config: GPTConfig,
    *,
    rows: float,
    tokens: int,
    width: int,
    tp: int = 1,
    sp: int = 1,
    alike: int = 1,
    trains: bool = True,
) -> Both:
    """Return the work of a block on one rank.

    rows, tokens  of a micro-batch: whole rows of T tokens, all of them looked at, as a kernel without tiles does
    width         bytes of an element
    tp            ranks that share heads and hidden features; sp: those that share a row's tokens
    alike         ranks that share the tokens between the parts that tp cuts: tp, or 1 where each has all of them
    trains        whether the weights have gradients; adapters, which are small, are not counted
    """
    n, D = rows * tokens / sp, config.model_dim
    Q, KV, F = (
        size / tp
        for size in (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.hidden_dim)
    )
    linears = [(D, Q + 2 * KV, config.qkv_bias), (Q, D, config.out_bias), (F, D, config.mlp_bias)]
    linears += [(D, F, config.mlp_bias)] * (2 if config.mlp == "swiglu" else 1)
    products = [_product(n, inputs, outputs, width, bias, trains) for inputs, outputs, bias in linears]
    stream = _norm(config, n * D / alike, width) + _norm(config, n * D / alike, width)
    stream += _elementwise(2, 6, 2, 6, n * D / alike * width)  # the two sums of the residual stream
    attention = _attention(n * tokens * Q) + _elementwise(1, 1, 1, 2, (2 * Q + 2 * KV) * n * width)
    attention += _elementwise(0, 0, 1, 2, (Q + 2 * KV) * n * width)  # gradients of q, k and v, side by side again
    if config.positions == "rotary":
        attention += _elementwise(14, 9.5, 16, 10.5, (Q + KV) * n * width) + _elementwise(1, 2, 2, 4, Q * n * width)
    if config.qk_norm:
        attention += _norm(config, n * Q, width) + _norm(config, n * KV, width)
    return sum(products, stream + attention + _between_mlp(config, n, D, F, width))


def embedding(
    config: GPTConfig, *, rows: float, tokens: int, width: int, tp: int = 1, sp: int = 1, trains: bool = True
) -> Both:
    """Return the work of the embedding: a look-up, and a gradient as large as the table."""
    n, D, V = rows * tokens / sp, config.model_dim, config.vocab_size / tp
    learned = config.positions == "learned"
    there = Work(operations=1 + 2 * learned, bytes=(2 + 5 * learned) * n * D * width)
    back = Work(operations=2 + 2 * learned, bytes=((2 + 2 * learned) * n + V) * D * width)
    return Both(forward=there, backward=back if trains else Work())


def head(config: GPTConfig, *, rows: float, tokens: int, width: int, tp: int = 1, sp: int = 1) -> Both:
    """Return the work of the last norm and the loss: logits in chunks, computed again in the backward."""
    n, D, V = rows * tokens / sp, config.model_dim, config.vocab_size / tp
    chunks = max(1, -(-n // CHUNK))
    logits = Both(
        forward=Work(flops=2 * n * D * V, operations=9 + 5 * chunks, bytes=2 * n * V * WIDE),
        backward=Work(flops=6 * n * D * V, operations=7 + 11 * chunks, bytes=(9 * n * V + chunks * V * D) * WIDE),
    )
    return logits + _norm(config, n * D, width)


def optimizer(elements: float, *, width: int, master: int, tensors: int = 1) -> Work:
    """Return the work of a step of AdamW on so many elements, and of what surrounds it.

    width, master  bytes of an element of the parameters and gradients, and of the masters and moments
    tensors        how many they are cut into

    The norm reads the gradients; the kernel reads gradient, master and two moments and writes all but the gradient;
    where masters are apart, gradients are cast before and parameters after.
    """
    casts = 2 * (width + master) * (width != master)
    return Work(operations=tensors * (4 + 2 * (width != master)), bytes=elements * (width + 7 * master + casts))


def _product(n: float, inputs: float, outputs: float, width: int, bias: bool, trains: bool) -> Both:
    """Return the work of a Linear on n tokens; the backward of a bias is a sum over them."""
    flops, sums = 2 * n * inputs * outputs, bias and trains
    return Both(
        forward=Work(flops=flops, operations=1),
        backward=Work(flops=(1 + trains) * flops, operations=1 + trains + sums, bytes=sums * n * outputs * width),
    )


def _attention(pairs: float) -> Both:
    """Return the products of attention, for so many pairs of tokens times features: scores and sums."""
    return Both(forward=Work(attention=4 * pairs), backward=Work(attention=8 * pairs))


def _norm(config: GPTConfig, elements: float, width: int) -> Both:
    if config.norm == "rmsnorm":  # torch's kernel is on GPUs alone; on a CPU it is made of parts
        return _elementwise(6, 7, 14, 24, elements * width)
    return _elementwise(1, 2, 1, 3, elements * width)


def _between_mlp(config: GPTConfig, n: float, D: int, F: float, width: int) -> Both:
    """Return the work between an MLP's products; a gated one has two that lead in, whose gradients are summed."""
    if config.mlp == "swiglu":
        return _elementwise(2, 5, 3, 9, n * F * width) + _elementwise(0, 0, 1, 3, n * D * width)
    return _elementwise(1, 2, 1, 3, n * F * width)


def _elementwise(forward: float, moved: float, backward: float, moved_back: float, size: float) -> Both:
    """Return operations that move `size` bytes so many times over, forward and backward."""
    return Both(
        forward=Work(operations=forward, bytes=moved * size),
        backward=Work(operations=backward, bytes=moved_back * size),
    )
