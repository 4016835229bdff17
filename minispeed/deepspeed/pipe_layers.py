"""The layers of a pipeline, as a script lists them and as they are built.

    LayerSpec(nn.Linear, 4, 8)                                  a module that is built later
    TiedLayerSpec("words", nn.Embedding, 50, 8, forward_fn=f)   one that all layers of that key share

https://deepspeed.readthedocs.io/en/latest/pipeline.html#model-specification
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from minispeed.errors import UserError


class PipelineError(UserError):
    """What cannot be asked of a pipeline."""


class LayerSpec:
    """A module that is built later: its class, and what that is called with."""

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        """Note them.  Raises UserError if it is no class of modules"""
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise UserError(f"LayerSpec got {typename!r}", fix="a subclass of torch.nn.Module, or the function itself")
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs

    def build(self, log: bool = False) -> nn.Module:
        """Return a new module."""
        return self.typename(*self.module_args, **self.module_kwargs)

    def __repr__(self) -> str:
        named = (f"{name}={value!r}" for name, value in self.module_kwargs.items())
        return f"{self.typename.__name__}({', '.join([*map(repr, self.module_args), *named])})"


class TiedLayerSpec(LayerSpec):
    """A module that all layers of one key share, wherever they lie; the first of them says how it is built.

    forward_fn        (module, x) -> what the layer returns; None: module(x)
    tied_weight_attr  the parameters that are tied, by their names in the module. Here the others are too, as they are
                      in DeepSpeed where the layers lie on one stage: no number of stages is another model
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)


@dataclass(frozen=True, eq=False)
class Layer:
    """One of the list, built.

    kind    its class, or the function's name: what `partition_method="type:..."` looks at
    call    x -> x
    name    of its module in the whole
    module  that holds its parameters; None of a function
    """

    kind: str
    call: Callable[[Any], Any]
    name: str = ""
    module: nn.Module | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return what it is called with, beside x."""
        return [] if self.module is None else list(self.module.parameters())
