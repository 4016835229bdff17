"""Say in closed form what a rank sends in a step: by axis, by kind, how often and how many bytes.

    shards   gradients are summed, parameters gathered: ZeRO
    tp       into and out of the parts of each layer, embedding and loss
    sp       attention beyond a rank's own tokens
    pp       what crosses from stage to stage, and its gradients; copies of tied parameters
    others   a few numbers: counts, loss, norm

Bytes are those that leave a rank when collectives run as rings, as `minispeed.collective.trace` counts them: with N
ranks, of a buffer of n bytes 2 n (N - 1)/N in an all-reduce, and n (N - 1)/N in an all-gather, a reduce-scatter or an
all-to-all. What runs again in the backward sends again; parameters alone are there still.

ZeRO: Rajbhandari et al. 2020, section 7 (https://arxiv.org/abs/1910.02054). pp: Narayanan et al. 2021, section 2
(https://arxiv.org/abs/2104.04473). What layers send is in `layer_messages.py`. Letters: N ranks of a line.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from minispeed.ledger.gradients import crossing, weighs
from minispeed.ledger.job import Job
from minispeed.ledger.layer_messages import INTEGER, Said, gradients_of, layer_messages, span, stream_of, tokens_of
from minispeed.ledger.states import shard_size
from minispeed.ledger.units import TIED, Unit, units

ALONE = " alone"  # ends the name of a unit of which several stages have copies
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


@dataclass(frozen=True)
class Messages:
    """Messages of one kind in a step of one rank.

    axis   along which the ranks lie that speak: "shards" (dp and sp), "sp", "tp", "pp"; of numbers "dp", "copy" (pp, sp
           and tp), "model" (pp and tp) or "world"
    kind   all_reduce, all_gather, reduce_scatter, all_to_all or send
    count  calls; of "send", tensors
    bytes  that this rank sends in all of them; of an all-reduce that N does not divide, the mean over the line
    what   travels
    """

    axis: str
    kind: str
    count: int
    bytes: float
    what: str


def messages(job: Job, pp_rank: int = 0) -> list[Messages]:
    """Return what a rank of the pipeline sends in a step that is not the first; nothing along an axis of one rank.

    Tokens that fill rows up, so that sp divides them, are sent too. Not counted is what `job.prefetch` has gathered and
    nobody reads in the end: where layers are frozen, the head is tied, or connections are deep.
    """
    return list(_messages(job, pp_rank))


@lru_cache(maxsize=8192)
def _messages(job: Job, pp_rank: int) -> tuple[Messages, ...]:
    sizes = lines(job)
    sums: dict[tuple[str, str, str], tuple[int, float]] = {}
    for part in (_states, layer_messages, _boundaries, _numbers):
        for axis, kind, what, calls, size in part(job, pp_rank):
            if sizes[axis] > 1 and calls:
                before = sums.get((axis, kind, what), (0, 0))
                sums[axis, kind, what] = before[0] + calls, before[1] + size
    return tuple(
        Messages(axis, kind, calls, _sent(kind, size, sizes[axis]), what)
        for (axis, kind, what), (calls, size) in sums.items()
    )


def lines(job: Job) -> dict[str, int]:
    """Return how many ranks each line has, by its name."""
    mesh = job.mesh
    merged = {"shards": job.shards, "copy": job.layout.ranks, "model": mesh.pp * mesh.tp, "world": job.devices}
    return {**mesh.sizes, **merged}


def _sent(kind: str, size: float, ranks: int) -> float:
    """Return what leaves a rank of buffers of so many bytes."""
    return {"send": size, "all_reduce": 2 * size * (ranks - 1) / ranks}.get(kind, size * (ranks - 1) / ranks)


# ---- parameters and their gradients


def _states(job: Job, pp_rank: int) -> Iterator[Said]:
    """Yield what ZeRO says, unit by unit, and the sums of tied gradients."""
    width, N = job.widths, job.shards
    for unit in units(job, pp_rank):
        stage = 2 if job.zero == 3 and unit.elements < job.persistence else job.zero
        size = N * shard_size(unit.elements, N) if stage else unit.elements
        if unit.trains:
            kind, times = ("reduce_scatter" if stage else "all_reduce"), (job.micros if stage >= 2 else 1)
            yield Said("shards", kind, "gradients", times, times * size * width.reduce)
        gathered = size * width.compute
        if unit.trains and stage in (1, 2):
            yield Said("shards", "all_gather", "updated parameters", 1, gathered)
        if stage == 3:
            times = job.micros * (1 + _is_read_again(job, unit))
            yield Said("shards", "all_gather", "parameters, forward", times, times * gathered)
            times = job.micros * _is_read_back(job, unit)
            yield Said("shards", "all_gather", "parameters, backward", times, times * gathered)
    yield from _ties(job, pp_rank)


def _is_read_again(job: Job, unit: Unit) -> bool:
    """Whether the head reads a unit that has been released after the embedding."""
    return job.layout.pp == 1 and job.model.tied and unit.name == "embed"


def _is_read_back(job: Job, unit: Unit) -> bool:
    """Whether a backward reads a unit, or brings it a gradient."""
    found, last = gradients_of(job), job.model.num_layers + 1
    home, _, number = unit.name.removesuffix(ALONE).partition(".")
    if home == "deep":
        return unit.trains and weighs(job.model, *span(job, unit.stage))
    if unit.trains:
        return True
    if home == "blocks":
        layer = int(number) + 1
        return found.passing[layer].is_any and (found.reads[layer] or job.is_recomputed(layer - 1))
    has_head = job.model.tied and unit.stage == job.layout.stages - 1
    return {"norm": found.first < last, "head": True, "embed": has_head}[home]


def _ties(job: Job, pp_rank: int) -> Iterator[Said]:
    """Yield what copies of one parameter say of their gradients: to every other holder."""
    alone = {unit.name: unit for unit in units(job, pp_rank) if unit.name.endswith(ALONE)}
    for name, unit in alone.items():
        others = 1 if name == TIED + ALONE else job.layout.pp - 1
        size = shard_size(unit.elements, job.shards) if job.zero else unit.elements
        yield Said("pp", "send", "gradients of copies", others, others * size * job.widths.gradient)


# ---- what crosses from stage to stage


def _boundaries(job: Job, pp_rank: int) -> Iterator[Said]:
    """Yield the tensors that cross, and their gradients; before the first of each boundary goes what will come."""
    found, last = gradients_of(job), job.layout.stages - 1
    cut = job.layout.tp if job.layout.tokens else 1
    each = stream_of(job) // cut
    for stage in range(pp_rank, job.layout.stages, job.layout.pp) if job.layout.pp > 1 else ():
        begin, end = span(job, stage)
        if stage < last:
            flags = crossing(job.model, end - 1, found.first)
            yield Said("pp", "send", "activations", len(flags) * job.micros, len(flags) * each)
            shape = [job.micro_batch, tokens_of(job) // cut, job.model.model_dim]
            forms = [[NAMES[job.dtype], shape, flag] for flag in flags]
            yield Said("pp", "send", "headers", 2, INTEGER + len(json.dumps(forms)))
        if stage > 0:
            count = sum(crossing(job.model, begin - 1, found.first))
            yield Said("pp", "send", "gradients of activations", count * job.micros, count * each)


# ---- numbers


def _numbers(job: Job, pp_rank: int) -> Iterator[Said]:
    """Yield checksums of rows, counts of tokens, loss, whether all is finite, and norm."""
    yield Said("copy", "all_gather", "numbers", 1, INTEGER * job.layout.ranks)
    yield Said("dp", "all_reduce", "numbers", 1, 2 * 8)
    yield Said("world", "all_reduce", "numbers", 2, 8 + 4)
    yield Said("world" if job.zero else "model", "all_reduce", "numbers", 1, 8)
