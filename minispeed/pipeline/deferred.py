"""Put off the gradients of weights, for which no other rank waits, until the rank has nothing better to do.

A backward through y = x W^T + b makes two things: the gradient of x, which the stage before waits for, and those of W
and b, which only the optimizer wants. Inside a `Deferred` every torch.nn.functional.linear whose weight is a trained
nn.Parameter makes the first alone, and queues (W, b, x, gradient of y): so does nn.Linear, and any other layer that
calls it. The gradients of all other parameters (norms, embeddings, a weight used in some other way) are made as always.

Recomputation runs the forward again inside the backward. Both must run inside the `Deferred`, so that a linear that was
put off is put off again. torch hands a backward to the modes it runs in and takes them away meanwhile: that is undone.

Qi et al. 2024, Zero bubble pipeline parallelism, section 1. https://arxiv.org/abs/2401.10241
torch's extension by `__torch_function__`: https://docs.pytorch.org/docs/stable/notes/extending.html
Letters: I and O, the features that go into a linear and come out.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class Put(NamedTuple):
    """What the gradients of one linear are made of."""

    weight: nn.Parameter  # (O, I)
    bias: nn.Parameter | None  # (O,)
    x: Tensor  # (.., I)
    grad_y: Tensor  # (.., O)


class Deferred(TorchFunctionMode):
    """The gradients of weights that one micro-batch has put off in one stage; a context for its forward and backward.

    num_linears  calls of linear in the forward; of a frozen weight there is no gradient to put off
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_linears = 0
        self._queue: list[Put] = []

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Make the gradients that were put off, one at a time; a parameter comes once for each of its calls."""
        while self._queue:
            weight, bias, x, grad_y = self._queue.pop()
            rows = grad_y.reshape(-1, grad_y.shape[-1])  # (.., O) -> (rows, O)
            yield weight, rows.T @ x.reshape(-1, x.shape[-1])  # (O, rows) @ (rows, I)
            if bias is not None and bias.requires_grad:
                yield bias, rows.sum(0)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is torch.autograd.backward:
            with self:
                return _backward(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self.num_linears += 1
        is_trained = isinstance(weight, nn.Parameter) and weight.requires_grad
        if not is_trained or not (bias is None or isinstance(bias, nn.Parameter)):
            return F.linear(input, weight, bias)
        return _Linear.apply(input, weight, bias, self._queue)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, queue: list[Put]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.queue = weight, bias, queue
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # recomputed, the weight is an alias of the parameter
        ctx.queue.append(Put(ctx.weight, ctx.bias, x.detach(), grad_y))
        return grad_y @ weight if ctx.needs_input_grad[0] else None, None, None, None


def _backward(
    tensors: Tensor | Sequence[Tensor],
    grad_tensors: Sequence[Tensor | None] | Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """Be torch.autograd.backward, in the modes that are on."""
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    given = (grad_tensors,) if isinstance(grad_tensors, Tensor) else grad_tensors or [None] * len(tensors)
    gradients = tuple(torch.ones_like(x) if g is None else g for x, g in zip(tensors, given, strict=True))
    torch.autograd.graph._engine_run_backward(
        tensors,
        gradients,
        bool(retain_graph),
        create_graph,
        tuple(inputs or ()),
        allow_unreachable=True,
        accumulate_grad=True,
    )
