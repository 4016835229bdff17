"""Say how long a step of a job takes on a kind of machine, and what the time goes to.

    stage's work / rates + its calls of tp and sp  ->  time of each action  ->  the pipeline, simulated
                                                       + the optimizer and the calls that follow it

What each rank of the pipeline does follows from closed forms (`work`, `network`); how they wait for each other, from
running the very programs of the schedule on virtual ranks. Ranks along dp, sp and tp are alike, so one pipeline stands
for all of them: 512 devices take no longer to simulate than those of their pipeline.

What hides behind what, unless the devices are a CPU's cores (`Profile.on_cpu`), where nothing does:

    a ring's keys and values          behind the attention of the block that they pass through
    reductions, with overlap          behind the backward they belong to, all but that of the last unit
    gathers of stage 3, with prefetch behind what computes, all but that of the first unit

Offloaded states are updated as fast as bytes travel to the host and back: no profile knows the host's own speed.
Dropout, deep connections and what a program does around its steps are left out.

Narayanan et al. 2021, section 3, for the calls of tp and pp (https://arxiv.org/abs/2104.04473); for the shards', ZeRO,
Rajbhandari et al. 2020, section 7 (https://arxiv.org/abs/1910.02054).
Letters: N shards, n tokens of a micro-batch on one rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from minispeed.ledger.job import Job
from minispeed.ledger.units import Unit, bounds, units
from minispeed.model.flops import step_flops
from minispeed.pipeline.actions import PARTNER, Program
from minispeed.pipeline.messages import with_messages
from minispeed.pipeline.schedule import SCHEDULES, with_reductions
from minispeed.pipeline.simulate import Cost, simulate
from minispeed.pipeline.timeline import Timeline
from minispeed.plan import work
from minispeed.plan.network import Network
from minispeed.plan.work import Both, Work
from minispeed.profiles import Profile

AXES = ("tp", "sp", "zero", "pp")
AGREEMENTS = 3  # numbers on which all ranks agree in a step: tokens, finiteness, norm


@dataclass(frozen=True, kw_only=True)
class Part:
    """Seconds of one stage and one micro-batch, or of one step: computing, and calls by axis that nothing hides."""

    compute: float = 0.0
    tp: float = 0.0
    sp: float = 0.0
    zero: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.tp + self.sp + self.zero

    def __add__(self, other: "Part") -> "Part":
        return Part(**{name: getattr(self, name) + getattr(other, name) for name in FIELDS})


FIELDS = ("compute", "tp", "sp", "zero")


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a stage's actions take, seconds.

    forward, backward  of a micro-batch
    weights            that part of the backward's computing which only makes gradients of weights
    reduce             of the gradients: of each micro-batch from ZeRO stage 2 on, else of the step
    send               of a micro-batch's activations to the next stage, and of their gradients back
    """

    forward: Part
    backward: Part
    weights: float
    reduce: float
    send: float
    send_back: float


@dataclass(frozen=True)
class Step:
    """A step on one pipeline, which stands for all that are alike.

    stages      their costs
    timeline    forwards, backwards, messages and reductions, as simulated
    optimizer   seconds of the update on each rank of the pipeline, calls that follow it left out
    after       seconds of those calls
    """

    job: Job
    profile: Profile
    stages: Sequence[StageCost]
    timeline: Timeline
    optimizer: Sequence[float]
    after: Sequence[float]

    @cached_property
    def seconds(self) -> float:
        """The time of a step."""
        return float(self.timeline.length) + max(a + b for a, b in zip(self.optimizer, self.after))

    @cached_property
    def breakdown(self) -> Mapping[str, float]:
        """Seconds of compute, of tp, sp, zero and pp, of the optimizer, and of the bubble: what they do and wait for.

        Each is the mean over the pipeline's ranks; together they are the step. A message between stages holds both
        its ranks for as long as it takes; what they wait for each other before it is bubble.
        """
        p = self.job.layout.pp
        sums = {name: 0.0 for name in ("compute", *AXES, "optimizer", "bubble")}
        for rank in range(p):
            mine = self._of(rank)
            idle = max(0.0, self.seconds - sum(mine.values()))
            mine["pp"] = min(self._messages(rank), idle)
            mine["bubble"] = idle - mine["pp"]
            for name, seconds in mine.items():
                sums[name] += seconds / p
        return sums

    @property
    def tokens_per_second(self) -> float:
        """All replicas together."""
        return self.job.rows * self.job.tokens / self.seconds

    @cached_property
    def flops_per_second(self) -> float:
        """What the mathematics asks for, of each device: without what is computed again."""
        job = self.job
        supervised = round(job.supervised * job.rows * job.tokens)
        flops = step_flops(job.model, rows=job.rows, tokens=job.tokens, supervised=supervised).model
        return flops / self.seconds / job.devices

    @property
    def mfu(self) -> float | None:
        """The share of the datasheet's peak (PaLM, appendix B); None where no datasheet is known."""
        peak = self.profile.peak.get(self.job.dtype)
        return self.flops_per_second / peak if peak else None

    def _of(self, rank: int) -> dict[str, float]:
        """Return what a rank does in a step but for its messages to other stages."""
        done = {name: 0.0 for name in FIELDS}
        micros = self.job.micros
        for stage in self.stages[rank :: self.job.layout.pp]:
            both = stage.forward + stage.backward
            for name in FIELDS:
                done[name] += micros * getattr(both, name)
            done["zero"] += stage.reduce * (micros if self.job.zero >= 2 else 1)
        return {**done, "optimizer": self.optimizer[rank], "zero": done["zero"] + self.after[rank]}

    def _messages(self, rank: int) -> float:
        cost = pipeline_cost(self.stages)
        sends = (event.action for event in self.timeline.of(rank) if event.action.kind in PARTNER)
        return sum(float(cost(action)) for action in sends if action.kind.startswith("SEND"))


def step(job: Job, profile: Profile) -> Step:
    """Return how long a step takes, and what it goes to.

    Raises  KeyError for a dtype that the profile has no products in
    """
    network = Network(job.mesh, profile)
    stages = stage_costs(job, network)
    pipeline = programs(job.layout.schedule, job.layout.pp, job.layout.virtual, job.micros, job.zero >= 2)
    timeline = simulate(pipeline, pipeline_cost(stages))
    ranks = range(job.layout.pp)
    return Step(
        job,
        profile,
        stages,
        timeline,
        [update_seconds(job, network, units(job, rank)) for rank in ranks],
        [after_seconds(job, network, units(job, rank)) for rank in ranks],
    )


@lru_cache(maxsize=256)
def programs(schedule: str, pp: int, virtual: int, micros: int, each_micro: bool) -> Sequence[Program]:
    """Return what the ranks of a pipeline do, as the engine runs it, with the reductions as actions of their own."""
    return with_reductions(with_messages(SCHEDULES[schedule](pp, micros, virtual)), each_micro=each_micro)


def pipeline_cost(stages: Sequence[StageCost]) -> Cost:
    """Return what each action takes, for `simulate`."""
    return Cost(
        f=[stage.forward.total for stage in stages],
        b=[stage.backward.total for stage in stages],
        bi=[stage.backward.total - stage.weights for stage in stages],
        bw=[stage.weights for stage in stages],
        send_f=[stage.send for stage in stages],
        send_b=[stage.send_back for stage in stages],
        reduce=[stage.reduce for stage in stages],
    )


def stage_costs(job: Job, network: Network) -> list[StageCost]:
    """Return the costs of each stage of a job's pipeline."""
    cuts = cuts_of(job)
    held = [unit for rank in range(job.layout.pp) for unit in units(job, rank)]
    return [
        _stage(job, network, range(cuts[index], cuts[index + 1]), [unit for unit in held if unit.stage == index], index)
        for index in range(job.layout.stages)
    ]


def cuts_of(job: Job) -> Sequence[int]:
    """Return where the stages begin among the L + 2 layers, as the engine cuts them, and where the last ends."""
    if job.layout.pp == 1:
        return 0, job.model.num_layers + 2
    return bounds(job.model, job.layout.stages, job.lora_rank, job.lora_targets)


def layer_work(job: Job, layer: int) -> tuple[Both, Work]:
    """Return the work of a layer for one micro-batch on one rank, and how much of it only makes weights' gradients.

    What is recomputed is part of the backward.
    """
    model, layout, rows, trains = job.model, job.layout, job.micro_batch, not job.lora_rank
    shape = dict(tokens=job.tokens, width=job.widths.compute, tp=layout.tp, sp=layout.sp)
    if layer == 0:
        return work.embedding(model, rows=rows, **shape, trains=trains), Work()
    if layer == model.num_layers + 1:
        return work.head(model, rows=rows * job.supervised, **shape), Work()
    both = work.block(model, rows=rows, **shape, alike=layout.tp if layout.tokens else 1, trains=trains)
    again = Work()
    if job.is_recomputed(layer - 1):  # up to the last product, behind which nothing is left to save
        last = 2 * rows * job.tokens / layout.sp * model.hidden_dim / layout.tp * model.model_dim
        again = both.forward + Work(flops=-last, operations=-1)
    elif job.recompute == "attention":
        again = Work(attention=both.forward.attention / 2, operations=2)
    products = 5 if model.mlp == "swiglu" else 4
    weights = Work() if job.lora_rank else Work(flops=both.forward.flops, operations=products)
    return Both(forward=both.forward, backward=both.backward + again), weights


def _stage(job: Job, network: Network, layers: range, held: Sequence[Unit], index: int) -> StageCost:
    forward, backward, weights = Part(), Part(), 0.0
    for layer in layers:
        both, only_weights = layer_work(job, layer)
        there, back = layer_calls(job, network, layer, both)
        forward += there + Part(compute=both.forward.seconds(network.rates, job.dtype))
        backward += back + Part(compute=both.backward.seconds(network.rates, job.dtype))
        weights += only_weights.seconds(network.rates, job.dtype)
    gathers = unit_gathers(job, network, held)
    is_last = index == job.layout.stages - 1
    return StageCost(
        forward=forward + Part(zero=_exposed(job, network, gathers, forward.compute, bool(job.prefetch), first=True)),
        backward=backward
        + Part(zero=_exposed(job, network, gathers, backward.compute, bool(job.prefetch), first=True)),
        weights=weights,
        reduce=_exposed(job, network, unit_reductions(job, network, held), backward.compute, job.overlap, first=False),
        send=0.0 if is_last else message_seconds(job, network, index % job.layout.pp),
        send_back=0.0 if index == 0 else message_seconds(job, network, (index - 1) % job.layout.pp),
    )


def message_seconds(job: Job, network: Network, rank: int) -> float:
    """Return the seconds of a micro-batch's stream from a rank of the pipeline to the next, or back."""
    layout = job.layout
    shared = layout.sp * (layout.tp if layout.tokens else 1)
    size = job.micro_batch * job.tokens / shared * job.model.model_dim * job.widths.compute
    return network.to_next(rank).seconds(size)


def layer_calls(job: Job, network: Network, layer: int, both: Both) -> tuple[Part, Part]:
    """Return the seconds of a layer's calls along tp and sp, forward and backward."""
    n = job.micro_batch * job.tokens / job.layout.sp
    stream = n * job.model.model_dim * job.widths.compute
    if job.layout.tp == 1:
        once = numbers = 0.0
    else:
        once = network.all_reduce("tp", stream)
        numbers = network.all_reduce("tp", n * work.WIDE) + network.all_reduce("tp", 2 * n * work.WIDE)
    if layer == 0:
        return Part(tp=once), Part()
    if layer == job.model.num_layers + 1:
        return Part(tp=numbers), Part(tp=once)
    there, back = _sequence(job, network, both)
    forward, backward = Part(tp=2 * once, sp=there), Part(tp=2 * once, sp=back)
    return forward, backward + forward if job.is_recomputed(layer - 1) else backward


def _sequence(job: Job, network: Network, both: Both) -> tuple[float, float]:
    """Return the seconds of a block's calls along sp, forward and backward."""
    P, width = job.layout.sp, job.widths.compute
    if P == 1:
        return 0.0, 0.0
    n = job.micro_batch * job.tokens / P
    heads, shared = (
        count * job.model.head_dim / job.layout.tp for count in (job.model.num_heads, job.model.num_kv_heads)
    )
    if job.layout.sequence == "ulysses":
        once = 2 * (network.gather("sp", n * heads * width) + network.gather("sp", n * shared * width))
        return once, once
    link, rates = network.link("sp"), network.rates
    there = link.seconds((P - 1) * 2 * n * shared * width, P - 1)
    back = link.seconds((P - 1) * 2 * n * shared * (width + max(width, 4)), P - 1)
    if network.profile.on_cpu:
        return there, back
    rate = rates.attention.get(job.dtype, rates.flops[job.dtype])
    return max(0.0, there - both.forward.attention / rate), max(0.0, back - both.backward.attention / rate)


def unit_gathers(job: Job, network: Network, held: Sequence[Unit]) -> list[float]:
    """Return the seconds in which each unit of a stage is gathered, once; none below ZeRO stage 3."""
    if job.zero < 3:
        return []
    sizes = [unit.elements * job.widths.compute for unit in held if unit.elements > job.persistence]
    away = network.profile.host.seconds if job.offload_param else (lambda size: 0.0)
    return [_over_shards(job, network, size) + away(size / job.shards) for size in sizes]


def unit_reductions(job: Job, network: Network, held: Sequence[Unit]) -> list[float]:
    """Return the seconds in which the gradients of each unit of a stage are summed, once."""
    sizes = [unit.elements * job.widths.reduce for unit in held if unit.trains]
    return [(1 + (job.zero == 0)) * _over_shards(job, network, size) for size in sizes]


def _over_shards(job: Job, network: Network, size: float) -> float:
    """Return the seconds of a reduce-scatter or an all-gather over the ranks that hold shards."""
    axis = "dp" if job.mesh.dp > 1 else "sp"
    return network.gather(axis, size, ranks=job.shards)


def _exposed(job: Job, network: Network, calls: Sequence[float], behind: float, hides: bool, *, first: bool) -> float:
    """Return what is left of calls beside computing of so many seconds, one of which has nothing to hide behind."""
    if not calls or not hides or network.profile.on_cpu:
        return sum(calls)
    alone = calls[0] if first else calls[-1]
    return alone + max(0.0, sum(calls) - alone - behind)


def update_seconds(job: Job, network: Network, held: Sequence[Unit]) -> float:
    """Return the seconds of an update of a rank's shards, of the norm before it, and of their way to the host."""
    mine = [unit.elements / (job.shards if job.zero else 1) for unit in held if unit.trains]
    widths = job.widths
    update = work.optimizer(sum(mine), width=widths.gradient, master=widths.master, tensors=len(mine))
    agreeing = AGREEMENTS * network.agree()
    if not job.offload_optimizer:
        rates = network.rates
        return update.operations * rates.overhead + update.bytes / rates.bandwidth + agreeing
    away = sum(mine) * (widths.gradient + widths.compute)
    return network.profile.host.seconds(away + update.bytes, 2) + agreeing


def after_seconds(job: Job, network: Network, held: Sequence[Unit]) -> float:
    """Return the seconds in which updated parameters are gathered: at ZeRO stages 1 and 2."""
    sizes = [unit.elements * job.widths.compute for unit in held if unit.trains]
    return sum(_over_shards(job, network, size) for size in sizes) if job.zero in (1, 2) else 0.0
