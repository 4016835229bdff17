"""Say how many bytes a rank of a job holds when it holds most, without running it.

    parameters, gradients, optimizer    `states.py`, of the rank's units
    activations                         `layers.py`, times the micro-batches that the schedule keeps in flight
    buffers                             all else that is there at that moment

The most is there in some backward: of the loss, or of a block, the last one first. Each such moment is added up, and
the largest counts. What is held but not yet there at that moment, or no more, makes buffers smaller.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from minispeed.ledger import buffers
from minispeed.ledger.flight import Moment, moments
from minispeed.ledger.job import Job
from minispeed.ledger.layers import Setting, adapted, block, final_norm
from minispeed.ledger.states import Held, held, shard_size
from minispeed.ledger.units import TIED, Unit, bounds, units


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank; host is what offload keeps in the machine's own memory."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        """All that lies on the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


def peak(job: Job) -> Memory:
    """Return what the rank with most holds."""
    return max((memory(job, rank) for rank in range(job.layout.pp)), key=lambda one: one.total)


def memory(job: Job, pp_rank: int = 0) -> Memory:
    """Return what each rank at this place in the pipeline holds at most, from its second step on."""
    return _Rank(job, pp_rank).memory()


class Stretch(NamedTuple):
    """What a stage holds for one micro-batch.

    saved     by autograd for the backward
    held      beside it, by the pipeline: what came in and what went out
    put_off   after the first half of a split backward
    forward   the most during the forward, beyond `saved`
    steps     of the backward: (layer, bytes that are there beyond `saved`), those that may be the most
    """

    saved: int
    held: int
    put_off: int
    forward: int
    steps: tuple[tuple[int, int], ...]


@lru_cache(maxsize=8192)
def stretch(of: Setting, recompute: str, first: int, last: int, supervised: int, head_stays: bool) -> Stretch:
    """Play layers first .. last - 1 of a stage.

    supervised   tokens of a micro-batch whose loss is asked for
    head_stays   whether the head's gradient waits until the end of the backward
    """
    D, L, e = of.config.model_dim, of.config.num_layers, of.e
    stream, whole_t = of.stream * D * e, of.s * of.p
    mine = [layer for layer in range(first, last) if 1 <= layer <= L]
    again = {layer for layer in mine if _is_recomputed(recompute, layer - 1)}
    trains = not of.lora_rank
    plays = {}
    for layer in mine:
        reaches = of.reaches and (trains or layer > 1)
        plays[layer] = block(replace(of, reaches=reaches, holds=layer == last - 1))
    saved_by = {layer: stream if layer in again else play.kept for layer, play in plays.items()}
    turns = bias = 0
    if mine:
        turns = (of.config.positions == "rotary") * of.b * of.s * of.config.head_dim * e
        has_bias = of.config.attention != "tiled" and (of.p == 1 or of.sequence == "ulysses")
        bias = has_bias * of.b * whole_t * whole_t * e
    adapts = trains or "attention.qkv" in adapted(of.config, of.lora_rank, of.lora_targets)
    is_any_kept = any(layer not in again and (adapts or layer > 1) for layer in mine)
    saves_bias = is_any_kept and of.config.attention == "fused" and of.recomputed == "none"
    tables = turns * is_any_kept + bias * saves_bias
    beside = turns + bias - tables if again or of.recomputed == "attention" else 0
    embedding = (9 * of.b * of.s if of.t > 1 else 0) if first == 0 else 0
    embedding += (first == 0 and of.config.dropout > 0) * of.stream * D
    is_last = last == L + 2
    V = -(-of.config.vocab_size // of.t)
    loss_saved = norm_saved = 0
    head = V * D * e * trains
    if is_last:
        loss_saved = supervised * (D * e + 8 + of.w) + of.b * of.s
        norm_saved = final_norm(of).kept
    below = tables + embedding + sum(saved_by.values()) + loss_saved + norm_saved
    saved, steps = below, []
    stays = head * head_stays * is_last
    if is_last:
        steps.append((L + 2, buffers.logits(of, supervised)))
        below -= loss_saved + norm_saved
        steps.append((L + 1, below - saved + final_norm(of).backward + head))
    so_far, forward = turns + bias + embedding, (3 * stream if first == 0 else 0) - saved
    for layer in mine:
        forward = max(forward, so_far + plays[layer].forward + stream - saved)
        so_far += saved_by[layer]
    put_off = 0
    for layer in reversed(mine):
        below -= saved_by[layer]
        replay = stream if layer in again else 0
        play = plays[layer]
        most = max(play.forward + stream, play.backward) if layer in again else play.backward
        given = stream * (not is_last and layer < last - 1 and not of.put_off)
        steps.append((layer, below - saved + put_off + max(most, replay) + stays + given))
        put_off += play.put_off
    if first == 0 and trains:
        tied = of.config.tied and is_last
        table = head * (1 + 2 * tied) + (of.config.positions == "learned") * of.config.max_positions * D * e
        steps.append((0, below - saved + put_off + stream * (1 + (not is_last)) + table))
    steps.append((-1, put_off - saved + stream * (not is_last)))
    held = beside
    if not is_last:
        held += stream
    if first > 0 and not (of.config.norm == "layernorm" or e == of.w or first in again):
        held += stream
    return Stretch(saved, held, put_off + stream * (first > 0), forward, tuple(steps))


def _is_recomputed(recompute: str, index: int) -> bool:
    every = {"none": 0, "attention": 0, "all": 1}.get(recompute)
    every = int(recompute) if every is None else every
    return every > 0 and index % every == 0


class _Rank:
    """What one rank of a job holds."""

    def __init__(self, job: Job, pp_rank: int) -> None:
        self.job, self.rank, layout = job, pp_rank, job.layout
        self.units, self.widths = units(job, pp_rank), job.widths
        lora = (job.lora_rank, job.lora_targets)
        cuts = bounds(job.model, layout.stages, *lora) if layout.pp > 1 else (0, job.model.num_layers + 2)
        self.spans = [(cuts[stage], cuts[stage + 1]) for stage in range(pp_rank, layout.stages, layout.pp)]
        local = -(-job.tokens // layout.sp)
        self.setting = Setting(
            config=job.model,
            b=min(job.micro_batch, job.replica_rows),
            s=local,
            dtype=job.dtype,
            t=layout.tp,
            is_cut=layout.tokens,
            p=layout.sp,
            sequence=layout.sequence,
            recomputed="attention" if job.recompute == "attention" else "none",
            lora_rank=job.lora_rank,
            lora_targets=job.lora_targets,
            put_off=layout.pp > 1 and layout.schedule == "zb_h1",
        )
        supervised = round(job.supervised * self.setting.b * local)
        head_stays = job.zero < 3 or self.setting.put_off or (job.model.tied and layout.pp == 1)
        self.stages = [
            stretch(self.setting, job.recompute, first, last, supervised, head_stays) for first, last in self.spans
        ]

    def memory(self) -> Memory:
        """Add up every moment, and take the largest."""
        job = self.job
        states, host = self.states()
        base = states.parameters + states.optimizer + self.resident()
        flight = moments(job.layout.schedule, job.layout.pp, job.micros, job.layout.virtual, self.rank)
        most = max(self.at(moment) for moment in flight)
        total = base + max(most, self.after())
        activations = max(self.activations(moment) for moment in flight)
        rest = states.parameters + states.gradients + states.optimizer + activations
        return Memory(
            parameters=states.parameters,
            gradients=states.gradients,
            optimizer=states.optimizer,
            activations=activations,
            buffers=total - rest,
            host=host,
        )

    def states(self) -> tuple[Held, int]:
        """Return what is held on the device, and what on the host."""
        job, found = self.job, Held(0, 0, 0)
        for stage, of in self.by_stage():
            trained, frozen = ([u.elements for u in of if u.trains is trains] for trains in (True, False))
            one = held(trained, ranks=job.shards, stage=stage, widths=self.widths, frozen=frozen)
            found = Held(*(a + b for a, b in zip((found.parameters, found.gradients, found.optimizer),
                                                 (one.parameters, one.gradients, one.optimizer))))  # fmt: skip
        if not job.offload_optimizer and not job.offload_param:
            return found, 0
        states = 3 * self.shards(self.trained) * self.widths.master * job.offload_optimizer
        away = found.parameters * (job.offload_param and job.zero == 3)
        return Held(found.parameters - away, found.gradients, 0 if states else found.optimizer), states + away

    def by_stage(self) -> Iterator[tuple[int, list[Unit]]]:
        """Yield the units by the stage of ZeRO that they run at: small ones stay whole."""
        job = self.job
        if job.zero < 3 or not job.persistence:
            yield job.zero, self.units
            return
        for stage, is_small in ((2, True), (3, False)):
            yield stage, [unit for unit in self.units if (unit.elements < job.persistence) is is_small]

    @property
    def trained(self) -> list[Unit]:
        """The units that have gradients."""
        return [unit for unit in self.units if unit.trains]

    def shards(self, of: Sequence[Unit]) -> int:
        """Return the elements of a rank's shards of some units."""
        return sum(u.elements if self.job.zero == 0 else shard_size(u.elements, self.job.shards) for u in of)

    def resident(self) -> int:
        """Return what is there all the time beside parameters and optimizer: memory that gradients pass through."""
        job, widths, N = self.job, self.widths, self.job.shards
        shared = 0
        if job.layout.sp > 1:
            shared = 6 * 8 * self.setting.b * self.setting.s * job.micros
        if job.zero < 2:
            return shared + sum(u.elements if job.zero == 0 else N * shard_size(u.elements, N) for u in self.trained) * widths.collect
        sizes = [N * shard_size(u.elements, N) * widths.collect for u in self.order()]
        if self.setting.put_off:
            return shared + sum(sizes)
        return shared + buffers.rooms(sizes, overlap=job.overlap)

    def order(self) -> list[Unit]:
        """Return the trained units as a backward reduces them."""
        return sorted(self.trained, key=lambda unit: (unit.stage, self.place(unit)), reverse=True)

    def place(self, unit: Unit) -> int:
        """Return the layer in whose backward a unit is reduced; those that no module's forward uses come last."""
        is_late = self.job.zero < 3 and not unit.name.startswith(("blocks.", "embed", "norm"))
        return -1 if is_late or (self.job.zero < 3 and unit.name.endswith("alone")) else self.layer(unit)

    def activations(self, moment: Moment) -> int:
        """Return what autograd keeps at a moment."""
        return sum(n * stage.saved for n, stage in zip(moment.whole, self.stages))

    def at(self, moment: Moment) -> int:
        """Return what is there in a backward at most, without what is there all the time."""
        job, stage = self.job, self.stages[moment.chunk]
        flying = sum(n * (one.saved + one.held) for n, one in zip(moment.whole, self.stages))
        flying += sum(n * one.put_off for n, one in zip(moment.halves, self.stages))
        if moment.kind == "F":
            return flying + stage.forward + self.gradients(-1, moment)
        if moment.kind == "BW":
            largest = self.linear()
            there = self.gradients(self.job.model.num_layers + 2, moment)
            return flying + max(there + largest, self.gradients(-1, moment) - stage.put_off)
        waits = self.head() if sum(moment.halves) else 0  # the head's gradient, until the second half
        return flying + max(
            extra + self.gradients(layer, moment) + self.gathered(layer, moment) + waits * (layer == stage.steps[0][0])
            for layer, extra in stage.steps
        )

    def linear(self) -> int:
        """Return the bytes of the largest gradient that a split backward puts off."""
        config, of = self.job.model, self.setting
        widest = max(config.hidden_dim, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        return widest * config.model_dim * of.e // of.t

    def head(self) -> int:
        """Return the bytes of the head's gradient, where this rank has one."""
        of = self.setting
        is_here = self.spans[-1][1] == of.config.num_layers + 2 and not of.lora_rank
        return -(-of.config.vocab_size // of.t) * of.config.model_dim * of.e * is_here

    def gradients(self, layer: int, moment: Moment) -> int:
        """Return the sums of gradients that are there when a layer's backward runs, where they have own memory.

        layer  -1: the backward is over, and the last sums arrive
        """
        job, widths, is_whole = self.job, self.widths, self.job.zero == 0
        if is_whole and widths.collect == widths.reduce:
            return 0
        if job.zero >= 2 and not moment.is_first:
            there = self.shards(self.trained) * widths.gradient
        else:
            over = [self.rank + n * job.layout.pp for n, is_over in enumerate(moment.finished) if is_over]
            there = self.shards([u for u in self.trained if u.stage in over]) * widths.gradient
        if moment.kind in ("F", "BI") or (job.zero < 2 and not moment.is_last):
            return there
        here = [u for u in self.order() if u.stage == self.stage_of(moment)]
        if job.zero == 1:
            return there + (layer < 0) * self.arriving(here)
        done = [u for u in here if self.place(u) > layer or layer <= 0]
        pending = done[-1:]  # on its way; the sum is settled when the next one is reduced
        settled = widths.gradient * (layer < 0 and widths.gradient != widths.reduce)
        way = self.shards(pending) * (widths.reduce + settled)
        is_new = is_whole or moment.is_first
        return there + way + is_new * self.shards(done[:-1]) * widths.gradient

    def arriving(self, order: Sequence[Unit]) -> int:
        """Return the most that sums take while they arrive after a backward, one unit after the other."""
        widths, N = self.widths, 1 if self.job.zero == 0 else self.job.shards
        is_cast = widths.collect != widths.reduce
        most = 0
        for index in range(len(order)):
            two = N * self.shards(order[max(0, index - 1) : index + 1]) * widths.reduce * is_cast
            most = max(most, self.shards(order[:index]) * widths.gradient + two)
        return max(most, self.shards(order) * widths.gradient)

    def stage_of(self, moment: Moment) -> int:
        return self.rank + moment.chunk * self.job.layout.pp

    def layer(self, unit: Unit) -> int:
        """Return the layer that a unit is of, in the chain of L + 2."""
        name, L = unit.name, self.job.model.num_layers
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        is_head = name.startswith("head") or (name.startswith(TIED) and unit.stage == self.job.layout.stages - 1)
        return L + 2 if is_head else L + 1 if name == "norm" else 0

    def gathered(self, layer: int, moment: Moment) -> int:
        """Return the units that are whole while a layer's backward runs, at stage 3."""
        job = self.job
        if job.zero < 3:
            return 0
        here = [u for u in self.units if u.stage == self.stage_of(moment) and u.elements >= job.persistence]
        L = job.model.num_layers
        stays = lambda u: not u.trains or self.setting.put_off
        whole = [u for u in here if self.layer(u) == layer or (self.layer(u) > layer and stays(u))]
        if job.model.tied and job.layout.pp == 1 and layer > 0:
            whole += [u for u in here if self.layer(u) == 0]
        elif layer == L + 2:
            whole += []
        return sum(job.shards * shard_size(u.elements, job.shards) for u in whole) * self.widths.compute

    def after(self) -> int:
        """Return what is there after the last backward: sums that arrive, copies that are added, the optimizer's."""
        job, widths, order = self.job, self.widths, self.order()
        is_apart = job.zero > 0 or widths.collect != widths.reduce
        sums = self.shards(order) * widths.gradient * is_apart
        tied = [u for u in self.units if u.name == f"{TIED} alone"]
        adding = (3 + len(tied)) * self.shards(tied[:1]) * widths.gradient
        cast = widths.gradient != widths.master and not job.offload_optimizer
        largest = max((self.shards([u]) for u in order), default=0) * widths.master * cast
        return max(self.arriving(order) * (is_apart and job.zero < 2), sums + adding, sums + largest)
