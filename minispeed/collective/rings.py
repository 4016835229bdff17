"""Build collectives from messages: rings and a tree, and the gathering at one rank that they replace.

In a ring each rank sends to its right and receives from its left, N - 1 times: a part of the buffer, a little
further along, each time. Every link is busy all the time and no rank holds more than its share, so the time
hardly depends on N. Gathered at one rank, the same sum waits for that rank's link, and takes N times as long.

    sent per rank     reduce-scatter  all-gather  all-reduce       through one rank
    elements          n (N - 1)/N     n (N - 1)/N 2 n (N - 1)/N    n, and at the root n (N - 1)

Patarasu & Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations; the tree is
binomial: Thakur, Rabenseifner & Gropp 2005, Optimization of collective communication operations in MPICH.
Letters: N ranks of the group, n elements of the whole buffer.
"""

import torch
from torch import Tensor

from minispeed.collective.group import REDUCE, Exchanging, Op


@torch.no_grad()
def reduce_scatter(group: Exchanging, out: Tensor, x: Tensor, op: Op = "sum") -> None:
    """Sum every rank's `x` (N n,) and write part `rank` of the sum into `out` (n,); `x` is left as it is.

    Holds  a received part and a partial sum, (n,) each
    Sends  n elements, N - 1 times
    """
    total = _ring_reduce(group, list(x.view(group.size, out.numel())), op)
    out.view(-1).copy_(total)


@torch.no_grad()
def all_gather(group: Exchanging, out: Tensor, x: Tensor) -> None:
    """Write every rank's `x` (n,) into `out` (N n,), in rank order; `x` may lie in its place inside `out`.

    Sends  n elements, N - 1 times
    """
    parts = list(out.view(group.size, x.numel()))
    parts[group.rank].copy_(x.view(-1))
    _ring_gather(group, parts)


@torch.no_grad()
def all_reduce(group: Exchanging, x: Tensor, op: Op = "sum") -> None:
    """Replace `x` (n,) by the sum of all ranks' `x`: scattered, then gathered. N need not divide n.

    Sends  the buffer less one part, twice: 2 n (N - 1)/N elements where N divides n
    """
    parts = [x.view(-1)[start:stop] for start, stop in part_bounds(x.numel(), group.size)]
    parts[group.rank].copy_(_ring_reduce(group, parts, op))
    _ring_gather(group, parts)


@torch.no_grad()
def broadcast(group: Exchanging, x: Tensor, root: int) -> None:
    """Replace `x` (n,) by that of rank `root`, along a tree: who has it sends it on, so the number doubles.

    Sends  n elements to each of `tree_children`; at most log2 N messages follow one another
    """
    place = (group.rank - root) % group.size
    if place:
        parent = place - (1 << place.bit_length() - 1)
        group.exchange([], [(x, (parent + root) % group.size)]).wait()
    for child in tree_children(group.rank, root, group.size):
        group.exchange([(x, child)], []).wait()


@torch.no_grad()
def central_all_reduce(group: Exchanging, x: Tensor, op: Op = "sum") -> None:
    """Replace `x` (n,) by the sum of all ranks' `x`, through rank 0: what a ring is measured against.

    Holds  at rank 0, N - 1 received buffers
    Sends  n elements to rank 0; at rank 0, n elements to each of the others
    """
    others = range(1, group.size)
    if group.rank:
        group.exchange([(x, 0)], []).wait()
        group.exchange([], [(x, 0)]).wait()
        return
    received = [torch.empty_like(x) for _ in others]
    group.exchange([], list(zip(received, others, strict=True))).wait()
    for buffer in received:
        REDUCE[op](x, buffer, out=x)
    group.exchange([(x, rank) for rank in others], []).wait()


def part_bounds(n: int, size: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of `size` parts of `n` elements; the first n mod size are one longer."""
    bounds = [rank * (n // size) + min(rank, n % size) for rank in range(size + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def tree_children(rank: int, root: int, size: int) -> list[int]:
    """Return the ranks that `rank` sends a broadcast on to, in order.

    Counted from the root, place p hears from p less its highest bit, and sends to p + 2^k for every 2^k above
    p.
    """
    place = (rank - root) % size
    reach = [1 << k for k in range(place.bit_length(), size.bit_length()) if place + (1 << k) < size]
    return [(place + step + root) % size for step in reach]


def _ring_reduce(group: Exchanging, parts: list[Tensor], op: Op) -> Tensor:
    """Send partial sums round the ring, each rank adding its own part; return the sum of part `rank`.

    Part r starts at rank r + 1 and arrives at rank r, complete, after N - 1 steps.
    """
    rank, size = group.rank, group.size
    total = parts[rank - 1]
    for step in range(1, size):
        mine = parts[(rank - 1 - step) % size]
        received = torch.empty_like(mine)
        _shift(group, total, received)
        total = REDUCE[op](received, mine, out=received)
    return total


def _ring_gather(group: Exchanging, parts: list[Tensor]) -> None:
    """Send each part round the ring: at step s a rank passes on what it received at step s - 1."""
    rank, size = group.rank, group.size
    for step in range(size - 1):
        _shift(group, parts[(rank - step) % size], parts[(rank - step - 1) % size])


def _shift(group: Exchanging, send: Tensor, recv: Tensor) -> None:
    """Send to the right, receive from the left; an empty part makes no message."""
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    group.exchange([(send, right)] if send.numel() else [], [(recv, left)] if recv.numel() else []).wait()
