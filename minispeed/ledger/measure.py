"""Measure what a rank holds while it trains, in the categories of `memory.py`.

A step runs under a census of storages. Parameters, gradients and optimizer states are the storages in which the units
keep them; activations are what autograd keeps for its backward, parameters left out; buffers are all else that was
there when most was.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from minispeed.census import Census, storage_bytes
from minispeed.engine import Engine
from minispeed.ledger.memory import Memory
from minispeed.zero.sharded import ShardedModel
from minispeed.zero.unit import ShardedUnit


def measure(engine: Engine, step: Callable[[], object]) -> Memory:
    """Run a step, and return what this rank held. Of a first step the optimizer's states come into being on the way.

    On a GPU the total is what torch's allocator had given out.
    """
    units = [unit for part in engine.parts for unit in part.units]
    saved, gradients = Saved(_parameters(units)), _Gradients(units)
    census = None if engine.device.type == "cuda" else Census(_known(engine, units))
    if census is None:
        torch.cuda.reset_peak_memory_stats(engine.device)
    with contextlib.ExitStack() as stack:
        for part in engine.parts:
            stack.enter_context(saved.of(part.sharded))
        stack.enter_context(gradients.counting())
        stack.enter_context(saved.hooks())
        stack.enter_context(census or contextlib.nullcontext())
        step()
    most = torch.cuda.max_memory_allocated(engine.device) if census is None else census.peak
    return _divide(engine, units, most, gradients.most, saved.most)


def _divide(engine: Engine, units: list[ShardedUnit], most: int, gradients: int, activations: int) -> Memory:
    away = [unit.shard for unit in units if unit.has_shard_away]
    here = [unit.flat for unit in units] + [unit.shard for unit in units if not unit.has_shard_away]
    states = storage_bytes(_states(engine, units))
    is_away = any(unit.has_states_away for unit in units)
    host = storage_bytes(away) + states * is_away
    parameters, optimizer = storage_bytes(here), states * (not is_away)
    total = most if engine.device.type == "cuda" else most - host
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        buffers=total - parameters - gradients - optimizer - activations,
        host=host,
    )


def _states(engine: Engine, units: Iterable[ShardedUnit]) -> list[Tensor]:
    """Return the moments, and the masters that are not the parameters themselves."""
    found = [value for state in engine.optimizer.state.values() for value in state.values()]
    moments = [value for value in found if isinstance(value, Tensor) and value.dim()]
    return moments + [unit.master for unit in units if unit.trainable and unit.master is not unit.shard]


def _parameters(units: Iterable[ShardedUnit]) -> list[Any]:
    return [unit._storage for unit in units]


def _known(engine: Engine, units: list[ShardedUnit]) -> list[Tensor]:
    """Return what was there before the step."""
    rooms = [room for part in engine.parts for room in part.sharded.rooms._free]
    kept = [x for unit in units for x in (unit.flat, unit.shard, unit.gradient, unit.full, unit._room)]
    buffers = [x for part in engine.parts for x in part.sharded.module.buffers()]
    return [x for x in (*kept, *rooms, *buffers, *_states(engine, units)) if x is not None]


class _Gradients:
    """The most bytes of gradients that the units keep, those left out that are on their way to being reduced."""

    def __init__(self, units: list[ShardedUnit]) -> None:
        self.units, self.most = units, 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count after every unit's backward."""
        verbs = [(unit, name, getattr(unit, name)) for unit in self.units for name in ("collect", "settle")]
        for unit, name, verb in verbs:
            setattr(unit, name, self._counted(verb))
        try:
            yield
        finally:
            for unit, name, verb in verbs:
                setattr(unit, name, verb)

    def _counted(self, verb: Callable[[], None]) -> Callable[[], None]:
        def counted() -> None:
            verb()
            kept = [unit.gradient if unit.stage >= 2 else unit._room for unit in self.units]
            self.most = max(self.most, storage_bytes(kept))

        return counted


class Saved:
    """What autograd keeps: each storage once, for as long as any operation's backward is to come."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        self.left_out = {storage._cdata for storage in parameters}
        self.count: Counter[int] = Counter()
        self.bytes = self.most = 0

    def hooks(self, touch: Callable[[Tensor], None] = lambda x: None) -> Any:
        """Return a context in which what is saved is counted; `touch` sees what is taken out again."""

        def unpack(kept: _Kept) -> Tensor:
            touch(kept.tensor)
            return kept.tensor

        return torch.autograd.graph.saved_tensors_hooks(lambda x: _Kept(x, self), unpack)

    @contextlib.contextmanager
    def of(self, sharded: ShardedModel) -> Iterator[None]:
        """Count what a model saves inside hooks of its own, at stage 3."""
        sharded._saving = lambda: self.hooks(sharded.touch)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del sharded._saving

    def add(self, storage: Any) -> None:
        """Count a storage."""
        if storage._cdata not in self.left_out:
            self.count[storage._cdata] += 1
            if self.count[storage._cdata] == 1:
                self.bytes += storage.nbytes()
                self.most = max(self.most, self.bytes)

    def drop(self, storage: Any) -> None:
        """Count it no more, if that was the last who kept it."""
        if storage._cdata in self.count:
            self.count[storage._cdata] -= 1
            if not self.count[storage._cdata]:
                del self.count[storage._cdata]
                self.bytes -= storage.nbytes()


class _Kept:
    """A tensor that autograd keeps, counted until it lets go."""

    def __init__(self, tensor: Tensor, saved: Saved) -> None:
        self.tensor, self.saved, self.storage = tensor.detach(), saved, tensor.untyped_storage()
        saved.add(self.storage)

    def __del__(self) -> None:
        self.saved.drop(self.storage)
