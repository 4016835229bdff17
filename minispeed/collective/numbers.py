"""Let all ranks know a few numbers of each: counts, losses, flags. They travel on the CPU, exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minispeed.collective.group import Group


def sums_of(group: Group, values: Sequence[float]) -> Tensor:
    """Return the sums over all ranks, fp64 (exact for counts below 2**53), (len(values),)."""
    sums = torch.tensor(values, dtype=torch.float64)
    group.all_reduce(sums).wait()
    return sums


def any_of(group: Group, flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    largest = torch.tensor([float(flag)])
    group.all_reduce(largest, "max").wait()
    return bool(largest.item())


def barrier(group: Group) -> None:
    """Return once every rank of the group has come here."""
    any_of(group, False)


def everyones(group: Group, numbers: Sequence[int]) -> Tensor:
    """Return what each rank brought, (N, len(numbers)); every rank brings as many."""
    mine = torch.tensor(numbers)
    everyone = mine.new_empty(group.size * len(numbers))
    group.all_gather(everyone, mine).wait()
    return everyone.view(group.size, len(numbers))


def texts_of(group: Group, text: str) -> list[str]:
    """Return what each rank brought, in rank order.

    Sends  as many bytes per rank as the longest text has, N - 1 times
    """
    mine = text.encode()
    lengths = everyones(group, [len(mine)]).flatten().tolist()
    padded = torch.tensor(list(mine.ljust(max(lengths))), dtype=torch.uint8)
    everyone = padded.new_empty(group.size * len(padded))
    group.all_gather(everyone, padded).wait()
    return [bytes(one[:length].tolist()).decode() for one, length in zip(everyone.split(len(padded)), lengths)]
