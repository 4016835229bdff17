"""Decide in which order each rank computes: a schedule is a pure function, and what it returns is data.

A rank that waits for its neighbours idles: that is the bubble. GPipe runs all forwards, then all backwards, and holds
the activations of all micro-batches. 1F1B begins a backward as soon as it can, which holds few and idles as long.
Interleaving gives a rank several short stages in place of a long one, which shortens the idling. ZB-H1 splits the
backward and keeps its second half, for which nobody waits, for when the rank would idle.

GPipe, Huang et al. 2019, section 2.3. https://arxiv.org/abs/1811.06965
1F1B and interleaving, Narayanan et al. 2021, section 2.2. https://arxiv.org/abs/2104.04473
ZB-H1, Qi et al. 2024, section 2.1. https://arxiv.org/abs/2401.10241
Letters: p ranks, m micro-batches, v stages on each rank.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from minispeed.errors import UserError
from minispeed.pipeline.actions import COMPUTE, LAST, PARTNER, Action, Kind, Program, num_stages, rank_of


def gpipe(ranks: int, micros: int, virtual: int = 1) -> list[Program]:
    """Run all forwards, then all backwards; with several stages on a rank, one stage after the other.

    Holds   the activations of all m v pairs of micro-batch and stage
    """
    _check(ranks, micros, virtual)
    return [_block("F", chunks, micros) + _block("B", chunks[::-1], micros) for chunks in _chunks(ranks, virtual)]


def one_f_one_b(ranks: int, micros: int, virtual: int = 1) -> list[Program]:
    """Run a backward after each forward, once rank i has run the p - 1 - i forwards that fill the ranks below it.

    Holds   the activations of min(p - i, m) micro-batches on rank i
    Raises  UserError if a rank is to have several stages
    """
    _check(ranks, micros, virtual)
    _check_single("1f1b", virtual)
    return [_alternate(_block("F", [i], micros), _block("B", [i], micros), ranks - 1 - i) for i in range(ranks)]


def interleaved(ranks: int, micros: int, virtual: int = 1) -> list[Program]:
    """Run 1F1B over v stages on each rank: p micro-batches through one stage, then through the rank's next.

    Holds   the activations of min(2 (p - 1 - i) + (v - 1) p + 1, m v) pairs of micro-batch and stage on rank i
    Raises  UserError unless p divides m
    """
    _check(ranks, micros, virtual)
    if micros % ranks:
        what = f"interleaved sends micro-batches in groups of {ranks}, one for each rank, but there are {micros}"
        raise UserError(what, fix=f"{micros - micros % ranks or ranks} or {micros - micros % ranks + ranks}")
    programs = []
    for rank, chunks in enumerate(_chunks(ranks, virtual)):
        groups = [range(first, first + ranks) for first in range(0, micros, ranks)]
        forwards = [Action("F", stage, micro) for group in groups for stage in chunks for micro in group]
        backwards = [Action("B", stage, micro) for group in groups for stage in chunks[::-1] for micro in group]
        programs.append(_alternate(forwards, backwards, 2 * (ranks - 1 - rank) + (virtual - 1) * ranks))
    return programs


def zb_h1(ranks: int, micros: int, virtual: int = 1) -> list[Program]:
    """Run 1F1B with the backward split: rank i puts off a weight half until i more input halves are done.

    Holds   the activations of min(p, m) micro-batches on every rank: what the first holds under 1F1B
    Raises  UserError if a rank is to have several stages
    """
    _check(ranks, micros, virtual)
    _check_single("zb_h1", virtual)
    programs = []
    for rank in range(ranks):
        program = []
        for action in _alternate(_block("F", [rank], micros), _block("BI", [rank], micros), ranks - 1 - rank):
            program.append(action)
            if action.kind == "BI" and action.micro >= rank:
                program.append(Action("BW", rank, action.micro - rank))
        programs.append(program + _block("BW", [rank], micros)[max(0, micros - rank) :])
    return programs


SCHEDULES: dict[str, Callable[[int, int, int], list[Program]]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb_h1": zb_h1,
}


def with_reductions(programs: Sequence[Program], *, each_micro: bool) -> list[Program]:
    """Add a REDUCE for each stage: whenever a micro-batch's weight gradients are there, or after the last one's.

    It follows the messages that follow the backward: the neighbours wait for those.
    """
    return [_reduce(program, each_micro) for program in programs]


def check_complete(programs: Sequence[Program]) -> None:
    """Raise UserError unless the programs compute, and every stage runs every micro-batch forward and backward once.

    An action that is missing, double, of another kind, or on a rank that does not hold its stage is named.
    """
    ranks, stages = len(programs), num_stages(programs)
    for rank, program in enumerate(programs):
        for action in program:
            if action.kind not in COMPUTE:
                raise UserError(f"rank {rank}'s program has {action}", fix="a program of F, B, BI and BW alone")
            if rank_of(action.stage, ranks) != rank:
                home = rank_of(action.stage, ranks)
                raise UserError(f"rank {rank}'s program has {action}", fix=f"rank {home} of {ranks} holds that stage")
    count = Counter(action for program in programs for action in program)
    micros = 1 + max((action.micro for action in count), default=-1)
    for stage in range(stages):
        for micro in range(micros):
            has = {kind: count[Action(kind, stage, micro)] for kind in ("F", "B", "BI", "BW")}
            if tuple(has.values()) not in ((1, 1, 0, 0), (1, 0, 1, 1)):
                what = f"stage {stage} runs micro-batch {micro} " + ", ".join(f"{n} times {k}" for k, n in has.items())
                raise UserError(what, fix="F and B once each, or F, BI and BW")


def _chunks(ranks: int, virtual: int) -> list[list[int]]:
    """Return the stages of each rank, first to last."""
    return [list(range(rank, ranks * virtual, ranks)) for rank in range(ranks)]


def _block(kind: Kind, stages: Sequence[int], micros: int) -> Program:
    return [Action(kind, stage, micro) for stage in stages for micro in range(micros)]


def _alternate(forwards: Program, backwards: Program, warm_up: int) -> Program:
    """Return some forwards, then a forward and a backward in turn, then the backwards that are left."""
    pairs = zip(forwards[warm_up:], backwards)
    steady = [action for pair in pairs for action in pair]
    return forwards[:warm_up] + steady + backwards[len(forwards[warm_up:]) :]


def _reduce(program: Program, each_micro: bool) -> Program:
    last = {action.stage: action for action in program if action.kind in LAST}
    reduced: Program = []
    due: Program = []
    for action in program:
        if action.kind not in PARTNER:
            reduced, due = reduced + due, []
        reduced.append(action)
        if action.kind in LAST and (each_micro or action == last[action.stage]):
            due.append(Action("REDUCE", action.stage, action.micro))
    return reduced + due


def _check(ranks: int, micros: int, virtual: int) -> None:
    named = {"ranks": ranks, "micro-batches": micros, "stages on each rank": virtual}
    for name, count in named.items():
        if count < 1:
            raise UserError(f"a pipeline of {count} {name}", fix="1 or more")


def _check_single(schedule: str, virtual: int) -> None:
    if virtual != 1:
        raise UserError(f"{schedule} has one stage on each rank, not {virtual}", fix="interleaved, or one stage")
