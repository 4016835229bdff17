"""Say what tp and sp send in the layers of a rank, forward and backward, micro-batch by micro-batch.

    tp, rows whole           all-reduces        out of attention and MLP; backward, into them
    tp, rows cut by tokens   all-gathers        into both, and what left them backward
                             reduce-scatters    out of both, and what entered them backward
    both                     all-reduces        gradients of what every rank has whole; three numbers a token for a loss
    sp, ulysses              all-to-alls        queries, keys, values, outputs; backward their gradients
    sp, ring                 sends              keys and values, N - 1 times; backward again, with their gradients

A layer that is recomputed sends again all that its forward does before the last tensor that the backward needs.

Shoeybi et al. 2019, section 3 (https://arxiv.org/abs/1909.08053). Korthikanti et al. 2022, section 4.2
(https://arxiv.org/abs/2205.05198). Jacobs et al. 2023, section 3 (https://arxiv.org/abs/2309.14509). Liu et al. 2023,
section 3 (https://arxiv.org/abs/2310.01889).
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from minispeed.ledger.gradients import Gradients, Parts, Passing, gradients, weighs
from minispeed.ledger.job import Job
from minispeed.ledger.units import bounds

INTEGER = 8  # bytes


class Said(NamedTuple):
    """Calls of one kind along an axis, before anybody asks how long its lines are.

    size  bytes of the whole buffers, of all calls together
    """

    axis: str
    kind: str
    what: str
    calls: int
    size: float


def layer_messages(job: Job, pp_rank: int) -> Iterator[Said]:
    """Yield what tp and sp say in the stages of a rank; blocks that say the same are counted together."""
    found = gradients_of(job)
    for stage in range(pp_rank, job.layout.stages, job.layout.pp):
        begin, end = span(job, stage)
        blocks = range(max(1, begin), min(end, job.model.num_layers + 1))
        alike = Counter((found.passing[j], found.parts[j], job.is_recomputed(j - 1)) for j in blocks)
        for (passing, parts, again), count in alike.items():
            for said in _block(job, passing, again and passing.is_any):
                yield said._replace(calls=count * said.calls, size=count * said.size)
            yield from _parts(job, parts, count)
        if blocks and job.layout.sp > 1:
            size = job.replica_rows * tokens_of(job) * job.layout.sp * INTEGER
            yield Said("sp", "all_gather", "documents", job.micros, size)
        if begin == 0:
            yield from _embedding(job, found)
        if end == job.model.num_layers + 2:
            yield from _head(job, found)
        if found.alpha and weighs(job.model, begin, end):
            yield from _parts(job, Parts(tokens=(found.alpha,)), 1)


def _block(job: Job, passing: Passing, again: bool) -> Iterator[Said]:
    """Yield what a block says; `again`: its forward runs twice, as far as the last of what the backward needs."""
    stream, m = stream_of(job), job.micros
    runs = 1 + again
    leaves = runs + (runs if job.model.dropout else 1)
    entered, left = passing.inputs + passing.stream, passing.attention + passing.outputs
    if job.layout.tokens:
        yield Said("tp", "all_gather", "activations", 2 * runs * m, 2 * runs * stream)
        yield Said("tp", "reduce_scatter", "activations", leaves * m, leaves * stream)
        yield Said("tp", "reduce_scatter", "gradients of activations", entered * m, entered * stream)
        yield Said("tp", "all_gather", "gradients of activations", left * m, left * stream)
    else:
        yield Said("tp", "all_reduce", "activations", leaves * m, leaves * stream)
        yield Said("tp", "all_reduce", "gradients of activations", entered * m, entered * stream)
    heads, groups = (
        job.replica_rows * tokens_of(job) * count // job.layout.tp * job.model.head_dim
        for count in (job.model.num_heads, job.model.num_kv_heads)
    )
    yield from (_ulysses if job.layout.sequence == "ulysses" else _ring)(job, heads, groups, runs, passing.queries)


def _ulysses(job: Job, heads: int, groups: int, runs: int, has_gradient: bool) -> Iterator[Said]:
    """Yield that queries, keys, values and outputs change places, and their gradients."""
    size, m = 2 * (heads + groups) * job.widths.compute, job.micros
    yield Said("sp", "all_to_all", "tokens for heads", 4 * runs * m, runs * size)
    yield Said("sp", "all_to_all", "gradients", 4 * has_gradient * m, has_gradient * size)


def _ring(job: Job, heads: int, groups: int, runs: int, has_gradient: bool) -> Iterator[Said]:
    """Yield that keys and values go round, backward again with their gradients, in fp32 or wider."""
    times, width = job.layout.sp - 1, job.widths.compute
    m, rounds = times * job.micros, runs + has_gradient
    yield Said("sp", "send", "keys and values", rounds * m, rounds * times * 2 * groups * width)
    size = has_gradient * times * 2 * groups * _wide(width)
    yield Said("sp", "send", "gradients of keys and values", has_gradient * m, size)


def _parts(job: Job, parts: Parts, count: int) -> Iterator[Said]:
    """Yield the sums of gradients of parameters that every rank of tp has whole."""
    sizes = [*parts.heads, *parts.adapters, *(parts.tokens if job.layout.tokens else ())]
    times = count * job.micros
    size = times * sum(sizes) * job.widths.compute
    yield Said("tp", "all_reduce", "gradients of parameters", times * len(sizes), size)


def _embedding(job: Job, found: Gradients) -> Iterator[Said]:
    kind = "reduce_scatter" if job.layout.tokens else "all_reduce"
    yield Said("tp", kind, "activations", job.micros, stream_of(job))
    if job.layout.tokens and found.first == 0:
        yield Said("tp", "all_gather", "gradients of activations", job.micros, stream_of(job))
    yield from _parts(job, found.parts[0], 1)


def _head(job: Job, found: Gradients) -> Iterator[Said]:
    """Yield what the norm and a loss over a cut vocabulary say: three numbers for a supervised token."""
    if job.layout.tokens:
        yield Said("tp", "all_gather", "activations", job.micros, stream_of(job))
    width = job.widths.compute
    rows = job.supervised * job.replica_rows * job.tokens / job.layout.sp
    yield Said("tp", "all_reduce", "loss", 2 * job.micros, 3 * rows * _wide(width))
    yield Said("tp", "all_reduce", "gradients of activations", job.micros, rows * job.model.model_dim * width)
    yield from _parts(job, found.parts[-1], 1)


def gradients_of(job: Job) -> Gradients:
    """Return where a job's model has gradients."""
    return gradients(job.model, job.lora_rank, job.lora_targets)


def span(job: Job, stage: int) -> tuple[int, int]:
    """Return the first layer of a stage, and the one after its last."""
    if job.layout.pp == 1:
        return 0, job.model.num_layers + 2
    cuts = bounds(job.model, job.layout.stages, job.lora_rank, job.lora_targets)
    return cuts[stage], cuts[stage + 1]


def tokens_of(job: Job) -> int:
    """Return a rank's tokens of a row, filled up so that sp divides it."""
    sp = job.layout.sp
    chunks = sp * (2 if sp > 1 and job.layout.sequence == "ring" else 1)
    return -(-job.tokens // chunks) * chunks // sp


def stream_of(job: Job) -> int:
    """Return the bytes of a layer's features, of all rows of a replica, on a rank of sp."""
    return job.replica_rows * tokens_of(job) * job.model.model_dim * job.widths.compute


def _wide(width: int) -> int:
    return max(width, 4)
