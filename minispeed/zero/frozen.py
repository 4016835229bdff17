"""Adam whose second moment stays as it is after a warm-up: what is then added to a weight is linear in the gradients.

Where gradients travel as signs, what is left out is added later (`compress.py`). That mends sums, and m is one. v is
none: it adds up squares, and the noise that comes and goes does not leave them. So v is kept once gradients are noisy.

    t <= freeze_step    AdamW
    t >  freeze_step    AdamW, but v, and what it is divided by for having begun at 0, stay

1-bit Adam, Tang et al. 2021, section 3.3 and algorithm 1.  https://arxiv.org/abs/2102.02888
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from minispeed.errors import UserError
from minispeed.optim import AdamW
from minispeed.zero.onebit import OneBit
from minispeed.zero.summing import Compression


class FrozenAdamW(AdamW):
    """AdamW that keeps its second moment from `freeze_step` updates on.

    An element without any gradient until then has none: nothing tells how far it should move, and it stays.
    """

    def __init__(self, params: Iterable[Any], *, freeze_step: int, **settings: Any) -> None:
        """Take AdamW's settings.  Raises UserError for a warm-up without a step"""
        if freeze_step < 1:
            raise UserError(f"freeze_step {freeze_step} freezes a second moment that is 0", fix="1 or more")
        self.freeze_step = freeze_step
        super().__init__(params, **settings)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        self._share_out(params, group, super()._update)

    def _fused_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        self._share_out(params, group, super()._fused_update)

    def _share_out(self, params: list[Tensor], group: dict[str, Any], warm_update: Callable[..., None]) -> None:
        """Update the parameters that are warm by AdamW, the others with the second moment that they have."""
        warm = [p for p in params if self.state[p]["step"].item() < self.freeze_step]
        settled = [p for p in params if self.state[p]["step"].item() >= self.freeze_step]
        if warm:
            warm_update(warm, group)
        self._frozen_update(settled, group)

    def _frozen_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            state["step"] += 1
            m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
            p.mul_(1 - lr * group["weight_decay"])
            m.lerp_(p.grad, 1 - beta1)
            root = (v / (1 - beta2**self.freeze_step)).sqrt_().add_(group["eps"])
            p.add_((m / root).masked_fill_(v == 0, 0), alpha=-lr / (1 - beta1**t))


def adamw_for(compression: Compression, **settings: Any) -> Callable[[list[dict[str, Any]]], AdamW]:
    """Return what makes AdamW of parameter groups: where gradients travel as signs after a warm-up, the frozen one."""
    if isinstance(compression, OneBit) and compression.freeze_step:
        return partial(FrozenAdamW, freeze_step=compression.freeze_step, **settings)
    return partial(AdamW, **settings)
