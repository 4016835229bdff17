"""Our answer to exercise.py."""

from minispeed.model.config import GPTConfig

FP32, INT64, BOOL = 4, 8, 1  # bytes of an element
ADAM = 2  # moments that Adam keeps of each parameter


def count_parameters(config: GPTConfig) -> int:
    D, F, V, L = config.model_dim, config.hidden_dim, config.vocab_size, config.num_layers
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norm = 2 * D
    attention = D * (queries + 2 * keys) + queries * D
    mlp = 3 * D * F
    return V * D + L * (2 * norm + attention + mlp) + norm


def bytes_of_states(config: GPTConfig) -> dict[str, int]:
    parameters = FP32 * count_parameters(config)
    return {"parameters": parameters, "gradients": parameters, "optimizer": ADAM * parameters}


def bytes_kept_by_block(config: GPTConfig, tokens: int) -> int:
    D, F, H = config.model_dim, config.hidden_dim, config.num_heads
    queries, keys = H * config.head_dim, config.num_kv_heads * config.head_dim
    norms = 2 * (D + 2)
    inputs = 2 * D
    attention = (queries + 2 * keys) + (queries + keys) + H + 2 * queries
    mlp = 4 * F
    return FP32 * tokens * (norms + inputs + attention + mlp)


def bytes_kept_beside(config: GPTConfig, tokens: int) -> dict[str, int]:
    D, K = config.model_dim, config.head_dim
    return {
        "tokens": INT64 * tokens,
        "rotary": FP32 * K * tokens,
        "norm and loss": (FP32 * (2 * D + 3) + INT64 + BOOL) * tokens,
    }


def rows_that_fit(config: GPTConfig, tokens: int, budget: int) -> int:
    states = bytes_of_states(config)
    left = budget - states["parameters"] - states["optimizer"]
    blocks = config.num_layers * bytes_kept_by_block(config, tokens)
    each = blocks + sum(bytes_kept_beside(config, tokens).values())
    return max(0, left // each)
