"""Name every parameter of a GPT with its shape, and say how tensor parallelism cuts it, without building the model.

What a rank holds, sends and computes follows from these alone; that they are the model's own, a test holds.

Letters: D model, H heads, G key/value heads, K head dim, F hidden, V vocabulary, L blocks, E learned entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

from minispeed.model.config import GPTConfig

LORA_TARGETS = ("attention.*", "mlp.*")
Cut = Literal["whole", "even", "padded"]


@dataclass(frozen=True)
class Shape:
    """A parameter of the whole model.

    cut     how tp's ranks share it: each has it whole, an even slice of dim `dim`, or one of a padded dim
    trains  whether it has a gradient
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut = "whole"
    dim: int = 0
    trains: bool = True

    @property
    def size(self) -> int:
        """Elements of the whole."""
        return prod(self.shape)

    def local_size(self, tp: int) -> int:
        """Return the elements on each of tp ranks, padding included."""
        if self.cut == "whole":
            return self.size
        return self.size // self.shape[self.dim] * -(-self.shape[self.dim] // tp)


def parameters(config: GPTConfig, *, lora_rank: int = 0, lora_targets: Sequence[str] = ()) -> list[Shape]:
    """Return every parameter, in the model's order; a tied head is the embedding's and does not come again.

    lora_rank     of the adapters beside the Linears that `lora_targets` name by the ends of their names, of every layer
                  when empty; then nothing else trains. 0: there are none
    """
    shapes = [*_embedding(config)]
    for index in range(config.num_layers):
        shapes += _block(config, f"blocks.{index}")
    shapes += _norm(config, "norm", config.model_dim)
    if not config.tied:
        shapes.append(Shape("head.weight", (config.vocab_size, config.model_dim), "padded"))
    entries = len(config.connections.learned) * config.deep_tasks
    shapes += [Shape("deep.alpha", (entries,))] if entries else []
    return [*_with_adapters(shapes, lora_rank, tuple(lora_targets) or LORA_TARGETS)] if lora_rank else shapes


def layer_of(name: str, num_layers: int) -> int | None:
    """Return which of the L + 2 layers that a pipeline cuts between has a parameter; None: all stages, or the head."""
    first, *rest = name.split(".")
    return {"embed": 0, "norm": num_layers + 1, "blocks": int(rest[0]) + 1 if first == "blocks" else 0}.get(first)


def divisible(config: GPTConfig) -> dict[str, int]:
    """Return what tp must divide, by the words for it."""
    return {"heads": config.num_heads, "key/value heads": config.num_kv_heads, "hidden features": config.hidden_dim}


def _embedding(config: GPTConfig) -> Iterator[Shape]:
    yield Shape("embed.tokens.weight", (config.vocab_size, config.model_dim), "padded")
    if config.positions == "learned":
        yield Shape("embed.positions.weight", (config.max_positions, config.model_dim))


def _block(config: GPTConfig, name: str) -> Iterator[Shape]:
    D, F, K, width = config.model_dim, config.hidden_dim, config.head_dim, config.num_heads * config.head_dim
    yield from _norm(config, f"{name}.attention_norm", D)
    qkv = width + 2 * config.num_kv_heads * K
    yield from _column(f"{name}.attention.qkv", D, qkv, bias=config.qkv_bias)
    yield from _row(f"{name}.attention.out", width, D, bias=config.out_bias)
    if config.qk_norm:
        yield from _norm(config, f"{name}.attention.query_norm", K)
        yield from _norm(config, f"{name}.attention.key_norm", K)
    yield from _norm(config, f"{name}.mlp_norm", D)
    for up in ("gate", "up") if config.mlp == "swiglu" else ("up",):
        yield from _column(f"{name}.mlp.{up}", D, F, bias=config.mlp_bias)
    yield from _row(f"{name}.mlp.down", F, D, bias=config.mlp_bias)


def _norm(config: GPTConfig, name: str, dim: int) -> Iterator[Shape]:
    yield Shape(f"{name}.weight", (dim,))
    if config.norm == "layernorm":
        yield Shape(f"{name}.bias", (dim,))


def _column(name: str, inputs: int, outputs: int, *, bias: bool) -> Iterator[Shape]:
    yield Shape(f"{name}.weight", (outputs, inputs), "even")
    if bias:
        yield Shape(f"{name}.bias", (outputs,), "even")


def _row(name: str, inputs: int, outputs: int, *, bias: bool) -> Iterator[Shape]:
    yield Shape(f"{name}.weight", (outputs, inputs), "even", 1)
    if bias:
        yield Shape(f"{name}.bias", (outputs,))


def _with_adapters(shapes: Sequence[Shape], rank: int, targets: Sequence[str]) -> Iterator[Shape]:
    """Freeze all; after the last parameter of each target come its adapter's A, (r, in), and B, (out, r)."""
    pending: list[Shape] = []
    for index, shape in enumerate(shapes):
        yield replace(shape, trains=False)
        module, _, kind = shape.name.rpartition(".")
        if kind == "weight" and len(shape.shape) == 2 and any(_ends(module, target) for target in targets):
            outputs, inputs = shape.shape
            by_column = shape.cut == "even" and shape.dim == 0
            pending = [
                Shape(f"{module}.lora.a.weight", (rank, inputs), "whole" if by_column else "even", 1),
                Shape(f"{module}.lora.b.weight", (outputs, rank), "even" if by_column else "whole"),
            ]
        following = shapes[index + 1].name if index + 1 < len(shapes) else ""
        if not following.startswith(f"{module}."):
            yield from pending
            pending = []


def _ends(name: str, pattern: str) -> bool:
    """Whether the last parts of a name fit a pattern, part by part."""
    patterns = pattern.split(".")
    return all(map(fnmatchcase, name.split(".")[-len(patterns) :], patterns)) and name.count(".") + 1 >= len(patterns)
