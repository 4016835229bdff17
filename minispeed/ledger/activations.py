"""Say how many bytes autograd keeps for the backward, layer by layer, read off the forward operation by operation.

An element has e bytes, w in fp32 or wider. The stream between the cut layers is whole on each of the t ranks of tensor
parallelism, c = 1, or cut by tokens, c = t (Megatron's sequence parallelism).

    a block keeps           elements                        of   because
    norms                   LayerNorm 2 (h + 2) b s/c       e    their inputs, means, 1 / deviations
                            RMSNorm   2 (2 h + 1) b s/c     w    their inputs, the same over the rms, 1 / rms
    inputs of qkv and mlp   2 b s h                         e    each gathered, where the stream is cut
    attention: reference    3 b s (a k)/t                   e    q / sqrt(k), k, v, each copied by matmul for its heads
                            b a s s/t                       e    softmax
      fused, tiled          b s (a + 2 g) k/t               e    what qkv made: v is a view of it, unturned q and k too
                            b s (a + g) k/t if rotary       e    turned q and k
                            b s a/t                         w    log of each softmax's sum
                            b s (a k)/t if rotary           e    output, laid out as q is: `out` must have it copied
      recomputed            b s (a + 2 g) k/t               e    the core's inputs alone
                            b s (a + g) k/t if rotary       e
    input of out            b s (a k)/t                     e
    mlp                     GELU 2, SwiGLU 4: b s f/t       e    up, gelu(up); gate, silu(gate), up, their product
    block recomputed        b s h/c                         e    its input, and nothing of the above

Of a CPU: other devices have other kernels. b and the heads of a rank are two or more: of one, matmul copies nothing.

Korthikanti et al. 2022, sections 4 and 5. https://arxiv.org/abs/2205.05198
Letters, the paper's: b rows, s tokens, h model, a heads, t ranks; and g key/value heads, k head dim, f hidden.
"""

from dataclasses import dataclass

from minispeed.ledger.states import BYTES
from minispeed.model.config import GPTConfig


@dataclass(frozen=True, kw_only=True)
class Case:
    """A block, and how it runs.

    b, s        rows, and tokens of each, of a micro-batch on this rank
    dtype       "bf16", "fp32", "fp64"
    t, is_cut   ranks; whether the stream between cut layers is cut by tokens
    recomputed  "none", "attention" or "all"
    """

    config: GPTConfig
    b: int
    s: int
    dtype: str = "bf16"
    t: int = 1
    is_cut: bool = False
    recomputed: str = "none"


def closed_form(case: Case) -> dict[str, int]:
    """Return the bytes that a block keeps on each rank, by the table above."""
    b, s, h, f = case.b, case.s, case.config.model_dim, case.config.hidden_dim // case.t
    e = BYTES[case.dtype]
    w, stream = max(e, 4), b * s // (case.t if case.is_cut else 1)
    if case.recomputed == "all":
        return {"block's input": stream * h * e}
    norm = {"layernorm": (h + 2) * e, "rmsnorm": (2 * h + 1) * w}[case.config.norm]
    return {
        "norms": 2 * stream * norm,
        "inputs of qkv and mlp": 2 * b * s * h * e,
        **_attention(case, e, w),
        "input of out": b * s * _width(case) * e,
        "mlp": {"gelu": 2, "swiglu": 4}[case.config.mlp] * b * s * f * e,
    }


def _width(case: Case) -> int:
    """Return a k / t, the features of the heads of a rank."""
    return case.config.num_heads * case.config.head_dim // case.t


def _attention(case: Case, e: int, w: int) -> dict[str, int]:
    b, s, a = case.b, case.s, case.config.num_heads // case.t
    ak, gk = _width(case), case.config.num_kv_heads * case.config.head_dim // case.t
    is_turned = case.config.positions == "rotary"
    inputs = {"output of qkv": b * s * (ak + 2 * gk) * e, "turned q and k": is_turned * b * s * (ak + gk) * e}
    if case.recomputed == "attention":
        return inputs
    if case.config.attention == "reference":
        return {"q, k, v": 3 * b * s * ak * e, "softmax": b * a * s * s * e}
    return inputs | {"log of sums": b * s * a * w, "output of attention": is_turned * b * s * ak * e}
