"""Say what ZeRO has of a rank's units at which moment of a backward, beside what it always holds.

    rooms      whole gradients pass through, and stay when the backward is over
    sums       my shards of the gradients: at stages 2 and 3 from the first reduction on, at 1 after the last backward
    gathered   units that are whole while they are used, at stage 3

One unit's sum is on its way while the next one's gradients are made: `minispeed/zero/reduction.py`.
Letters: N ranks that hold other shards, L blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from minispeed.ledger import buffers
from minispeed.ledger.flight import Moment
from minispeed.ledger.job import Job
from minispeed.ledger.states import Held, Widths, held, shard_size
from minispeed.ledger.units import TIED, Unit, units

OVER = -1  # the layer of a moment at which a backward is over


class Key(NamedTuple):
    """What of a job its sharding follows from; see `Job`.

    shards     N
    is_split   whether backwards are split in two
    """

    zero: int
    shards: int
    widths: Widths
    persistence: int
    prefetch: int
    overlap: bool
    offload_optimizer: bool
    offload_param: bool
    is_tied: bool
    is_split: bool
    num_layers: int
    pp: int
    stages: int
    pp_rank: int
    units: tuple[Unit, ...]


@lru_cache(maxsize=2048)
def sharded(key: Key) -> "Sharded":
    """Return the sharding of a rank."""
    return Sharded(key)


class Sharded:
    """The units of a rank, and when what of them is there."""

    def __init__(self, key: Key) -> None:
        self.key, self.widths, self.zero = key, key.widths, key.zero
        self.trained = [unit for unit in key.units if unit.trains]
        self.order = sorted(self.trained, key=lambda unit: (unit.stage, self.place(unit)), reverse=True)
        self._found: dict[tuple[object, ...], int] = {}

    @classmethod
    def of(cls, job: Job, pp_rank: int) -> "Sharded":
        """Return the sharding of a rank of a job; equal ones are worked out once."""
        layout = job.layout
        return sharded(
            Key(
                zero=job.zero,
                shards=job.shards,
                widths=job.widths,
                persistence=job.persistence if job.zero == 3 else 0,
                prefetch=job.prefetch,
                overlap=job.overlap,
                offload_optimizer=job.offload_optimizer,
                offload_param=job.offload_param,
                is_tied=job.model.tied,
                is_split=layout.pp > 1 and layout.schedule == "zb_h1",
                num_layers=job.model.num_layers,
                pp=layout.pp,
                stages=layout.stages,
                pp_rank=pp_rank,
                units=tuple(units(job, pp_rank)),
            )
        )

    # ---- what is always there

    @cached_property
    def states(self) -> tuple[Held, int]:
        """What is held on the device, and bytes on the host."""
        found = [
            held(
                [u.elements for u in of if u.trains],
                ranks=self.key.shards,
                stage=stage,
                widths=self.widths,
                frozen=[u.elements for u in of if not u.trains],
            )
            for stage, of in self._by_stage()
        ]
        parameters, gradients, optimizer = (
            sum(getattr(one, name) for one in found) for name in ("parameters", "gradients", "optimizer")
        )
        # offloaded masters are apart even where they have the parameters' dtype
        states = 3 * self.shards(self.trained) * self.widths.master * self.key.offload_optimizer
        away = parameters * (self.key.offload_param and self.zero == 3)
        return Held(parameters - away, gradients, 0 if states else optimizer), states + away

    def _by_stage(self) -> Iterator[tuple[int, list[Unit]]]:
        """Yield the units by the stage of ZeRO that they run at: small ones stay whole."""
        small = [unit for unit in self.key.units if unit.elements < self.key.persistence]
        yield self.zero, [unit for unit in self.key.units if unit not in small]
        if small:
            yield 2, small

    @cached_property
    def rooms(self) -> int:
        """The memory that whole gradients pass through; each stage of a pipeline has its own."""
        stages = {unit.stage for unit in self.order}
        return sum(self._rooms([unit for unit in self.order if unit.stage == stage]) for stage in stages)

    def _rooms(self, order: Sequence[Unit]) -> int:
        sizes = [self.whole([unit]) * self.widths.collect for unit in order]
        if self.zero < 2:
            return sum(sizes)
        if not self.key.is_split:
            return buffers.rooms(sizes, overlap=self.key.overlap)
        # the blocks' gradients are all there before any is reduced; who comes later takes a room that is free by then
        blocks = [size for size, unit in zip(sizes, order) if unit.name.startswith("blocks.")]
        early = [size for size, unit in zip(sizes, order) if self.place(unit) > self.key.num_layers]
        late = max((size for size, unit in zip(sizes, order) if self.place(unit) < 1), default=0)
        return sum(blocks) + sum(early) + late * (late > max(blocks[:-1], default=0))

    # ---- what comes and goes

    def sums(self, layer: int, moment: Moment) -> int:
        """Return the sums of gradients that are there in a layer's backward, where they have memory of their own."""
        of = (moment.kind, moment.chunk, moment.is_last, moment.reduced, moment.finished)
        return self._once(self._sums, layer, *of)

    def _sums(
        self,
        layer: int,
        kind: str,
        chunk: int,
        is_last: bool,
        reduced: tuple[bool, ...],
        finished: tuple[bool, ...],
    ) -> int:
        widths, is_whole = self.widths, self.zero == 0
        if is_whole and widths.collect == widths.reduce:
            return 0
        summed = [self._stage(n) for n, is_so in enumerate(reduced if self.zero >= 2 else finished) if is_so]
        there = self.shards([unit for unit in self.trained if unit.stage in summed]) * widths.gradient
        if kind in ("F", "BI") or (self.zero < 2 and not is_last):
            return there
        here = [u for u in self.order if u.stage == self._stage(chunk)]
        if self.zero == 1:
            return there + (layer == OVER) * self._arriving(here)
        done = [u for u in here if self.place(u) > layer or layer <= 0]
        pending = self.shards(done[-1:])  # on its way; it is settled when the next one is reduced
        cast = widths.gradient * (layer == OVER and widths.gradient != widths.reduce)
        is_new = is_whole or not reduced[chunk]
        return there + pending * (widths.reduce + cast) + is_new * self.shards(done[:-1]) * widths.gradient

    def _arriving(self, order: Sequence[Unit]) -> int:
        """Return the most that sums take while they arrive after a backward, one unit after the other."""
        widths, most = self.widths, 0
        is_cast = widths.collect != widths.reduce
        for index in range(len(order) + 1):
            two = order[max(0, index - 1) : index + 1]  # one that is being settled, and the next on its way
            mine = self.shards(two) * (self.zero > 0)
            sent = (self.whole(two) + mine) * widths.reduce * is_cast
            most = max(most, self.shards(order[:index]) * widths.gradient + sent)
        return most

    def gathered(self, layer: int, moment: Moment) -> int:
        """Return the units that are whole while a layer's backward runs, at stage 3."""
        return self._once(self._gathered, layer, moment.chunk) if self.zero == 3 else 0

    def _gathered(self, layer: int, chunk: int) -> int:
        here = [u for u in self.key.units if u.stage == self._stage(chunk) and u.elements >= self.key.persistence]
        whole = [u for u in here if self._is_whole(u, layer)]
        asked, left = [], self.key.prefetch
        for unit in sorted(here, key=self.layer, reverse=True):
            if self.layer(unit) < layer and unit not in whole:
                left -= unit.elements
                asked += [unit] if left >= 0 else []
        return self.whole(whole + asked) * self.widths.compute

    def _is_whole(self, unit: Unit, layer: int) -> bool:
        """Return whether a unit is used in a layer's backward, or is still there: until its gradients are complete."""
        stays = not unit.trains or self.key.is_split
        is_head = self.key.is_tied and self.key.pp == 1 and self.layer(unit) == 0
        return self.layer(unit) == layer or (self.layer(unit) > layer and stays) or is_head

    @cached_property
    def after(self) -> int:
        """The most after the last backward: sums that arrive, copies of a tied embedding that are added, a cast."""
        widths, key = self.widths, self.key
        is_apart = self.zero > 0 or widths.collect != widths.reduce
        sums = self.shards(self.order) * widths.gradient * is_apart
        tied = [unit for unit in key.units if unit.name == f"{TIED} alone"]
        adding = (3 + len(tied)) * self.shards(tied[:1]) * widths.gradient
        is_cast = widths.gradient != widths.master and not key.offload_optimizer
        largest = max((self.shards([unit]) for unit in self.order), default=0) * widths.master * is_cast
        return max(self._arriving(self.order) * (is_apart and self.zero < 2), sums + adding, sums + largest)

    # ---- where the units are

    def layer(self, unit: Unit) -> int:
        """Return the layer that a unit is of: 0 the embedding, 1 to L the blocks, then the norm, and L + 2 the head."""
        L = self.key.num_layers
        if unit.name.startswith("blocks."):
            return int(unit.name.split(".")[1]) + 1
        is_head = unit.name.startswith("head") or (unit.name.startswith(TIED) and unit.stage == self.key.stages - 1)
        return L + 2 if is_head else L + 1 if unit.name == "norm" else 0

    def place(self, unit: Unit) -> int:
        """Return the layer in whose backward a unit is reduced; below stage 3 those of no module's forward are last."""
        is_used = unit.name.startswith("blocks.") or unit.name in ("embed", "norm")
        return self.layer(unit) if is_used or self.zero == 3 else OVER

    def shards(self, of: Sequence[Unit]) -> int:
        """Return the elements of a rank's shards of some units."""
        return sum(u.elements if self.zero == 0 else shard_size(u.elements, self.key.shards) for u in of)

    def whole(self, of: Sequence[Unit]) -> int:
        """Return the elements of some units' buffers."""
        return self.shards(of) * (1 if self.zero == 0 else self.key.shards)

    def _stage(self, chunk: int) -> int:
        return self.key.pp_rank + chunk * self.key.pp

    def _once(self, work: Callable[..., int], *args: Any) -> int:
        key = (work.__name__, *args)
        if key not in self._found:
            self._found[key] = work(*args)
        return self._found[key]
