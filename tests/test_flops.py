"""The closed forms of FLOPs are what torch counts, for any flavour of the model."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minispeed.model.config import GPTConfig
from minispeed.model.flops import attention_flops, linear_flops, megatron, palm, six_p, step_flops
from minispeed.model.gpt import GPT
from minispeed.model.loss import IGNORED
from minispeed.model.presets import preset
from minispeed.model.recompute import recompute


@st.composite
def configs(draw):
    groups, shares = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    masks = st.sampled_from(["none", "x0", "unet", "dwa"])
    layers = draw(st.integers(1, 4))
    return GPTConfig(
        vocab_size=draw(st.integers(2, 40)),
        max_positions=16,
        num_layers=layers,
        model_dim=draw(st.sampled_from([3, 8, 12])),
        num_heads=groups * shares,
        num_kv_heads=groups,
        head_dim=2 * draw(st.integers(1, 3)),
        hidden_dim=draw(st.integers(1, 20)),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        positions=draw(st.sampled_from(["rotary", "learned"])),
        mlp=draw(st.sampled_from(["swiglu", "gelu"])),
        qkv_bias=draw(st.booleans()),
        bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        attention="reference",
        deep=draw(masks) if layers > 1 else "none",
    )


@given(
    configs(), st.integers(1, 3), st.integers(1, 9), st.sampled_from(["none", "all", "2", "3", "attention"]), st.data()
)
def test_they_are_what_torch_counts(config, rows, tokens, what, data):
    model = GPT(config)
    recompute(model, what)
    supervised = data.draw(st.integers(1, rows * tokens))
    labels = torch.full((rows * tokens,), IGNORED)
    labels[:supervised] = 0
    with FlopCounterMode(display=False) as counter:
        losses = model(torch.zeros(rows, tokens, dtype=torch.int64), labels.view(rows, tokens))
    expected = step_flops(config, rows=rows, tokens=tokens, supervised=supervised, recompute=what)
    assert counter.get_total_flops() == expected.forward
    with FlopCounterMode(display=False) as counter:
        losses.sum().backward()
    assert counter.get_total_flops() == expected.backward + expected.again
    assert expected.hardware == expected.model + expected.again


def test_the_well_known_forms_are_what_they_leave_out_away():
    config, T = preset("gpt2"), 1024
    P = sum(p.numel() for p in GPT(config, hollow_on=torch.device("cpu")).parameters())
    exact = step_flops(config, rows=1, tokens=T)
    vectors = P - config.num_layers * linear_flops(config) // 2 - config.vocab_size * config.model_dim
    assert exact.model == T * (palm(config, P, T) - 6 * vectors)  # biases, norms and the table of positions
    assert six_p(P, T) == T * (palm(config, P, T) - 3 * config.num_layers * attention_flops(config, T))


@pytest.mark.parametrize("again", [False, True])
def test_megatrons_form_is_ours_but_for_the_ends_of_a_recomputation(again):
    config, T = preset("gpt2-medium"), 512
    exact = step_flops(config, rows=4, tokens=T, recompute="all" if again else "none")
    shape = dict(layers=config.num_layers, model_dim=config.model_dim, vocab_size=config.vocab_size)
    formula = megatron(rows=4, tokens=T, recompute=again, **shape)
    head = 2 * 4 * T * config.model_dim * config.vocab_size
    last = config.num_layers * 2 * 4 * T * config.hidden_dim * config.model_dim if again else 0
    assert math.isclose(exact.hardware - head + last, formula, rel_tol=1e-12)  # ours computes the logits again
