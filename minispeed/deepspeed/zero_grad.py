"""Let `zero_grad` of a trained module, or of a caller's optimizer, do what the engine's does.

Their own would look for gradients in the parameters, find none, and leave those that lie in the engine's buffers.
"""

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from minispeed.deepspeed.engine import DeepSpeedEngine


class ZeroGrad:
    """What stands in the place of a `zero_grad`. A copy of the module has its own again."""

    def __init__(self, engine: "DeepSpeedEngine") -> None:
        """Remember an engine without keeping it alive."""
        self.engine, self.module = weakref.ref(engine), weakref.ref(engine.module)

    def __call__(self, set_to_none: bool = True) -> None:
        """Drop the engine's gradients."""
        engine = self.engine()
        if engine is not None and engine.core is not None:
            engine.zero_grad()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return partial(nn.Module.zero_grad, memo[id(self.module())])
