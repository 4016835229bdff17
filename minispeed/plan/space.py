"""List every layout that the devices can have, and say of those that cannot be what forbids them.

    devices = dp x pp x sp x tp        each with the schedules, stages and cuts that it can have

A layout leaves four settings open: the ZeRO stage, what is offloaded, what is recomputed, and the rows of a
micro-batch. Together they are all that the engine can be told of how a step is shared out.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from minispeed.axes import Layout
from minispeed.errors import UserError
from minispeed.ledger.job import Job
from minispeed.ledger.units import bounds
from minispeed.model.shapes import divisible
from minispeed.plan.request import OFFLOADS, Request


class Refusal(NamedTuple):
    """A value of a choice that the case forbids, and why: "heads 20 do not divide"."""

    name: str
    value: Any
    reason: str


class Settings(NamedTuple):
    """The values that the settings of a layout may have, each in the order in which it is tried."""

    zero: tuple[int, ...]
    offload: tuple[str, ...]
    recompute: tuple[str, ...]
    micro_batch: tuple[int, ...]


def divisors(number: int) -> list[int]:
    """Return what divides a number, smallest first."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def layouts(request: Request) -> tuple[list[Layout], list[Refusal]]:
    """Return every layout that can be, and why the lengths of axes that are in none cannot."""
    refusals = [r for name in ("tp", "sp", "pp", "dp") for r in _refused(request, name)] + _contradictions(request)
    refused = {(r.name, r.value) for r in refusals}
    found: list[Layout] = []
    for tp in divisors(request.devices):
        for sp in divisors(request.devices // tp):
            for pp in divisors(request.devices // tp // sp):
                sizes = {"tp": tp, "sp": sp, "pp": pp, "dp": request.devices // tp // sp // pp}
                able = all(request.allows(*size) and size not in refused for size in sizes.items())
                found += _variants(request, **sizes) if able else []
    return found, refusals


def settings(request: Request, layout: Layout) -> Settings:
    """Return what the settings of a layout may be. One rank alone has nothing to share by ZeRO."""
    mesh = layout.mesh(request.devices)
    replica = request.rows // mesh.dp
    stages = request.values("zero") if mesh.dp * layout.sp > 1 or "zero" in request.fixed else (0,)
    micros = [b for b in divisors(replica) if request.allows("micro_batch", b)]
    if layout.schedule == "interleaved":
        micros = [b for b in micros if replica // b % layout.pp == 0]
    again = request.values("recompute")
    if request.model.attention != "reference" and "recompute" not in request.fixed:
        again = tuple(what for what in again if what != "attention")
    return Settings(stages, request.values("offload"), again, tuple(micros))


def job_of(request: Request, layout: Layout, *, zero: int, offload: str, recompute: str, micro_batch: int) -> Job:
    """Return one candidate."""
    states, shards = OFFLOADS[offload]
    return Job(
        model=request.model,
        devices=request.devices,
        rows=request.rows,
        tokens=request.tokens,
        micro_batch=micro_batch,
        layout=layout,
        zero=zero,
        dtype=request.dtype,
        supervised=request.supervised,
        recompute=recompute,
        offload_optimizer=states,
        offload_param=shards,
        lora_rank=request.lora_rank,
        lora_targets=request.lora_targets,
    )


def is_able(zero: int, offload: str) -> bool:
    """Whether a stage can offload so much: parameters leave the device where shards of them are all it keeps."""
    return zero == 3 or not OFFLOADS[offload][1]


def all_jobs(request: Request) -> Iterator[Job]:
    """Yield every candidate, one by one: what the search must agree with."""
    for layout in layouts(request)[0]:
        open_ones = settings(request, layout)
        for zero in open_ones.zero:
            for offload in open_ones.offload:
                for recompute in open_ones.recompute:
                    for micro in open_ones.micro_batch:
                        if is_able(zero, offload):
                            chosen = dict(zero=zero, offload=offload, recompute=recompute, micro_batch=micro)
                            yield job_of(request, layout, **chosen)  # type: ignore[arg-type]


def _contradictions(request: Request) -> list[Refusal]:
    """Return what is fixed and can be in no layout, or not together."""
    fixed, found = request.fixed, list[Refusal]()
    if fixed.get("offload") == "all" and fixed.get("zero", 3) != 3:
        found.append(Refusal("offload", "all", f"parameters leave the device at ZeRO stage 3, not {fixed['zero']}"))
    rows = request.rows // fixed.get("dp", 1)
    if rows % fixed.get("micro_batch", 1):
        found.append(Refusal("micro_batch", fixed["micro_batch"], f"does not divide the {rows} rows"))
    return found


def _refused(request: Request, name: str) -> Iterator[Refusal]:
    """Yield the lengths of an axis that no layout can have."""
    fixed = request.fixed.get(name, 1)
    if request.devices % fixed:
        yield Refusal(name, fixed, f"does not divide {request.devices} devices")
    for value in divisors(request.devices):
        reason = {"tp": _tp, "sp": _sp, "pp": _pp, "dp": _dp}[name](request, value) if value > 1 else ""
        if reason:
            yield Refusal(name, value, reason)


def _tp(request: Request, tp: int) -> str:
    wrong = [f"{what} {number} do not divide" for what, number in divisible(request.model).items() if number % tp]
    return wrong[0] if wrong else ""


def _sp(request: Request, sp: int) -> str:
    if request.model.attention_dropout:
        return "attention's weights are dropped only where a rank sees whole rows"
    return f"a row has {request.tokens} tokens" if 2 * sp > request.tokens else ""


def _pp(request: Request, pp: int) -> str:
    layers = request.model.num_layers + 2
    return f"{layers} layers, embedding and head counted, do not fill the stages" if pp > layers else ""


def _dp(request: Request, dp: int) -> str:
    return f"{request.rows} rows do not divide over the replicas" if request.rows % dp else ""


def _variants(request: Request, *, tp: int, sp: int, pp: int, dp: int) -> Iterator[Layout]:
    """Yield the layouts of one mesh: with each schedule, way to cut rows, and cut of tokens that it can have."""
    for sequence in _sequences(request, tp, sp):
        for tokens in (False, True) if tp > 1 else (False,):
            if not request.allows("tokens", tokens) or (tokens and request.tokens % (sp * tp)):
                continue
            plain = Layout(sp=sp, sequence=sequence, tp=tp, tokens=tokens)
            for schedule, virtual in _schedules(request, pp, dp):
                yield replace(plain, pp=pp, schedule=schedule, virtual=virtual)


def _sequences(request: Request, tp: int, sp: int) -> Iterator[str]:
    if sp == 1:
        yield from [request.fixed.get("sequence", "ulysses")]
        return
    for kind in request.values("sequence"):
        if kind == "ring" or request.model.num_kv_heads % (tp * sp) == 0:
            yield kind


def _schedules(request: Request, pp: int, dp: int) -> Iterator[tuple[str, int]]:
    if pp == 1:
        able = request.allows("virtual", 1)
        yield from [(request.fixed.get("schedule", "1f1b"), 1)] if able else []
        return
    for schedule in request.values("schedule"):
        for virtual in request.values("virtual"):
            is_plain = schedule != "interleaved"
            if is_plain == (virtual == 1) and _can_cut(request, pp * virtual, schedule):
                yield schedule, virtual


def _can_cut(request: Request, stages: int, schedule: str) -> bool:
    """Whether there are layers for so many stages, and, where backwards are split, blocks in each."""
    try:
        cuts = bounds(request.model, stages, request.lora_rank, request.lora_targets)
    except UserError:
        return False
    return schedule != "zb_h1" or (cuts[1] > 1 and cuts[-2] < cuts[-1] - 1)
