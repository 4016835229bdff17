"""Cut an ordinary module over the ranks of a group, by a plan of names.

The leaves that the plan names are replaced by layers that hold slices of the same weights: so a cut model is by
construction a cut of the whole one, and the forward of everything else stays as it was written. What makes that
possible is code that takes sizes from tensors: `view(B, T, -1, K)` finds the heads that are here.

Everything is checked before anything is changed.

Megatron-LM, Shoeybi et al. 2019, section 3.  https://arxiv.org/abs/1909.08053
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minispeed.collective.group import Group
from minispeed.errors import UserError
from minispeed.model.lora import LoRALinear
from minispeed.placement import Placement, Shard, cut
from minispeed.tensor.check import check_all_named, check_counts, check_dropout, check_rule, check_ties
from minispeed.tensor.layers import ColumnLinear, RowLinear, SharedLinear, VocabEmbedding, VocabHead
from minispeed.tensor.plan import Column, Enter, Named, Plan, Replica, Row, Shared, Use, is_transposed, match
from minispeed.tensor.stream import Stream


def tensor_parallel(model: nn.Module, plan: Plan, group: Group, *, sequence_parallel: bool = False) -> Placement:
    """Keep this rank's part of a module that every rank of the group has built alike.

    plan               name pattern -> Column, Row, Vocab, Enter or Replica; `gpt_plan(config)` for a GPT
    sequence_parallel  cut what runs between the cut layers by tokens, (B, T/tp, D); the plan names every parameter then
    Writes             the module: leaves are replaced and their parameters cut, all others stay the same objects
    Returns            for every parameter, under each of its names, how slices make up the whole
    Raises             UserError if a pattern matches nothing, a leaf is no Linear or Embedding, tp does not divide
                       heads or features, the plan contradicts itself, or the module drops out at random
    """
    named = match(plan, model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for one in named:
        check_rule(one, named)
    check_counts(named, group.size)
    uses = _uses(named)
    check_ties(parameters, uses)
    check_dropout(model, group.size)
    if sequence_parallel:
        check_all_named(parameters, uses)

    stream = Stream(group, is_cut=sequence_parallel)
    mine = {p: _slice(p, uses.get(name, Use()), group) for name, p in parameters.items()}
    _replace_leaves(model, named, mine, stream)
    _hook_modules(named, stream)
    sums = {"heads": stream.sum_over_heads, "tokens": stream.sum_over_tokens}
    for p, on in {parameters[name]: use.on for name, use in uses.items() if use.on in sums}.items():
        _sum_gradients(p, sums[on])
    return {name: uses.get(name, Use()).place for name in parameters}


def _uses(named: Sequence[Named]) -> dict[str, Use]:
    """Return what becomes of each parameter that the plan reaches."""
    uses: dict[str, Use] = {}
    for name, rule, found in named:
        own = {"": found} if isinstance(found, nn.Parameter) else dict(found.named_parameters(remove_duplicate=False))
        for last, use in rule.uses(found, own).items():
            full = f"{name}.{last}".strip(".")
            if full in uses:
                raise UserError(f"two rules of the plan reach {full}", fix="one of them")
            uses[full] = use
    return uses


def _slice(p: nn.Parameter, use: Use, group: Group) -> nn.Parameter:
    """Return my slice of a parameter, in memory of its own; a whole one as it is."""
    if not isinstance(use.place, Shard):
        return p
    mine = cut(p.detach(), use.place, rank=group.rank, size=group.size)
    return nn.Parameter(mine.clone(memory_format=torch.contiguous_format), requires_grad=p.requires_grad)


def _replace_leaves(
    model: nn.Module, named: Sequence[Named], mine: Mapping[nn.Parameter, nn.Parameter], stream: Stream
) -> None:
    # what is inside a Column, a part of its adapter, has entered with it
    entered = tuple(f"{name}." for name, rule, _ in named if isinstance(rule, (Enter, Column)))
    made: dict[nn.Module, nn.Module] = {}  # by the leaf, which may have several names
    for name, rule, leaf in named:
        if isinstance(leaf, nn.Module) and not isinstance(rule, (Enter, Replica)):
            if leaf not in made:
                own = {last: mine[p] for last, p in leaf.named_parameters()}
                made[leaf] = _cut_leaf(leaf, rule, own, stream, enters=not name.startswith(entered))
            model.set_submodule(name, made[leaf])


def _cut_leaf(leaf: Any, rule: Any, own: Mapping[str, nn.Parameter], stream: Stream, *, enters: bool) -> nn.Module:
    weight, bias = own["weight"], own.get("bias")
    lora = leaf.lora if isinstance(leaf, LoRALinear) else None
    if isinstance(rule, Column):
        return ColumnLinear(stream, weight, bias, enters=enters, transposed=is_transposed(leaf), lora=lora)
    if isinstance(rule, Row):
        return RowLinear(stream, weight, bias, leaves=rule.leaves, transposed=is_transposed(leaf), lora=lora)
    if isinstance(rule, Shared):
        return SharedLinear(stream, weight)
    if isinstance(leaf, nn.Embedding):
        return VocabEmbedding(stream, weight, vocab_size=leaf.num_embeddings)
    return VocabHead(stream, weight, bias, vocab_size=leaf.out_features)


def _hook_modules(named: Sequence[Named], stream: Stream) -> None:
    """Let the stream into and out of the modules that stay themselves."""
    for module, rule in {found: rule for _, rule, found in named if isinstance(found, nn.Module)}.items():
        if isinstance(rule, Enter):
            module.register_forward_pre_hook(partial(_change_first, stream.enter, rule.keyword), with_kwargs=True)
            for size in rule.sizes:
                setattr(module, size, getattr(module, size) // stream.group.size)
        elif isinstance(rule, Replica) and rule.takes != "stream":
            mine = {"whole": stream.mine, "heads": stream.my_heads}[rule.takes]
            module.register_forward_pre_hook(partial(_change_first, mine, ""), with_kwargs=True)
        if isinstance(rule, Replica) and rule.gives == "whole":
            module.register_forward_hook(lambda module, args, out: stream.whole(out))


def _change_first(
    change: Callable[[Tensor], Tensor],
    keyword: str,
    module: nn.Module,
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not args and keyword in named:
        return args, {**named, keyword: change(named[keyword])}
    if not args:
        what = f"{type(module).__name__} is called with keywords alone, and which of them enters from the stream"
        raise UserError(f"{what} is not known", fix="that one as first argument, without its keyword")
    return (change(args[0]), *args[1:]), named


def _sum_gradients(p: nn.Parameter, total: Callable[[Tensor], Tensor]) -> None:
    """Sum a parameter's gradient over ranks when a backward has it complete: once, however often it was used."""
    is_trained = p.requires_grad
    p.requires_grad_(True)  # torch takes hooks only so, and who is frozen may be trained later
    p.register_hook(total)
    p.requires_grad_(is_trained)
