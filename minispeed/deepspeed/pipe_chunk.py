"""One stage of a `PipelineModule`: some of its layers, as a module that bundles of tensors go into and come out of.

What travels is a tuple of tensors, and what a layer returns a tensor or a tuple of some. So a tuple goes with one more
tensor, without elements, behind it: then a tuple of one tensor is not taken for the tensor itself.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minispeed.deepspeed.pipe_batches import map_tensors
from minispeed.errors import UserError
from minispeed.pipeline.bundle import Bundle

if TYPE_CHECKING:
    from minispeed.deepspeed.pipe import PipelineModule


class LayerChunk(nn.Module):
    """Layers first .. last - 1 under the names that they have in the whole; the last ones with the loss."""

    def __init__(self, whole: "PipelineModule", first: int, last: int) -> None:
        """Share the modules."""
        super().__init__()
        self.first, self.last = first, last
        self.is_first, self.is_last = first == 0, last == len(whole.layers)
        self.tied_modules = nn.ModuleDict()
        for layer in whole.layers[first:last]:
            if layer.module is not None:
                home, _, name = layer.name.rpartition(".")
                self.get_submodule(home).add_module(name, layer.module)
        self.loss_fn = whole.loss_fn if self.is_last else None
        self._run = partial(whole.run_layers, first, last)

    def forward(self, bundle: Bundle, inputs: Any, labels: Any, with_loss: bool) -> tuple[Any, ...]:
        """Run the layers.

        bundle     what the chunk before returned; the first has `inputs` instead
        labels     for the last chunk's loss, where `with_loss`
        Returns    the bundle for the next chunk; of the last one (loss, output), the loss being the output without a
                   `loss_fn`, or not `with_loss`
        """
        x = self._run(map_tensors(torch.clone, inputs if self.is_first else unpack(bundle)))  # layers may work in place
        if not self.is_last:
            return pack(x, self.last - 1)
        return (self.loss_fn(x, labels) if with_loss and self.loss_fn is not None else x), x


def pack(x: Any, layer: int) -> Bundle:
    """Return what a layer returned as a bundle.  Raises UserError if it is no tensor and no tuple of some"""
    if isinstance(x, Tensor):
        return (x,)
    if not isinstance(x, tuple) or not x or not all(isinstance(one, Tensor) for one in x):
        kinds = f" of {', '.join(type(one).__name__ for one in x)}" if isinstance(x, tuple) else ""
        what = f"layer {layer} returned a {type(x).__name__}{kinds}, which cannot go on to the next stage"
        raise UserError(what, fix="a tensor, or a tuple of tensors")
    return (*x, torch.empty(0))


def unpack(bundle: Bundle) -> Any:
    """Return what `pack` was given."""
    return bundle[0] if len(bundle) == 1 else bundle[:-1]
