"""Say what a GPT is made of: its sizes, and which part of each kind its family has.

GPT-2, Llama and Qwen are each a choice of these fields, which JSON can hold.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from minispeed.errors import UserError, nearest
from minispeed.model.attention import implementation

CHOICES = {"norm": ("rmsnorm", "layernorm"), "positions": ("rotary", "learned"), "mlp": ("swiglu", "gelu")}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT.

    max_positions   longest row that it can read, in tokens (with learned positions: the rows of their table)
    num_kv_heads    key/value heads G, a divisor of num_heads
    hidden_dim      width F inside the MLP
    qkv_bias, bias  biases on the query/key/value projection, and on every other matrix product of a block
    qk_norm         normalise queries and keys per head before their product (Qwen3)
    tied            the head is the token embedding, transposed
    attention       "fused", "tiled" or "reference"
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
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    attention: str = "fused"

    def __post_init__(self) -> None:
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
        implementation(self.attention)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        """Build from what `to_dict` returned; UserError names a key that is unknown or missing."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise UserError(f"a GPT has no setting {name!r}", fix=nearest(name, known) or "remove it")
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"the model's configuration is incomplete: {error}") from error
