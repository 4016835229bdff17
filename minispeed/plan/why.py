"""Say why the best is the best: what each other value of each choice would cost, forbid or need.

For every value that the best candidate has not, the fastest that has it and fits: what it takes more, and of that the
largest part, in words. Where none fits, what the least of them needs; where none can be, what forbids it. And where
nothing fits at all, the smallest single change that would make room.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from minispeed.ledger.job import Job
from minispeed.model.shapes import parameters
from minispeed.plan.request import KNOBS, Request, choices, line_of, spell_seconds
from minispeed.plan.search import Found, Scored, fits, score, search, simulated
from minispeed.plan.space import Settings, is_able, job_of, settings
from minispeed.sizes import spell_size

PARTS = {  # of a step: how a difference is put in words, with its seconds
    "compute": "computes {} more",
    "tp": "messages inside layers take {} more than they save",
    "sp": "attending beyond a rank's tokens takes {} more than it saves",
    "pp": "messages between stages take {} more than they save",
    "bubble": "a bubble of {share:.0%}, {} more",
    "zero": "{verb} take {} more than they save",
    "optimizer": "the optimizer's step takes {} more",
}


class Reason(NamedTuple):
    """A value of a choice, and why it is not the best's."""

    name: str
    value: Any
    text: str


def reasons(found: Found) -> list[Reason]:
    """Return what speaks against each value that the best has not, choice by choice; needs a candidate that fits."""
    best = found.ranked[0]
    mine = choices(best.job)
    named = [Reason(name, value, why) for name, value, why in found.refusals]
    for (name, value), other in found.best.items():
        if mine[name] != value and (name != "micro_batch" or value in _neighbours(found.request, best.job)):
            needs = _in_place(found.request, best, name, value)
            named.append(Reason(name, value, needs + _slower(best, simulated(found.request, other))))
    for (name, value), least in found.least.items():
        if (name, value) not in found.best:
            named.append(Reason(name, value, _needs(found.request, least)))
    order = list(KNOBS)
    return sorted(named, key=lambda one: (order.index(one.name), _rank(one.value)))


def _neighbours(request: Request, job: Job) -> list[int]:
    """Return the sizes of a micro-batch next to a job's."""
    able = settings(request, job.layout).micro_batch
    at = able.index(job.micro_batch)
    return list(able[max(0, at - 1) : at + 2])


def _in_place(request: Request, best: Scored, name: str, value: Any) -> str:
    """Say that the best would not fit if this setting alone were changed; "" if it would, or that cannot be."""
    said = choices(best.job)
    open_ones = settings(request, best.job.layout)
    if name not in Settings._fields or value not in getattr(open_ones, name):
        return ""
    chosen = {setting: said[setting] for setting in Settings._fields} | {name: value}
    if not is_able(chosen["zero"], chosen["offload"]):
        return ""
    job = job_of(request, best.job.layout, **chosen)
    one = score(request, job)
    return "" if fits(request, one.memory, job) else f"{_needs(request, one)} as the best is laid out; elsewhere "


def _rank(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, (int, float)) else (1, str(value))


def _slower(best: Scored, other: Scored) -> str:
    """Say what makes a candidate, the fastest of its kind, slower than the best."""
    more = other.step.total - best.step.total
    if more < 0.001 * best.step.total:
        return f"as fast, with {spell_size(other.memory.total)} a device ({line_of(other.job)})"
    parts = {name: getattr(other.step, name) - getattr(best.step, name) for name in PARTS}
    name = max(parts, key=lambda one: parts[one])
    verb = "gathers" if other.job.zero == 3 else "sums of gradients"
    share = other.step.bubble / other.step.total
    text = PARTS[name].format(spell_seconds(parts[name]), share=share, verb=verb)
    percent = 100 * more / best.step.total
    return (
        f"{text}: {percent:.0f} % slower ({line_of(other.job)})" if percent >= 1 else f"{text}: {percent:.1f} % slower"
    )


def _needs(request: Request, least: Scored) -> str:
    if least.memory.total > request.memory:
        return f"needs {spell_size(least.memory.total)} of {spell_size(request.memory)}"
    together = least.memory.host * min(request.devices, request.profile.per_machine)
    return f"needs {spell_size(together)} of a machine's own {spell_size(request.profile.host_memory)}"


class Change(NamedTuple):
    """One thing that would make an impossible request fit, and what then does."""

    text: str
    fitting: Scored


def changes(found: Found) -> Iterator[Change]:
    """Yield single changes with which something fits, each the smallest of its kind."""
    request = found.request
    least = min(found.least.values(), key=lambda one: one.memory.total, default=None)
    if least is not None:
        yield Change(f"devices of {spell_size(least.memory.total)}", least)
    for name in request.fixed:
        others = {other: value for other, value in request.fixed.items() if other != name}
        yield from _first(f"{name} left open", [replace(request, fixed=others)])
    if len(request.fixed) > 1:
        yield from _first("all left open", [replace(request, fixed={})])
    yield from _first("{} devices", _doubled(request), lambda one: one.devices)
    yield from _first("rows of {} tokens", _halved(request), lambda one: one.tokens)
    if not request.lora_rank:
        yield from _first("LoRA, of rank 8", [replace(request, lora_rank=8)])


def _first(text: str, tried: list[Request], value: Callable[[Request], Any] = lambda one: "") -> Iterator[Change]:
    """Yield the first of a row of requests for which something fits."""
    for request in tried:
        found = search(request, ranked=1, of_values=False)
        if found.ranked:
            yield Change(text.format(value(request)), found.ranked[0])
            return


def _doubled(request: Request) -> list[Request]:
    return [replace(request, devices=request.devices * 2**k) for k in range(1, 4)]


def _halved(request: Request) -> list[Request]:
    return [replace(request, tokens=request.tokens // 2**k) for k in range(1, 4) if request.tokens >= 2**k * 64]


def num_parameters(request: Request) -> int:
    """Return P, of the whole model."""
    return sum(shape.size for shape in parameters(request.model))
