"""Be one stage of a pipeline: run a part of the model forward and backward, one micro-batch at a time.

A stage is a function from the bundle that comes in to the bundle that goes out; what it computes is its own affair.
Autograd stops at its ends: what comes in is cut off from whoever made it and collects its gradient, which is the
bundle that goes back. How gradients are made and where they go is a `Backward`: plain autograd into p.grad, or
somebody's who shards parameters, which the pipeline need not know.

Huang et al. 2019, GPipe, section 2.3. https://arxiv.org/abs/1811.06965
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from minispeed.errors import UserError
from minispeed.pipeline.bundle import Bundle, differentiable
from minispeed.pipeline.deferred import Deferred


class Backward(Protocol):
    """How a stage's gradients are made: one method for each kind of action."""

    def whole(self, tensors: Bundle, gradients: Bundle, micro: int) -> None:
        """B: add to the .grad of the stage's inputs and of its parameters, given the gradients of `tensors`."""

    def inputs(self, tensors: Bundle, gradients: Bundle, micro: int) -> None:
        """BI: the same, without the weights that are put off. Must call torch.autograd.backward, as `Deferred` says."""

    def weights(self, gradients: Iterable[tuple[nn.Parameter, Tensor]], micro: int) -> None:
        """BW: add the gradients that were put off; each is made when it is asked for, a parameter may come twice."""

    def reduce(self, micro: int) -> None:
        """REDUCE: the weight gradients of this micro-batch, and of those before it, are there."""


class Autograd:
    """Gradients as torch makes them, into p.grad."""

    def whole(self, tensors: Bundle, gradients: Bundle, micro: int) -> None:
        """Call torch.autograd.backward."""
        torch.autograd.backward(tensors, gradients)

    def inputs(self, tensors: Bundle, gradients: Bundle, micro: int) -> None:
        """Call torch.autograd.backward."""
        torch.autograd.backward(tensors, gradients)

    def weights(self, gradients: Iterable[tuple[nn.Parameter, Tensor]], micro: int) -> None:
        """Add each gradient to p.grad."""
        for parameter, gradient in gradients:
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient

    def reduce(self, micro: int) -> None:
        """Do nothing."""


@dataclass(frozen=True, eq=False)
class Made:
    """What a stage made of one micro-batch: `bundle` can travel, the rest serves the stage's next action."""

    bundle: Bundle
    inputs: Bundle = ()
    deferred: Deferred | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """A part of the model.

    run       (inputs, micro) -> outputs, tuples of tensors: the first stage is given () and finds its micro-batch by
              its number; the last returns its losses, or whatever `loss` wants
    loss      of the last stage: (outputs, micro) -> the number to differentiate, ()
    backward  how gradients are made
    """

    run: Callable[[Bundle, int], Bundle]
    loss: Callable[[Bundle, int], Tensor] | None = None
    backward: Backward = Autograd()

    def forward(self, inputs: Bundle, micro: int, *, is_split: bool) -> Made:
        """Run a micro-batch forward.

        is_split  whether the backward will be two halves
        Returns   the outputs, with their graph
        Raises    UserError if the outputs are no tuple of tensors, or if the backward cannot be split: no linear ran
        """
        leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)
        deferred = Deferred() if is_split else None
        with deferred or nullcontext():
            outputs = self.run(leaves, micro)
        if not isinstance(outputs, tuple) or not all(isinstance(x, Tensor) for x in outputs):
            raise UserError(f"a stage's run returned a {type(outputs).__name__}", fix="a tuple of tensors")
        if deferred and not deferred.num_linears and differentiable(outputs):
            what = "a backward in two halves of a stage without torch.nn.functional.linear"
            raise UserError(what, fix="nn.Linear in every stage, or a schedule that does not split the backward: 1f1b")
        return Made(outputs, leaves, deferred)

    def give_back(self, made: Made, gradients: Bundle | None, micro: int) -> Made:
        """Run a micro-batch backward, or the input half where that is split.

        gradients  of those outputs that require one; None: differentiate `loss`
        Returns    the gradients of those inputs that require one; zeros for what was not used
        """
        tensors = differentiable(made.bundle)
        if gradients is None:
            assert self.loss is not None
            tensors = (self.loss(made.bundle, micro),)
            gradients = (torch.ones_like(tensors[0]),)
        if tensors:  # else nothing in this stage or before it is trained
            with made.deferred or nullcontext():
                (self.backward.inputs if made.deferred else self.backward.whole)(tensors, gradients, micro)
        given = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in differentiable(made.inputs))
        return Made(given, deferred=made.deferred)

    def add_weights(self, made: Made, micro: int) -> None:
        """Run the weight half of a backward, given what its input half returned."""
        assert made.deferred is not None
        with torch.no_grad():
            self.backward.weights(made.deferred.gradients(), micro)
