"""Laws of chunks: wherever a GPT is cut by depth, losses and gradients are its own, and bundles are the smallest."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from test_deep import batch, built, close, deep_configs, gradients
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minispeed.collective.group import Group
from minispeed.collective.threads import run_threads
from minispeed.errors import UserError
from minispeed.model.cache import Cache
from minispeed.model.chunk import Chunk, layer_costs
from minispeed.model.config import GPTConfig
from minispeed.model.flops import layer_flops
from minispeed.model.gpt import GPT
from minispeed.model.presets import PRESETS, preset
from minispeed.model.recompute import recompute
from minispeed.pipeline.partition import partition
from minispeed.placement import join
from minispeed.tensor.parallel import tensor_parallel
from minispeed.tensor.plan import gpt_plan
from minispeed.testing.models import small_configs
from minispeed.testing.strategies import seeds
from minispeed.zero.division import units_of

MASKS = ("none", "x0", "unet", "dwa")


@dataclass(frozen=True)
class Case:
    """A model, where it is cut, and what of it is recomputed."""

    config: GPTConfig
    boundaries: tuple[int, ...]
    recompute: str
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a model and a cut of its chain into 1 to L + 2 chunks."""
    config = draw(deep_configs(MASKS))
    length = config.num_layers + 2
    inner = draw(st.sets(st.integers(1, length - 1)))
    return Case(
        config, (0, *sorted(inner), length), draw(st.sampled_from(["none", "all", "2", "attention"])), draw(seeds)
    )


def chunks_of(model: GPT, boundaries: tuple[int, ...]) -> list[Chunk]:
    return [Chunk(model, first, last) for first, last in zip(boundaries, boundaries[1:])]


def passed_by_hand(chunks: list[Chunk], tokens: Tensor, labels: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return losses and gradients, bundles and their gradients handed over as a pipeline would; copies are added."""
    received: list[tuple[Tensor, ...]] = [()]
    sent: list[tuple[Tensor, ...]] = []
    for chunk in chunks:
        sent.append(chunk(received[-1], tokens, labels, **rows))
        received.append(tuple(x.detach().requires_grad_() for x in sent[-1]))
    pulls: list[Tensor | None] = [torch.ones_like(sent[-1][0])]
    for chunk, came, went in zip(reversed(chunks), reversed(received[:-1]), reversed(sent)):
        torch.autograd.backward(went, pulls)
        pulls = [x.grad for x in came]
    total = {"losses": sent[-1][0].detach()}
    for chunk in chunks:
        for local, p in chunk.named_parameters():
            name = chunk.tied.get(local, local)
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            total[name] = total[name] + gradient if name in total else gradient.clone()
    return total


@given(cases())
def test_wherever_it_is_cut_it_is_the_same_model(case):
    model, step = built(case.config, case.seed), batch(case.config, case.seed)
    recompute(model, case.recompute)
    wanted = gradients(model, *step)
    model.zero_grad()
    chunks = chunks_of(model, case.boundaries)
    got = passed_by_hand(chunks, *step)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert close(got[name], gradient), name
    if not any(model.deep.connections.cover(chunk.last - 1).rows for chunk in chunks):  # sums in the same order
        assert torch.equal(got["losses"], wanted["losses"])


@given(cases())
def test_parameters_of_chunks_are_the_models_each_owned_once(case):
    model = GPT(case.config, seed=case.seed)
    whole = dict(model.named_parameters())
    owned: dict[str, nn.Parameter] = {}
    for chunk in chunks_of(model, case.boundaries):
        named = dict(chunk.named_parameters())
        for local, name in chunk.tied.items():
            copy = named.pop(local)
            assert torch.equal(copy, whole[name]) and copy is not whole[name]
        assert not owned.keys() & named.keys()
        owned |= named
        assert chunk.tied.get("head.weight") == (
            "embed.tokens.weight" if case.config.tied and chunk.is_last and not chunk.is_first else None
        )
        assert chunk.tied.get("deep.alpha") == ("deep.alpha" if case.config.deep != "none" and chunk.first else None)
    assert owned.keys() == whole.keys() and all(owned[name] is p for name, p in whole.items())
    assert case.config.tied == (model.head.weight is model.embed.tokens.weight)


@given(cases())
def test_a_bundle_has_as_many_tensors_as_it_says(case):
    model = GPT(case.config, seed=case.seed)
    tokens, labels, rows = batch(case.config, case.seed)
    bundle: tuple[Tensor, ...] = ()
    for chunk in chunks_of(model, case.boundaries):
        assert len(bundle) == chunk.num_received
        bundle = chunk.features(bundle, tokens, **rows)
        assert len(bundle) == chunk.num_sent
        assert all(x.shape == (2, 6, case.config.model_dim) for x in bundle)
    assert len(bundle) == 1 and torch.allclose(bundle[0], model.features(tokens, **rows), atol=1e-4)


@pytest.mark.parametrize(
    ("mask", "sent"),
    [
        ("none", [1] * 10),
        ("x0", [1, *[2] * 6, 1, 1, 1]),  # the embedding, until the last block has read it
        ("unet", [1, 1, 2, 3, 4, 3, 2, 1, 1, 1]),  # blocks that wait for their mirror image, and the last
        ("dwa", [1, 2, 3, 4, 5, 4, 3, 2, 1, 1]),  # all outputs so far, or a sum for every reader to come
    ],
)
def test_what_each_mask_sends_over_each_cut_of_eight_blocks(mask, sent):
    model = GPT(preset("nano", num_layers=8, model_dim=4, vocab_size=3, deep=mask))
    assert [Chunk(model, 0, last).num_sent for last in range(1, 11)] == sent


def test_a_plain_bundle_is_the_stream():
    model = GPT(preset("nano"))
    tokens = torch.arange(6).view(2, 3)
    (sent,) = Chunk(model, 0, 3).features((), tokens)
    seen: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda module, args, x: seen.append(x))
    model.features(tokens)
    assert torch.equal(sent, seen[0])


@given(cases(), st.integers(1, 4))
def test_each_chunk_generates_with_a_cache_of_its_own(case, prompt):
    model = built(case.config, case.seed)
    tokens, _, rows = batch(case.config, case.seed)
    chunks = chunks_of(model, case.boundaries)
    caches = [Cache(6) for chunk in chunks]
    for part in slice(0, prompt), slice(prompt, 6):
        bundle: tuple[Tensor, ...] = ()
        here = {name: x[:, part] for name, x in rows.items()}
        for chunk, cache in zip(chunks, caches):
            bundle = chunk.features(bundle, tokens[:, part], **here, cache=cache)
    assert close(chunks[-1].head(bundle[0]), model.logits(tokens, **rows)[:, prompt:])


NANO = preset("nano", deep="dwa", model_dim=8, hidden_dim=4, head_dim=2, vocab_size=11)


@settings(max_examples=20)
@given(cases(), st.booleans())
@example(Case(NANO, (0, 3, 6), "none", 0), True)  # a copy of alpha, applied to this rank's tokens alone
def test_a_model_cut_over_tp_is_cut_by_depth_too(case, sequence):
    config = replace(case.config, num_heads=4, num_kv_heads=2, hidden_dim=4)
    step = batch(config, case.seed)

    def run(group: Group) -> tuple[dict[str, Tensor], dict]:
        model = built(config, case.seed)
        placement = tensor_parallel(model, gpt_plan(config), group, sequence_parallel=sequence)
        recompute(model, case.recompute)
        return passed_by_hand(chunks_of(model, case.boundaries), *step), placement

    wanted = gradients(built(config, case.seed), *step)
    (first, placement), (second, _) = run_threads(run, 2)
    assert torch.equal(first["losses"], second["losses"]) and close(first.pop("losses"), wanted.pop("losses"))
    for name, gradient in wanted.items():
        assert close(join([first[name], second[name]], placement[name]), gradient), name


def test_blocks_recomputed_in_the_model_are_recomputed_in_the_chunk():
    model = GPT(preset("nano"))
    recompute(model, "2")
    runs: list[int] = []
    for index, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(lambda *all, index=index: runs.append(index))
    tokens = torch.arange(4).view(1, 4)
    (out,) = Chunk(model, 0, 4).features((), tokens)
    out.sum().backward()
    assert runs == [0, 1, 2, 2, 0]


def test_a_frozen_parameter_has_a_frozen_copy():
    model = GPT(preset("nano", deep="x0"))
    model.embed.requires_grad_(False)
    chunk = Chunk(model, 3, 6)
    assert not chunk.head.weight.requires_grad and chunk.deep.alpha.requires_grad


def test_a_block_of_a_chunk_is_a_unit_of_zero():
    model = GPT(preset("nano", deep="x0"))
    assert list(units_of(Chunk(model, 2, 6))) == ["blocks.1", "blocks.2", "blocks.3", "norm", "head", "deep"]


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 2), (3, 7)])
def test_layers_that_are_not_there_are_a_sentence(first, last):
    with pytest.raises(UserError, match=rf"a chunk of layers {first} to {last - 1}, of a model with layers 0 to 5"):
        Chunk(GPT(preset("nano")), first, last)


def test_a_bundle_of_another_cut_is_a_sentence():
    chunk = Chunk(GPT(preset("nano", deep="x0")), 3, 6)
    with pytest.raises(UserError, match="layer 3 needs a bundle of 2 tensors, and 1 came"):
        chunk.features((torch.zeros(1, 4, 128),), torch.zeros(1, 4, dtype=torch.int64))


# ---- what layers cost


@given(deep_configs(MASKS), seeds)
def test_costs_are_the_parameters_that_one_chunk_a_layer_computes_with(config, seed):
    model = GPT(config, seed=seed)
    alpha = 0 if model.deep.alpha is None else model.deep.alpha.numel()
    alone = [Chunk(model, layer, layer + 1) for layer in range(config.num_layers + 2)]
    assert layer_costs(model) == [0, *(sum(p.numel() for p in chunk.parameters()) - alpha for chunk in alone[1:])]


@given(small_configs(), st.integers(1, 9))
def test_flops_are_those_that_torch_counts(config, T):
    """Every product of the plain attention, which leaves out no pair."""
    model = GPT(replace(config, attention="reference"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(torch.zeros(1, T, dtype=torch.int64))
    whole = layer_flops(config, T, causal=False)
    assert counter.get_total_flops() == sum(whole)
    if T == 1:
        assert layer_flops(config, 1) == whole


def test_a_long_row_of_gpt2_costs_what_is_known():
    """Per token 2 operations a weight, and half of 4 T H K: 85M + 38.6M weights, 12 layers of 768, at T = 1,024."""
    flops = sum(layer_flops(PRESETS["gpt2"], 1024))
    weights = 12 * 12 * 768 * 768 + 50257 * 768
    assert flops == 1024 * (2 * weights + 12 * 2 * 1025 * 768)


def test_chunks_are_cut_by_cost():
    costs = layer_costs(GPT(preset("nano", vocab_size=8000)))
    assert partition(costs, 3) == [0, 3, 5, 6]  # the head outweighs all blocks
    assert partition(layer_flops(preset("nano"), 64), 2) == [0, 3, 6]
