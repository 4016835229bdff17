"""DeepSpeed's two Adams: names and arguments of theirs on our Adam, which runs wherever its tensors are.

Both are AdamW, unless told to add the decay to the gradient; torch's fused kernels move the weights on CPU and GPU.

https://deepspeed.readthedocs.io/en/latest/optimizers.html
"""

from collections.abc import Iterable
from typing import Any

from minispeed.errors import UserError
from minispeed.optim import Adam


class FusedAdam(Adam):
    """Adam with DeepSpeed's arguments.

    bias_correction  True: no other Adam stands here
    adam_w_mode      whether the decay acts on the weights themselves
    amsgrad          False, in DeepSpeed too
    set_grad_none    whether `zero_grad()` leaves None, not zeros
    Holds            two moments per element, in the parameter's dtype
    Raises           UserError on bias_correction=False or amsgrad=True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if amsgrad or not bias_correction:
            what = "amsgrad=True" if amsgrad else "bias_correction=False"
            raise UserError(f"{type(self).__name__} with {what}", fix="leaving it out")
        self.decoupled, self.set_grad_none = adam_w_mode, set_grad_none
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)


class DeepSpeedCPUAdam(FusedAdam):
    """The same, with the order of arguments that DeepSpeed's optimizer for the CPU has.

    fp32_optimizer_states  means nothing here: moments have the parameter's dtype, and the engine's masters are fp32
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)
