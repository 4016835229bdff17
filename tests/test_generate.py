"""Laws of generation: the cache changes no number, a row is deaf to its neighbours, sampling keeps to its promise."""

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.errors import UserError
from minispeed.model.cache import Cache
from minispeed.model.generate import Sampling, decode, generate
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.testing.models import small_configs


@given(small_configs(), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2**31))
def test_logits_through_the_cache_are_the_logits_without(config, cuts, seed):
    model = GPT(config, seed=seed).to(torch.float64)
    tokens = torch.randint(0, config.vocab_size, (2, sum(cuts)), generator=torch.Generator().manual_seed(seed))
    cache = Cache(sum(cuts))
    pieces = [model.logits(part, cache=cache) for part in tokens.split(cuts, dim=1)]
    whole = model.logits(tokens)
    assert (torch.cat(pieces, dim=1) - whole).abs().max() <= 1e-10 * max(1, whole.abs().max().item())


@given(small_configs(), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2**31))
def test_a_prompt_is_answered_in_a_batch_as_it_is_alone(config, lengths, seed):
    model = GPT(config, seed=seed).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    together = generate(model, prompts, stop=[0], max_new=5)
    assert together == [generate(model, [prompt], stop=[0], max_new=5)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, together):
        read = list(prompt)
        for token in [*answer.tokens, *([0] if answer.stopped else [])]:
            assert int(model.logits(torch.tensor([read]))[0, -1].argmax()) == token
            read.append(token)
        assert answer.stopped or len(answer.tokens) == 5


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.integers(0, 9), st.floats(0.01, 1.0))
def test_what_sampling_keeps_is_the_smallest_likely_set(scores, top_k, top_p):
    logits = torch.tensor([scores], dtype=torch.float64)
    kept = Sampling(temperature=1.0, top_k=top_k, top_p=top_p).keep(logits)[0].isfinite()
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    probability = logits[0].softmax(-1)
    expected, together = [], 0.0
    for token in order[: top_k or None]:
        if together >= top_p and top_p < 1:
            break
        expected.append(token)
        together += probability[token].item()
    if abs(together - top_p) > 1e-9:  # on the border itself either is right
        assert sorted(expected) == kept.nonzero()[:, 0].tolist()
    assert kept.any()


def test_drawn_tokens_follow_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).log_softmax(-1).repeat(20000, 1)
    drawn = Sampling(temperature=0.5).choose(logits, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    assert (share - (2 * logits[0]).softmax(-1)).abs().max() < 0.015


def test_the_same_generator_draws_the_same_answer():
    model = GPT(preset("nano"))
    drawn = [
        generate(
            model,
            [[5, 6, 7]],
            stop=[],
            max_new=8,
            sampling=Sampling(temperature=1.0),
            generator=torch.Generator().manual_seed(4),
        )
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]


def test_generation_ends_where_positions_end():
    model = GPT(preset("nano", max_positions=8))
    assert len(list(decode(model, [[1, 2, 3]], max_new=100))) == 5
    with pytest.raises(UserError, match="the prompt has 8 tokens, and the model reads at most 8"):
        list(decode(model, [[1] * 8], max_new=1))
    with pytest.raises(UserError, match="no tokens"):
        list(decode(model, [[]], max_new=1))


@pytest.mark.parametrize(
    ("change", "name"),
    [({"temperature": -1}, "temperature"), ({"top_k": -1}, "top-k"), ({"top_p": 0}, "top-p")],
)
def test_sampling_outside_its_range_is_named(change, name):
    with pytest.raises(UserError, match=name):
        Sampling(**change)


def test_a_long_prompt_in_the_batch_leaves_the_others_their_room():
    model = GPT(preset("nano", vocab_size=7, max_positions=12, num_layers=1))
    prompts = [[1] * 11, [2], [3, 4, 5]]
    together = generate(model, prompts, stop=[], max_new=10)
    assert [len(answer.tokens) for answer in together] == [1, 10, 9]
    assert together == [generate(model, [prompt], stop=[], max_new=10)[0] for prompt in prompts]
