"""Find out how a HuggingFace model is cut by width, from the names of its modules.

    "tensor_parallel": {"autotp_size": 4}        in the configuration

A decoder's layer holds modules of two kinds, and each begins with Linears that are cut by their output features and
ends with one that is cut by its input features: attention, by heads, and the MLP. Which is which their names say, and
`KNOWN` is the list of them. What lies outside (norms, embeddings, the head) stays whole on every rank and computes the
same there. Adapters of ours (`add_lora`) are cut with the Linears that they are beside. A matrix or anything else in a
layer that no line of the list places is an error: it would be trained as a whole, and who asked for a cut model would
not get one.

Ranks that share a layer's width must be given the same rows; at the first forward they compare them.

https://www.deepspeed.ai/tutorials/autotp-training/
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minispeed.collective.group import Group
from minispeed.collective.numbers import everyones
from minispeed.errors import UserError
from minispeed.model.gpt import GPT
from minispeed.model.lora import adapted
from minispeed.tensor.plan import Column, Enter, Plan, Replica, Row, Rule, any_number, gpt_plan
from minispeed.zero.watch import tensors_in


@dataclass(frozen=True)
class Known:
    """A module that can be cut, by the names of the Linears (or Conv1Ds) that are its children.

    models   families that have it
    columns  what begins: cut by output features
    row      what ends: cut by input features
    fused    tensors in the output of one Column
    heads    whether features come in heads, of the module's `head_dim`; norms of one head may then be beside
    """

    models: str
    columns: tuple[str, ...]
    row: str
    fused: int = 1
    heads: bool = False

    def __str__(self) -> str:
        return f"{', '.join(self.columns)} -> {self.row} ({self.models})"


KNOWN = (
    Known("attention of Llama, Mistral, Qwen2, Qwen3", ("q_proj", "k_proj", "v_proj"), "o_proj", heads=True),
    Known("attention of GPT-2", ("c_attn",), "c_proj", fused=3, heads=True),
    Known("MLP of Llama, Mistral, Qwen2, Qwen3", ("gate_proj", "up_proj"), "down_proj"),
    Known("MLP of GPT-2", ("c_fc",), "c_proj"),
)
HEAD_NORMS = ("q_norm", "k_norm")
SIZES = ("num_heads", "num_key_value_heads", "split_size")  # attributes of attention that a forward may read


def plan_for(model: nn.Module) -> Plan:
    """Return the plan of names by which tensor parallelism cuts a model.

    Raises  UserError that names what in a layer has no place, or if there are no layers
    """
    if isinstance(model, GPT):
        return gpt_plan(model.config)
    rules: dict[str, Rule] = {}
    for name, module in model.named_modules():
        rules |= _rules_of(name, module)
    _check_all_placed(model, rules)
    return _by_pattern(rules)


def _rules_of(name: str, module: nn.Module) -> dict[str, Rule]:
    """Return the rules of a module and its children; none if no line of the list is of their names."""
    own = {child for child, of in module.named_children() if any(True for _ in of.parameters())}
    for known in KNOWN:
        leaves = {*known.columns, known.row}
        if not leaves <= own <= (leaves | {*HEAD_NORMS} if known.heads else leaves):
            continue
        size = getattr(module, "head_dim", None) if known.heads else 1
        norms = own & {*HEAD_NORMS}
        if size is None or any(p.numel() != size for norm in norms for p in module.get_submodule(norm).parameters()):
            continue  # a norm over all heads together needs what other ranks have
        _check_dropout(name, module)
        sizes = tuple(one for one in SIZES if known.heads and isinstance(getattr(module, one, None), int))
        rules: dict[str, Rule] = {name: Enter(keyword="hidden_states", sizes=sizes)}
        rules |= {f"{name}.{child}": Column(chunks=known.fused, head_dim=size) for child in known.columns}
        rules |= {f"{name}.{child}": Replica(on="heads") for child in sorted(norms)}
        return rules | {f"{name}.{known.row}": Row()}
    return {}


def _check_dropout(name: str, module: nn.Module) -> None:
    """Raise UserError if attention drops out without a module of its own, which no other check would see."""
    if p := getattr(module, "attention_dropout", 0.0):
        what = f"{name} drops out with p={p}, and ranks with one seed would drop the same places of different heads"
        raise UserError(what, fix="attention_dropout=0.0 in the model's configuration")


def _check_all_placed(model: nn.Module, rules: Mapping[str, Rule]) -> None:
    """Raise UserError, with the families that are known, if the rules leave out what should be cut."""
    entered = tuple(f"{name}." for name, rule in rules.items() if isinstance(rule, Enter))
    leaves = {name: rule for name, rule in rules.items() if not isinstance(rule, Enter)}
    adapters = {
        f"{name}.lora.{own}" for name in leaves.keys() & adapted(model).keys() for own in leaves[name].adapter()
    }
    placed = leaves.keys() | adapters
    left = [
        name
        for name, p in model.named_parameters()
        if any(part.isdecimal() for part in name.split("."))  # it is in a layer
        and name.rpartition(".")[0] not in placed
        and (p.dim() > 1 or name.startswith(entered))
    ]
    if left or not rules:
        kind = type(model).__name__
        found = f"where {left[0]} is to be cut, one of {len(left)} parameters" if left else "of any layer to cut"
        what = f"the names of this {kind} do not say {found}"
        raise UserError(what, fix=f"a model whose layers are of {'; '.join(map(str, KNOWN))}")


def _by_pattern(rules: Mapping[str, Rule]) -> Plan:
    """Return one pattern in place of the names that are alike in all layers, where their rules are too."""
    alike: dict[str, dict[str, Rule]] = {}
    for name, rule in rules.items():
        alike.setdefault(any_number(name), {})[name] = rule
    return {
        name: rule
        for pattern, of in alike.items()
        for name, rule in ({pattern: next(iter(of.values()))} if len({*of.values()}) == 1 else of).items()
    }


class SameRows:
    """Compare, once, what the ranks that share each layer's width are given to compute on."""

    def __init__(self, module: nn.Module, group: Group) -> None:
        """Wait for the module's first forward."""
        self._group = group
        self._hook = module.register_forward_pre_hook(self._compare, with_kwargs=True)

    def _compare(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._hook.remove()
        digest = hashlib.blake2b(digest_size=7)
        for x in tensors_in((args, named)):
            digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
            digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found = everyones(self._group, [int.from_bytes(digest.digest(), "big")]).flatten().tolist()
        for rank, other in enumerate(found):
            if other != found[0]:
                what = (
                    f"of the {len(found)} ranks that share each layer's width, 0 and {rank} were given different rows"
                )
                raise UserError(
                    what, fix="rows by the number among data-parallel ranks, as of initialize(training_data=)"
                )
