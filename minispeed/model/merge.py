"""Add a model's adapters to the weights that they stand beside, W + (alpha / r) B A, and it is a plain model again.

In the model itself, or among named tensors, out of a checkpoint; and give a model the adapters of another one.

LoRA, Hu et al. 2021, section 4.1: no slower than the model without.  https://arxiv.org/abs/2106.09685
Letters: I and O, the features that go into a Linear and come out; r the rank of what is added.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minispeed.errors import UserError
from minispeed.model.gpt import GPT
from minispeed.model.lora import A, AdapterDropping, B, LoRA, LoRALinear, adapted, adapter_names


def merge(model: nn.Module) -> None:
    """Add (alpha / r) B A to each W and take the adapters away. What is frozen stays so.

    Writes  the weights, in their own dtype; the sum is made in fp32 or wider
    Raises  UserError if there are no adapters
    """
    found = adapted(model, remove_duplicate=False)
    if not found:
        raise UserError(f"this {type(model).__name__} has no adapters to merge", fix="add_lora(model, lora, seed=0)")
    plain: dict[LoRALinear, nn.Linear] = {}
    for name, leaf in found.items():
        if leaf not in plain:
            plain[leaf] = _merge_leaf(leaf)
        model.set_submodule(name, plain[leaf])
    if isinstance(model, GPT) and isinstance(model.dropping, AdapterDropping):
        model.dropping = model.dropping.plain()


def merged(weights: Mapping[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """Return a model's named tensors with its adapters' added to what they stood beside, as `merge` does.

    Raises  UserError if there are no adapters, or half of one
    """
    bases = [name.removesuffix(A) for name in weights if name.endswith(f".{A}")]
    if not bases:
        raise UserError(f"none of the {len(weights)} tensors is an adapter's", fix=f"names that end in {A} and {B}")
    plain = {name: tensor for name, tensor in weights.items() if not name.endswith((f".{A}", f".{B}"))}
    for base in bases:
        if missing := [name for name in (f"{base}weight", f"{base}{B}") if name not in weights]:
            raise UserError(f"{base}{A} is there without {missing[0]}", fix="all tensors of the model")
        plain[f"{base}weight"] = _sum(plain[f"{base}weight"], weights[f"{base}{A}"], weights[f"{base}{B}"], lora.scale)
    return plain


@torch.no_grad()
def put_adapters(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model's adapters other values, and what was trained whole beside them.

    weights  by name: of all adapters, and of other parameters as they come
    Raises   UserError that names what is missing, unknown, of another shape, or one parameter here and two there
    """
    names, held = adapter_names(model), dict(model.named_parameters(remove_duplicate=False))
    for name in sorted({*names, *weights}):
        here = tuple(held[name].shape) if name in held else None
        given = tuple(weights[name].shape) if name in weights else None
        if here != given:
            what = f"{name} is {given or 'not there'} among the adapters, and {here or 'not there'} in the model"
            raise UserError(what, fix="the LoRA settings that the adapters were trained with")
        same = next(other for other in sorted(weights) if held[other] is held[name])
        if not torch.equal(weights[same], weights[name]):
            raise UserError(f"{same} and {name} are one parameter here, and differ in the files", fix="tied=False")
    for name, x in weights.items():
        held[name].copy_(x)


@torch.no_grad()
def _merge_leaf(leaf: LoRALinear) -> nn.Linear:
    adapter = leaf.lora
    a, b = adapter.get_parameter("a.weight"), adapter.get_parameter("b.weight")
    leaf.weight.copy_(_sum(leaf.weight, a, b, adapter.scale))
    if adapter.hook is not None:
        adapter.hook.remove()
    plain = nn.Linear(leaf.in_features, leaf.out_features, bias=False, device="meta")
    plain.weight, plain.bias, plain.training = leaf.weight, leaf.bias, leaf.training
    return plain


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return W + scale B A in W's dtype, made in fp32 or wider.  (O, I), (r, I), (O, r)"""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(weight.dtype)
