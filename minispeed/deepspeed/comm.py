"""The collectives that scripts call without naming a world: the tensors' half of `deepspeed.comm`.

    import minispeed.comm as dist
    dist.all_reduce(loss, op=dist.ReduceOp.AVG)

Each is a call of our Group, which knows flat contiguous buffers and sums: here any shape goes in, a mean is a sum
that is divided in the end, lists are laid out in one buffer. With `async_op=True` a call returns at once, with
something to `wait()` for.

The names are torch.distributed's.  https://pytorch.org/docs/stable/distributed.html
Letters: N ranks of the group, n elements.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor

from minispeed.collective.group import Group, Op, Work
from minispeed.deepspeed.groups import AnyGroup, group_of, rank_in
from minispeed.errors import UserError


class ReduceOp(Enum):
    """What is made of the ranks' values; torch.distributed's own names are understood too."""

    SUM = 0
    MIN = 2
    MAX = 3
    AVG = 7


OPS = {"SUM": "sum", "AVG": "sum", "MIN": "min", "MAX": "max"}


class Handle:
    """A call under way, whose results are in place after `wait`."""

    def __init__(self, work: Work, finish: Callable[[], None]) -> None:
        self._work, self._finish, self._is_done = work, finish, False

    def wait(self) -> None:
        """Return once the results are in place; a second time, at once."""
        if not self._is_done:
            self._is_done = True
            self._work.wait()
            self._finish()


def barrier(group: AnyGroup = None, async_op: bool = False, device_ids: Any = None) -> Handle | None:
    """Return when all ranks have come here. On a GPU it is the ranks that have met, not their streams."""
    return all_reduce(torch.zeros(1), ReduceOp.SUM, group, async_op)


def all_reduce(tensor: Tensor, op: Any = ReduceOp.SUM, group: AnyGroup = None, async_op: bool = False) -> Handle | None:
    """Replace `tensor` by the sum (mean, largest, smallest) of all ranks'."""
    mine, word, flat = group_of(group), _word(op, tensor), tensor.detach().contiguous()

    def finish() -> None:
        _divide(flat, op, mine)
        put(flat, tensor)

    return end(mine.all_reduce(flat, word), finish, async_op)


def reduce(
    tensor: Tensor, dst: int, op: Any = ReduceOp.SUM, group: AnyGroup = None, async_op: bool = False
) -> Handle | None:
    """Do as `all_reduce`, on rank `dst` alone; the others keep what they have. It sends what `all_reduce` sends."""
    mine, word = group_of(group), _word(op, tensor)
    root, flat = rank_in(mine, dst), tensor.detach().clone(memory_format=torch.contiguous_format)

    def finish() -> None:
        if mine.rank == root:
            _divide(flat, op, mine)
            put(flat, tensor)

    return end(mine.all_reduce(flat, word), finish, async_op)


def broadcast(tensor: Tensor, src: int, group: AnyGroup = None, async_op: bool = False) -> Handle | None:
    """Replace `tensor` by that of rank `src`."""
    mine, flat = group_of(group), tensor.detach().contiguous()
    return end(mine.broadcast(flat, rank_in(mine, src)), lambda: put(flat, tensor), async_op)


def all_gather_into_tensor(
    output_tensor: Tensor, tensor: Tensor, group: AnyGroup = None, async_op: bool = False
) -> Handle | None:
    """Write every rank's `tensor` (n elements) into `output_tensor` (N n elements), in rank order."""
    out = output_tensor.detach().contiguous()
    work = group_of(group).all_gather(out, tensor.detach().contiguous())
    return end(work, lambda: put(out, output_tensor), async_op)


def all_gather(
    tensor_list: Sequence[Tensor], tensor: Tensor, group: AnyGroup = None, async_op: bool = False
) -> Handle | None:
    """Write rank r's `tensor` into `tensor_list[r]`; all have one size."""
    mine = group_of(group)
    check_one_each("tensor_list", tensor_list, mine)
    out = tensor.detach().new_empty((mine.size, *tensor.shape))
    work = mine.all_gather(out, tensor.detach().contiguous())
    return end(work, lambda: _put_each(out, tensor_list), async_op)


def reduce_scatter_tensor(
    output_tensor: Tensor, tensor: Tensor, op: Any = ReduceOp.SUM, group: AnyGroup = None, async_op: bool = False
) -> Handle | None:
    """Sum every rank's `tensor` (N n elements), and keep part `rank` of the sum in `output_tensor` (n elements)."""
    if _word(op, tensor) != "sum":
        raise UserError(f"reduce_scatter with {op}", fix="SUM or AVG, or all_reduce")
    mine, out = group_of(group), output_tensor.detach().contiguous()

    def finish() -> None:
        _divide(out, op, mine)
        put(out, output_tensor)

    return end(mine.reduce_scatter(out, tensor.detach().contiguous()), finish, async_op)


def reduce_scatter(
    output: Tensor,
    input_list: Sequence[Tensor],
    op: Any = ReduceOp.SUM,
    group: AnyGroup = None,
    async_op: bool = False,
) -> Handle | None:
    """Sum every rank's `input_list[r]` on rank r."""
    check_one_each("input_list", input_list, group_of(group))
    return reduce_scatter_tensor(output, torch.stack([x.detach() for x in input_list]), op, group, async_op)


def all_to_all_single(
    output: Tensor,
    tensor: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: AnyGroup = None,
    async_op: bool = False,
) -> Handle | None:
    """Send part r of `tensor` to rank r, and lay what comes in `output`, in rank order.

    The parts are equal, or cut from the first dim by the split sizes, one for each rank.
    """
    mine, out, x = group_of(group), output.detach().contiguous(), tensor.detach().contiguous()
    if output_split_sizes or input_split_sizes:
        sent, received = (
            _cut(whole, sizes, mine) for whole, sizes in ((x, input_split_sizes), (out, output_split_sizes))
        )
        work = exchange(mine, sent, received)
    else:
        work = mine.all_to_all(out, x)
    return end(work, lambda: put(out, output), async_op)


def all_to_all(
    output_tensor_list: Sequence[Tensor],
    input_tensor_list: Sequence[Tensor],
    group: AnyGroup = None,
    async_op: bool = False,
) -> Handle | None:
    """Send `input_tensor_list[r]` to rank r, and receive `output_tensor_list[r]` from it; sizes may differ."""
    mine = group_of(group)
    check_one_each("output_tensor_list", output_tensor_list, mine)
    check_one_each("input_tensor_list", input_tensor_list, mine)
    outs = [place.detach().contiguous() for place in output_tensor_list]
    work = exchange(mine, [x.detach().contiguous() for x in input_tensor_list], outs)
    return end(work, lambda: _put_each(outs, output_tensor_list), async_op)


def end(work: Work, finish: Callable[[], None], async_op: bool) -> Handle | None:
    """Finish a call at once, or hand it out to be waited for."""
    handle = Handle(work, finish)
    if async_op:
        return handle
    handle.wait()
    return None


def put(result: Tensor, place: Tensor) -> None:
    """Write a result where the caller wants it, unless it lies there."""
    if result.data_ptr() != place.data_ptr():
        place.detach().copy_(result.view_as(place))


def exchange(mine: Group, sent: Sequence[Tensor], received: Sequence[Tensor]) -> Work:
    """Send `sent[r]` to rank r and receive `received[r]` from it; what is empty does not travel."""
    sends, recvs = ([(x, peer) for peer, x in enumerate(parts) if x.numel()] for parts in (sent, received))
    return mine.exchange(sends, recvs)


def check_one_each(name: str, tensors: Sequence[Tensor], mine: Group) -> None:
    """Raise UserError unless there is one tensor for each rank."""
    if len(tensors) != mine.size:
        raise UserError(f"{name} has {len(tensors)} tensors for {mine.size} ranks", fix="one for each rank")


def _word(op: Any, tensor: Tensor) -> Op:
    """Return what the Group calls a reduction."""
    name = getattr(op, "name", op)
    if name not in OPS:
        raise UserError(f"there is no reduction {op}", fix=", ".join(OPS))
    if name == "AVG" and not (tensor.is_floating_point() or tensor.is_complex()):
        raise UserError(f"the mean of {tensor.dtype} is no {tensor.dtype}", fix="SUM, or a floating-point tensor")
    return cast(Op, OPS[name])


def _divide(total: Tensor, op: Any, mine: Group) -> None:
    if getattr(op, "name", op) == "AVG":
        total.div_(mine.size)


def _put_each(results: Sequence[Tensor] | Tensor, places: Sequence[Tensor]) -> None:
    for result, place in zip(results, places, strict=True):
        put(result, place)


def _cut(whole: Tensor, sizes: Sequence[int] | None, mine: Group) -> Sequence[Tensor]:
    """Cut the first dim into one part for each rank."""
    equal = whole.shape[0] // mine.size
    parts = whole.split(list(sizes) if sizes else [equal] * mine.size)
    check_one_each("split_sizes", parts, mine)
    return parts
