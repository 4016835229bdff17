"""Say where in a GPT a backward comes, and what it reads there: of a model with adapters, not everywhere.

Before the first adapter nothing has a gradient, so nothing is sent back there, and what is frozen is not needed again.
Without adapters everything trains, and a backward comes everywhere.

Layers are those of `minispeed.model.shapes.layer_of`: 0 the embedding, 1 to L the blocks, L + 1 the norm with the head.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from minispeed.model.config import GPTConfig
from minispeed.model.connections import Connections
from minispeed.model.shapes import Shape, layer_of, parameters


class Passing(NamedTuple):
    """Which of the features in a block have a gradient.

    inputs     what the block reads
    queries    queries, keys and values
    attention  what attention adds to the stream
    stream     what the MLP reads
    outputs    what the MLP adds
    """

    inputs: bool
    queries: bool
    attention: bool
    stream: bool
    outputs: bool

    @property
    def is_any(self) -> bool:
        """Whether a backward comes into the block."""
        return self.outputs


class Parts(NamedTuple):
    """Trained parameters that each rank of tp has whole, and of which it has a part of the gradient: elements of each.

    heads     applied to its own heads
    tokens    applied to its own tokens, where rows are cut by tokens
    adapters  of an adapter, the matrix that is not cut
    """

    heads: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    adapters: tuple[int, ...] = ()


class Gradients(NamedTuple):
    """Where a model's gradients are.

    first    the first layer that has a trained parameter
    passing  by layer; all alike in what is no block
    parts    by layer
    reads    by layer, whether its backward reads what is frozen there
    alpha    elements of deep connections' weights, 0 where they do not train
    """

    first: int
    passing: tuple[Passing, ...]
    parts: tuple[Parts, ...]
    reads: tuple[bool, ...]
    alpha: int


@lru_cache(maxsize=256)
def gradients(model: GPTConfig, lora_rank: int = 0, lora_targets: tuple[str, ...] = ()) -> Gradients:
    """Return where they are."""
    trained = [s for s in parameters(model, lora_rank=lora_rank, lora_targets=lora_targets) if s.trains]
    by_layer: list[list[Shape]] = [[] for _ in range(model.num_layers + 2)]
    for shape in trained:
        layer = layer_of(shape.name, model.num_layers)
        if layer is not None:
            by_layer[layer].append(shape)
    first = next((layer for layer, shapes in enumerate(by_layer) if shapes), model.num_layers + 2)
    linears = [{s.name.split(".")[3] for s in shapes if ".lora." in s.name} for shapes in by_layer]
    passing = tuple(_passing(first < layer, here) for layer, here in enumerate(linears))
    return Gradients(
        first=first,
        passing=passing,
        parts=tuple(map(_parts, by_layer)),
        reads=tuple(p.inputs or bool(here - {"down"}) for p, here in zip(passing, linears)),
        alpha=sum(shape.size for shape in trained if shape.name == "deep.alpha"),
    )


@lru_cache(maxsize=4096)
def crossing(model: GPTConfig, after: int, first: int) -> tuple[bool, ...]:
    """Return, for each tensor that crosses a cut after a layer, whether it has a gradient.

    first  the first layer that trains; where that is not the embedding, alpha does not
    """
    known = _connections(model)
    columns, rows = known.cover(after)
    sums = (
        any((row, j) in known.entries and j not in columns and j >= first for j in range(after + 1)) for row in rows
    )
    return *(column >= first for column in columns), *sums


@lru_cache(maxsize=4096)
def weighs(model: GPTConfig, begin: int, end: int) -> bool:
    """Return whether layers begin .. end - 1 multiply by a learned weight, for themselves or for later ones."""
    known = _connections(model)
    raw = set(known.cover(begin - 1).columns)
    for layer in range(begin, end):
        if any((layer - 1, j) in known.learned for j in raw):
            return True
        raw = {j for j in raw if known.readers[j] > layer - 1} | {layer}
    columns, rows = known.cover(end - 1)
    return any((row, j) in known.learned for row in rows for j in raw - set(columns))


@lru_cache(maxsize=256)
def _connections(model: GPTConfig) -> Connections:
    return model.connections


def _passing(inputs: bool, adapted: set[str]) -> Passing:
    queries = inputs or "qkv" in adapted
    attention = queries or "out" in adapted
    return Passing(inputs, queries, attention, attention, attention or bool(adapted & {"gate", "up", "down"}))


def _parts(trained: Sequence[Shape]) -> Parts:
    whole = [shape for shape in trained if shape.cut == "whole"]
    adapters = [shape for shape in whole if ".lora." in shape.name]
    heads = [shape for shape in whole if ".attention.query_norm." in shape.name or ".attention.key_norm." in shape.name]
    tokens = [shape for shape in whole if shape not in adapters and shape not in heads]
    return Parts(*(tuple(shape.size for shape in of) for of in (heads, tokens, adapters)))
