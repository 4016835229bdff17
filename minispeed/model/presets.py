"""Shapes with a name: a few that a laptop trains, and published ones.

Published: GPT-2 (Radford et al. 2019, table 2), Llama-3.2-1B and Qwen2.5-0.5B (their released configurations). The
vocabulary of the small ones is that of the tokenizer they are trained with.
"""

from dataclasses import replace
from typing import Any

from minispeed.errors import UserError, nearest
from minispeed.model.config import GPTConfig


def _llama(layers: int, dim: int, heads: int, kv_heads: int, hidden: int, **other: Any) -> GPTConfig:
    shape = dict(vocab_size=512, max_positions=2048, num_layers=layers, model_dim=dim, num_heads=heads)
    shape |= dict(num_kv_heads=kv_heads, head_dim=dim // heads, hidden_dim=hidden)
    return GPTConfig(**(shape | other))


def _gpt2(layers: int, dim: int, heads: int) -> GPTConfig:
    family: dict[str, Any] = dict(norm="layernorm", positions="learned", mlp="gelu", qkv_bias=True, bias=True)
    published: dict[str, Any] = dict(vocab_size=50257, max_positions=1024)
    return _llama(layers, dim, heads, heads, 4 * dim, **family, **published)


# short rows need no slow angles, and on a CPU torch has a kernel for LayerNorm and none for RMSNorm
_LAPTOP: dict[str, Any] = dict(norm="layernorm", rope_theta=1000.0)
_LLAMA_3: dict[str, Any] = dict(vocab_size=128256, max_positions=131072, rope_theta=500000.0)
_LLAMA_3 |= dict(rope_scaling="llama3", rope_factor=32.0)
_QWEN_2: dict[str, Any] = dict(vocab_size=151936, max_positions=32768, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True)

PRESETS: dict[str, GPTConfig] = {
    "nano": _llama(4, 128, 4, 4, 384, **_LAPTOP),  # about 1M parameters
    "tiny": _llama(4, 192, 4, 4, 512, **_LAPTOP),  # about 2M
    "small": _llama(6, 256, 8, 4, 704, **_LAPTOP),  # about 5M
    "medium": _llama(8, 384, 6, 6, 1024, **_LAPTOP),  # about 14M
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-3.2-1b": _llama(16, 2048, 32, 8, 8192, **_LLAMA_3),
    "qwen2.5-0.5b": _llama(24, 896, 14, 2, 4864, **_QWEN_2),
}


def preset(name: str, **changes: Any) -> GPTConfig:
    """Return the shape called `name`, with fields changed (a vocabulary, a context); UserError names the nearest."""
    if name not in PRESETS:
        alike = nearest(name, PRESETS) or "tiny"
        raise UserError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}", fix=f"--model {alike}")
    return replace(PRESETS[name], **changes)
