"""What the ranks of a run do together: agree on the number of steps."""

import torch

from minispeed.chat.clock import Clock
from minispeed.collective.group import Group
from minispeed.collective.numbers import any_of


def fix_together(clock: Clock, step: int, group: Group) -> Clock:
    """Fix the number of steps after `step`, once every rank knows its pace, to what fits the time by rank 0's."""
    if any_of(group, not clock.is_measured):
        return clock
    left = torch.tensor([clock.steps_left])
    group.broadcast(left, 0).wait()
    return clock.fixed(step + int(left))
