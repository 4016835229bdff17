"""DeepSpeed you can read: chat fine-tuning and the techniques under it, in pure PyTorch.

A script written for DeepSpeed changes one import, `import minispeed as deepspeed`: its dotted names are found in
`face/`, which counts as a part of this folder. Every name is imported when it is first asked for: torch takes a second.
"""

from typing import TYPE_CHECKING

from minispeed.deepspeed.lazily import lazily
from minispeed.version import __version__ as __version__

if TYPE_CHECKING:
    from minispeed.collective.launch import launch as launch

__path__.append(f"{__path__[0]}/face")

_MODULES = ("accelerator", "checkpointing", "comm", "ops", "optim", "pipe", "runtime", "utils", "zero")
_HOMES = {
    **{name: f"minispeed.{name}" for name in _MODULES},
    "DeepSpeedConfig": "minispeed.deepspeed.settings",
    "DeepSpeedConfigError": "minispeed.config",
    "DeepSpeedEngine": "minispeed.deepspeed.engine",
    "OnDevice": "minispeed.deepspeed.devices",
    "PipelineEngine": "minispeed.deepspeed.pipe_engine",
    "PipelineModule": "minispeed.deepspeed.pipe",
    "RepeatingLoader": "minispeed.deepspeed.loader",
    "add_config_arguments": "minispeed.deepspeed.arguments",
    "add_tuning_arguments": "minispeed.deepspeed.arguments",
    "get_accelerator": "minispeed.deepspeed.accelerator",
    "init_distributed": "minispeed.deepspeed.start",
    "initialize": "minispeed.deepspeed.initialize",
    "launch": "minispeed.collective.launch",
    "log_dist": "minispeed.deepspeed.logging",
    "logger": "minispeed.deepspeed.logging",
    "tp_model_init": "minispeed.deepspeed.sharing",
}

__getattr__, __dir__ = lazily(__name__, _HOMES)
