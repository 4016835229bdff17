"""Say where in a HuggingFace model's files each parameter of ours lies: tables from our names to theirs.

    blocks.3.attention.qkv.weight        model.layers.3.self_attn.q_proj.weight    (H K, D)
    ((H + 2 G) K, D)                =    model.layers.3.self_attn.k_proj.weight    (G K, D)   one below the other
                                         model.layers.3.self_attn.v_proj.weight    (G K, D)

GPT-2's matrices lie there transposed, (D, F), and its query, key and value are one. All else is a name for a name.

Letters: D model, H heads, G key/value heads, K head dim, F features.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from minispeed.model.config import GPTConfig
from minispeed.model.gpt import Block, Embedding, make_norm
from minispeed.model.hf.families import Family

HEAD, EMBEDDING = "head.weight", "embed.tokens.weight"


class Stored(NamedTuple):
    """A parameter of ours, (rows, ...), in the files: `rows` of it in each tensor.

    transposed  its rows are the tensor's columns
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    rows: tuple[int, ...]
    is_transposed: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        found = {name: (rows, *self.shape[1:]) for name, rows in zip(self.names, self.rows, strict=True)}
        return {name: shape[::-1] if self.is_transposed else shape for name, shape in found.items()}


@dataclass(frozen=True)
class Names:
    """What a family calls its modules.

    base        what precedes all names but the head's, unless the files leave it out
    modules     ours -> theirs, after the base; `*` is the number of a block
    transposed  modules whose weights are
    harmless    names of tensors that are no parameters
    """

    base: str
    modules: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str]
    harmless: re.Pattern[str]


_GPT2 = Names(
    base="transformer.",
    modules={
        "embed.tokens": ("wte",),
        "embed.positions": ("wpe",),
        "blocks.*.attention_norm": ("h.*.ln_1",),
        "blocks.*.attention.qkv": ("h.*.attn.c_attn",),
        "blocks.*.attention.out": ("h.*.attn.c_proj",),
        "blocks.*.mlp_norm": ("h.*.ln_2",),
        "blocks.*.mlp.up": ("h.*.mlp.c_fc",),
        "blocks.*.mlp.down": ("h.*.mlp.c_proj",),
        "norm": ("ln_f",),
    },
    transposed=frozenset({f"blocks.*.{of}" for of in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")}),
    harmless=re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"),  # which token may look at which
)
_LLAMA = Names(
    base="model.",
    modules={
        "embed.tokens": ("embed_tokens",),
        "blocks.*.attention_norm": ("layers.*.input_layernorm",),
        "blocks.*.attention.qkv": tuple(f"layers.*.self_attn.{of}_proj" for of in "qkv"),
        "blocks.*.attention.query_norm": ("layers.*.self_attn.q_norm",),
        "blocks.*.attention.key_norm": ("layers.*.self_attn.k_norm",),
        "blocks.*.attention.out": ("layers.*.self_attn.o_proj",),
        "blocks.*.mlp_norm": ("layers.*.post_attention_layernorm",),
        "blocks.*.mlp.gate": ("layers.*.mlp.gate_proj",),
        "blocks.*.mlp.up": ("layers.*.mlp.up_proj",),
        "blocks.*.mlp.down": ("layers.*.mlp.down_proj",),
        "norm": ("norm",),
    },
    transposed=frozenset(),
    harmless=re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
)
THEIR_HEAD = "lm_head.weight"


def names_of(family: Family) -> Names:
    """Return the names of a family's modules: GPT-2 has its own, the others have Llama's."""
    return _GPT2 if family.model_type == "gpt2" else _LLAMA


def shapes_of(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a GPT, those of deep connections left out; no memory is used."""
    blocks = {f"blocks.{index}": Block(config, index) for index in range(config.num_layers)}
    modules: dict[str, nn.Module] = {"embed": Embedding(config), **blocks, "norm": make_norm(config, config.model_dim)}
    named = ((f"{home}.{name}", p) for home, module in modules.items() for name, p in module.named_parameters())
    head = {} if config.tied else {HEAD: (config.vocab_size, config.model_dim)}
    return {name: tuple(p.shape) for name, p in named} | head


def stored(config: GPTConfig, family: Family, *, base: str) -> dict[str, Stored]:
    """Return where each parameter lies; `base` is what precedes their names."""
    names, found = names_of(family), {}
    width, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for ours, shape in shapes_of(config).items():
        home, _, kind = ours.rpartition(".")
        number = re.sub(r"\D", "", home)
        pattern = re.sub(r"\d+", "*", home)
        if ours == HEAD:
            found[ours] = Stored(shape, (THEIR_HEAD,), shape[:1])
            continue
        theirs = tuple(f"{base}{name.replace('*', number)}.{kind}" for name in names.modules[pattern])
        rows = (width, narrow, narrow) if len(theirs) > 1 else shape[:1]
        found[ours] = Stored(shape, theirs, rows, kind == "weight" and pattern in names.transposed)
    return found
