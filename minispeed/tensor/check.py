"""Refuse a plan that cannot be carried out, with the sizes that disagree, before the model is touched."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from minispeed.errors import UserError
from minispeed.model.lora import LoRALinear
from minispeed.tensor.plan import Column, Enter, Named, Replica, Row, Shared, Use, Vocab, is_transposed

LEAVES: dict[Any, tuple[Any, ...]] = {
    Column: (nn.Linear, LoRALinear),
    Row: (nn.Linear, LoRALinear),
    Shared: (nn.Linear,),
    Vocab: (nn.Embedding, nn.Linear),
}
ANY: tuple[Any, ...] = (nn.Module, nn.Parameter)


def check_rule(one: Named, named: Sequence[Named]) -> None:
    """Raise UserError if a rule is for another kind of module, or cannot cut this one into any number of slices.

    A subclass with a forward of its own is another kind: a slice of its weights would not compute what it does.
    """
    name, rule = one.name, one.rule
    found: Any = one.found
    kinds = LEAVES.get(type(rule), ANY if isinstance(rule, Replica) else ANY[:1])
    if type(rule) in (Column, Row) and is_transposed(found):
        kinds = (type(found),)
    alike = [kind for kind in kinds if isinstance(found, kind)]
    if not alike or (type(rule) in LEAVES and all(type(found).forward is not kind.forward for kind in alike)):
        wanted = " or ".join(kind.__name__ for kind in kinds if kind is not LoRALinear)
        what = f"{name} is of type {type(found).__name__}, and {type(rule).__name__}() is for torch's {wanted}"
        raise UserError(what, fix=f"{wanted} there, or Replica()")
    if rule.problem(found):
        raise UserError(f"{name} {rule.problem(found)}", fix="the widths of what is fused there; a plain Embedding")
    if isinstance(rule, Enter) and not any(o.name.startswith(f"{name}.") for o in named if isinstance(o.rule, Column)):
        raise UserError(f"{name} enters from the stream, and no Column is inside", fix=f"no Enter() for {name}")


def check_counts(named: Sequence[Named], size: int) -> None:
    """Raise UserError, with the sizes that do, if tp does not divide the heads or features of some leaf."""
    counts = [(one.name, count) for one in named for count in one.rule.counts(one.found)]
    common = math.gcd(*(count.number for _, count in counts))
    divisors = [str(tp) for tp in range(1, common + 1) if common % tp == 0]
    for name, count in counts:
        if count.number % size:
            what = f"{name} has {count.number} {count.what}, which tp={size} does not divide"
            raise UserError(what, fix=f"tp={' or '.join(divisors)}")


def check_ties(parameters: Mapping[str, nn.Parameter], uses: Mapping[str, Use]) -> None:
    """Raise UserError if a parameter with several names would become different things under them."""
    first: dict[nn.Parameter, str] = {}
    for name, p in parameters.items():
        other = first.setdefault(p, name)
        if uses.get(name, Use()) != uses.get(other, Use()):
            what = f"{other} and {name} are one parameter, and the plan treats them differently"
            raise UserError(what, fix="the same rule for both")


def check_dropout(model: nn.Module, size: int) -> None:
    """Raise UserError if a module drops out at random: ranks that must hold equal copies would draw differently."""
    for name, module in model.named_modules():
        if size > 1 and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            what = f"{name} drops out with p={module.p}: tp={size} ranks would draw differently, and must stay equal"
            raise UserError(what, fix="p=0, or of a minispeed GPT GPTConfig.dropout, which draws alike on all ranks")


def check_all_named(parameters: Mapping[str, nn.Parameter], uses: Mapping[str, Use]) -> None:
    """Raise UserError if the plan leaves a parameter out: whether its gradient is partial, only the plan can know."""
    for name in parameters:
        if name not in uses:
            what = f"with sequence parallelism each rank computes on its own tokens, and the plan does not name {name}"
            raise UserError(what, fix=f'"{name}": Replica(), or Replica(on="whole") outside the stream')
