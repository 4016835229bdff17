"""Build a model that never exists whole on any rank, and look at parameters that are in pieces.

A parameter is cut as soon as the constructor turns to another: every rank keeps its part and the memory is given back.
Whatever is done to it afterwards, while building goes on, makes it whole again. So what is whole at any time while a
model is built is one parameter.

    with Init(group):                          model = Model()           # then Engine(model, group, zero=3, ...)
    with GatheredParameters(parameters, 0):    model.scale.fill_(2.0)    # whole for a while; rank 0's values count

ZeRO, Rajbhandari et al. 2020, section 5.3; the two names are DeepSpeed's.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from minispeed.collective.group import Group
from minispeed.errors import UserError
from minispeed.layout import FlatLayout
from minispeed.zero.absent import classes, owner_of, plainly


class Piece:
    """One parameter of which each rank holds a part, until an engine takes it over."""

    def __init__(self, name: str, p: nn.Parameter, building: "Building") -> None:
        """Take a parameter over; it stays whole until another is."""
        self.name, self.p, self.group, self._building = name, p, building.group, building
        self.layout = FlatLayout.of({"": p}, self.group.size)
        self.is_released = False
        self.pins = 0
        self._present, self._absent = classes(self, {id(p): (name, self.layout.shapes[""])}, self._read)
        p.__class__ = self._present

    def unshard(self) -> None:
        """Make the parameter whole: an ordinary one until `reshard`.

        Sends  S (N - 1) elements per rank (all-gather)
        """
        if not self.is_released:
            return
        with plainly():
            flat = self.shard.new_empty(self.layout.size)
            self.group.all_gather(flat, self.shard).wait()
            self.is_released = False
            self.p.__class__ = self._present
            self.p.data = self.layout.views(flat)[""].clone()  # memory that no call still holds

    @property
    def is_viewed(self) -> bool:
        """Whether somebody holds a view: what is written to it after the parameter is cut would be lost."""
        storage = self.p.untyped_storage()
        return torch._C._storage_Use_Count(storage._cdata) > 2  # the parameter's, and the variable of the line above

    def reshard(self) -> None:
        """Keep my part alone."""
        if self.is_released or self.pins:
            return
        with plainly():
            flat = self.layout.flatten({"": self.p.data}, out=self.p.data.new_empty(self.layout.size))
            self.shard = self.layout.shard(flat, self.group.rank).clone()
            self.is_released = True
            self.p.data = flat.new_empty(0)
            self.p.__class__ = self._absent

    def let_go(self) -> None:
        """Keep my part alone; `reshard` frees nothing that somebody else holds."""
        self.reshard()

    def take(self, root: int) -> None:
        """Make the value on rank `root` everybody's.

        Sends  its elements from `root` (broadcast)
        """
        with plainly():
            value = self.p.data.clone(memory_format=torch.contiguous_format)
            self.group.broadcast(value, root).wait()
            self.p.data.copy_(value)

    def _read(self, func: Any, operation: Callable[[], Any]) -> Any:
        if not self._building.goes_on:
            raise LookupError
        self._building.make_whole(self)
        return operation()


class Building:
    """Which parameters are whole while a model is built: the last that was used, and those that somebody looks at."""

    def __init__(self, group: Group) -> None:
        self.group, self.goes_on = group, True
        self._whole: list[Piece] = []

    def add(self, name: str, p: nn.Parameter) -> None:
        """Take over a new parameter, which is whole."""
        self._put_away()
        self._whole.append(Piece(name, p, self))

    def make_whole(self, piece: Piece) -> None:
        """Make this one whole, and cut those before."""
        self._put_away()
        piece.unshard()
        self._whole.append(piece)

    def end(self) -> None:
        """Cut what is left; from now on parameters are made whole by an engine or `GatheredParameters` alone.

        Raises  UserError if somebody still holds a view of one
        """
        self.goes_on = False
        self._put_away()
        for piece in self._whole:
            raise UserError(
                f"a view of {piece.name} is still held, and each rank is to keep its part alone",
                fix="taking it later, in `with GatheredParameters([parameter]):`",
            )

    def _put_away(self) -> None:
        seen = [piece for piece in self._whole if piece.is_viewed]
        for piece in self._whole:
            if piece not in seen:
                piece.take(0)  # whatever was done to it: rank 0's values are everybody's
                piece.reshard()
        self._whole = seen


@contextlib.contextmanager
def Init(group: Group, *, enabled: bool = True) -> Iterator[None]:  # noqa: N802 DeepSpeed's name
    """Cut every parameter that a module gets inside this, on this thread.

    Holds   at any time one parameter whole, of all others 1/N
    Values  those of rank 0; parameters on the meta device stay as they are
    Raises  UserError if a view of a parameter is still held at the end
    """
    outer = getattr(_here, "building", None)
    _here.building = building = Building(group) if enabled else outer
    try:
        yield
        if enabled and building is not None:
            building.end()
    finally:
        _here.building = outer


def _cut(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
    building = getattr(_here, "building", None)
    if building is not None and p is not None and owner_of(p) is None and p.device.type != "meta":
        building.add(f"{name} of a {type(module).__name__}", p)


_here = threading.local()  # what this thread is building, inside an Init
register_module_parameter_registration_hook(_cut)  # once: ranks that are threads build modules at the same time


@contextlib.contextmanager
def GatheredParameters(  # noqa: N802 DeepSpeed's name
    parameters: Iterable[nn.Parameter | None] | nn.Parameter, modifier_rank: int | None = None, *, enabled: bool = True
) -> Iterator[None]:
    """Make parameters whole on every rank inside this; every rank enters it, with the same ones.

    modifier_rank  whose changes count, for all ranks; None: they are only looked at
    Raises         UserError if a parameter was changed, in place or by `p.data = value`, and no modifier_rank given
    """
    given = [parameters] if isinstance(parameters, Tensor) else [p for p in parameters if p is not None]
    owners = {id(owner): owner for p in given if (owner := owner_of(p)) is not None} if enabled else {}
    released = [owner for owner in owners.values() if owner.is_released]
    for owner in owners.values():
        owner.unshard()
        owner.pins += 1
    looked_at = given if owners else []
    before = _states(looked_at)
    try:
        yield
        if modifier_rank is not None:
            for owner in owners.values():
                owner.take(modifier_rank)
        elif before != _states(looked_at):
            raise UserError("a parameter was changed, and no rank's change counts", fix="modifier_rank=0")
    finally:
        for owner in owners.values():
            owner.pins -= 1
        for owner in released:
            owner.let_go()


def _states(parameters: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return what tells a change: one in place counts the version up, `p.data = value` moves the address."""
    return [(p._version, p.data_ptr()) for p in parameters]
