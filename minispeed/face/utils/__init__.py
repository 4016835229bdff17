"""DeepSpeed's `deepspeed.utils`."""

from minispeed.deepspeed.lazily import lazily

_KINDS = (
    "full_fp32_param",
    "full_grad",
    "full_optimizer_state",
    "local_fp32_param",
    "local_grad",
    "local_optimizer_state",
)
_FRAGMENTS = [f"safe_{verb}_{kind}" for verb in ("get", "set") for kind in _KINDS]

__getattr__, __dir__ = lazily(
    "minispeed.utils",
    {
        "logging": "minispeed.utils.logging",
        "timer": "minispeed.utils.timer",
        "zero_to_fp32": "minispeed.utils.zero_to_fp32",
        "OnDevice": "minispeed.deepspeed.devices",
        "RepeatingLoader": "minispeed.deepspeed.loader",
        "log_dist": "minispeed.deepspeed.logging",
        "logger": "minispeed.deepspeed.logging",
        **dict.fromkeys(_FRAGMENTS, "minispeed.deepspeed.fragments"),
    },
)
