"""Write down what is alive in memory, by what it is there for, after every operation of a training step.

Whatever torch computes, from a product of matrices to the optimizer's update, is a row of operations. A `Trace` looks
on at each of them and afterwards asks two questions: how many bytes are alive, and whose are they? What belongs to
nobody is temporary: some operation needs it until its neighbour is through.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minispeed.census import Census, storage_bytes

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "temporary")


class Trace(Census):
    """The bytes of each category, after every operation inside `with trace:`.

    samples  one row an operation, in the order of CATEGORIES
    marks    (name, number of samples so far, bytes of each category then), of moments that somebody named
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.kept = model, optimizer, Kept(model)
        self.samples: list[tuple[int, ...]] = []
        self.marks: list[tuple[str, int, tuple[int, ...]]] = []
        super().__init__(known=[*model.parameters(), *model.buffers(), *self.states()])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.samples.append(self.now())
        return result

    def now(self) -> tuple[int, ...]:
        """Divide the bytes that are alive among the categories."""
        owned = (
            storage_bytes(self.model.parameters()),
            storage_bytes(p.grad for p in self.model.parameters()),
            storage_bytes(self.states()),
            self.kept.bytes,
        )
        return *owned, self.alive() - sum(owned)

    def mark(self, name: str) -> None:
        """Name this moment."""
        self.marks.append((name, len(self.samples), self.now()))

    def states(self) -> list[Tensor]:
        """Return the optimizer's tensors, its counters of steps left out: they are single numbers."""
        found = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value for value in found if value.dim()]


class Kept:
    """What autograd keeps of the forward because the backward will read it: the activations.

    bytes  of the storages that are kept now, each counted once, the parameters' left out
    """

    def __init__(self, model: nn.Module) -> None:
        self.left_out = {p.untyped_storage()._cdata for p in model.parameters()}
        self.keepers: Counter[int] = Counter()
        self.bytes = 0

    def watching(self) -> AbstractContextManager[None]:
        """Count what autograd keeps of the operations inside."""
        return torch.autograd.graph.saved_tensors_hooks(lambda x: _Saved(self, x), lambda saved: saved.tensor)

    def add(self, storage: torch.UntypedStorage, keepers: int) -> None:
        """Count one keeper of a storage more, or one less."""
        if storage._cdata in self.left_out:
            return
        before = self.keepers[storage._cdata] > 0
        self.keepers[storage._cdata] += keepers
        self.bytes += ((self.keepers[storage._cdata] > 0) - before) * storage.nbytes()


class _Saved:
    """A tensor that autograd keeps, counted until autograd lets go."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor.detach()
        kept.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.kept.add(self.tensor.untyped_storage(), -1)


@contextmanager
def marking_layers(trace: Trace) -> Iterator[None]:
    """Mark the end of each layer's forward, and the moment when its backward begins."""
    layers = [("embedding", trace.model.embed), *((f"block {i}", b) for i, b in enumerate(trace.model.blocks))]
    hooks = [layer.register_forward_hook(_marker(trace, name)) for name, layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _marker(trace: Trace, name: str) -> Callable[..., None]:
    def after(module: nn.Module, given: Any, output: Tensor) -> None:
        trace.mark(f"forward of {name}")
        output.register_hook(lambda gradient: trace.mark(f"backward down to {name}"))

    return after
