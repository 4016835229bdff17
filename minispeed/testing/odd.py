"""A model with everything that trips a sharding: small, and trained by the engine like any other.

Its parts can be switched on one by one: a head tied to the embedding, a weight used outside its own module, a module
called twice, one that returns a dict, one that returns a tuple, a frozen and an unused parameter, a scalar one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minispeed.model.init import draw
from minispeed.model.loss import IGNORED


@dataclass(frozen=True)
class OddConfig:
    """Sizes and switches; `recompute` runs each layer again in the backward, `reentrant` by a backward inside it."""

    dim: int = 3
    layers: int = 2
    vocab: int = 5
    tied: bool = False
    borrowed: bool = False
    twice: bool = False
    frozen: bool = False
    unused: bool = False
    recompute: bool = False
    reentrant: bool = False


class OddModel(nn.Module):
    """Called as the GPT is: (tokens, labels) -> losses, (B, T)."""

    def __init__(self, config: OddConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(OddLayer(config.dim) for _ in range(config.layers))
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(config.dim, config.vocab)
        if config.tied:
            self.head.weight = self.embed.weight
        if config.frozen:
            self.layers[0].get_parameter("up.weight").requires_grad_(False)
            self.frozen = nn.Linear(config.dim, config.dim).requires_grad_(False)
        if config.unused:
            self.unused = nn.Linear(config.dim, 2)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(draw(seed, name, p.shape, 0.5))

    def forward(self, tokens: Tensor, labels: Tensor, *, positions: Tensor, **attached: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + positions[..., None].to(x.dtype) * 0.1
        for layer in [*self.layers, *([self.layers[-1]] if self.config.twice else [])]:
            if self.config.recompute:
                x = checkpoint(lambda x, layer=layer: layer(x)["x"], x, use_reentrant=self.config.reentrant)
            else:
                x = layer(x)["x"]
        if self.config.frozen:
            x = x + self.frozen(x)
        if self.config.borrowed:
            lent = self.layers[0].get_parameter("down.weight")
            x = x @ lent @ lent.T  # a parameter of another module, and a view of it
        logits = self.head(x * self.scale)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view(labels.shape)


class OddLayer(nn.Module):
    """x + down(tanh(up(x))), in a dict."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x + self.down(torch.tanh(self.up(x)))}
