"""Differentiate through collectives: each is half of a pair, and the other half is its backward.

A collective is a linear map from what all ranks put in to what all get out, so its backward is the transpose
of that map: again a collective. Where the ranks hold equal copies that count once, the transpose looks
different from where each holds a value of its own; hence two all-gathers.

    forward                       backward          used by
    copy                          all_reduce        tensor parallelism, into a column-parallel layer
    all_reduce                    copy              tensor parallelism, out of a row-parallel layer
    all_gather, copies=False      reduce_scatter    sequence parallelism: each rank goes on in its own way
    reduce_scatter                all_gather        sequence parallelism, out of a row-parallel layer
    all_gather, copies=True       split             all ranks go on with the same computation
    split                         all_gather        one slice of a value that all ranks hold
    all_to_all                    all_to_all        Ulysses: cut along one dim, joined along another

Every backward is written with the functions of this file, so gradients can be differentiated again.

Megatron-LM, Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2; Jacobs et al. 2023,
section 3. Letters: N ranks of the group.
"""

from typing import Any

import torch
from torch import Tensor

from minispeed.collective.group import Group
from minispeed.placement import Shard, cut


def copy(x: Tensor, group: Group) -> Tensor:
    """Return `x`, the same on every rank; the backward sums the ranks' gradients of it."""
    return _Copy.apply(x, group)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Return the sum of the ranks' `x`; the backward hands on the gradient of the sum, which counts once."""
    return _AllReduce.apply(x, group)


def all_gather(x: Tensor, group: Group, *, dim: int = 0, copies: bool) -> Tensor:
    """Return the ranks' `x` joined along `dim`.  (.., L, ..) -> (.., N L, ..)

    copies  True: every rank computes the same from the result, so its gradient is everywhere the same, and my
            slice of it is mine. False: each rank uses the result in its own way, so the slices are summed
            over the ranks.
    """
    function = _AllGatherCopies if copies else _AllGather
    return function.apply(x, group, dim % x.dim())


def reduce_scatter(x: Tensor, group: Group, *, dim: int = 0) -> Tensor:
    """Return my slice along `dim` of the sum of the ranks' `x`.  (.., N L, ..) -> (.., L, ..)

    Raises  UserError if N does not divide the dim
    """
    return _ReduceScatter.apply(x, group, dim % x.dim())


def split(x: Tensor, group: Group, *, dim: int = 0) -> Tensor:
    """Return my slice along `dim` of `x`, which every rank holds.  (.., N L, ..) -> (.., L, ..)

    Raises  UserError if N does not divide the dim
    """
    return _Split.apply(x, group, dim % x.dim())


def all_to_all(x: Tensor, group: Group, *, cut_dim: int, join_dim: int) -> Tensor:
    """Cut `x` along one dim, send slice r to rank r, and join what came along another dim.

    With cut_dim the heads and join_dim the tokens: (B, T/N, H, K) -> (B, T, H/N, K).

    Raises  UserError if N does not divide the dim that is cut
    """
    return _AllToAll.apply(x, group, cut_dim % x.dim(), join_dim % x.dim())


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce(grad, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        group.all_reduce(total).wait()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return copy(grad, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return reduce_scatter(grad, ctx.group, dim=ctx.dim), None, None


class _AllGatherCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return split(grad, ctx.group, dim=ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        slices = _slices(x, group, dim)  # (N, .., L, ..)
        mine = torch.empty_like(slices[0])
        group.reduce_scatter(mine, slices).wait()
        return mine

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_gather(grad, ctx.group, dim=ctx.dim, copies=False), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _slices(x, group, dim)[group.rank]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_gather(grad, ctx.group, dim=ctx.dim, copies=True), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, cut_dim: int, join_dim: int) -> Tensor:
        ctx.group, ctx.cut_dim, ctx.join_dim = group, cut_dim, join_dim
        slices = _slices(x, group, cut_dim)  # (N, ..)
        came = torch.empty_like(slices)
        group.all_to_all(came, slices).wait()
        return torch.cat(came.unbind(), dim=join_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_to_all(grad, ctx.group, cut_dim=ctx.join_dim, join_dim=ctx.cut_dim), None, None, None


def _gathered(x: Tensor, group: Group, dim: int) -> Tensor:
    parts = x.new_empty(group.size, *x.shape)
    group.all_gather(parts, x.contiguous()).wait()
    return torch.cat(parts.unbind(), dim=dim)


def _slices(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return the N slices along `dim`, one after another in memory.  (.., N L, ..) -> (N, .., L, ..)"""
    place = Shard("group", dim)
    slices = torch.stack([cut(x, place, rank=rank, size=group.size) for rank in range(group.size)])
    return slices.contiguous()  # stack keeps the slices' order in memory, which may be channels last
