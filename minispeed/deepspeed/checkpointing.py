"""Recomputation by DeepSpeed's names: `deepspeed.checkpointing.checkpoint(function, *args)`.

What `configure` can ask for beyond recomputing (activations cut over tensor-parallel ranks, moved to the CPU, laid in
one buffer, timed) changes no result, and is not done: it is named in one printed line.

https://deepspeed.readthedocs.io/en/latest/activation-checkpointing.html
"""

from collections.abc import Callable
from typing import Any

from minispeed.deepspeed.logging import print_rank_0
from minispeed.model.recompute import checkpoint as recompute_call

_configured: dict[str, Any] = {}


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Note that recomputation is configured, and print, on rank 0, what of it is not done here."""
    asked = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    _configured.update(asked, mpu=mpu_, config=deepspeed_config, num_checkpoints=num_checkpoints)
    without_effect = [name for name, value in asked.items() if value]
    if without_effect:
        print_rank_0(f"activations are recomputed; without effect: {', '.join(without_effect)}")


def is_configured() -> bool:
    """Whether `configure` was called."""
    return bool(_configured)


def reset() -> None:
    """Forget that `configure` was called; between steps nothing is held."""
    _configured.clear()


def checkpoint(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Call `function`, keep only its inputs, and call it again in the backward, with the same random numbers."""
    return recompute_call(lambda *inputs: function(*inputs, **named), *args)


non_reentrant_checkpoint = checkpoint
