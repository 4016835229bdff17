"""Teach a model by small matrices beside its large ones, which stay as they are (LoRA).

    y = W x + (alpha / r) B A dropout(x)          W (O, I), frozen; A (r, I), drawn; B (O, r), zeros at first

A and B together have r (O + I) numbers in place of O I: only they have gradients, masters and moments. An `Adapter`
holds them as two ordinary Linears; a `LoRALinear` holds a Linear's own weight, under its own name, with an adapter
beside it. Afterwards B A is added to W (`merge.py`), and the model is a plain one again.

What adapters drop of their inputs is drawn as the model's own dropout is: by where a token stands in the step
(`dropout.py`), which the layers of a GPT are told, and hand on.

LoRA, Hu et al. 2021, section 4.1.  https://arxiv.org/abs/2106.09685
Letters: I and O, the features that go into a Linear and come out; r the rank of what is added.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from minispeed.errors import UserError, nearest
from minispeed.model.dropout import Dropout, Dropping, number_of, numbered
from minispeed.model.gpt import GPT
from minispeed.model.init import seed_of
from minispeed.optim import decay_groups

A, B = "lora.a.weight", "lora.b.weight"  # what an adapter's parameters are called after the Linear's name
Trained = Literal["lora", "all"]


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which Linears are given an adapter, and what kind.

    rank      r
    alpha     what is added is multiplied by alpha / r
    targets   patterns of the ends of names: "attention.qkv", or "mlp.*" for all Linears of every MLP
    dropout   share of an adapter's input that is dropped in training
    train     "lora": the adapters alone; "all": what was trained before, too
    lr        the adapters' own learning rate; None: that of the run
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention.*", "mlp.*")
    dropout: float = 0.0
    train: Trained = "lora"
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA's rank is {self.rank}", fix="rank=8, or any from 1 on")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"LoRA's alpha is {self.alpha}", fix="alpha=16.0, or any above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA's dropout is {self.dropout}", fix="0.0 or more, and below 1")
        if isinstance(self.targets, str) or not self.targets:
            raise UserError(f"LoRA's targets are {self.targets!r}", fix='a tuple of patterns: ("attention.*", "mlp.*")')
        if self.train not in get_args(Trained):
            raise UserError(f"LoRA is to train {self.train!r}", fix=" or ".join(get_args(Trained)))
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"LoRA's lr is {self.lr}", fix="a rate above 0, or None for that of the run")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


class Adapter(nn.Module):
    """(alpha / r) B A dropout(x).  (.., I) -> (.., O)

    features  is given the numbers of all input features, and returns those of the features that are here: all, unless
              tensor parallelism cuts them
    """

    def __init__(self, a: Tensor, b: Tensor, lora: LoRA, *, place: str) -> None:
        """Hold A (r, I) and B (O, r).

        place  what the dropout is drawn by beside the token: the name of the Linear in its layer
        """
        super().__init__()
        self.scale, self.p, self.place, self.num_features = lora.scale, lora.dropout, number_of(place), a.shape[1]
        self.a: nn.Module = _linear(a)
        self.b: nn.Module = _linear(b)
        self.features = nn.Identity()
        self.drawn: Dropout | None = None  # for the forward of the layer that is under way
        self.hook: Any = None  # on that layer

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self._drop(x)) * self.scale)

    def _drop(self, x: Tensor) -> Tensor:
        if self.drawn is None:
            return x
        mine = self.features(torch.arange(self.num_features))
        return self.drawn(x, columns=slice(int(mine[0]), int(mine[-1]) + 1))

    def listen(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Learn, before a layer of a GPT runs, or runs again in the backward, what is dropped of its tokens."""
        _, rows = args
        drops = rows.dropout
        self.drawn = replace(drops.adapters.at(self.place), p=self.p) if isinstance(drops, WithAdapters) else None


class LoRALinear(nn.Linear):
    """A Linear with an adapter beside it; its weight and bias are the ones it was made of."""

    def __init__(self, base: nn.Linear, adapter: Adapter) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.training = base.in_features, base.out_features, base.training
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.lora = adapter

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora(x)


@dataclass(frozen=True, eq=False)
class WithAdapters(Dropout):
    """The stream's dropout, which may drop nothing, and that of what adapters read: of whole rows, (B, T)."""

    adapters: Dropout

    def at(self, place: int) -> "WithAdapters":
        """Return both for the same tokens, elsewhere."""
        return replace(self, states=super().at(place).states, adapters=self.adapters.at(place))

    def __call__(self, x: Tensor, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """Drop out of the stream."""
        return super().__call__(x, rows, columns) if self.p else x


class AdapterDropping(Dropping):
    """A GPT's dropout, that of its adapters among it.

    adapter_seed  of what adapters drop
    """

    def __init__(self, own: Dropping, *, seed: int) -> None:
        super().__init__(stream=own.stream, weights=own.weights, num_heads=own.num_heads, seed=own.seed)
        self.adapter_seed = seed

    def plain(self) -> Dropping:
        """Return the GPT's own, without adapters."""
        return Dropping(stream=self.stream, weights=self.weights, num_heads=self.num_heads, seed=self.seed)

    @property
    def is_on(self) -> bool:
        """Whether anything is ever dropped: of adapters, always."""
        return True

    def forward(self, cells: Tensor | None, step: int | None) -> tuple[Dropout | None, Dropout | None]:
        """Return what a step drops of the stream, with what it drops of adapters, and of attention's weights."""
        stream, weights = super().forward(cells, step)
        if step is None or cells is None:
            return None, None
        adapters = Dropout(0.0, numbered(seed_of(self.adapter_seed, step), cells))
        own = stream or adapters
        return WithAdapters(self.stream, own.states, adapters), weights


def add_lora(model: nn.Module, lora: LoRA, *, seed: int) -> list[str]:
    """Give every Linear that a target names an adapter, and say what is trained.

    seed     of each A, drawn by its name, and of what is dropped
    Writes   the model: its Linears are replaced, their parameters stay the same objects; of `train` "lora", all but the
             adapters is frozen
    Returns  the names of the parameters that are trained
    Raises   UserError if a target matches nothing or what is no plain Linear, the model has adapters, or it has no
             layers that know what is to be dropped
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UserError(f"this {type(model).__name__} has adapters already", fix="merge(model) before")
    if lora.dropout and not isinstance(model, GPT):
        what = (
            f"LoRA's dropout is drawn by where in a step a token stands, and no {type(model).__name__} tells its layers"
        )
        raise UserError(what, fix="dropout=0.0, or a minispeed GPT")
    found = _targets(model, lora.targets)
    if lora.train == "lora":
        model.requires_grad_(False)
    made: dict[nn.Module, LoRALinear] = {}  # by the Linear, which may have several names
    for name, leaf in found.items():
        if leaf not in made:
            made[leaf] = LoRALinear(leaf, _adapter(name, leaf, lora, seed))
        model.set_submodule(name, made[leaf])
    if lora.dropout and isinstance(model, GPT):
        model.dropping = AdapterDropping(model.dropping, seed=seed)
        for layer in model.blocks:
            for leaf in adapted(layer).values():
                leaf.lora.hook = layer.register_forward_pre_hook(leaf.lora.listen)
    return [name for name, p in model.named_parameters() if p.requires_grad]


def lora_groups(model: nn.Module, lora: LoRA, weight_decay: float, *, lr: float) -> list[dict[str, Any]]:
    """Split the trainable parameters in groups, as `decay_groups`; adapters with a rate of their own are one more.

    lr       of the run, which the schedule is of
    Returns  groups of {"names", "weight_decay"}; the adapters' with "lr_factor", what their rate is to the run's
    """
    adapters = adapter_names(model)
    if lora.lr is None:
        return decay_groups(model, weight_decay)
    groups = [
        {**group, "names": [name for name in group["names"] if name not in adapters]}
        for group in decay_groups(model, weight_decay)
    ]
    own = {"names": adapters, "weight_decay": weight_decay, "lr_factor": lora.lr / lr}
    return [group for group in (*groups, own) if group["names"]]


def adapted(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, LoRALinear]:
    """Return the Linears that have adapters, by name; without `remove_duplicate` under each of their names."""
    named = model.named_modules(remove_duplicate=remove_duplicate)
    return {name: module for name, module in named if isinstance(module, LoRALinear)}


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters of all adapters of a model that is whole."""
    return [f"{name}.{own}" for name in adapted(model) for own in (A, B)]


def _targets(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Return the Linears to be adapted, under each of their names, whichever of them a target names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    leaves = {name: leaf for name, leaf in modules.items() if isinstance(leaf, (nn.Linear, nn.Embedding))}
    chosen: set[nn.Module] = set()
    for target in targets:
        names = [name for name in leaves if _ends(name, target)]
        if not names:
            plain = sorted({_without_number(name) for name, leaf in leaves.items() if type(leaf) is nn.Linear})
            fix = nearest(target, plain) or ", ".join(plain) or "a model with nn.Linear in it"
            raise UserError(f"LoRA's target {target!r} matches no Linear of this {type(model).__name__}", fix=fix)
        for name in names:
            _check_leaf(name, leaves[name], modules)
        chosen |= {leaves[name] for name in names}
    return {name: leaf for name, leaf in leaves.items() if isinstance(leaf, nn.Linear) and leaf in chosen}


def _check_leaf(name: str, leaf: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Raise UserError if what is added to a leaf's output would not be all that becomes of its weight."""
    if type(leaf) is not nn.Linear:
        what = f"LoRA's targets name {name}, of type {type(leaf).__name__}, and adapters are for plain nn.Linear"
        raise UserError(what, fix='targets within the layers: ("attention.*", "mlp.*")')
    for other, module in modules.items():
        if module is not leaf and any(p is leaf.weight for p in module.parameters(recurse=False)):
            what = f"{name} and {other} are one weight, and an adapter changes one use of it"
            raise UserError(what, fix=f"targets without {name}, or two weights")


def _ends(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) >= len(patterns) and all(map(fnmatchcase, parts[-len(patterns) :], patterns))


def _without_number(name: str) -> str:
    """Return the end of a name that it has in common with others: "blocks.3.mlp.up" -> "mlp.up"."""
    *_, last = [-1, *(index for index, part in enumerate(name.split(".")) if part.isdecimal())]
    return ".".join(name.split(".")[last + 1 :])


def _adapter(name: str, leaf: nn.Linear, lora: LoRA, seed: int) -> Adapter:
    """Draw A between -1/sqrt(I) and 1/sqrt(I), as torch draws a Linear's weight, by its name; B is zero."""
    generator = torch.Generator().manual_seed(seed_of(seed, f"{name}.{A}"))
    drawn = torch.rand((lora.rank, leaf.in_features), generator=generator, dtype=torch.float32)
    a = (drawn * 2 - 1) / math.sqrt(leaf.in_features)
    b = torch.zeros(leaf.out_features, lora.rank)
    device, dtype = leaf.weight.device, leaf.weight.dtype
    return Adapter(a.to(device, dtype), b.to(device, dtype), lora, place=f"{_without_number(name)}.lora")


def _linear(weight: Tensor) -> nn.Linear:
    out_features, in_features = weight.shape
    made = nn.Linear(in_features, out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made
