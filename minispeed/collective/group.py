"""Talk to the other ranks: what a group can do, and what every call must look like.

Every feature of the library takes `(module, group)` and knows of the world only what stands here. Who carries
the messages is the group's affair: threads of this process, gloo or NCCL, or nobody (a group of one). Ranks
are local to the group; buffers are contiguous, and what counts is their elements in memory order, not their
shape.

MPI, the Message Passing Interface 4.0, chapter 6, fixed the names.  https://www.mpi-forum.org/docs/
Letters: N ranks of the group, n elements.
"""

import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from minispeed.errors import UserError
from minispeed.mesh import line_of

Op: TypeAlias = Literal["sum", "max", "min"]  # on bools: any, any, all
Message: TypeAlias = tuple[Tensor, int]  # a buffer, and the rank it goes to or comes from

REDUCE: dict[Op, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class CollectiveError(UserError):
    """A collective that cannot complete: the ranks disagree, one is gone, or all wait for each other."""


class Work(Protocol):
    """A call under way. Its buffers belong to it until `wait` returns."""

    def wait(self) -> None:
        """Return once the results are in place (on a GPU: once the stream will see them)."""


class Done:
    """Work that was complete when the call returned."""

    def wait(self) -> None:
        """Return at once."""


class Exchanging(Protocol):
    """The little that rings and trees are built from."""

    @property
    def rank(self) -> int:
        """My position in the group."""

    @property
    def size(self) -> int:
        """N, the number of ranks."""

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Work:
        """Send and receive point to point, all in flight together.

        The k-th message from a to b in a's calls is the k-th in b's. Each waits for its partner: two ranks
        that both send first and receive in a second exchange are a deadlock. A message to myself is allowed.
        """


class Group(Exchanging, Protocol):
    """Ranks that call the same collectives in the same order. Every method is called by all of them."""

    @property
    def members(self) -> tuple[int, ...]:
        """The world's number of each rank of the group."""

    def all_reduce(self, x: Tensor, op: Op = "sum") -> Work:
        """Replace `x` (n,) by the sum (max, min) of all ranks' `x`."""

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """Write every rank's `x` (n,) into `out` (N n,), in rank order; `x` may lie at its place in `out`."""

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        """Sum every rank's `x` (N n,) and write part `rank` of the sum into `out` (n,)."""

    def all_to_all(self, out: Tensor, x: Tensor) -> Work:
        """Send part r of `x` (N n,) to rank r; `out` (N n,) holds what came, in rank order."""

    def broadcast(self, x: Tensor, root: int) -> Work:
        """Replace `x` (n,) by that of rank `root`."""

    def subgroup(self, lines: Sequence[Sequence[int]]) -> "Group":
        """Return the group of the line that holds me; the lines (`Mesh.lines`) hold this group's ranks."""


class SoloGroup:
    """The group of one: everything is the identity."""

    rank, size = 0, 1

    def __init__(self, member: int = 0) -> None:
        """Be the group of that rank of the world alone."""
        self.members: tuple[int, ...] = (member,)

    def all_reduce(self, x: Tensor, op: Op = "sum") -> Work:
        """Leave `x` as it is."""
        check_buffers("all_reduce", self, x, op=op)
        return Done()

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """Copy `x` to `out`."""
        check_buffers("all_gather", self, x, out)
        copy_to_self([(x, 0)], [(out, 0)])
        return Done()

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        """Copy `x` to `out`."""
        return self.all_gather(out, x)

    def all_to_all(self, out: Tensor, x: Tensor) -> Work:
        """Copy `x` to `out`."""
        return self.all_gather(out, x)

    def broadcast(self, x: Tensor, root: int) -> Work:
        """Leave `x` as it is."""
        check_buffers("broadcast", self, x, root=root)
        return Done()

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Work:
        """Copy what I send myself to where I receive it, in order."""
        check_messages(self, sends, recvs)
        copy_to_self(sends, recvs)
        return Done()

    def subgroup(self, lines: Sequence[Sequence[int]]) -> "SoloGroup":
        """Return this group: alone, it has no other line than its own."""
        check_lines(self, lines)
        return self


def check_buffers(
    kind: str, group: Exchanging, x: Tensor, out: Tensor | None = None, *, op: str = "sum", root: int = 0
) -> None:
    """Raise UserError, the two values that disagree named, unless the buffers fit the collective."""
    for name, buffer in (("x", x), ("out", out)):
        if buffer is not None and not buffer.is_contiguous():
            raise UserError(f"{kind}: {name} of shape {tuple(buffer.shape)} is not contiguous", fix=".contiguous()")
    if op not in REDUCE:
        raise UserError(f"{kind}: no reduction {op!r}", fix=", ".join(REDUCE))
    if not 0 <= root < group.size:
        raise UserError(f"{kind}: root {root} in a group of {group.size}", fix="a rank of this group")
    if out is None:
        return
    if (out.dtype, out.device) != (x.dtype, x.device):
        what = f"out is {out.dtype} on {out.device}, x {x.dtype} on {x.device}"
        raise UserError(f"{kind}: {what}", fix="one dtype and one device for both")
    factor = {"all_gather": group.size, "reduce_scatter": 1 / group.size}.get(kind, 1)
    what = f"{kind} over {group.size} ranks: x has {x.numel()} elements"
    if kind in ("reduce_scatter", "all_to_all") and x.numel() % group.size:
        raise UserError(what, fix="a multiple of the number of ranks")
    if out.numel() != round(x.numel() * factor):
        raise UserError(f"{what}, out {out.numel()}", fix=f"out of {round(x.numel() * factor)} elements")


def check_messages(group: Exchanging, sends: Sequence[Message], recvs: Sequence[Message]) -> None:
    """Raise UserError on a peer outside the group or a buffer that is not contiguous."""
    for buffer, peer in (*sends, *recvs):
        if not 0 <= peer < group.size:
            raise UserError(f"exchange with rank {peer} in a group of {group.size}", fix="a rank in the group")
        if not buffer.is_contiguous():
            shape = tuple(buffer.shape)
            raise UserError(f"exchange: a buffer of shape {shape} is not contiguous", fix=".contiguous()")


def check_lines(group: Exchanging, lines: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the line that holds me.

    Raises  UserError unless the lines hold every rank of the group once, each line in rank order
    """
    held = sorted(rank for line in lines for rank in line)
    if held != list(range(group.size)):
        what = f"the lines hold the ranks {held} of a group of {group.size}"
        raise UserError(what, fix="mesh.lines(axis), or lists that hold every rank once")
    mine = line_of(group.rank, lines)
    if list(mine) != sorted(mine):
        raise UserError(f"the line {list(mine)} is not in rank order", fix=str(sorted(mine)))
    return mine


@torch.no_grad()
def copy_to_self(sends: Sequence[Message], recvs: Sequence[Message]) -> None:
    """Serve the messages of one exchange that a rank has for itself: the k-th sent is the k-th received."""
    if len(sends) != len(recvs):
        what = f"exchange with myself: {len(sends)} messages sent, {len(recvs)} received"
        raise CollectiveError(f"{what}, at {call_site()}", fix="as many of one as of the other in one exchange")
    for (sent, _), (received, _) in zip(sends, recvs, strict=True):
        if describe(sent) != describe(received):
            what = f"exchange with myself: {describe(sent)} sent, {describe(received)} received"
            raise CollectiveError(f"{what}, at {call_site()}", fix="the same size and dtype on both sides")
        received.view(-1).copy_(sent.view(-1))


def describe(x: Tensor) -> str:
    """Return what of a buffer the ranks must agree on: "4 float32"."""
    return f"{x.numel()} {str(x.dtype).removeprefix('torch.')}"


def describe_messages(sends: Sequence[Message], recvs: Sequence[Message]) -> str:
    """Return an exchange in words: "exchange(4 float32 to 1, 4 float32 from 3)"."""
    parts = [f"{describe(x)} to {peer}" for x, peer in sends]
    parts += [f"{describe(x)} from {peer}" for x, peer in recvs]
    return f"exchange({', '.join(parts)})"


_HERE = str(Path(__file__).parent)
MACHINERY = (
    str(Path(__file__).parents[1]),  # this library
    str(Path(torch.__file__).parent),
    sysconfig.get_paths()["stdlib"],
    "<frozen",
)


def call_site() -> str:
    """Return "file:line in function" of the user's line that led to this call.

    That is the innermost frame outside this library, torch and Python's own modules; where there is none (the
    command line runs the library alone), the innermost outside this package.
    """
    frame: FrameType | None = sys._getframe(1)
    inner = None
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(MACHINERY):
            return _spell(frame)
        if inner is None and not path.startswith(_HERE):
            inner = frame
        frame = frame.f_back
    return _spell(inner) if inner else "a line that Python does not know"


def _spell(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
