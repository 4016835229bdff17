"""A GPT that is GPT-2, Llama or Qwen by its configuration, as a loop over named layers.

    embed -> block 0 -> ... -> block L-1 -> norm -> head

Each block adds attention and then an MLP to a stream that runs from the embedding to the head (pre-norm); with deep
connections (`deep.py`) it reads earlier outputs beside the last. What the families differ in (norm, positions, MLP,
biases, grouped heads) is a field of `GPTConfig`, and a part chosen when the model is built: no forward asks which
family it is.

GPT-2: Radford et al. 2019, section 2.3. Llama: Touvron et al. 2023, section 2.2 (https://arxiv.org/abs/2302.13971).
Rotary positions: Su et al. 2021, section 3.2 (https://arxiv.org/abs/2104.09864). RMSNorm: Zhang & Sennrich 2019
(https://arxiv.org/abs/1910.07467). SwiGLU: Shazeer 2020 (https://arxiv.org/abs/2002.05202). Slower angles for longer
rows: Chen et al. 2023, section 2.3 (https://arxiv.org/abs/2306.15595), and Llama 3.1's released configuration.

Letters: B batch, T tokens, D model, H heads, G key/value heads, K head dim, F hidden, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minispeed.errors import UserError
from minispeed.model.attention import implementation
from minispeed.model.cache import Cache
from minispeed.model.config import GPTConfig
from minispeed.model.connections import TOKENS
from minispeed.model.deep import Deep, Outputs
from minispeed.model.dropout import ATTENTION, EMBEDDING, MLP, Dropout, Dropping, number_of
from minispeed.model.init import hollow, initialise
from minispeed.model.loss import token_losses
from minispeed.model.mask import Mask
from minispeed.model.rotary import rotary_angles, rotate


@dataclass
class Rows:
    """What a layer needs to know of the tokens beside their features.

    positions  place of each token in its document, (B, T)
    mask       which token may look at which
    turns      cosine and sine of the rotary angles, each (B, 1, T, K/2); None with learned positions
    tasks      which task each token is of, (B, T); None where the model knows one
    cache      earlier keys and values, when generating
    dropout    which features are dropped; None: none
    """

    positions: Tensor
    mask: Mask
    turns: tuple[Tensor, Tensor] | None
    tasks: Tensor | None = None
    cache: Cache | None = None
    dropout: Dropout | None = None

    def at(self, layer: str) -> "Rows":
        """Return what a layer needs to know: the same, but for what it drops."""
        if self.dropout is None and self.mask.dropout is None:
            return self
        number = number_of(layer)
        dropout = None if self.dropout is None else self.dropout.at(number)
        return replace(self, dropout=dropout, mask=self.mask.at(number))

    def drop(self, x: Tensor, place: int) -> Tensor:
        """Drop out of what is added to the stream.  (B, T, D)"""
        return x if self.dropout is None else self.dropout.at(place)(x)


class GPT(nn.Module):
    """The model. Parameters are initialised from (seed, qualified name)."""

    def __init__(
        self,
        config: GPTConfig,
        *,
        seed: int = 0,
        given: Mapping[str, Tensor] | None = None,
        hollow_on: torch.device | None = None,
    ) -> None:
        """Build it whole, on the CPU; or, to be filled elsewhere, without memory for its parameters: see `hollow`.

        given   values to start from, by name: these tensors themselves become the parameters
        """
        super().__init__()
        self.config = config
        self.recomputed: frozenset[str] = frozenset()  # layers whose forward runs again in the backward
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = make_norm(config, config.model_dim)
        self.head = Head(config.model_dim, config.vocab_size, bias=False, device="meta")
        if config.tied:
            self.head.weight = self.embed.tokens.weight
        self.deep = Deep(config.connections, config.deep_tasks)
        self.dropping = Dropping(
            stream=config.dropout, weights=config.attention_dropout, num_heads=config.num_heads, seed=seed
        )
        if hollow_on is not None:
            hollow(self, hollow_on)
            return
        given = {"deep.alpha": self.deep.identity(), **(given or {})}
        initialise(self, seed=seed, model_dim=config.model_dim, num_layers=config.num_layers, given=given)

    def set_dropout(self, p: float, *, seed: int) -> None:
        """Drop so much of the stream in training from now on, drawn from `seed`; the configuration says so, too.

        What adapters drop stays as it is.
        """
        self.config = replace(self.config, dropout=p)
        self.dropping.stream, self.dropping.seed = p, seed

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield what the forward runs, in order, all but the head: each maps (features, rows) to features."""
        yield "embed", self.embed
        for index, block in enumerate(self.blocks):
            yield f"blocks.{index}", block
        yield "norm", Final(self.norm)

    def features(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        tasks: Tensor | None = None,
        cache: Cache | None = None,
        cells: Tensor | None = None,
        step: int | None = None,
    ) -> Tensor:
        """Run every layer but the head.

        Reads    tokens (B, T) int64; positions (B, T), counted from the row's start when absent; documents (B, T):
                 tokens look only at tokens of equal document, and padding is a document of its own; tasks (B, T),
                 where the model has several
        step     of training, where it is training: without it nothing is dropped, whatever the configuration says
        cells    of a model with dropout, in training: as `cells_of`, (B, T)
        Writes   the keys and values of these tokens to `cache`, when given
        Returns  (B, T, D)
        """
        dtype = self.embed.tokens.weight.dtype
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
        outputs = Outputs(self.deep.connections, self.deep(rows.tasks), TOKENS, (tokens,))
        run_layers(self.named_layers(), outputs, rows, recomputed=self.recomputed)
        if cache is not None:
            cache.advance(tokens.shape[1], documents)
        return outputs.read()

    def logits(self, tokens: Tensor, **rows: Any) -> Tensor:
        """Return the scores of every next token.  (B, T) -> (B, T, V); `rows` as in `features`"""
        return self.head(self.features(tokens, **rows))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.tokens.weight.device

    def new_cache(self, capacity: int) -> Cache:
        """Return room for the keys and values of so many tokens a row."""
        return Cache(capacity)

    def next_logits(self, tokens: Tensor, *, cache: Cache, **rows: Any) -> Tensor:
        """Return the scores of what follows the last token.  (B, T) -> (B, V); `rows` as in `features`"""
        return self.head(self.features(tokens, cache=cache, **rows)[:, -1])

    def forward(self, tokens: Tensor, labels: Tensor, **rows: Any) -> Tensor:
        """Return the loss of each token's prediction, 0 where the label is -100.

        Reads    tokens (B, T); labels (B, T), already shifted: the token that should follow
        Holds    no (B, T, V) logits: the head runs on chunks of the supervised rows alone
        Returns  (B, T), nats, fp32 or wider
        """
        return self.head.losses(self.features(tokens, **rows), labels)


def run_layers(
    layers: Iterable[tuple[str, nn.Module]], outputs: Outputs, rows: Rows, *, recomputed: frozenset[str]
) -> None:
    """Run layers one after another, each on what it reads of the outputs before."""
    for name, layer in layers:
        x, here = outputs.read(), rows.at(name)
        again = name in recomputed and torch.is_grad_enabled()
        outputs.add(checkpoint(layer, x, here, use_reentrant=False) if again else layer(x, here))


def describe(
    config: GPTConfig,
    dtype: torch.dtype,
    tokens: Tensor,
    *,
    positions: Tensor | None,
    documents: Tensor | None,
    tasks: Tensor | None,
    cache: Cache | None,
    drops: tuple[Dropout | None, Dropout | None],
) -> Rows:
    """Work out once what every layer will ask for: positions, mask, rotary angles in `dtype`.

    drops   of the stream, and of attention's weights
    Raises  UserError if a row is longer than the positions, or the model has several tasks and none is named
    """
    B, T = tokens.shape
    past = 0 if cache is None else cache.length
    if past + T > config.max_positions and positions is None:
        raise UserError(
            f"a row of {past + T} tokens is longer than the model's max_positions {config.max_positions}",
            fix="shorter rows, or a model with more positions",
        )
    if config.deep_tasks > 1 and tasks is None:
        what = f"the model has weights for each of {config.deep_tasks} tasks, and the tokens came without"
        raise UserError(what, fix=f"tasks=..., ({B}, {T}), each from 0 to {config.deep_tasks - 1}")
    if positions is None:
        positions = torch.arange(past, past + T, device=tokens.device).expand(B, T)
    keys = documents if cache is None or documents is None else cache.all_documents(documents)
    mask = Mask(T, past + T, offset=past, queries=documents, keys=keys, dropout=drops[1])
    turns = None
    if config.positions == "rotary":
        cos, sin = rotary_angles(positions, config)
        turns = cos.to(dtype), sin.to(dtype)
    return Rows(positions, mask, turns, tasks if config.deep_tasks > 1 else None, cache, drops[0])


class Head(nn.Linear):
    """Features to the scores of every token; or, where the labels are known, straight to losses."""

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each token's prediction: see `token_losses`.  (B, T, D), (B, T) -> (B, T)"""
        return token_losses(features, self.weight, labels)


class Embedding(nn.Module):
    """Tokens to features, plus a learned vector for each position where the family has them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.model_dim, device="meta")
        self.positions: nn.Embedding | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_positions, config.model_dim, device="meta")

    def forward(self, tokens: Tensor, rows: Rows) -> Tensor:
        x: Tensor = self.tokens(tokens)  # (B, T) -> (B, T, D)
        return rows.drop(x if self.positions is None else x + self.positions(rows.positions), EMBEDDING)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.model_dim)
        self.attention = Attention(config, index)
        self.mlp_norm = make_norm(config, config.model_dim)
        self.mlp = (SwiGLU if config.mlp == "swiglu" else GELU)(config)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        x = x + rows.drop(self.attention(self.attention_norm(x), rows), ATTENTION)
        return x + rows.drop(self.mlp(self.mlp_norm(x)), MLP)


class Attention(nn.Module):
    """Project to queries, keys and values, turn them by their positions, attend, project back."""

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        D, K = config.model_dim, config.head_dim
        self.head_dim, self.index = K, index
        self.num_shares = config.num_heads // config.num_kv_heads  # query heads to a key/value head
        self.qkv = nn.Linear(D, (config.num_heads + 2 * config.num_kv_heads) * K, bias=config.qkv_bias, device="meta")
        self.out = nn.Linear(config.num_heads * K, D, bias=config.out_bias, device="meta")
        self.query_norm = make_norm(config, K) if config.qk_norm else None
        self.key_norm = make_norm(config, K) if config.qk_norm else None
        self.core = implementation(config.attention)

    @property
    def num_kv_heads(self) -> int:
        """G, of the heads that are here: all, unless the weights have been cut."""
        return self.qkv.weight.shape[0] // (self.num_shares + 2) // self.head_dim

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        fused = self.qkv(x)
        width = fused.shape[-1] // (self.num_shares + 2)  # G K, of the heads that are here
        parts = fused.split([self.num_shares * width, width, width], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)  # (B, H or G, T, K)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rows.turns is not None:
            q, k = rotate(q, rows.turns), rotate(k, rows.turns)
        if rows.cache is not None:
            k, v = rows.cache.append(self.index, k, v)  # (B, G, S, K)
        y = self.core(q, k, v, rows.mask)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, H, T, K) -> (B, T, D)


class GELU(nn.Module):
    """down(gelu(up(x))), the GPT-2 family's MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.model_dim, config.hidden_dim, bias=config.mlp_bias, device="meta")
        self.down = nn.Linear(config.hidden_dim, config.model_dim, bias=config.mlp_bias, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), the Llama family's MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.model_dim, config.hidden_dim, bias=config.mlp_bias, device="meta")
        self.up = nn.Linear(config.model_dim, config.hidden_dim, bias=config.mlp_bias, device="meta")
        self.down = nn.Linear(config.hidden_dim, config.model_dim, bias=config.mlp_bias, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Final(nn.Module):
    """The last norm, in the shape of a layer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        return self.norm(x)


def make_norm(config: GPTConfig, dim: int) -> nn.Module:
    """Return the family's norm over the last `dim` features."""
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(dim, eps=config.norm_eps, device="meta")
