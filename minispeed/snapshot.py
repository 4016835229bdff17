"""Say what a checkpoint must hold of a sharded run, by logical name, and put it back.

    parameters/NAME        masters
    exp_avg/NAME, ...      what the optimizer keeps of each element, under the optimizer's own name for it
    step/group 0, ...      what it keeps of each parameter group: a number, the same for all of the group's parameters

Whatever the layout, the names are the same: so the layout may change between writing and reading.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from minispeed.checkpoint import Piece
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.parts import Part
from minispeed.placement import WHOLE, Slice
from minispeed.zero.unit import ShardedUnit

MASTERS = "parameters"
COUNTS = {"step", "mu_product", "eta", "mu"}  # what torch's optimizers keep of a parameter as a whole


class Source(Protocol):
    """Where a run's tensors are read from: a checkpoint on disk, or pieces in memory."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name."""

    def read(self, name: str, elements: Interval, part: Slice = WHOLE) -> Tensor | None:
        """Return some elements of the flattened tensor `name`, or of a slice of it; None where there is no such tensor.

        elements  in the flattened slice
        """


@runtime_checkable
class Filling(Source, Protocol):
    """A source that reads into memory that is there already, many tensors at once."""

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Put into each piece's tensor what it is a piece of; of each of them the source has a tensor."""


def pieces_of(parts: Sequence[Part], optimizer: torch.optim.Optimizer) -> list[Piece]:
    """Return everything of this rank that a checkpoint must hold; the tensors are views of the live ones.

    What another rank holds too and writes is marked so.
    """
    found = [piece for part in parts for piece in _elements(part, optimizer)]
    for index, group in enumerate(optimizer.param_groups):
        for key, value in _numbers(optimizer, group).items():
            number = torch.tensor([float(value)], dtype=torch.float64)
            found.append(Piece(f"{key}/group {index}", (1,), Interval(0, 1), number))
    return found


def given_by(source: Source) -> set[str]:
    """Return the names of the parameters that a source has."""
    return {name.partition("/")[2] for name in source.shapes if name.partition("/")[0] == MASTERS}


@torch.no_grad()
def put_back(
    parts: Sequence[Part],
    optimizer: torch.optim.Optimizer,
    source: Source,
    *,
    with_optimizer: bool = True,
    strict: bool = True,
) -> None:
    """Go on from what `pieces_of` returned, under whatever layout.

    with_optimizer  False: parameters alone; the optimizer starts anew
    strict          False: what the source lacks stays as it is
    Raises          UserError naming what the source lacks, or what of it is damaged: the run cannot go on from there
    """
    optimizer.state.clear()
    if with_optimizer:
        for part in parts:
            _start_states(part, optimizer, source)
    wanted = [piece for part in parts for piece in _elements(part, optimizer)]
    for piece in wanted:
        if (held := source.shapes.get(piece.name, piece.shape)) != piece.shape:
            what = f"{piece.name} has the shape {tuple(held)} in the checkpoint, {tuple(piece.shape)} here"
            raise UserError(what, fix="the checkpoint of a run of this model")
    if isinstance(source, Filling):
        source.fill(piece for piece in wanted if piece.name in source.shapes)
        wanted = [piece for piece in wanted if piece.name not in source.shapes]
    for piece in wanted:
        found = source.read(piece.name, piece.elements, piece.part)
        if found is None and strict:
            raise UserError(f"the checkpoint holds no {piece.name}", fix="the checkpoint of a run of this model")
        if found is not None:
            piece.tensor.copy_(found.view(piece.tensor.shape))
    for part in parts:
        part.sharded.publish(frozen=True)


def _start_states(part: Part, optimizer: torch.optim.Optimizer, source: Source) -> None:
    """Give each master the states that the source has of its elements, still zero, and its group's numbers."""
    kinds: dict[str, list[str]] = {}
    for full in source.shapes:
        kind, _, name = full.partition("/")
        kinds.setdefault(name, []).append(kind)
    for unit in part.units:
        for (index, window, first), master in zip(unit.windows, unit.masters):
            state, group, of = optimizer.state[master], optimizer.param_groups[index], part.logical[first]
            here = [name for name, _, place in unit.layout.pieces(unit.part) if place.meet(window).size]
            mine = [part.logical[name].name for name in here]
            for kind in sorted({kind for name in mine for kind in kinds.get(name, ())} - {MASTERS}):
                # an optimizer of whole tensors may keep rows and columns, in shapes of their own
                held = source.shapes[f"{kind}/{of.name}"] if unit.whole else of.shape
                state[kind] = master.new_zeros(master.shape if held == of.shape else held)
            for kind in kinds.get(f"group {index}", ()):
                value = source.read(f"{kind}/group {index}", Interval(0, 1))
                assert value is not None
                on = master.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
                state[kind] = torch.tensor(value.item(), dtype=torch.float32, device=on)


def _elements(part: Part, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    """Yield what is kept of this rank's elements."""
    for unit in part.units:
        for name, elements, place in unit.layout.pieces(unit.part):
            yield _piece(part, unit, MASTERS, name, elements, unit.master[slice(*place)])
        for (_, window, first), master in zip(unit.windows, unit.masters):
            for kind, state in _moments(optimizer, master):
                if not unit.whole:
                    yield from _cut(part, unit, kind, window, state)
                elif state.shape == master.shape:
                    yield _piece(part, unit, kind, first, Interval(0, state.numel()), state.view(-1))
                else:
                    of, is_copy = part.logical[first], _is_copy(part, unit, first)
                    elements = Interval(0, state.numel())
                    yield Piece(f"{kind}/{of.name}", tuple(state.shape), elements, state.view(-1), is_copy)


def _cut(part: Part, unit: ShardedUnit, kind: str, window: Interval, state: Tensor) -> Iterator[Piece]:
    """Yield a flat state of a window of the shard, parameter by parameter."""
    for name, elements, place in unit.layout.pieces(unit.part):
        both = place.meet(window)
        if both.size:
            here = state[slice(*both.shift(-window.start))]
            yield _piece(part, unit, kind, name, both.shift(elements.start - place.start), here)


def _piece(part: Part, unit: ShardedUnit, kind: str, name: str, elements: Interval, tensor: Tensor) -> Piece:
    of = part.logical[name]
    return Piece(f"{kind}/{of.name}", of.shape, elements, tensor, _is_copy(part, unit, name), of.part)


def _is_copy(part: Part, unit: ShardedUnit, name: str) -> bool:
    """Whether another rank writes the same elements."""
    return not part.logical[name].counts or (unit.whole and unit.group.rank > 0)


def _moments(optimizer: torch.optim.Optimizer, master: Tensor) -> Iterator[tuple[str, Tensor]]:
    for kind, value in optimizer.state.get(master, {}).items():
        if isinstance(value, Tensor) and not _is_number(kind, value, master):
            yield kind, value


def _numbers(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the optimizer counts for a group: the same for all of its parameters here."""
    kept = [(p, optimizer.state[p]) for p in group["params"] if p in optimizer.state]
    return {key: value for p, state in kept for key, value in state.items() if _is_number(key, value, p)}


def _is_number(kind: str, value: Any, master: Tensor) -> bool:
    """Whether a state is of a parameter as a whole; of one that is itself one number, only the name tells."""
    if isinstance(value, Tensor):
        return kind in COUNTS or (value.dim() == 0 and master.dim() > 0)
    return isinstance(value, (int, float))
