"""Micro-batches as a pipeline's iterators give them: pairs of inputs and labels."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minispeed.errors import UserError


class MicroBatch(NamedTuple):
    """What the first stage reads, and what the last: a tensor, or a tuple of tensors. None where nobody reads."""

    inputs: Any
    labels: Any

    def to(self, device: torch.device, *, halve: bool) -> "MicroBatch":
        """Return it on a device, with inputs in fp16 where they have a fraction and `halve` says so."""
        inputs = map_tensors(lambda x: x.half() if halve and x.is_floating_point() else x, self.inputs)
        return MicroBatch(*(map_tensors(lambda x: x.to(device), one) for one in (inputs, self.labels)))


def read_batches(
    iterator: Iterator[Any] | None, number: int, batch_fn: Callable[[Any], Any] | None = None
) -> list[MicroBatch]:
    """Return that many micro-batches of an iterator.

    batch_fn  is called with what the iterator gives
    Raises    UserError if there is none, if it ends before, or gives no pair
    """
    if iterator is None:
        raise UserError("train_batch has nothing to read", fix="train_batch(data_iter), or initialize(training_data=)")
    if not hasattr(iterator, "__next__"):
        what = f"a {type(iterator).__name__}, which has no next micro-batch"
        raise UserError(what, fix="iter(loader), or engine.set_dataloader(loader)")
    found: list[MicroBatch] = []
    for batch in iterator:
        pair = batch if batch_fn is None else batch_fn(batch)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            size = f" of {len(pair)}" if isinstance(pair, (tuple, list)) else ""
            raise UserError(f"a micro-batch is a {type(pair).__name__}{size}", fix="(inputs, labels), by set_batch_fn")
        found.append(MicroBatch(*pair))
        if len(found) == number:
            return found
    what = f"the data iterator ended after {len(found)} micro-batches, and a step takes {number}"
    raise UserError(what, fix="deepspeed.utils.RepeatingLoader(loader), or fewer gradient_accumulation_steps")


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Return a function of each tensor in tuples and lists, which become tuples; all else as it is."""
    if isinstance(x, (tuple, list)):
        return tuple(map_tensors(function, one) for one in x)
    return function(x) if isinstance(x, Tensor) else x
