"""Measure what a rank holds while it trains, to be compared with the ledger's closed forms."""

from collections.abc import Callable, Iterable

from torch import Tensor

from minispeed.census import storage_bytes
from minispeed.checkpoint import Piece
from minispeed.engine import Engine
from minispeed.layout import Interval
from minispeed.ledger import Held
from minispeed.placement import WHOLE, Slice


def measure_held(engine: Engine, step: Callable[[], object]) -> Held:
    """Run a step, which is not the first; return the bytes of the storages in which the units keep their things.

    Gradients are counted after every unit's backward. Those that stages 2 and 3 hold whole are on their way to being
    reduced and left out, as the ledger says.
    """
    units, most = engine.sharded.units, 0

    def counting(verb: Callable[[], None]) -> Callable[[], None]:
        def counted() -> None:
            nonlocal most
            verb()
            kept = [unit.gradient for unit in units]
            kept += [unit.full for unit in units] if engine.sharded.stage < 2 else []
            most = max(most, storage_bytes(kept))

        return counted

    verbs = [(unit.collect, unit.settle) for unit in units]
    for unit, (collect, settle) in zip(units, verbs):
        unit.collect, unit.settle = counting(collect), counting(settle)  # type: ignore[method-assign]
    try:
        step()
    finally:
        for unit, (collect, settle) in zip(units, verbs):
            unit.collect, unit.settle = collect, settle  # type: ignore[method-assign]
    parameters = storage_bytes(tensor for unit in units for tensor in (unit.flat, unit.shard))
    are_apart = engine.precision.master != engine.precision.compute
    states = engine.optimizer.state.values()
    optimizer = [value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim()]
    masters = [unit.master for unit in units if are_apart and unit.trainable]
    return Held(parameters, most, storage_bytes([*optimizer, *masters]))


class InMemory:
    """Pieces of a run, copied: what `Engine.load` reads from when no disk is wanted."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._parts = {(p.name, p.elements, p.part): p.tensor.detach().flatten().clone() for p in pieces}
        self.shapes = {p.name: p.shape for p in pieces}

    def read(self, name: str, elements: Interval, part: Slice = WHOLE) -> Tensor | None:
        """Return what was copied under that name."""
        return self._parts.get((name, elements, part))
