"""Say how a model is cut over tensor-parallel ranks: a table from names to rules.

    {"blocks.*.mlp.up": Column(), "blocks.*.mlp.down": Row(), "blocks.*.mlp_norm": Replica(), ...}

A name is that of a module or a parameter; between two dots, `*` stands for any letters. What the plan does not name
stays whole on every rank, and computes the same there. A rule is data: it says where the elements of each parameter
lie and what tp must divide, and `parallel.py` does it. The GPT's own plan is `gpt_plan`.

Megatron-LM, Shoeybi et al. 2019, section 3.  https://arxiv.org/abs/1909.08053
Letters: D model, F features, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn

from minispeed.errors import UserError, nearest
from minispeed.model.config import GPTConfig
from minispeed.model.lora import LoRALinear
from minispeed.placement import Place, Replicated, Shard

AXIS = "tp"


class Use(NamedTuple):
    """What becomes of a parameter.

    place  where its elements lie
    on     what each rank applies a whole one to: to what is "whole" on every rank, or to its own "heads", or "tokens"
           where the stream is cut; its gradients are then parts, to be summed
    """

    place: Place = Replicated()
    on: Literal["whole", "heads", "tokens"] = "whole"


class Count(NamedTuple):
    """So many of something, which tp must divide."""

    number: int
    what: str


def is_transposed(leaf: nn.Module) -> bool:
    """Return whether a leaf is transformers' Conv1D: a Linear whose weight is (D, F)."""
    kind = type(leaf)
    return f"{kind.__module__}.{kind.__qualname__}" == "transformers.pytorch_utils.Conv1D"


def features(leaf: Any) -> tuple[int, int]:
    """Return how many input and output features a Linear has, or a Conv1D."""
    return (leaf.nx, leaf.nf) if is_transposed(leaf) else (leaf.in_features, leaf.out_features)


class Rule:
    """What the plan says of a module, `leaf`, whose parameters by name are `own`."""

    def uses(self, leaf: Any, own: Iterable[str]) -> dict[str, Use]:
        """Return what becomes of each of its parameters."""
        return {}

    def counts(self, leaf: Any) -> list[Count]:
        """Return what tp must divide."""
        return []

    def problem(self, leaf: Any) -> str:
        """Return why it cannot be cut, whatever tp is: "has 10 ..."; "" if it can."""
        return ""

    def adapter(self) -> dict[str, "Rule"]:
        """Return the rules of the parts of an adapter beside it."""
        return {}


@dataclass(frozen=True)
class Shared(Rule):
    """Keep a Linear between cut layers whole: its gradients are parts, which its own backward sums."""

    def uses(self, leaf: nn.Module, own: Iterable[str]) -> dict[str, Use]:
        """Keep it whole."""
        return dict.fromkeys(own, Use())


@dataclass(frozen=True)
class Column(Rule):
    """Cut a Linear, or a Conv1D, by its output features.

    chunks    how many tensors of one width are fused in its output, or their widths; each is cut for itself
    head_dim  features of a head, for no head is cut
    """

    chunks: int | tuple[int, ...] = 1
    head_dim: int = 1

    def widths(self, leaf: nn.Module) -> tuple[int, ...]:
        """Return the width of each chunk."""
        if not isinstance(self.chunks, int):
            return self.chunks
        return (features(leaf)[1] // self.chunks,) * self.chunks

    def uses(self, leaf: nn.Module, own: Iterable[str]) -> dict[str, Use]:
        """Cut weight and bias alike."""
        dims = {"weight": 1 if is_transposed(leaf) else 0, "bias": 0}
        return {name: Use(Shard(AXIS, dims[name], self.widths(leaf))) for name in own if name in dims}

    def adapter(self) -> dict[str, Rule]:
        """Cut B as the Linear is."""
        return {"a": Shared(), "b": self}

    def counts(self, leaf: nn.Module) -> list[Count]:
        """Return the heads, or features, of each chunk."""
        what = "output features" if self.head_dim == 1 else f"heads of {self.head_dim} features"
        return [Count(width // self.head_dim, what) for width in self.widths(leaf)]

    def problem(self, leaf: nn.Module) -> str:
        """Compare the widths with the leaf's."""
        widths, whole = self.widths(leaf), features(leaf)[1]
        if sum(widths) == whole and not any(width % self.head_dim for width in widths):
            return ""
        return f"has {whole} output features, not chunks {self.chunks} of heads of {self.head_dim}"


@dataclass(frozen=True)
class Row(Rule):
    """Cut a Linear, or a Conv1D, by its input features, which a Column made.

    Its bias is whole.

    leaves  whether its output goes to the stream, or is a term of what a Row around it sums
    """

    leaves: bool = True

    def uses(self, leaf: nn.Module, own: Iterable[str]) -> dict[str, Use]:
        """Cut the weight; the bias is applied to the stream."""
        uses = {"weight": Use(Shard(AXIS, 0 if is_transposed(leaf) else 1)), "bias": Use(on="tokens")}
        return {name: uses[name] for name in own if name in uses}

    def adapter(self) -> dict[str, Rule]:
        """Cut A as the Linear is, and let the adapter know which features are here."""
        return {"a": Row(leaves=False), "b": Shared(), "features": Replica(takes="heads")}

    def counts(self, leaf: nn.Module) -> list[Count]:
        """Return the input features."""
        return [Count(features(leaf)[0], "input features")]


@dataclass(frozen=True)
class Vocab(Rule):
    """Cut an Embedding, or the Linear that is the head, by the vocabulary, which tp need not divide.

    The embedding's output goes to the stream; the head reads features that every rank holds whole.
    """

    def uses(self, leaf: nn.Embedding | nn.Linear, own: Iterable[str]) -> dict[str, Use]:
        """Cut weight and bias alike, the last slices padded."""
        return dict.fromkeys(own, Use(Shard(AXIS, 0, (leaf.weight.shape[0],), padded=True)))

    def problem(self, leaf: nn.Embedding | nn.Linear) -> str:
        """Name a setting of an embedding that its slices would not have."""
        settings = ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")
        found = {name: getattr(leaf, name, None) for name in settings}
        return ", ".join(
            f"has {name}={value}" for name, value in found.items() if value is not None and value is not False
        )


@dataclass(frozen=True)
class Enter(Rule):
    """Let a module's first argument enter from the stream once, for all the Columns inside it.

    Without it each Column speaks for itself, and a gated MLP sends twice as much. Everything that the module does with
    that argument must pass through its Columns: no residual connection inside.

    keyword  the argument's name, for a module that is called with keywords alone
    sizes    the module's attributes that count heads or features of all ranks: they become this rank's
    """

    keyword: str = ""
    sizes: tuple[str, ...] = ()

    def counts(self, leaf: nn.Module) -> list[Count]:
        """Return the sizes."""
        return [Count(getattr(leaf, name), name) for name in self.sizes]


@dataclass(frozen=True)
class Replica(Rule):
    """Keep the parameters of a module, or one parameter, whole on every rank; sum gradients where they are parts.

    on     what each rank applies it to: its own "tokens", where the stream is cut, or, between cut layers, its own
           "heads"; or, before the stream and after it, what is "whole" on every rank
    takes  what its first argument is: a piece of the "stream", or on every rank the same, of the "whole" rows (the
           positions of tokens), of which it is to have its tokens', or of all "heads", of which its own
    gives  what its result is to be (the norm before the head gives "whole")
    """

    on: Literal["tokens", "heads", "whole"] = "tokens"
    takes: Literal["stream", "whole", "heads"] = "stream"
    gives: Literal["stream", "whole"] = "stream"

    def uses(self, leaf: Any, own: Iterable[str]) -> dict[str, Use]:
        """Keep all whole."""
        return dict.fromkeys(own, Use(on=self.on))


Plan: TypeAlias = Mapping[str, Rule]


class Named(NamedTuple):
    """A module or parameter of a model, and the plan's rule for it."""

    name: str
    rule: Rule
    found: nn.Module | nn.Parameter


def gpt_plan(config: GPTConfig) -> dict[str, Rule]:
    """Return the plan of a GPT: attention by heads, the MLP by hidden features, both ends by the vocabulary."""
    K = config.head_dim
    qkv = (config.num_heads * K, config.num_kv_heads * K, config.num_kv_heads * K)
    plan: dict[str, Rule] = {
        "embed.tokens": Vocab(),
        "blocks.*.*_norm": Replica(),
        "blocks.*.attention.qkv": Column(chunks=qkv, head_dim=K),
        "blocks.*.attention.out": Row(),
        "blocks.*.mlp": Enter(),
        "blocks.*.mlp.up": Column(),
        "blocks.*.mlp.down": Row(),
        "norm": Replica(gives="whole"),
        "head": Vocab(),
        "dropping.cells": Replica(takes="whole"),
        "dropping.heads": Replica(takes="heads"),
    }
    if config.positions == "learned":
        plan["embed.positions"] = Replica(takes="whole")
    if config.mlp == "swiglu":
        plan["blocks.*.mlp.gate"] = Column()
    if config.qk_norm:
        plan["blocks.*.attention.*_norm"] = Replica(on="heads")
    if config.deep != "none":
        plan["deep"] = Replica(takes="whole" if config.deep_tasks > 1 else "stream")  # tasks are of all tokens
    return plan


def match(plan: Plan, model: nn.Module) -> list[Named]:
    """Return what the plan names, in its order: a module with several names appears under each, adapters after theirs.

    Raises  UserError if a pattern matches nothing, or two match one name
    """
    known: dict[str, nn.Module | nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    known |= dict(model.named_modules(remove_duplicate=False))
    by_name: dict[str, str] = {}
    for pattern in plan:
        names = [name for name in known if _fits(name, pattern)]
        if not names:
            alike = nearest(pattern, {any_number(name) for name in known}) or "a name of model.named_modules()"
            raise UserError(f"the plan's {pattern!r} matches nothing in this {type(model).__name__}", fix=alike)
        for name in names:
            if name in by_name:
                what = f"{name} is matched by {by_name[name]!r} and by {pattern!r}"
                raise UserError(what, fix="patterns that match each name once")
            by_name[name] = pattern
    named = [Named(name, plan[pattern], known[name]) for name, pattern in by_name.items()]
    return [one for of in named for one in (of, *_adapters(of))]


def _adapters(of: Named) -> list[Named]:
    """Return the parts of the adapter that a Linear may have."""
    if not isinstance(of.found, LoRALinear):
        return []
    adapter = of.found.lora
    return [
        Named(f"{of.name}.lora.{name}", rule, adapter.get_submodule(name)) for name, rule in of.rule.adapter().items()
    ]


def _fits(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def any_number(name: str) -> str:
    """Return the pattern of a name and of its like in other layers: "layers.3.mlp" -> "layers.*.mlp"."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
