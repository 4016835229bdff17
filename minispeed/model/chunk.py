"""Cut a GPT by depth into chunks, each a module that maps what the chunk before returned to what the next one needs.

    layer      0        1 .. L       L + 1
               embed    the blocks   norm and head        tokens -> chunk -> bundle -> chunk -> ... -> losses

A bundle is a tuple of tensors: of a plain GPT one, with deep connections as few as serve all layers behind the cut
(`deep.py`). Nobody speaks here: who hands bundles on, and their gradients back, is the pipeline.

A chunk holds the model's own modules under their own names, so that its parameters are some of the model's. Two kinds
are needed by chunks that do not own them: alpha, by all, and the token embedding, by the head that is tied to it. There
a chunk has a copy, and `tied` names what it is a copy of: the gradients of all copies are to be added.

GPipe, Huang et al. 2019, section 2 (https://arxiv.org/abs/1811.06965).
Letters: B batch, T tokens, D model, H heads, K head dim, V vocabulary, L blocks.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from minispeed.errors import UserError
from minispeed.model.cache import Cache
from minispeed.model.config import GPTConfig
from minispeed.model.deep import Deep, Outputs
from minispeed.model.dropout import Dropping
from minispeed.model.gpt import GPT, Final, Head, describe, run_layers


class Chunk(nn.Module):
    """Layers first .. last - 1 of a GPT's L + 2, as they are now: cut over tp, or recomputed, if the model is.

    tied          local name of each parameter that is a copy -> the model's name for it
    num_received  tensors in the bundle that comes in, (B, T, D) each, or (B, T/tp, D); the first chunk has none
    num_sent      tensors in the bundle that goes out; of the last chunk, features or losses
    """

    head: Head  # in the last chunk alone
    deep: Deep
    dropping: Dropping

    def __init__(self, model: GPT, first: int, last: int) -> None:
        """Share the model's modules; copy what is tied to other chunks.

        Raises  UserError if there are no such layers
        """
        super().__init__()
        length = model.config.num_layers + 2
        if not 0 <= first < last <= length:
            what = f"a chunk of layers {first} to {last - 1}, of a model with layers 0 to {length - 1}"
            raise UserError(what, fix=f"0 <= first < last <= {length}")
        self.config, self.recomputed = model.config, model.recomputed
        self.first, self.last, self.is_first, self.is_last = first, last, first == 0, last == length
        connections = model.deep.connections
        self.num_received = 0 if self.is_first else sum(map(len, connections.cover(first - 1)))
        self.num_sent = sum(map(len, connections.cover(last - 1)))
        self.layers = layer_names(model.config)[first:last]
        self.tied: dict[str, str] = {}
        self._take_modules(model)

    def _take_modules(self, model: GPT) -> None:
        here = [*self.layers, *(["head"] if self.is_last else []), "deep", "dropping"]
        own = tuple(f"{name}." for name in here if self.is_first or name != "deep")
        foreign = {p: name for name, p in model.named_parameters() if not name.startswith(own)}
        for name in here:
            module = model.get_submodule(name)
            copied = {p: local for local, p in module.named_parameters(name) if p in foreign}
            self.tied |= {local: foreign[p] for p, local in copied.items()}
            _place(self, name, _twin(module, {p: _copy(p) for p in copied}) if copied else module)

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield what the forward runs, in order, all but the head: each maps (features, rows) to features."""
        for name in self.layers:
            layer = self.get_submodule(name)
            yield name, Final(layer) if name == "norm" else layer

    def features(
        self,
        inputs: tuple[Tensor, ...],
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        tasks: Tensor | None = None,
        cache: Cache | None = None,
        cells: Tensor | None = None,
        step: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Run every layer but the head.

        Reads    inputs: what the chunk before returned, nothing where there is none; the rest as the GPT's `features`
        Writes   the keys and values of these tokens to `cache`, which is this chunk's own
        Returns  the bundle for the next chunk; of the last one the features after the norm, (B, T, D), alone
        """
        if len(inputs) != self.num_received:
            what = f"layer {self.first} needs a bundle of {self.num_received} tensors, and {len(inputs)} came"
            raise UserError(what, fix="what the chunk before returned")
        dtype = next(p.dtype for p in self.parameters() if p.is_floating_point())
        rows = describe(
            self.config,
            dtype,
            tokens,
            positions=positions,
            documents=documents,
            tasks=tasks,
            cache=cache,
            drops=self.dropping(cells, step),
        )
        received = (tokens,) if self.is_first else inputs
        outputs = Outputs(self.deep.connections, self.deep(rows.tasks), self.first - 1, received)
        run_layers(self.named_layers(), outputs, rows, recomputed=self.recomputed)
        if cache is not None:
            cache.advance(tokens.shape[1], documents)
        return outputs.bundle()

    def forward(
        self,
        inputs: tuple[Tensor, ...],
        tokens: Tensor,
        labels: Tensor,
        **rows: Any,
    ) -> tuple[Tensor, ...]:
        """Run every layer, in the last chunk the head too.

        Reads    as `features`, `rows` too; labels (B, T), already shifted, -100 where nothing is to be learnt
        Returns  the bundle for the next chunk; of the last one the loss of each token alone, (B, T), in nats
        """
        outputs = self.features(inputs, tokens, **rows)
        if not self.is_last:
            return outputs
        (features,) = outputs
        return (self.head.losses(features, labels),)


def layer_names(config: GPTConfig) -> list[str]:
    """Return the name of the module that is each layer of the chain; the head belongs to the last."""
    return ["embed", *(f"blocks.{index}" for index in range(config.num_layers)), "norm"]


def layer_costs(model: GPT) -> list[int]:
    """Return with how many parameters each of the L + 2 layers computes; the embedding, which looks up, with none.

    A tied head counts as if it were not.
    """
    _, *sizes = [sum(p.numel() for p in layer.parameters()) for _, layer in model.named_layers()]
    return [0, *sizes[:-1], sizes[-1] + sum(p.numel() for p in model.head.parameters())]


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Set a module under a dotted name, the numbers in which are places in lists."""
    *homes, last = name.split(".")
    for home in homes:
        if home not in root._modules:
            root.add_module(home, nn.ModuleList())
        root = root.get_submodule(home)
    root.add_module(last, module)


def _twin(module: nn.Module, copies: Mapping[nn.Parameter, nn.Parameter]) -> nn.Module:
    """Return a module like this one with some parameters replaced; all else, hooks included, is shared."""
    twin = copy.copy(module)
    twin._parameters = {name: copies.get(p, p) if p is not None else None for name, p in module._parameters.items()}
    twin._modules = {name: child and _twin(child, copies) for name, child in module._modules.items()}
    return twin


def _copy(p: nn.Parameter) -> nn.Parameter:
    """Return a parameter with the same values, and the same hooks on its gradient: sequence parallelism sums in one."""
    twin = nn.Parameter(p.detach().clone())
    for hook in (p._backward_hooks or {}).values():
        twin.register_hook(hook)
    twin.requires_grad_(p.requires_grad)
    return twin
