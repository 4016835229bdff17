"""What goes from one rank to another, and objects: the rest of `deepspeed.comm`.

Messages are matched in call order: the k-th from a to b in a's calls is the k-th in b's. On ranks that are threads
each waits for its partner, `isend` too: two ranks that both send first are told that they wait for each other. What
must be in flight together goes into one `batch_isend_irecv`. Objects travel as pickles.

The names are torch.distributed's.  https://pytorch.org/docs/stable/distributed.html
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minispeed.collective.group import Group
from minispeed.deepspeed.comm import Handle, check_one_each, end, put
from minispeed.deepspeed.groups import AnyGroup, group_of, rank_in
from minispeed.errors import UserError


def send(tensor: Tensor, dst: int, group: AnyGroup = None, tag: int = 0) -> None:
    """Send `tensor` to rank `dst`."""
    _in_flight([P2POp(isend, tensor, dst, group, tag)]).wait()


def recv(tensor: Tensor, src: int | None = None, group: AnyGroup = None, tag: int = 0) -> int:
    """Replace `tensor` by what rank `src` sends; return `src`."""
    if src is None:
        raise UserError("recv from any rank", fix="src=RANK: messages are matched in call order")
    _in_flight([P2POp(irecv, tensor, src, group, tag)]).wait()
    return src


def isend(tensor: Tensor, dst: int, group: AnyGroup = None, tag: int = 0) -> Handle:
    """Begin to send `tensor` to rank `dst`."""
    return _in_flight([P2POp(isend, tensor, dst, group, tag)])


def irecv(tensor: Tensor, src: int, group: AnyGroup = None, tag: int = 0) -> Handle:
    """Begin to replace `tensor` by what rank `src` sends."""
    return _in_flight([P2POp(irecv, tensor, src, group, tag)])


@dataclass(frozen=True)
class P2POp:
    """One message of a batch: `op` is `isend` or `irecv`, `peer` the other rank."""

    op: Callable[..., Handle]
    tensor: Tensor
    peer: int
    group: AnyGroup = None
    tag: int = 0

    def __post_init__(self) -> None:
        if self.op not in (isend, irecv):
            raise UserError(f"a message by {self.op!r}", fix="deepspeed.comm.isend or deepspeed.comm.irecv")


def batch_isend_irecv(p2p_op_list: Sequence[P2POp]) -> list[Handle]:
    """Begin all these messages together; they are of one group."""
    return [_in_flight(p2p_op_list)]


def gather(
    tensor: Tensor,
    gather_list: Sequence[Tensor] | None = None,
    dst: int = 0,
    group: AnyGroup = None,
    async_op: bool = False,
) -> Handle | None:
    """Write rank r's `tensor` into `gather_list[r]` on rank `dst`."""
    mine = group_of(group)
    root, places = rank_in(mine, dst), list(gather_list or ())
    if mine.rank == root:
        check_one_each("gather_list", places, mine)
    outs = [place.detach().contiguous() for place in places]
    work = mine.exchange([(tensor.detach().contiguous(), root)], [(out, peer) for peer, out in enumerate(outs)])

    def finish() -> None:
        for out, place in zip(outs, places, strict=True):
            put(out, place)

    return end(work, finish, async_op)


def scatter(
    tensor: Tensor,
    scatter_list: Sequence[Tensor] | None = None,
    src: int = 0,
    group: AnyGroup = None,
    async_op: bool = False,
) -> Handle | None:
    """Replace `tensor` on rank r by rank `src`'s `scatter_list[r]`."""
    mine = group_of(group)
    root, out = rank_in(mine, src), tensor.detach().contiguous()
    parts = [x.detach().contiguous() for x in scatter_list or ()]
    if mine.rank == root:
        check_one_each("scatter_list", parts, mine)
    work = mine.exchange([(part, peer) for peer, part in enumerate(parts)], [(out, root)])
    return end(work, lambda: put(out, tensor), async_op)


def broadcast_object_list(object_list: list[Any], src: int = 0, group: AnyGroup = None, device: Any = None) -> None:
    """Replace the objects of the list by those of rank `src`."""
    mine = group_of(group)
    root = rank_in(mine, src)
    payload = _bytes_of(object_list) if mine.rank == root else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([payload.numel()])
    mine.broadcast(size, root).wait()
    if mine.rank != root:
        payload = payload.new_empty(int(size))
    mine.broadcast(payload, root).wait()
    if mine.rank != root:
        object_list[:] = _object_of(payload)


def all_gather_object(object_list: list[Any], obj: Any, group: AnyGroup = None) -> None:
    """Replace `object_list[r]` by the object of rank r."""
    mine = group_of(group)
    check_one_each("object_list", object_list, mine)
    payload = _bytes_of(obj)
    sizes = _gathered(mine, torch.tensor([payload.numel()])).tolist()
    padded = torch.nn.functional.pad(payload, (0, max(sizes) - payload.numel()))
    everything = _gathered(mine, padded).view(mine.size, -1)
    object_list[:] = [_object_of(one[:size]) for one, size in zip(everything, sizes, strict=True)]


def _in_flight(messages: Sequence[P2POp]) -> Handle:
    """Begin messages of one group as one exchange."""
    group = messages[0].group
    for message in messages:
        if message.tag or message.group is not group:
            what = f"a message with tag {message.tag}" if message.tag else "one batch for two groups"
            raise UserError(what, fix="tag=0: messages are matched in call order; one batch for each group")
    mine = group_of(group)
    flats = [(message, message.tensor.detach().contiguous()) for message in messages]
    sends = [(flat, rank_in(mine, message.peer)) for message, flat in flats if message.op is isend]
    recvs = [(flat, rank_in(mine, message.peer)) for message, flat in flats if message.op is irecv]

    def finish() -> None:
        for message, flat in flats:
            if message.op is irecv:
                put(flat, message.tensor)

    return Handle(mine.exchange(sends, recvs), finish)


def _gathered(mine: Group, x: Tensor) -> Tensor:
    out = x.new_empty(mine.size * x.numel())
    mine.all_gather(out, x).wait()
    return out


def _bytes_of(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _object_of(payload: Tensor) -> Any:
    return pickle.loads(payload.numpy().tobytes())
