"""Estimate steps without simulating them: in closed form, all settings of a layout at once.

    a rank of the pipeline    m (forward + backward + gathers) of its stages + reductions + optimizer + what follows
    the pipeline              the slowest rank, and its wait for each of the others: the bubble

    of each other rank        gpipe, 1F1B F + B      interleaved (F + B)/v      ZB-H1 F + BI - BW

A message between stages holds both its ranks. What layers of one kind take is the same in all of them, and in every
layout that cuts them alike; so thousands of candidates share a few hundred costs, those of `step.py`.

Narayanan et al. 2021, section 2.2 (https://arxiv.org/abs/2104.04473); Qi et al. 2024, section 2
(https://arxiv.org/abs/2401.10241).
Letters: p ranks of a pipeline, v stages on each, m micro-batches, L blocks. Arrays: z ZeRO stages, o what is offloaded,
r what is recomputed, b rows of a micro-batch.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from minispeed.axes import Layout
from minispeed.ledger.job import Job
from minispeed.ledger.units import units
from minispeed.plan import step as costs
from minispeed.plan.network import Network
from minispeed.plan.request import Request
from minispeed.plan.space import OFFLOADS, Settings, job_of

T = TypeVar("T")
Array = NDArray[np.float64]
KINDS = ("embedding", "head", "block", "attention again", "block again")  # of layers, by what they take


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of a step on the slowest rank, and what they go to."""

    compute: float
    tp: float
    sp: float
    zero: float
    pp: float
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


PARTS = tuple(field.name for field in fields(Estimate))


@dataclass(frozen=True)
class Sort:
    """Ranks of a pipeline that have the same layers: the first of them, how many they are, and of each kind of layer.

    layers  by what is recomputed, (r, kinds)
    """

    rank: int
    count: int
    layers: Array


class Estimator:
    """The costs of a request's candidates, each computed once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._known: dict[Hashable, Any] = {}

    def totals(self, layout: Layout, settings: Settings) -> Array:
        """Return the seconds of a step with each of the settings.  (z, o, r, b)"""
        ranks = [np.sum(list(parts.values()), axis=0) for parts in self._ranks(layout, settings)]
        most: Array = np.max(ranks, axis=0)
        return most

    def of(self, job: Job) -> Estimate:
        """Return what a step of a candidate takes."""
        offload = {pair: name for name, pair in OFFLOADS.items()}[job.offload_optimizer, job.offload_param]
        one = Settings((job.zero,), (offload,), (job.recompute,), (job.micro_batch,))
        found = [Estimate(**{name: float(of.item()) for name, of in p.items()}) for p in self._ranks(job.layout, one)]
        return max(found, key=lambda estimate: estimate.total)

    def _ranks(self, layout: Layout, settings: Settings) -> list[Mapping[str, Array]]:
        """Return, for each sort of rank, its parts of a step.  (z, o, r, b)"""
        first = self._job(layout, micro_batch=settings.micro_batch[0])
        micros = np.array([float(-(-first.replica_rows // rows)) for rows in settings.micro_batch])
        layers = np.stack([self._layers(layout, rows) for rows in settings.micro_batch])  # (b, kinds, 7)
        sends = self._sends(layout, settings)
        sorts = self._sorts(layout, settings.recompute)
        ranks = [self._rank(layout, settings, of, layers, micros, sends) for of in sorts]
        waits = [parts["bubble"] for parts in ranks]
        together = np.sum([of.count * wait for of, wait in zip(sorts, waits)], axis=0) + (layout.pp - 1) * sends
        return [{**parts, "bubble": together - wait} for parts, wait in zip(ranks, waits)]

    def _rank(
        self, layout: Layout, settings: Settings, of: Sort, layers: Array, micros: Array, sends: Array
    ) -> Mapping[str, Array]:
        """Return the parts of one sort of rank; as its bubble, what each other rank waits for it."""
        v = layout.virtual
        there, tp, sp, back, tp_back, sp_back, weights = np.einsum("rk,bkf->frb", of.layers, layers)
        gathered, summed, alone = self._sharding(layout, of.rank, settings)
        if not self.request.profile.on_cpu:  # what the backward hides
            summed = alone + np.maximum(0.0, summed - alone - back)
        times = np.where(np.array(settings.zero).reshape(-1, 1, 1, 1) >= 2, micros, 1.0)
        update, after = np.where(micros == 1, *self._ends(layout, of.rank, settings))
        inside = there + back + tp + tp_back + sp + sp_back
        waits = (inside - 2 * weights if layout.schedule == "zb_h1" else inside / v) + 2 * gathered
        parts = {
            "compute": micros * (there + back),
            "tp": micros * (tp + tp_back),
            "sp": micros * (sp + sp_back),
            "zero": micros * 2 * gathered + times * summed + after,
            "pp": micros * sends * v,
            "bubble": waits,
            "optimizer": update,
        }
        full = np.broadcast_shapes(*(part.shape for part in parts.values()))
        return {name: np.broadcast_to(part, full) for name, part in parts.items()}

    def _layers(self, layout: Layout, rows: int) -> Array:
        """Return the seconds of each kind of layer: forward, its tp, sp; backward, likewise; weights.  (kinds, 7)"""
        key = ("layers", layout.tp, layout.sp, layout.sequence, layout.tokens, rows)

        def make() -> Array:
            jobs = {
                again: self._job(layout, micro_batch=rows, recompute=again) for again in ("none", "attention", "all")
            }
            last = self.request.model.num_layers + 1
            chosen = [("none", 0), ("none", last), ("none", 1), ("attention", 1), ("all", 1)]
            return np.array([_seconds(jobs[again], self._network(jobs[again]), layer) for again, layer in chosen])

        return self._once(key, make)

    def _sorts(self, layout: Layout, recompute: Sequence[str]) -> list[Sort]:
        def make() -> list[Sort]:
            found: dict[bytes, Sort] = {}
            jobs = [self._job(layout, recompute=again) for again in recompute]
            for rank in range(layout.pp):
                layers = np.array([_counts(job, rank) for job in jobs], dtype=float)
                known = found.get(layers.tobytes(), Sort(rank, 0, layers))
                found[layers.tobytes()] = replace(known, count=known.count + 1)
            return list(found.values())

        return self._once(("sorts", layout.pp, layout.virtual, tuple(recompute)), make)

    def _sharding(self, layout: Layout, rank: int, settings: Settings) -> Array:
        """Return the seconds of a rank's gathers, once; its sums of gradients; the last of these.  (3, z, o, 1, 1)"""

        def seconds(zero: int, offload: str) -> tuple[float, float, float]:
            job = self._job(layout, zero=zero, offload=offload)
            network, held = self._network(job), units(job, rank)
            sums = costs.unit_reductions(job, network, held)
            return sum(costs.unit_gathers(job, network, held)), sum(sums), sums[-1] if sums else 0.0

        key = ("sharding", *_cut(layout), rank, settings.zero, settings.offload)
        return self._once(key, lambda: _over(settings, seconds))

    def _ends(self, layout: Layout, rank: int, settings: Settings) -> Array:
        """Return the seconds of a rank's optimizer and of the gathers that follow it.  (2, 2, z, o, 1, 1)

        First those where gradients are not added up, of one micro-batch, then those where they are.
        """
        replica = self._job(layout).replica_rows

        def seconds(zero: int, offload: str, rows: int) -> tuple[float, float]:
            job = self._job(layout, zero=zero, offload=offload, micro_batch=rows)
            network, held = self._network(job), units(job, rank)
            return costs.update_seconds(job, network, held), costs.after_seconds(job, network, held)

        def make() -> Array:
            return np.stack([_over(settings, partial(seconds, rows=rows)) for rows in (replica, 1)])

        return self._once(("ends", *_cut(layout), rank, settings.zero, settings.offload), make)

    def _sends(self, layout: Layout, settings: Settings) -> Array:
        """Return the seconds of a stage's messages for one micro-batch: activations on, their gradients back.  (b,)"""
        if layout.pp == 1:
            return np.zeros(len(settings.micro_batch))

        def make(rows: int) -> float:
            job = self._job(layout, micro_batch=rows)
            return 2 * max(costs.message_seconds(job, self._network(job), rank) for rank in range(layout.pp - 1))

        key = ("sends", layout.pp, layout.sp, layout.tp, layout.tokens)
        return np.array([self._once((*key, rows), partial(make, rows)) for rows in settings.micro_batch])

    def _job(self, layout: Layout, **chosen: Any) -> Job:
        plain: dict[str, Any] = {"zero": 0, "offload": "none", "recompute": "none", "micro_batch": 1}
        return job_of(self.request, layout, **(plain | chosen))

    def _network(self, job: Job) -> Network:
        return Network(job.mesh, self.request.profile)

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found


def _cut(layout: Layout) -> tuple[int, ...]:
    """Return what the units of a rank, and who shares them, follow from."""
    return layout.pp, layout.virtual, layout.sp, layout.tp


def _over(settings: Settings, seconds: Callable[[int, str], tuple[float, ...]]) -> Array:
    """Return numbers that depend on the ZeRO stage and on what is offloaded.  (numbers, z, o, 1, 1)"""
    rows = [[seconds(zero, offload) for offload in settings.offload] for zero in settings.zero]
    return np.moveaxis(np.array(rows), -1, 0)[..., None, None]


def _counts(job: Job, rank: int) -> list[int]:
    """Return how many layers of each of the `KINDS` a rank has."""
    cuts, p, L = costs.cuts_of(job), job.layout.pp, job.model.num_layers
    counts = dict.fromkeys(KINDS, 0)
    for stage in range(rank, job.layout.stages, p):
        for layer in range(cuts[stage], cuts[stage + 1]):
            plain = "attention again" if job.recompute == "attention" else "block"
            block = "block again" if 1 <= layer <= L and job.is_recomputed(layer - 1) else plain
            counts[{0: "embedding", L + 1: "head"}.get(layer, block)] += 1
    return list(counts.values())


def _seconds(job: Job, network: Network, layer: int) -> list[float]:
    both, only_weights = costs.layer_work(job, layer)
    there, back = costs.layer_calls(job, network, layer, both)
    computing = [work.seconds(network.rates, job.dtype) for work in (both.forward, both.backward, only_weights)]
    return [computing[0], there.tp, there.sp, computing[1], back.tp, back.sp, computing[2]]
