"""Say of each HuggingFace architecture what its config.json's keys are to us, as tables.

A key says fields of `GPTConfig`, or it changes nothing: whatever its value, or at some values alone. A key that is in
no table may change what the model computes, and stops the reading.

The keys are documented with each model: https://huggingface.co/docs/transformers/model_doc/llama, and gpt2, qwen2,
qwen3, stablelm in its place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Ignored(NamedTuple):
    """A key that changes nothing, and why; `at`: the values at which it does not, all when empty."""

    why: str
    at: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture.

    says     key -> the fields of ours that have its value
    missing  the value of a key that is not there, where it may be so; None: it follows from the others
    has      our fields, where all models of the family are alike
    ignores  keys that change nothing
    unsaid   the value of such a key where it is not there, if that one is not harmless; since transformers 5, such keys
             may be among those of the rotary angles
    writes   keys that we write beside those
    divides  whether num_heads must divide model_dim (which makes it head_dim, where no key says that)
    """

    model_type: str
    architecture: str
    says: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, Any]
    has: Mapping[str, Any]
    ignores: Mapping[str, Ignored]
    writes: Mapping[str, Any]
    unsaid: Mapping[str, Any] = field(default_factory=dict)
    divides: bool = False


_ORIGIN = Ignored("it tells where the model comes from")
_DTYPE = Ignored("the files say it of each tensor")
_OUTPUTS = Ignored("it chooses what transformers returns")
_TEXT = Ignored("it is about text and tokens")
_TRAINING = Ignored("it is a setting of a training run")
_CLASSES = Ignored("it is about classes of texts")

_EVERYWHERE = {
    **dict.fromkeys(("model_type", "architectures"), Ignored("it names the family")),
    **dict.fromkeys(("_name_or_path", "transformers_version", "transformers.js_config", "unsloth_version"), _ORIGIN),
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    **dict.fromkeys(("use_cache", "output_attentions", "output_hidden_states", "return_dict"), _OUTPUTS),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params"), _TEXT),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "_num_labels"), _CLASSES),
    "initializer_range": Ignored("it is of a model before training"),
}
_GPT2_IGNORES = {
    **_EVERYWHERE,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), _TRAINING),
    **dict.fromkeys(("summary_activation", "summary_first_dropout", "summary_proj_to_labels"), _CLASSES),
    **dict.fromkeys(("summary_type", "summary_use_proj"), _CLASSES),
    "n_ctx": Ignored("n_positions says it"),
    "reorder_and_upcast_attn": Ignored("it rounds otherwise, and computes the same"),
    "activation_function": Ignored("these are ours", ("gelu_new", "gelu_pytorch_tanh")),
    "scale_attn_weights": Ignored("scores are always divided by the root of head_dim", (True,)),
    "scale_attn_by_inverse_layer_idx": Ignored("no layer is scaled by its number", (False,)),
    "add_cross_attention": Ignored("there is no other text to look at", (False,)),
}
_ROTARY_IGNORES = {
    **_EVERYWHERE,
    "hidden_act": Ignored("these are ours", ("silu", "swish")),
    "attention_dropout": Ignored("it would be dropped in training", (0,)),
}
_LLAMA_IGNORES = {
    **_ROTARY_IGNORES,
    "is_llama_config": _ORIGIN,
    "pretraining_tp": Ignored("products are in one piece", (1,)),
    "rope_interleaved": Ignored("turned pairs are half a head apart", (False,)),
    "sliding_window": Ignored("every token looks at all before it", (None,)),
}
_QWEN_IGNORES = {
    **_ROTARY_IGNORES,
    **dict.fromkeys(("sliding_window", "max_window_layers"), Ignored("use_sliding_window says whether it is in use")),
    "use_sliding_window": Ignored("every token looks at all before it", (False,)),
    "layer_types": Ignored("every token looks at all before it", ("full_attention",)),
    "use_mrope": Ignored("positions are one number", (False,)),
}
_STABLELM_IGNORES = {
    **_ROTARY_IGNORES,
    "hidden_dropout": Ignored("it would be dropped in training", (0,)),
    "partial_rotary_factor": Ignored("all features of a head are turned", (1,)),
    "qk_layernorm": Ignored("each head has no LayerNorm of its own", (False,)),
    "use_parallel_residual": Ignored("the MLP reads what attention has added to", (False,)),
}

_ROTARY_SAYS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_positions",),
    "num_hidden_layers": ("num_layers",),
    "hidden_size": ("model_dim",),
    "num_attention_heads": ("num_heads",),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("hidden_dim",),
    "tie_word_embeddings": ("tied",),
}
_LLAMA_SAYS = _ROTARY_SAYS | {"head_dim": ("head_dim",), "rms_norm_eps": ("norm_eps",)}
_LLAMA_MISSING = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_LLAMA_HAS = {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu"}
_ROTARY_WRITES = {"hidden_act": "silu", "attention_dropout": 0.0}
_STABLELM_WRITES = _ROTARY_WRITES | {"hidden_dropout": 0.0, "partial_rotary_factor": 1.0}
_STABLELM_WRITES |= {"qk_layernorm": False, "use_parallel_residual": False}
_ATTENTION_BIAS: dict[str, tuple[str, ...]] = {"attention_bias": ("qkv_bias", "out_bias")}

_GPT2_BIASES = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    says={
        "vocab_size": ("vocab_size",),
        "n_positions": ("max_positions",),
        "n_layer": ("num_layers",),
        "n_embd": ("model_dim",),
        "n_head": ("num_heads", "num_kv_heads"),
        "n_inner": ("hidden_dim",),
        "layer_norm_epsilon": ("norm_eps",),
        "tie_word_embeddings": ("tied",),
    },
    missing={"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    has={"norm": "layernorm", "positions": "learned", "mlp": "gelu", **_GPT2_BIASES},
    ignores=_GPT2_IGNORES,
    writes={"activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    divides=True,
)
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    says=_LLAMA_SAYS | _ATTENTION_BIAS | {"mlp_bias": ("mlp_bias",)},
    missing=_LLAMA_MISSING | {"attention_bias": False, "mlp_bias": False},
    has=_LLAMA_HAS,
    ignores=_LLAMA_IGNORES,
    writes=_ROTARY_WRITES,
    divides=True,
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    says=_LLAMA_SAYS,
    missing=_LLAMA_MISSING,
    has=_LLAMA_HAS | {"qkv_bias": True},
    ignores=_QWEN_IGNORES,
    writes=_ROTARY_WRITES,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    says=_LLAMA_SAYS | _ATTENTION_BIAS,
    missing=_LLAMA_MISSING | {"attention_bias": False, "head_dim": 128},
    has=_LLAMA_HAS | {"qk_norm": True},
    ignores=_QWEN_IGNORES,
    writes=_ROTARY_WRITES,
)
STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    says=_ROTARY_SAYS | {"layer_norm_eps": ("norm_eps",), "use_qkv_bias": ("qkv_bias",)},
    missing={"num_key_value_heads": 32, "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "use_qkv_bias": False},
    has={"norm": "layernorm", "positions": "rotary", "mlp": "swiglu"},
    ignores=_STABLELM_IGNORES,
    unsaid={"partial_rotary_factor": 0.25},
    writes=_STABLELM_WRITES,
    divides=True,
)
FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, QWEN2, QWEN3, STABLELM)}
