"""DeepSpeed's `deepspeed.utils.timer`."""

from minispeed.deepspeed.timers import SynchronizedWallClockTimer, ThroughputTimer

__all__ = ["SynchronizedWallClockTimer", "ThroughputTimer"]
