"""Count the arithmetic of a training step in closed form: a multiplication and an addition are 2 FLOPs.

Only matrix products count; all else is a percent or less. Of each, the forward takes one product and the backward two:
one for the gradient of what went in, one for the weight's.

    a token of a block      2 D (H + 2 G) K   qkv        2 H K D   out        2 D F (3 or 2 products)   MLP
    a token's attention     4 T H K: scores and sums over all T keys, the masked ones too, as kernels without tiles do
    a supervised token      2 D V   head; its backward computes the logits again

The well-known forms are approximations of that: 6 P a token (Kaplan et al. 2020, section 2.1,
https://arxiv.org/abs/2001.08361), 6 P + 12 L H K T (PaLM, Chowdhery et al. 2022, appendix B,
https://arxiv.org/abs/2204.02311), and Megatron's for a whole step (Narayanan et al. 2021, appendix,
https://arxiv.org/abs/2104.04473).

Letters: L layers, D model, H heads, G key/value heads, K head dim, F hidden, V vocabulary, T tokens of a row.
"""

from dataclasses import dataclass

from minispeed.model.config import GPTConfig


@dataclass(frozen=True)
class StepFlops:
    """What a step computes.

    forward, backward  the products that the mathematics asks for
    again              what is computed a second time, to save memory
    """

    forward: int
    backward: int
    again: int

    @property
    def model(self) -> int:
        """Those that count for MFU (PaLM, appendix B): without what is computed again."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """All that the device does (HFU)."""
        return self.model + self.again


def step_flops(
    config: GPTConfig, *, rows: int, tokens: int, supervised: int | None = None, recompute: str = "none"
) -> StepFlops:
    """Return the FLOPs of a step on `rows` rows of `tokens` tokens.

    supervised  tokens whose loss is asked for; all when absent
    recompute   as `minispeed.model.recompute`
    """
    n = rows * tokens
    head = 2 * (n if supervised is None else supervised) * config.model_dim * config.vocab_size
    linear, attention = n * linear_flops(config), n * attention_flops(config, tokens)
    forward = config.num_layers * (linear + attention) + head
    # the second forward of a block ends where nothing is left to save: before its last product
    last = 2 * n * config.hidden_dim * config.model_dim
    again = {"none": 0, "attention": config.num_layers * attention // 2}.get(recompute)
    if again is None:
        every = 1 if recompute == "all" else int(recompute)
        again = -(-config.num_layers // every) * (linear + attention - last)
    return StepFlops(forward, 2 * forward, again + head)


def layer_flops(config: GPTConfig, tokens: int, *, causal: bool = True) -> list[int]:
    """Return the FLOPs of the forward of each of the L + 2 layers that a pipeline cuts between, for one row.

    The embedding looks up and multiplies nothing; the head belongs to the last norm. Of pairs of a query and a key
    there are T T, or, where `causal` leaves later keys out, T (T + 1) / 2.
    """
    pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    block = tokens * linear_flops(config) + pairs * attention_flops(config, 1)
    return [0, *[block] * config.num_layers, 2 * tokens * config.model_dim * config.vocab_size]


def linear_flops(config: GPTConfig) -> int:
    """Return the FLOPs of a block's forward for a token, attention's own left out."""
    D, K = config.model_dim, config.head_dim
    qkv = D * (config.num_heads + 2 * config.num_kv_heads) * K
    mlp = (3 if config.mlp == "swiglu" else 2) * D * config.hidden_dim
    return 2 * (qkv + config.num_heads * K * D + mlp)


def attention_flops(config: GPTConfig, tokens: int) -> int:
    """Return the FLOPs of a block's attention for a token that looks at `tokens` keys: scores, then weighted sums."""
    return 4 * tokens * config.num_heads * config.head_dim


def six_p(parameters: int, tokens: int) -> int:
    """Return 6 P D, for D tokens in all: every parameter multiplies every token, three times (Kaplan, section 2.1)."""
    return 6 * parameters * tokens


def palm(config: GPTConfig, parameters: int, tokens: int) -> int:
    """Return the FLOPs of training a token: 6 P + 12 L H K T (PaLM, appendix B)."""
    return 6 * parameters + 12 * config.num_layers * config.num_heads * config.head_dim * tokens


def megatron(*, rows: int, tokens: int, layers: int, model_dim: int, vocab_size: int, recompute: bool) -> float:
    """Return the FLOPs of a step: 72 (96 with every block recomputed) B T L D^2 (1 + T/6D + V/(12 or 16) L D).

    For GPT-2's shape: as many key heads as heads, H K = D, F = 4 D. Narayanan et al. 2021, appendix.
    """
    each = 96 if recompute else 72
    return each * rows * tokens * layers * model_dim**2 * (
        1 + tokens / (6 * model_dim) + vocab_size / ((16 if recompute else 12) * layers * model_dim)
    )  # fmt: skip
