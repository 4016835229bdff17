"""The rows of `training_data` for this rank, a micro-batch at a time, and a loader that never ends.

Which rows a rank gets is torch's DistributedSampler's affair, as in DeepSpeed: a shuffled order of all rows, filled
up with its first rows until N divides it, of which rank r takes every N-th from r on. The order is the same in every
epoch, unless `loader.sampler.set_epoch(epoch)` makes another.

https://deepspeed.readthedocs.io/en/latest/initialize.html     Letters: N ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, DistributedSampler

from minispeed.collective.group import Group
from minispeed.errors import UserError

T = TypeVar("T")


def make_loader(
    dataset: Any,
    *,
    micro_batch: int,
    group: Group,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = False,
    seed: int = 0,
) -> DataLoader[Any]:
    """Return this rank's micro-batches of a dataset with a length and an index.

    micro_batch  rows in each; the last may have less
    group        the ranks that share the rows
    drop_last    leave the last micro-batch out where it has less rows
    seed         of the order; 0 is DeepSpeed's
    Raises       UserError if the dataset cannot be indexed, or is empty
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        what = f"training_data is a {type(dataset).__name__}, of which no row can be asked for by its number"
        raise UserError(what, fix="a dataset with __len__ and __getitem__, or a loader of your own")
    if not len(dataset):
        raise UserError("training_data has no rows", fix="a dataset with rows")
    return DataLoader(
        dataset,
        batch_size=micro_batch,
        sampler=DistributedSampler(dataset, num_replicas=group.size, rank=group.rank, seed=seed),
        collate_fn=collate_fn,
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed),  # or it would draw from the one that all threads share
    )


class RepeatingLoader(Generic[T]):
    """A loader that begins again when it is through."""

    def __init__(self, loader: Iterable[T]) -> None:
        """Begin with the loader's first batch."""
        self.loader, self.data_iter = loader, iter(loader)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """Return the next batch; of an empty loader there is none."""
        for batch in self.data_iter:
            return batch
        self.data_iter = iter(self.loader)
        return next(self.data_iter)
