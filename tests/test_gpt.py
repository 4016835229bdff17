"""Laws of the GPT: families by configuration, loss in chunks, packed documents alone, weights from names."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.errors import UserError
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.init import draw
from minispeed.model.loss import IGNORED, token_losses
from minispeed.model.presets import PRESETS, preset
from minispeed.model.rotary import rotary_frequencies
from minispeed.testing.models import small_configs


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> bool:
    """Whether two tensors are equal as the design page defines it."""
    return bool((got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item()))


@given(small_configs(), st.integers(1, 7), st.integers(0, 2**31))
def test_chunked_loss_is_plain_loss(config, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 5, config.model_dim, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.model_dim, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    labels = torch.randint(0, config.vocab_size, (2, 5), generator=generator)
    labels[torch.rand(2, 5, generator=generator) < 0.4] = IGNORED
    pull = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    losses = token_losses(features, weight, labels, chunk=chunk)
    logits = (features @ weight.T).flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
    assert close(losses, plain.view(2, 5))
    for got, expected in zip(
        torch.autograd.grad((losses * pull).sum(), (features, weight)),
        torch.autograd.grad((plain.view(2, 5) * pull).sum(), (features, weight)),
        strict=True,
    ):
        assert close(got, expected)


def test_unsupervised_rows_never_meet_the_head():
    """A row with nothing to learn may hold nan features: they must not reach the product."""
    features = torch.full((1, 3, 4), float("nan"))
    features[0, 1] = 1.0
    losses = token_losses(features, torch.ones(6, 4), torch.tensor([[IGNORED, 2, IGNORED]]))
    assert losses.isfinite().all() and losses[0, 1] > 0


@given(small_configs(), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2**31))
def test_packed_documents_are_alone(config, lengths, seed):
    """Logits, losses and gradients of a document are those it has in a row of its own."""
    model = GPT(config, seed=seed).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(0, config.vocab_size, (1, n + 1), generator=generator) for n in lengths]
    tokens = torch.cat([d[:, :-1] for d in documents], dim=1)
    labels = torch.cat([d[:, 1:] for d in documents], dim=1)
    ids = torch.cat([torch.full((1, n), index) for index, n in enumerate(lengths)], dim=1)
    positions = torch.cat([torch.arange(n)[None] for n in lengths], dim=1)
    packed = model.logits(tokens, positions=positions, documents=ids)
    losses = model(tokens, labels, positions=positions, documents=ids)
    start = 0
    for document, length in zip(documents, lengths):
        span = slice(start, start + length)
        assert close(packed[:, span], model.logits(document[:, :-1]))
        assert close(losses[:, span], model(document[:, :-1], document[:, 1:]))
        start += length


def test_no_gradient_reaches_another_document():
    config = PRESETS["nano"]
    model = GPT(config).to(torch.float64)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    reached = []
    model.embed.register_forward_hook(lambda module, args, out: reached.append(out.requires_grad_()) or out)
    model(tokens, torch.tensor([[IGNORED] * 4 + [7, 8]]), documents=ids).sum().backward(inputs=reached)
    assert reached[0].grad[0, :3].abs().max() == 0 and reached[0].grad[0, 3:].abs().max() > 0


@given(small_configs(), st.integers(0, 2**31))
def test_attentions_give_the_same_model(config, seed):
    tokens = torch.randint(0, config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed))
    logits = [
        GPT(replace(config, attention=name), seed=seed).to(torch.float64).logits(tokens)
        for name in ("reference", "tiled", "fused")
    ]
    assert close(logits[1], logits[0]) and close(logits[2], logits[0])


@given(small_configs(), st.integers(0, 2**31))
def test_a_later_token_changes_no_earlier_logit(config, seed):
    model = GPT(config, seed=seed).to(torch.float64)
    tokens = torch.randint(0, config.vocab_size, (1, 6), generator=torch.Generator().manual_seed(seed))
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % config.vocab_size
    before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3], after[:, 3])


def test_a_parameter_depends_on_seed_and_name_alone():
    model, deeper = GPT(PRESETS["nano"], seed=5), GPT(preset("nano", vocab_size=700), seed=5)
    assert torch.equal(model.blocks[2].attention.qkv.weight, deeper.blocks[2].attention.qkv.weight)
    assert not torch.equal(model.blocks[1].attention.qkv.weight, model.blocks[2].attention.qkv.weight)
    other = GPT(PRESETS["nano"], seed=6)
    assert not torch.equal(model.embed.tokens.weight, other.embed.tokens.weight)
    assert draw(0, "a", (2, 3), 1.0).tolist() == draw(0, "a", (3, 2), 1.0).view(2, 3).tolist()


def test_building_leaves_the_default_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    GPT(PRESETS["nano"])
    assert torch.equal(torch.rand(3), expected)


def test_published_shapes_have_the_published_number_of_parameters():
    def count(name: str) -> int:
        config = PRESETS[name]
        D, K, F, V = config.model_dim, config.head_dim, config.hidden_dim, config.vocab_size
        model = GPT(preset(name, num_layers=1, vocab_size=1, max_positions=1))
        block = sum(p.numel() for p in model.blocks.parameters())
        table = config.max_positions * D if config.positions == "learned" else 0
        norm = sum(p.numel() for p in model.norm.parameters())
        assert (K * config.num_heads, F > D, config.tied) == (D, True, True)
        return V * D + table + config.num_layers * block + norm

    assert count("gpt2") == 124_439_808
    assert count("llama-3.2-1b") == 1_235_814_400
    assert count("qwen2.5-0.5b") == 494_032_768


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm', not one of rmsnorm, layernorm"),
        ({"num_layers": 0}, "num_layers counts at least 1, got 0"),
        ({"attention": "flash"}, "attention is 'flash', not one of reference, tiled, fused"),
        ({"rope_factor": 2.0}, "rope_factor 2.0 with rope_scaling 'none'"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor 0.5"),
        ({"rope_low": 4.0}, "rope_low is 4.0, and rope_high 4.0"),
    ],
)
def test_a_wrong_shape_is_a_sentence(change, message):
    with pytest.raises(UserError, match=message):
        preset("nano", **change)


def test_a_row_beyond_the_positions_is_a_sentence():
    with pytest.raises(UserError, match="a row of 9 tokens is longer than the model's max_positions 8"):
        GPT(preset("nano", max_positions=8)).logits(torch.zeros(1, 9, dtype=torch.long))


@given(st.floats(1, 50), st.sampled_from([100.0, 10000.0]), st.floats(0.5, 2), st.floats(2.5, 9), st.integers(8, 9000))
def test_scaled_angles_interpolate_positions_or_slow_pairs_alone(factor, theta, low, high, original):
    def turned(**scaling):
        return rotary_frequencies(preset("nano", head_dim=16, rope_theta=theta, **scaling))

    plain, linear = turned(), turned(rope_scaling="linear", rope_factor=factor)
    assert torch.equal(linear, plain / factor)
    between = dict(rope_low=low, rope_high=high, rope_original=original)
    scaled = turned(rope_scaling="llama3", rope_factor=factor, **between)
    turns = plain * original / (2 * torch.pi)
    assert torch.equal(scaled[turns >= high], plain[turns >= high])
    assert torch.equal(scaled[turns <= low], linear[turns <= low])
    assert (linear - 1e-12 <= scaled).all() and (scaled <= plain + 1e-12).all() and (scaled.diff() < 0).all()


def test_one_word_for_biases_is_still_read():
    """Before attention's output and the MLP had biases of their own, a configuration said `bias` of both."""
    config = PRESETS["gpt2"].to_dict()
    assert config.pop("out_bias") and config.pop("mlp_bias") and "bias" not in config
    assert GPTConfig.from_dict(config | {"bias": True}) == PRESETS["gpt2"]
    neither = GPTConfig.from_dict(config | {"bias": False})
    assert not (neither.out_bias or neither.mlp_bias) and replace(PRESETS["gpt2"], num_layers=3).out_bias


def test_config_survives_json_and_names_a_wrong_key():
    config = PRESETS["qwen2.5-0.5b"]
    assert GPTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="no setting 'num_layer'; try: num_layers"):
        GPTConfig.from_dict({"num_layer": 3})
    with pytest.raises(UserError, match="incomplete"):
        GPTConfig.from_dict({"num_layers": 3})
