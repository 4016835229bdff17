"""Write a forward down operation by operation, and read off what it keeps and what its backward needs beside.

An operation makes a value of some that were there. Autograd keeps some of them for the operation's backward, which
turns the gradient of what was made into those of what went in, and then lets go. A value lies in a storage, which views
of it share; what is kept counts once for each storage, however often it is kept. So a backward can be played back with
sizes alone, in the reverse order of the forward, as autograd runs it.

All sizes are bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Value(NamedTuple):
    """A tensor.

    number         of the value
    storage        where it lies, a number of the tape's
    size           of its own elements, and so of its gradient
    has_gradient   whether its gradient is asked for
    """

    number: int
    storage: int
    size: int
    has_gradient: bool


class Op(NamedTuple):
    """An operation.

    ins, outs   what it reads that may have a gradient, and what it makes
    kept        storages that its backward reads
    shares      the gradients of what went in are that of what came out, or views of it: no new memory
    weight      of the gradients of its parameters
    put_off     those are made later: what went in, and the gradient of what came out, stay
    forward, backward   that come and go while it runs, beside what it makes
    """

    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    kept: tuple[int, ...]
    shares: bool
    weight: int
    put_off: bool
    forward: int
    backward: int


@dataclass(frozen=True)
class Played:
    """What a stretch of a model holds, without what others hold meanwhile.

    kept       for its backward, from its forward on; of what it was given, what it keeps
    forward    the most during its forward, what it was given left out
    backward   the most during its backward, from the gradient of what it made to that of what it was given
    put_off    what stays after its backward, for gradients of weights that are made later
    weights    the gradients of its parameters
    """

    kept: int
    forward: int
    backward: int
    put_off: int
    weights: int


@dataclass
class Tape:
    """The operations of a stretch, first to last.

    put_off   gradients of linears' weights are made later
    holds     somebody else holds the gradient of what the stretch made until its backward is through
    late      of storages, the last operation until which somebody holds them
    """

    put_off: bool = False
    holds: bool = False
    sizes: list[int] = field(default_factory=list)  # of storages
    ops: list[Op] = field(default_factory=list)
    values: int = 0
    late: dict[int, int] = field(default_factory=dict)

    def given(self, size: int, *, has_gradient: bool = True) -> Value:
        """Return a value that was there before."""
        return self._new(size, has_gradient)

    def run(
        self,
        ins: Sequence[Value],
        sizes: int | Sequence[int],
        *,
        keeps: Sequence[Value] = (),
        keeps_out: bool = False,
        extra: int = 0,
        shares: bool = False,
        weight: int = 0,
        linear: bool = False,
        forward: int = 0,
        backward: int = 0,
        gradient: bool = False,
        view: Value | None = None,
    ) -> Value:
        """Write an operation down, and return the last of what it makes (see `ops` for the others).

        keeps, keeps_out, extra   what autograd keeps: of what is there, what is made, and bytes that are nobody else's
        gradient   whether what it makes has one whatever went in
        view       what is made lies in that one's storage
        """
        differentiable = tuple(x for x in ins if x.has_gradient)
        needed = bool(differentiable) or weight > 0 or gradient
        each = (sizes,) if isinstance(sizes, int) else sizes
        outs = tuple(self._new(size, needed, view) for size in each)
        kept = [x.storage for x in keeps] + [out.storage for out in outs if keeps_out]
        if extra:
            self.sizes.append(extra)
            kept.append(len(self.sizes) - 1)
        put_off = self.put_off and linear and weight > 0
        self.ops.append(
            Op(differentiable, outs, tuple(kept) if needed else (), shares, weight, put_off, forward, backward)
        )
        return outs[-1]

    def lives(self, *values: Value) -> None:
        """Say that somebody holds values until here."""
        self.late |= {x.storage: len(self.ops) - 1 for x in values}

    def _new(self, size: int, has_gradient: bool, view: Value | None = None) -> Value:
        if view is None:
            self.sizes.append(size)
        self.values += 1
        return Value(self.values, len(self.sizes) - 1 if view is None else view.storage, size, has_gradient)

    def play(self, given: Sequence[Value]) -> Played:
        """Play the forward, then the backward.

        given   what was there before: it counts where it is kept
        """
        keepers: dict[int, int] = {}
        for op in self.ops:
            for storage in op.kept:
                keepers[storage] = keepers.get(storage, 0) + 1
        kept = sum(self.sizes[storage] for storage in keepers)
        backward, put_off, weights = self._backward(keepers, kept)
        return Played(kept, self._forward({x.storage for x in given}), backward, put_off, weights)

    def _forward(self, given: set[int]) -> int:
        """Return the most that is there: each storage from when it is made to its last reader, or on if it is kept."""
        last = {x.storage: index for index, op in enumerate(self.ops) for x in (*op.ins, *op.outs)} | self.late
        kept = {storage for op in self.ops for storage in op.kept} - given
        there, most, seen = 0, 0, set(given)
        ending: dict[int, list[int]] = {}
        for storage, index in last.items():
            ending.setdefault(index, []).append(storage)
        for index, op in enumerate(self.ops):
            new = {*op.kept, *(out.storage for out in op.outs)} - seen
            seen |= new
            there += sum(self.sizes[storage] for storage in new)
            most = max(most, there + op.forward)
            for storage in ending.get(index, ()):
                if storage not in kept and storage not in given:
                    there -= self.sizes[storage]
        return most

    def _backward(self, keepers: dict[int, int], kept: int) -> tuple[int, int, int]:
        """Return the most that is there, what is put off, and the gradients of weights."""
        gradients: dict[int, list[int]] = {}  # by value: [its storage's number of holders], shared between views
        there, weights, put_off = kept, 0, 0
        stays: set[int] = set()

        def let_go(holders: list[int], size: int) -> int:
            holders[0] -= 1
            return size if not holders[0] else 0

        last = self.ops[-1].outs[-1]
        gradients[last.number] = [1 + self.holds, last.size]
        there += last.size
        most = there
        for op in reversed(self.ops):
            if not op.ins and not op.weight and not op.kept:
                continue
            mine = [gradients.pop(out.number) for out in op.outs if out.number in gradients]
            if not mine:
                continue
            new = 0 if op.shares else sum(x.size for x in op.ins)
            there += new + op.weight * (not op.put_off)
            most = max(most, there + op.backward)
            for x in op.ins:
                if op.shares:
                    mine[0][0] += 1
                came = mine[0] if op.shares else [1, x.size]
                if x.number in gradients:  # added up: a new one for the two
                    there += x.size
                    most = max(most, there)
                    there -= let_go(gradients[x.number], gradients[x.number][1]) + let_go(came, came[1])
                    came = [1, x.size]
                gradients[x.number] = came
            weights += op.weight
            for holders in mine:
                if op.put_off:
                    put_off += holders[1]
                else:
                    there -= let_go(holders, holders[1])
            if op.put_off:
                stays.update(op.kept)
            for storage in op.kept:
                keepers[storage] -= 1
                if not keepers[storage] and storage not in stays:
                    there -= self.sizes[storage]
        return most, put_off + sum(self.sizes[storage] for storage in stays), weights
