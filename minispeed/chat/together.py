"""What the ranks of a run do together: lend the first of them the whole model, agree on the number of steps."""

from collections.abc import Callable
from typing import TypeVar

import torch

from minispeed.chat.clock import Clock
from minispeed.collective.group import Group
from minispeed.collective.numbers import any_of, barrier
from minispeed.engine import Engine

Made = TypeVar("Made")


def on_first_rank(engine: Engine, work: Callable[[], Made]) -> Made | None:
    """Let rank 0 work with the whole model; the other ranks lend it their shards, wait, and get None."""
    with engine.sharded.gathered():
        made = work() if engine.group.rank == 0 else None
        barrier(engine.group)
    return made


def fix_together(clock: Clock, step: int, group: Group) -> Clock:
    """Fix the number of steps after `step`, once every rank knows its pace, to what fits the time by rank 0's."""
    if any_of(group, not clock.is_measured):
        return clock
    left = torch.tensor([clock.steps_left])
    group.broadcast(left, 0).wait()
    return clock.fixed(step + int(left))
