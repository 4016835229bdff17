"""DeepSpeed's `deepspeed.runtime.config`."""

from minispeed.config import DeepSpeedConfigError
from minispeed.deepspeed.settings import DeepSpeedConfig

__all__ = ["DeepSpeedConfig", "DeepSpeedConfigError"]
