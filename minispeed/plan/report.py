"""Put a plan in words: what was asked, the ranked layouts, the best in full, and why the others lose."""

from collections.abc import Mapping, Sequence
from typing import Any

from minispeed.ledger.memory import Memory
from minispeed.model.flops import step_flops
from minispeed.plan.request import Request, choices, line_of, spell_seconds
from minispeed.plan.search import Found, Scored
from minispeed.plan.why import Change, num_parameters, reasons
from minispeed.sizes import spell_size

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "buffers")
TIMES = ("compute", "tp", "sp", "zero", "pp", "bubble", "optimizer")


def text(found: Found, *, top: int) -> str:
    """Return the whole report of a plan of which something fits."""
    best = found.ranked[0]
    lines = [*_asked(found), "", *table(found.request, found.ranked[:top]), "", *_in_full(found.request, best), ""]
    lines += ["Why not", *(f"  {line}" for line in why_not(found))]
    return "\n".join(lines)


def impossible(found: Found, changes: Sequence[Change]) -> str:
    """Return what to say where nothing fits: what the least needs, and which single change would do."""
    lines = [*_asked(found), "", "Nothing fits."]
    if found.least:
        least = min(found.least.values(), key=lambda one: one.memory.total)
        size = spell_size(least.memory.total)
        lines.append(f"The least that a candidate needs is {size} a device: {line_of(least.job)}")
        lines += _memory(found.request, least.memory)
    if not found.count:
        lines.append("No candidate has all that is fixed." if found.request.fixed else "There is no candidate.")
    lines += [f"  {one.name} {spell(one.value)}: {one.reason}" for one in found.refusals]
    lines += ["", "Any one of these would do:"] if changes else ["", "No single change that was tried would do."]
    lines += [f"  {change.text}: {line_of(change.fitting.job)}" for change in changes]
    return "\n".join(lines)


def table(request: Request, ranked: Sequence[Scored]) -> list[str]:
    """Return the candidates in columns, the fastest first."""
    head = ["", "layout", "GB", "s/step", "tokens/s", "compute", "messages", "bubble", "optimizer"]
    rows = [head]
    for place, one in enumerate(ranked, start=1):
        parts = shares(one)
        messages = sum(parts[name] for name in ("tp", "sp", "zero", "pp"))
        cells = [parts["compute"], messages, parts["bubble"], parts["optimizer"]]
        rows.append(
            [
                str(place),
                line_of(one.job),
                f"{one.memory.total / 1e9:.3g}",
                f"{one.step.total:.3g}",
                f"{one.tokens_per_second:,.0f}",
                *(f"{cell:.0%}" for cell in cells),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(w) if column == 1 else cell.rjust(w) for column, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]


def shares(one: Scored) -> dict[str, float]:
    """Return what share of a step goes to what."""
    return {name: getattr(one.step, name) / one.step.total for name in TIMES}


def mfu(request: Request, one: Scored) -> float | None:
    """Return the share of the datasheet's peak that a step reaches (PaLM, appendix B); None where it is unknown."""
    peak = request.profile.peak.get(request.dtype)
    supervised = round(request.supervised * request.rows * request.tokens)
    flops = step_flops(request.model, rows=request.rows, tokens=request.tokens, supervised=supervised).model
    return flops / one.step.total / request.devices / peak if peak else None


def to_json(found: Found, *, top: int, changes: Sequence[Change] = ()) -> Mapping[str, Any]:
    """Return the plan as plain values; where nothing fits, the bytes that the least needs, and what would do."""
    return {
        "request": found.request.words,
        "candidates": found.count,
        "ranked": [
            {
                **choices(one.job),
                "memory": {name: getattr(one.memory, name) for name in (*CATEGORIES, "host")},
                "seconds": {name: getattr(one.step, name) for name in TIMES} | {"total": one.step.total},
                "tokens_per_second": one.tokens_per_second,
                "mfu": mfu(found.request, one),
            }
            for one in found.ranked[:top]
        ],
        "why_not": [{"name": one.name, "value": one.value, "reason": one.text} for one in reasons(found)]
        if found.ranked
        else [one._asdict() for one in found.refusals],
        "least": min((one.memory.total for one in found.least.values()), default=None) if not found.ranked else None,
        "would_fit": [{"change": change.text, **choices(change.fitting.job)} for change in changes],
    }


def why_not(found: Found) -> list[str]:
    """Return what speaks against each value that the best has not, in a line each."""
    return [f"{one.name} {spell(one.value)}: {one.text}" for one in reasons(found)]


def spell(value: Any) -> str:
    """Return a choice's value as a user types it."""
    return {True: "cut", False: "whole"}[value] if isinstance(value, bool) else str(value)


def _asked(found: Found) -> list[str]:
    request = found.request
    millions = num_parameters(request) / 1e6
    size = f"{millions / 1000:.3g} billion" if millions >= 1000 else f"{millions:.3g} million"
    return [
        f"{request.words[0].upper()}{request.words[1:]}",
        f"{size} parameters; {found.count:,} candidates scored. Rates: {request.profile.source}",
    ]


def _in_full(request: Request, best: Scored) -> list[str]:
    """Return the best with its memory by category and its time by what it goes to."""
    share = mfu(request, best)
    reached = f", {share:.1%} of the datasheet's peak (MFU)" if share is not None else ""
    some = [name for name in TIMES if getattr(best.step, name) > 1e-6 * best.step.total]
    times = ", ".join(f"{name} {spell_seconds(getattr(best.step, name))}" for name in some)
    return [
        f"The best: {line_of(best.job)}",
        *_memory(request, best.memory),
        f"  a step takes {spell_seconds(best.step.total)}{reached}: {times}",
    ]


def _memory(request: Request, memory: Memory) -> list[str]:
    parts = ", ".join(f"{name} {spell_size(getattr(memory, name))}" for name in CATEGORIES)
    host = f"; {spell_size(memory.host)} on the host" if memory.host else ""
    return [f"  a device holds {spell_size(memory.total)} of {spell_size(request.memory)}: {parts}{host}"]
