"""Say what a GPT is made of: its sizes, and which part of each kind its family has.

GPT-2, Llama and Qwen are each a choice of these fields, which JSON can hold. Nothing heavy is imported: who plans a run
needs no torch.
"""

from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any, Literal

from minispeed.errors import UserError, nearest
from minispeed.model.connections import MASKS, Connections, learned_entries

CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "positions": ("rotary", "learned"),
    "mlp": ("swiglu", "gelu"),
    "rope_scaling": ("none", "linear", "llama3"),
    "deep": MASKS,
    "attention": ("reference", "tiled", "fused"),
}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT.

    max_positions   longest row that it can read, in tokens (with learned positions: the rows of their table)
    num_kv_heads    key/value heads G, a divisor of num_heads
    hidden_dim      width F inside the MLP
    rope_scaling    how rotary angles are slowed down for rows longer than the model once knew: "none", "linear" (all by
                    rope_factor), or "llama3" (a pair that turns at most rope_low times in rope_original tokens by
                    rope_factor, one that turns rope_high times or more not at all)
    qkv_bias, out_bias, mlp_bias   biases on the query/key/value projection, on attention's output, and in the MLP
    bias            out_bias and mlp_bias in one word, which is what configurations written before there were two say
    qk_norm         normalise queries and keys per head before their product (Qwen3)
    tied            the head is the token embedding, transposed
    attention       "fused", "tiled" or "reference"
    dropout         share of the features that are dropped in training, after the embedding and of what attention and
                    MLP add to the stream; rounded to 1 / 65536
    attention_dropout   likewise of the softmax's weights, which "fused" cannot
    deep            which earlier outputs a block reads beside the last one: "none", "x0", "unet" or "dwa"
    deep_dilation   of dwa: one earlier output in so many is read, the last one among them
    deep_period     of dwa: they are read after one block in so many
    deep_tasks      how many sets of weights they have: each token's task chooses its own
    """

    vocab_size: int
    max_positions: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_original: int = 8192
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    attention: str = "fused"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    deep: Literal["none", "x0", "unet", "dwa"] = "none"
    deep_dilation: int = 1
    deep_period: int = 1
    deep_tasks: int = 1
    bias: InitVar[bool | None] = None

    def __post_init__(self, bias: bool | None) -> None:
        if bias is not None:
            object.__setattr__(self, "out_bias", bias)
            object.__setattr__(self, "mlp_bias", bias)
        for field in fields(self):
            size = getattr(self, field.name)
            if field.type is int and size < 1:
                raise UserError(f"{field.name} counts at least 1, got {size}", fix=f"{field.name}=1")
        if self.num_heads % self.num_kv_heads:
            divisors = [g for g in range(1, self.num_heads + 1) if self.num_heads % g == 0]
            raise UserError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}",
                fix=f"num_kv_heads one of {divisors}",
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise UserError(
                f"rotary positions turn pairs of features, and head_dim is {self.head_dim}",
                fix=f"head_dim={self.head_dim + 1}",
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(known)}", fix=known[0])
        self._check_rope()
        self._check_dropout()
        self._check_deep()

    @property
    def connections(self) -> Connections:
        """Which layer reads which outputs."""
        steps = dict(dilation=self.deep_dilation, period=self.deep_period)
        return Connections(self.num_layers, learned_entries(self.deep, self.num_layers, **steps))

    def _check_rope(self) -> None:
        if self.rope_factor < 1 or (self.rope_factor > 1 and self.rope_scaling == "none"):
            what = f"rope_factor {self.rope_factor} with rope_scaling {self.rope_scaling!r}"
            raise UserError(what, fix="a factor above 1, with rope_scaling='linear' or 'llama3'")
        if not 0 < self.rope_low < self.rope_high:
            what = f"rope_low is {self.rope_low}, and rope_high {self.rope_high}"
            raise UserError(what, fix="0 < rope_low < rope_high")

    def _check_dropout(self) -> None:
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is a share from 0 to below 1, got {getattr(self, name)}", fix=f"{name}=0.1")
        if self.attention_dropout and self.attention == "fused":
            what = f"attention_dropout {self.attention_dropout}: the fused attention cannot drop weights"
            raise UserError(what, fix="attention='reference' or 'tiled'")

    def _check_deep(self) -> None:
        for name in ("deep_dilation", "deep_period"):
            if getattr(self, name) > 1 and self.deep != "dwa":
                raise UserError(f"{name} {getattr(self, name)} is of dwa, and deep is {self.deep!r}", fix="deep='dwa'")
        if self.deep_tasks > 1 and self.deep == "none":
            raise UserError(
                f"deep_tasks {self.deep_tasks} choose among weights that deep 'none' has not", fix="deep='x0'"
            )
        if self.deep != "none" and all(i == j for i, j in self.connections.learned):
            raise UserError(f"deep {self.deep!r} connects nothing in {self.num_layers} blocks", fix="deep='none'")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        """Build from what `to_dict` returned; UserError names a key that is unknown or missing."""
        known = {"bias", *(field.name for field in fields(cls))}
        for name in values:
            if name not in known:
                raise UserError(f"a GPT has no setting {name!r}", fix=nearest(name, known) or "remove it")
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"the model's configuration is incomplete: {error}") from error
