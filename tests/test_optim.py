"""Laws of the optimizer and its schedules: ours is torch's, the fused kernel is the loop, a schedule has its shape."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from minispeed.errors import UserError
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.optim import AdamW, decay_groups, warmup_then

settings_of_adamw = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-5, 1e-2),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
        "eps": st.floats(1e-8, 1e-4),
        "weight_decay": st.floats(0, 0.3),
    }
)


def train(make, seed: int, steps: int) -> list[torch.Tensor]:
    """Return parameters of drawn gradients after some steps; the second parameter has none in the first step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (5,), (0,)]
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    optimizer = make(params)
    for step in range(steps):
        for index, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = None if index == 1 and step == 0 else gradient
        optimizer.step()
    return [p.detach() for p in params]


@given(settings_of_adamw, st.booleans(), st.integers(0, 2**31), st.integers(1, 4))
def test_ours_is_torchs(values, fused, seed, steps):
    ours = train(lambda params: AdamW(params, fused=fused, **values), seed, steps)
    theirs = train(lambda params: torch.optim.AdamW(params, foreach=False, **values), seed, steps)
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_the_state_survives_a_save():
    model = nn.Linear(2, 2)
    optimizer = AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    again = AdamW(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    assert again.state_dict()["state"][0]["step"] == 1


def test_matrices_decay_and_vectors_do_not():
    model = GPT(preset("nano", qkv_bias=True))
    model.norm.weight.requires_grad_(False)
    decayed, kept = decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(decayed["names"] + kept["names"]) == sorted(trainable)
    assert all("norm" in name or "bias" in name for name in kept["names"])


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(0, 9), st.integers(1, 50), st.floats(0, 1))
def test_a_schedule_rises_in_a_line_then_never_again(shape, warmup, total, final):
    factor = warmup_then(shape, warmup=warmup, total=total, final=final)
    assert [factor(step) for step in range(warmup)] == [(step + 1) / warmup for step in range(warmup)]
    after = [factor(step) for step in range(warmup, total + 3)]
    assert all(late <= early + 1e-12 for early, late in zip(after, after[1:]))
    assert total <= warmup or after[0] == 1.0
    if shape != "constant" and total > warmup:
        assert math.isclose(factor(total), final, abs_tol=1e-12)


def test_cosine_is_half_way_down_half_way():
    assert math.isclose(warmup_then("cosine", warmup=10, total=110)(60), 0.5)
    assert math.isclose(warmup_then("linear", warmup=10, total=110, final=0.1)(60), 0.55)


def test_wrong_values_are_named():
    with pytest.raises(UserError, match="'cosin'.*cosine or linear or constant"):
        warmup_then("cosin", warmup=1, total=2)
    with pytest.raises(UserError, match="lr -1"):
        AdamW([torch.ones(1)], lr=-1)
