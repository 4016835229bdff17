"""Draw small models of every family, awkward sizes included."""

from hypothesis import strategies as st

from minispeed.model.config import GPTConfig


@st.composite
def small_configs(draw: st.DrawFn) -> GPTConfig:
    """Draw a GPT of a few hundred parameters: either norm, positions, MLP; biases, grouped heads, tied or not."""
    num_kv_heads = draw(st.integers(1, 2))
    heads = num_kv_heads * draw(st.integers(1, 3))
    return GPTConfig(
        vocab_size=draw(st.integers(2, 23)),
        max_positions=32,
        num_layers=draw(st.integers(1, 2)),
        model_dim=draw(st.sampled_from([3, 8])),
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        hidden_dim=draw(st.integers(1, 9)),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        positions=draw(st.sampled_from(["rotary", "learned"])),
        mlp=draw(st.sampled_from(["swiglu", "gelu"])),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        attention=draw(st.sampled_from(["fused", "tiled", "reference"])),
    )
