"""Name what a rank of a pipeline does: one action, what it needs, what it gives, whom it talks to.

The model is cut into stages 0, 1, 2, ...; of p ranks, stage s lives on rank s % p. An action computes for one stage
and one micro-batch, or sends or receives for it. What passes between actions are values: a stage's activations, the
gradients of its input, the gradients of its weights. Two tables say which action needs and gives which; whoever
plans, simulates or executes a pipeline follows them.

B = BI + BW is from Qi et al. 2024, Zero bubble pipeline parallelism, section 1. https://arxiv.org/abs/2401.10241
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["F", "B", "BI", "BW", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE"]
What: TypeAlias = Literal["activations", "gradients", "weight gradients"]

FORWARD = frozenset[Kind]({"F"})
BACKWARD = frozenset[Kind]({"B", "BI", "BW"})
COMPUTE = FORWARD | BACKWARD
LAST = frozenset[Kind]({"B", "BW"})  # nothing of the micro-batch is held by the stage any more

NEIGHBOUR: dict[Kind, int] = {"SEND_F": +1, "RECV_F": -1, "SEND_B": -1, "RECV_B": +1}  # the stage at the other end
PARTNER: dict[Kind, Kind] = {"SEND_F": "RECV_F", "RECV_F": "SEND_F", "SEND_B": "RECV_B", "RECV_B": "SEND_B"}

NEEDS: dict[Kind, tuple[tuple[What, int], ...]] = {  # the int is added to the action's stage
    "F": (("activations", -1),),
    "B": (("activations", 0), ("gradients", +1)),
    "BI": (("activations", 0), ("gradients", +1)),
    "BW": (("gradients", 0),),
    "SEND_F": (("activations", 0),),
    "RECV_F": (),
    "SEND_B": (("gradients", 0),),
    "RECV_B": (),
    "REDUCE": (("weight gradients", 0),),
}
GIVES: dict[Kind, tuple[tuple[What, int], ...]] = {
    "F": (("activations", 0),),
    "B": (("gradients", 0), ("weight gradients", 0)),
    "BI": (("gradients", 0),),
    "BW": (("weight gradients", 0),),
    "SEND_F": (),
    "RECV_F": (("activations", -1),),
    "SEND_B": (),
    "RECV_B": (("gradients", +1),),
    "REDUCE": (),
}


class Action(NamedTuple):
    """One thing that a rank does for one of its stages and one micro-batch."""

    kind: Kind
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.kind}(stage {self.stage}, micro {self.micro})"


class Value(NamedTuple):
    """What an action made of one micro-batch: activations out of a stage, gradients of what went into it."""

    what: What
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"the {self.what} of stage {self.stage}, micro {self.micro}"


Program: TypeAlias = list[Action]  # of one rank


def rank_of(stage: int, ranks: int) -> int:
    """Return the rank that holds a stage."""
    return stage % ranks


def num_stages(programs: Sequence[Program]) -> int:
    """Return how many stages the programs of all ranks know of."""
    return 1 + max((action.stage for program in programs for action in program), default=-1)


def needs(action: Action, stages: int) -> list[Value]:
    """Return what must be on the rank before the action; the batch and the loss, at the two ends, always are."""
    kind, stage, micro = action
    return [Value(what, stage + by, micro) for what, by in NEEDS[kind] if 0 <= stage + by < stages]


def gives(action: Action) -> list[Value]:
    """Return what is on the rank after the action."""
    return [Value(what, action.stage + by, action.micro) for what, by in GIVES[action.kind]]


def peer(message: Action, ranks: int) -> int:
    """Return the rank at the other end of a message."""
    return rank_of(message.stage + NEIGHBOUR[message.kind], ranks)


def partner(message: Action) -> Action:
    """Return the action at the other end of a message: what one stage sends its neighbour receives."""
    return Action(PARTNER[message.kind], message.stage + NEIGHBOUR[message.kind], message.micro)


def calls(program: Program) -> list[list[Action]]:
    """Divide a program into what is called at once: neighbouring messages are one exchange, all else is alone."""
    divided: list[list[Action]] = []
    for is_exchange, actions in groupby(program, lambda action: action.kind in PARTNER):
        divided += [list(actions)] if is_exchange else [[action] for action in actions]
    return divided
