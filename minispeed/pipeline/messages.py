"""Add the messages to programs that only compute, so that no rank waits for ever, and as few as possible wait at all.

A message holds up both its ranks until both have come to it. The programs are therefore walked through in slots of
one action each, and a message takes place on both ranks just before the slot of the action that needs it. Slots put
the actions and messages of all ranks in one order, and each rank's program follows that order: what is first in it
and not yet done can always be done. So there is no deadlock, whatever the programs.

What is left is to keep step where forwards and backwards last differently. Two clocks do it: in 1F1B a rank runs
forward while the next runs backward, so every slot is for everything; where stages are interleaved all run forward
together, then all backward, so slots alternate. The clock with the shorter simulation is taken.

Narayanan et al. 2021, section 2.2, for the programs. https://arxiv.org/abs/2104.04473
"""

from collections.abc import Callable, Sequence, Set

from minispeed.errors import UserError
from minispeed.pipeline.actions import (
    BACKWARD,
    COMPUTE,
    FORWARD,
    Action,
    Kind,
    Program,
    Value,
    What,
    gives,
    needs,
    num_stages,
    partner,
    rank_of,
)
from minispeed.pipeline.schedule import check_complete
from minispeed.pipeline.simulate import Cost, simulate
from minispeed.pipeline.timeline import Time

Clock = Sequence[Set[Kind]]  # the kinds that may run in a slot, over and over
TOGETHER: Clock = (COMPUTE,)
IN_TURN: Clock = (FORWARD, BACKWARD)
SENT_BY: dict[What, Kind] = {"activations": "SEND_F", "gradients": "SEND_B"}


def with_messages(programs: Sequence[Program], cost: Callable[[Action], Time] = Cost()) -> list[Program]:
    """Return the programs with a SEND and a RECV for each value that a stage on another rank needs.

    Messages that stand side by side are one exchange (`actions.calls`). Those between two ranks, both ways, stand in
    the same order on both, and sent one by one they are no deadlock either. `cost` decides between clocks: it must be
    the same on all ranks.

    Raises  UserError unless every stage runs every micro-batch once (`check_complete`), in an order that can be run
    """
    check_complete(programs)
    plans = [_insert(programs, _slots(programs, clock)) for clock in (TOGETHER, IN_TURN)]
    return min(plans, key=lambda plan: simulate(plan, cost).length)


def forward_only(programs: Sequence[Program]) -> list[Program]:
    """Return what the programs do forward, messages included: to evaluate."""
    return [[action for action in program if action.kind in ("F", "SEND_F", "RECV_F")] for program in programs]


def _slots(programs: Sequence[Program], clock: Clock) -> dict[Action, int]:
    """Run each action in the first slot that is for its kind and finds its inputs made in earlier slots."""
    stages = num_stages(programs)
    slots: dict[Action, int] = {}
    made: set[Value] = set()
    left = [list(reversed(program)) for program in programs]
    slot = last = 0
    while any(left):
        kinds, nexts = clock[slot % len(clock)], [(program, program[-1]) for program in left if program]
        able = [p for p, action in nexts if action.kind in kinds and made.issuperset(needs(action, stages))]
        ran = [program.pop() for program in able]
        slots |= dict.fromkeys(ran, slot)
        made |= {value for action in ran for value in gives(action)}
        last = slot if ran else last
        if slot - last > len(clock):
            raise _stuck([action for _, action in nexts], made, stages)
        slot += 1
    return slots


def _insert(programs: Sequence[Program], slots: dict[Action, int]) -> list[Program]:
    """Put each message on both of its ranks, before the slot of the action that needs it."""
    ranks, stages = len(programs), num_stages(programs)
    timed = [[(slots[action], True, action, action) for action in program] for program in programs]
    for action, slot in slots.items():
        for send in _sends(action, ranks, stages):
            for message in (send, partner(send)):
                timed[rank_of(message.stage, ranks)].append((slot, False, send, message))
    return [[action for *_, action in sorted(program)] for program in timed]


def _sends(action: Action, ranks: int, stages: int) -> list[Action]:
    """Return what other ranks must send before an action."""
    home = rank_of(action.stage, ranks)
    far = [value for value in needs(action, stages) if rank_of(value.stage, ranks) != home]
    return [Action(SENT_BY[value.what], value.stage, value.micro) for value in far]


def _stuck(actions: Sequence[Action], made: set[Value], stages: int) -> UserError:
    missing = [(action, value) for action in actions for value in needs(action, stages) if value not in made]
    text = ", ".join(f"{action} for {value}" for action, value in missing)
    return UserError(f"the programs wait for ever: {text}", fix="each action after those that make its inputs")
