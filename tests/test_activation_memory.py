"""What a block keeps for its backward is what the benchmark's closed form says, in bytes, and the paper's with reasons.

Drawn: both norms, MLPs and kinds of positions, shared key heads, biases, every attention, what is recomputed, dtypes,
ranks, and a stream between cut layers that is whole or cut by tokens. Heads have four features or more: halves of one
feature, which rotary positions turn, may lie in memory in an order for which torch takes another kernel.
"""

import sys
from dataclasses import replace
from pathlib import Path

from hypothesis import assume, given, strategies as st

from minispeed.ledger import layers
from minispeed.ledger.activations import Case, closed_form
from minispeed.model.presets import preset

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from activation_memory import beyond_paper, count, paper


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    """Draw a block of few features: at least two rows and two heads on a rank, for matmul to copy them."""
    t = draw(st.sampled_from([1, 2, 3, 4]))
    g, shares = t * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    assume(g // t * shares > 1)
    config = preset(
        "gpt2",
        num_layers=1,
        model_dim=draw(st.integers(1, 9)),
        num_heads=g * shares,
        num_kv_heads=g,
        head_dim=draw(st.sampled_from([4, 6, 8])),
        hidden_dim=t * draw(st.integers(1, 5)),
        vocab_size=7,
        max_positions=16,
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        positions=draw(st.sampled_from(["learned", "rotary"])),
        mlp=draw(st.sampled_from(["gelu", "swiglu"])),
        bias=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        attention=draw(st.sampled_from(["reference", "fused", "tiled"])),
    )
    return Case(
        config=config,
        b=draw(st.integers(2, 3)),
        s=t * draw(st.integers(2, 4)),
        dtype=draw(st.sampled_from(["bf16", "fp32", "fp64"])),
        t=t,
        is_cut=draw(st.booleans()),
        recomputed=draw(st.sampled_from(["none", "attention", "all"])),
    )


@given(drawn_cases())
def test_every_rank_keeps_the_bytes_of_the_closed_form(case):
    assert count(case) == [sum(closed_form(case).values())] * case.t


@given(drawn_cases())
def test_the_tape_of_a_block_keeps_what_the_table_says(case):
    same = {name: getattr(case, name) for name in ("config", "b", "s", "dtype", "t", "is_cut", "recomputed")}
    played = layers.block(layers.Setting(**same))
    if case.recomputed != "all":  # then the stage keeps the input, and the tape is played in the backward
        assert played.kept == sum(closed_form(case).values())


@st.composite
def their_cases(draw: st.DrawFn) -> Case:
    """Draw a block of the kind that the paper speaks of."""
    case, heads, k = draw(drawn_cases()), draw(st.integers(1, 50)), 2 * draw(st.integers(1, 25))
    h = case.t * heads * k
    width = dict(model_dim=h, hidden_dim=4 * h, num_heads=case.t * heads, num_kv_heads=case.t * heads, head_dim=k)
    config = replace(case.config, norm="layernorm", mlp="gelu", positions="learned", **width)
    return replace(case, config=config, dtype="bf16")


@given(their_cases())
def test_what_the_paper_does_not_say_is_explained_term_by_term(case):
    assert paper(case) + sum(beyond_paper(case).values()) == sum(closed_form(case).values())


CHANGES = [
    dict(norm="rmsnorm"),
    dict(mlp="swiglu"),
    dict(positions="rotary"),
    dict(hidden_dim=1),
    dict(model_dim=1, hidden_dim=4),
]


@given(their_cases())
def test_the_paper_is_asked_only_about_blocks_of_its_kind(case):
    assert paper(replace(case, dtype="fp32")) is None
    for change in CHANGES:
        assert paper(replace(case, config=replace(case.config, **change))) is None
