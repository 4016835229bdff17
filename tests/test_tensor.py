"""Laws of tensor parallelism: any cut is the same training run, copies stay equal, and messages are what is said."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Trace, Traced
from minispeed.collective.world import World
from minispeed.errors import UserError
from minispeed.model.config import GPTConfig
from minispeed.model.generate import Sampling, generate
from minispeed.model.gpt import GPT
from minispeed.model.init import draw as drawn
from minispeed.model.loss import IGNORED, token_losses as whole_losses
from minispeed.model.presets import preset
from minispeed.model.recompute import recompute
from minispeed.optim import AdamW
from minispeed.placement import Placement, Replicated, Shard, cut, join, local_shape
from minispeed.tensor.loss import token_losses
from minispeed.tensor.parallel import tensor_parallel
from minispeed.tensor.plan import Column, Enter, Plan, Replica, Row, Vocab, gpt_plan
from minispeed.tensor.stream import whole_rows
from minispeed.testing.models import small_configs
from minispeed.testing.pool import shared_pool
from minispeed.testing.strategies import seeds

STEPS = 3
OPTIMIZERS = {"adamw": lambda params: AdamW(params, lr=1e-3), "sgd": lambda params: torch.optim.SGD(params, lr=1e-3)}


# ---- a user's own module


@dataclass(frozen=True)
class OwnConfig:
    """Sizes and switches of `Own`."""

    vocab_size: int
    dim: int
    heads: int
    hidden: int
    tied: bool
    bias: bool
    twice: bool
    cut_ends: bool


class Own(nn.Module):
    """What a user might write: separate q, k, v, a gated MLP in one Linear, a free parameter, a plain cross-entropy."""

    def __init__(self, config: OwnConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(OwnLayer(config) for _ in range(2))
        self.final = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=not config.tied)
        if config.tied:
            self.head.weight = self.embed.weight
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(drawn(seed, name, p.shape, 0.5))

    def forward(self, tokens: Tensor, labels: Tensor, *, positions: Tensor, **attached: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in [*self.layers, *([self.layers[-1]] if self.config.twice else [])]:
            x = layer(x)
        logits = self.head(self.final(x))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view(labels.shape)


class OwnLayer(nn.Module):
    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        D, self.head_dim = config.dim, 2
        self.scale = nn.Parameter(torch.ones(D))
        self.mix = Mix(config)
        self.norm = nn.LayerNorm(D)
        self.gate_up = nn.Linear(D, 2 * config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, D, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x) * self.scale
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(torch.tanh(gate) * up)


class Mix(nn.Module):
    """Attention with a gain per feature of a head, and its own names."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        D, self.head_dim = config.dim, 2
        self.gain = nn.Parameter(torch.ones(self.head_dim))
        self.q, self.k, self.v = (nn.Linear(D, config.heads * self.head_dim, bias=config.bias) for _ in range(3))
        self.out = nn.Linear(config.heads * self.head_dim, D, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q * self.gain, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def own_plan(config: OwnConfig) -> Plan:
    whole_ends: Plan = {"embed": Replica(takes="whole"), "head": Replica(on="whole")}
    return {
        **({"embed": Vocab(), "head": Vocab()} if config.cut_ends or config.tied else whole_ends),
        "layers.*.scale": Replica(),
        "layers.*.mix": Enter(),
        "layers.*.mix.[qkv]": Column(head_dim=2),
        "layers.*.mix.gain": Replica(on="heads"),
        "layers.*.mix.out": Row(),
        "layers.*.norm": Replica(),
        "layers.*.gate_up": Column(chunks=2),
        "layers.*.down": Row(),
        "final": Replica(gives="whole"),
    }


# ---- any cut is the same training run


@dataclass(frozen=True)
class Case:
    """One cut of one drawn model."""

    config: Any
    ranks: int
    sequence: bool
    share: float
    optimizer: str
    recompute: str
    seed: int


@st.composite
def cases(draw: st.DrawFn, configs: Any) -> Case:
    """Draw a model whose heads and features the ranks divide; `configs` is a function of their number."""
    ranks = draw(st.integers(1, 4))
    return Case(
        config=draw(configs(ranks)),
        ranks=ranks,
        sequence=draw(st.booleans()),
        share=draw(st.floats(0, 1)),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        recompute=draw(st.sampled_from(["none", "all", "attention"])),
        seed=draw(seeds),
    )


def gpt_configs(ranks: int) -> st.SearchStrategy[GPTConfig]:
    fields = ("num_heads", "num_kv_heads", "hidden_dim")
    return small_configs().map(lambda c: replace(c, **{name: ranks * getattr(c, name) for name in fields}))


def own_configs(ranks: int) -> st.SearchStrategy[OwnConfig]:
    return st.builds(
        OwnConfig,
        vocab_size=st.integers(2, 9),
        dim=st.integers(2, 4),
        heads=st.integers(1, 2).map(lambda n: n * ranks),
        hidden=st.integers(1, 3).map(lambda n: n * ranks),
        tied=st.booleans(),
        bias=st.booleans(),
        twice=st.booleans(),
        cut_ends=st.booleans(),
    )


gpt_cases, own_cases = cases(gpt_configs), cases(own_configs)


def build(case: Case) -> tuple[nn.Module, Plan]:
    if isinstance(case.config, OwnConfig):
        return Own(case.config, seed=case.seed).to(torch.float64), own_plan(case.config)
    model = GPT(case.config, seed=case.seed).to(torch.float64)
    recompute(model, case.recompute)
    return model, gpt_plan(case.config)


def batch(case: Case, step: int) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Draw two packed rows, learnt from unevenly; with cut rows, of a length that the ranks divide."""
    generator = torch.Generator().manual_seed(case.seed + step)
    shape = (2, case.ranks * 2 if case.sequence else 5)
    tokens, labels = torch.randint(0, case.config.vocab_size, (2, *shape), generator=generator)
    labels[torch.rand(shape, generator=generator) >= case.share] = IGNORED
    documents = (torch.arange(shape[1]) >= shape[1] // 2).to(torch.int64).expand(shape)
    positions = torch.arange(shape[1]) - documents * (shape[1] // 2)
    return (tokens, labels), {"positions": positions.contiguous(), "documents": documents.contiguous()}


@dataclass
class Run:
    """What came of a few steps: losses of each, gradients of the first, parameters at the end."""

    losses: list[Tensor]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    placement: Placement


def train(case: Case, model: nn.Module, placement: Placement) -> Run:
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())
    run = Run([], {}, {}, placement)
    for step in range(STEPS):
        (tokens, labels), rows = batch(case, step)
        losses = model(tokens, labels, **rows)
        optimizer.zero_grad()
        (losses.sum() / max(1, (labels != IGNORED).sum())).backward()
        run.losses.append(losses.detach())
        if step == 0:
            for name, p in model.named_parameters():
                run.gradients[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        optimizer.step()
    run.parameters = {name: p.detach() for name, p in model.named_parameters()}
    return run


def trained_alone(case: Case) -> Run:
    model, _ = build(case)
    return train(case, model, {})


def trained(case: Case, group: Group) -> Run:
    model, plan = build(case)
    return train(case, model, tensor_parallel(model, plan, group, sequence_parallel=case.sequence))


def trained_in(world: World, case: Case) -> Run:
    return trained(case, world.group)


def assert_close(got: Tensor, expected: Tensor, name: str) -> None:
    assert got.shape == expected.shape
    difference = (got - expected).abs().max().item()
    assert difference <= 1e-10 * max(1.0, expected.abs().max().item()), f"{name} differs by {difference:.2e}"


def check(case: Case, runs: list[Run]) -> None:
    expected, placement = trained_alone(case), runs[0].placement
    for losses, wanted in zip(zip(*(run.losses for run in runs)), expected.losses, strict=True):
        assert all(torch.equal(one, losses[0]) for one in losses)
        assert_close(losses[0], wanted, "loss")
    for what in ("gradients", "parameters"):
        by_rank: list[Mapping[str, Tensor]] = [getattr(run, what) for run in runs]
        whole: Mapping[str, Tensor] = getattr(expected, what)
        assert by_rank[0].keys() == whole.keys()
        for name, wanted in whole.items():
            slices = [tensors[name] for tensors in by_rank]
            assert_close(join(slices, placement[name]), wanted, f"{name} ({what})")
            if isinstance(placement[name], Replicated):
                assert all(torch.equal(one, slices[0]) for one in slices), f"copies of {name} differ"


@given(st.one_of(gpt_cases, own_cases))
@settings(print_blob=True)
def test_any_cut_is_the_same_training_run(case):
    check(case, run_threads(lambda group: trained(case, group), case.ranks))


@given(st.one_of(gpt_cases, own_cases))
@settings(max_examples=6, print_blob=True)
def test_processes_over_gloo_too(case):
    check(case, shared_pool().run(trained_in, case, ranks=case.ranks))


# ---- what is cut joins to the whole


@given(st.one_of(gpt_cases, own_cases))
def test_slices_of_a_fresh_model_are_those_of_the_whole(case):
    def slices(group: Group) -> tuple[dict[str, Tensor], Placement]:
        model, plan = build(case)
        placement = tensor_parallel(model, plan, group, sequence_parallel=case.sequence)
        assert placement.keys() == model.state_dict().keys()
        return model.state_dict(), placement

    results = run_threads(slices, case.ranks)
    for name, whole in build(case)[0].state_dict().items():
        place = results[0][1][name]
        held = [state[name] for state, _ in results]
        assert torch.equal(join(held, place), whole)
        assert {tuple(x.shape) for x in held} == {local_shape(whole.shape, place, {"tp": case.ranks})}
        assert all(torch.equal(x, cut(whole, place, rank=r, size=case.ranks)) for r, x in enumerate(held))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 4), st.booleans(), st.integers(-2, 1))
def test_join_undoes_a_cut_of_fused_and_padded_tensors(lengths, size, padded, dim):
    chunks = tuple(n if padded else n * size for n in lengths)
    shape = [3, 3]
    shape[dim] = sum(chunks)
    x = torch.arange(1.0, 1 + 3 * sum(chunks)).view(shape)
    place = Shard("tp", dim, chunks, padded)
    slices = [cut(x, place, rank=rank, size=size) for rank in range(size)]
    assert torch.equal(join(slices, place), x)
    assert {tuple(s.shape) for s in slices} == {local_shape(shape, place, {"tp": size})}
    assert sum(int((s != 0).sum()) for s in slices) == x.numel()  # all else is padding


def test_a_rank_holds_whole_heads_of_query_key_and_value():
    place = Shard("tp", 0, (4, 2, 2))
    assert cut(torch.arange(8), place, rank=1, size=2).tolist() == [2, 3, 5, 7]
    with pytest.raises(UserError, match=r"dim 0 has 3 elements, which tp=2 does not divide"):
        cut(torch.arange(8), Shard("tp", 0, (4, 3, 1)), rank=0, size=2)
    with pytest.raises(UserError, match=r"dim 0 has 8 elements, and its chunks \(4, 2\) have 6"):
        cut(torch.arange(8), Shard("tp", 0, (4, 2)), rank=0, size=2)


# ---- the vocabulary


class LossOnRanks(torch.autograd.Function):
    """The cut loss as a function of whole tensors: its value and gradients come from ranks."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, labels: Tensor, ranks: int, chunk: int) -> Tensor:
        place = Shard("tp", 0, (len(weight),), padded=True)
        pull = torch.sin(1.0 + torch.arange(labels.numel(), dtype=weight.dtype)).view(labels.shape)

        def run(group: Group) -> tuple[Tensor, ...]:
            mine = cut(weight, place, rank=group.rank, size=group.size).clone().requires_grad_()
            seen = features.clone().requires_grad_()
            with torch.enable_grad():
                losses = token_losses(seen, mine, labels, group=group, vocab_size=len(weight), chunk=chunk)
                total = (losses * pull).sum()
            return losses.detach(), *torch.autograd.grad(total, (seen, mine))

        losses, of_features, of_weights = zip(*run_threads(run, ranks), strict=True)
        assert all(torch.equal(one, losses[0]) for one in losses)
        assert all(torch.equal(one, of_features[0]) for one in of_features)
        ctx.save_for_backward(of_features[0], join(of_weights, place))
        return (losses[0] * pull).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(grad * x for x in ctx.saved_tensors), None, None, None


def loss_inputs(vocab_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab_size, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, vocab_size, (2, 3), generator=generator)
    labels[0, 1] = IGNORED
    return features, weight, labels


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), seeds)
@settings(max_examples=8)
def test_the_cut_loss_passes_gradcheck(ranks, vocab_size, chunk, seed):
    features, weight, labels = loss_inputs(vocab_size, seed)
    assert torch.autograd.gradcheck(lambda f, w: LossOnRanks.apply(f, w, labels, ranks, chunk), (features, weight))


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.floats(0.1, 300), seeds)
def test_the_cut_loss_is_the_whole_one(ranks, vocab_size, chunk, scale, seed):
    features, weight, labels = loss_inputs(vocab_size, seed)
    pull = torch.sin(1.0 + torch.arange(6, dtype=torch.float64)).view(2, 3)
    got = LossOnRanks.apply(features * scale, weight, labels, ranks, chunk)
    expected = (whole_losses(features * scale, weight, labels) * pull).sum()
    assert_close(got, expected, "loss")
    for one, other in zip(*(torch.autograd.grad(x, (features, weight)) for x in (got, expected)), strict=True):
        assert_close(one, other, "gradient")


@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from(sorted(OPTIMIZERS)), seeds)
def test_padding_gets_no_gradient_and_never_wins(ranks, vocab_size, optimizer, seed):
    """Even where every true logit is negative, and padding's, 0, would be the largest."""
    shape = dict(num_layers=1, model_dim=4, num_heads=12, num_kv_heads=12, head_dim=2, hidden_dim=12)
    config = preset("nano", vocab_size=vocab_size, tied=False, **shape)
    tokens = torch.arange(6).view(2, 3) % vocab_size

    def run(group: Group) -> None:
        model = GPT(config, seed=seed).to(torch.float64)
        with torch.no_grad():
            model.head.weight.copy_(-model.features(tokens)[0, 0])  # its own product with itself, negative
        tensor_parallel(model, gpt_plan(config), group)
        size = -(-vocab_size // ranks)
        first = max(0, vocab_size - group.rank * size)  # of the padding
        assert model.head.weight.shape[0] == size
        with torch.no_grad():
            logits = model.logits(tokens)
        assert logits.shape[-1] == vocab_size and logits[0, 0].max() < 0
        steps = OPTIMIZERS[optimizer](model.parameters())
        for _ in range(2):
            model(tokens, tokens).sum().backward()
            for weight in (model.embed.tokens.weight, model.head.weight):
                assert not weight.grad[first:].any()
            steps.step()
        assert not model.head.weight[first:].any() and not model.embed.tokens.weight[first:].any()

    run_threads(run, ranks)


@pytest.mark.parametrize("token", [-1, 5, 6, 8])
def test_a_token_that_is_in_no_vocabulary_fails_on_every_rank(token):
    """5 tokens on 4 ranks: 6 and 7 would be found in the padding, 8 nowhere, and a zero returned in silence."""
    config = preset("nano", vocab_size=5, num_layers=1, model_dim=8, head_dim=2, hidden_dim=4)
    good, bad = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0, token]])

    def run(group: Group) -> None:
        model = GPT(config)
        tensor_parallel(model, gpt_plan(config), group)
        with pytest.raises(IndexError):
            model.logits(bad)
        with pytest.raises(RuntimeError, match="out of bounds"):
            model(good, bad)

    run_threads(run, 4)


# ---- generation


@given(gpt_cases, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.sampled_from([0.0, 1.0]))
def test_the_same_tokens_are_written(case, lengths, temperature):
    generator = torch.Generator().manual_seed(case.seed)
    prompts = [torch.randint(0, case.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    def write(model: GPT) -> Any:
        draws = torch.Generator().manual_seed(case.seed)
        return generate(
            model, prompts, stop=[0], max_new=4, sampling=Sampling(temperature=temperature), generator=draws
        )

    def run(group: Group) -> Any:
        model, plan = build(case)
        assert isinstance(model, GPT)
        tensor_parallel(model, plan, group, sequence_parallel=case.sequence)
        with whole_rows(model):
            assert model.blocks[0].attention.num_kv_heads * group.size == case.config.num_kv_heads
            return write(model)

    expected = write(build(case)[0])
    assert run_threads(run, case.ranks) == [expected] * case.ranks


def test_rows_that_cannot_be_cut_by_tokens_are_named_and_whole_rows_end():
    config = preset("nano", num_layers=1)
    tokens = torch.zeros(1, 4, dtype=torch.int64)

    def run(group: Group) -> None:
        model = GPT(config)
        tensor_parallel(model, gpt_plan(config), group, sequence_parallel=True)
        with whole_rows(model):
            model.logits(tokens[:, :3])
        model.logits(tokens)
        with pytest.raises(UserError, match="rows of 3 tokens, which tp=2 does not divide.*rows of 4, or .with whole_"):
            model.logits(tokens[:, :3])

    run_threads(run, 2)


# ---- messages


def traced_step(config: GPTConfig, ranks: int, sequence: bool, num_tokens: int, num_supervised: int) -> Any:
    """Run one forward and one backward; return a trace of each, of all ranks, and the elements of whole parameters."""
    traces = Trace(), Trace()
    tokens = torch.zeros(2, num_tokens, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    labels.view(-1)[:num_supervised] = 0

    def run(group: Group) -> int:
        both = Trace()
        model = GPT(config).to(torch.float64)
        placement = tensor_parallel(model, gpt_plan(config), Traced(group, both), sequence_parallel=sequence)
        loss = model(tokens, labels).sum()
        traces[0].events.extend(both.events)
        both.clear()
        loss.backward()
        traces[1].events.extend(both.events)
        return sum(p.numel() for name, p in model.named_parameters() if isinstance(placement[name], Replicated))

    return *traces, run_threads(run, ranks)[0]


@given(gpt_cases, st.integers(1, 3), st.integers(0, 5))
def test_messages_are_what_the_closed_forms_say(case, length, num_supervised):
    """Per layer and step 8 B T D (tp - 1)/tp elements leave a rank; for each supervised token 3; and at the ends."""
    config, tp = case.config, case.ranks
    T, N, D, L = tp * length, min(num_supervised, 2 * tp * length), config.model_dim, config.num_layers
    forward, backward, replicated = traced_step(config, tp, case.sequence, T, N)
    stream = 2 * T * D  # elements of (B, T, D)
    of_heads = L * 2 * config.head_dim * (1 + (config.norm == "layernorm")) * config.qk_norm
    # elements that ranks put into each kind of collective; over all ranks a ring sends tp - 1 times as many, an
    # all-reduce twice that
    if case.sequence:
        forward_says = {"all_reduce": 3 * N, "all_gather": (2 * L + 1) * stream, "reduce_scatter": (2 * L + 1) * stream}
        backward_says = {"all_reduce": N * D + replicated, "all_gather": (2 * L + 1) * stream}
        backward_says |= {"reduce_scatter": 2 * L * stream}
    else:
        forward_says = {"all_reduce": (2 * L + 1) * stream + 3 * N}
        backward_says = {"all_reduce": 2 * L * stream + N * D + of_heads}
    for trace, says in ((forward, forward_says), (backward, backward_says)):
        assert {event.kind for event in trace.events} == set(says)
        for kind, elements in says.items():
            assert trace.sent(kind) == 8 * (tp - 1) * elements * (2 if kind == "all_reduce" else 1), kind


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_a_layer_calls_two_all_reduces_forward_and_two_backward(mlp):
    calls = {}
    for num_layers in (1, 2, 3):
        config = preset("nano", num_layers=num_layers, mlp=mlp)
        forward, backward, _ = traced_step(config, 2, False, 4, 8)
        calls[num_layers] = forward.count("all_reduce") / 2, backward.count("all_reduce") / 2
        assert forward.count() == forward.count("all_reduce") and backward.count() == backward.count("all_reduce")
    # beside the layers: the embedding's sum and the loss's two, and backward the head's
    assert calls == {L: (2 * L + 3, 2 * L + 1) for L in calls}


def test_logits_are_never_gathered():
    """No message of the loss is longer than two numbers a token, however large the vocabulary."""
    config = preset("nano", num_layers=1, vocab_size=4000)
    forward, backward, _ = traced_step(config, 2, False, 4, 8)
    assert [e.bytes for e in forward.events if e.rank == 0][-2:] == [8 * 8, 2 * 8 * 8]
    assert max(e.bytes for e in forward.events + backward.events) == 8 * 2 * 4 * config.model_dim


# ---- what a rank computes on


def test_the_stream_is_cut_by_tokens_between_the_layers():
    config = preset("nano", num_layers=1)
    seen: dict[str, tuple[int, ...]] = {}

    def run(group: Group) -> None:
        model = GPT(config)
        tensor_parallel(model, gpt_plan(config), group, sequence_parallel=True)
        for name in ("embed", "blocks.0.attention_norm", "blocks.0.mlp.down", "norm"):
            note = lambda module, args, out, name=name: seen.setdefault(name, tuple(out.shape))  # noqa: E731
            model.get_submodule(name).register_forward_hook(lambda *all, note=note: note(*all) and None)
        model.logits(torch.zeros(2, 8, dtype=torch.int64))

    run_threads(run, 4)
    D = config.model_dim
    assert seen == {"embed": (2, 2, D), "blocks.0.attention_norm": (2, 2, D), "blocks.0.mlp.down": (2, 2, D),
                    "norm": (2, 8, D)}  # fmt: skip


def test_a_frozen_parameter_that_is_trained_later_has_its_gradient_summed():
    config = preset("nano", num_layers=1)
    tokens = torch.arange(8).view(2, 4)

    def gradient(group: Group | None) -> Tensor:
        model = GPT(config).to(torch.float64).requires_grad_(False)
        if group is not None:
            tensor_parallel(model, gpt_plan(config), group, sequence_parallel=True)
            assert not any(p.requires_grad for p in model.parameters())
        model.blocks[0].mlp_norm.weight.requires_grad_(True)
        model(tokens, tokens).sum().backward()
        return model.blocks[0].mlp_norm.weight.grad

    for got in run_threads(gradient, 2):
        assert_close(got, gradient(None), "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_stays_near(dtype):
    """The whole model in the same dtype is as far from float64: sums of slices are rounded once more."""
    config = preset("nano", num_layers=2, vocab_size=50)
    tokens = torch.arange(16).view(2, 8)

    def run(group: Group) -> Tensor:
        model = GPT(config)
        tensor_parallel(model, gpt_plan(config), group)
        losses = model.to(dtype)(tokens, tokens)
        losses.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
        return losses

    exact = GPT(config).to(torch.float64)(tokens, tokens)
    for losses in run_threads(run, 2):
        assert losses.dtype == torch.float32
        assert (losses - exact).abs().max() < 20 * torch.finfo(dtype).eps


# ---- mistakes


def refused(model: nn.Module, plan: Plan, ranks: int = 2, *, sequence: bool = False) -> str:
    """Return what `tensor_parallel` says of a plan for a model, which it must leave as it was."""

    def run(group: Group) -> str:
        before = [(name, id(module)) for name, module in model.named_modules()]
        with pytest.raises(UserError) as error:
            tensor_parallel(model, plan, group, sequence_parallel=sequence)
        assert before == [(name, id(module)) for name, module in model.named_modules()]
        return str(error.value)

    return run_threads(run, ranks)[0]


NANO = preset("nano", num_layers=1)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"blocks.*.atention.qkv": Column()}, "'blocks.*.atention.qkv' matches nothing in this GPT; try: blocks.*.at"),
        ({"blocks": Column()}, "blocks is of type ModuleList, and Column() is for torch's Linear"),
        ({"head": Vocab(), "h*d": Vocab()}, "head is matched by 'head' and by 'h*d'"),
        ({"embed.tokens": Column()}, "embed.tokens is of type Embedding, and Column() is for torch's Linear"),
        ({"norm": Vocab()}, "norm is of type LayerNorm, and Vocab() is for torch's Embedding or Linear"),
        ({"norm.weight": Enter()}, "norm.weight is of type Parameter, and Enter() is for torch's Module"),
        ({"blocks.0.mlp": Enter()}, "blocks.0.mlp enters from the stream, and no Column is inside"),
        ({"blocks.0.mlp": Replica(), "blocks.0.mlp.up": Column()}, "two rules of the plan reach blocks.0.mlp.up.we"),
        ({"embed.tokens": Vocab()}, "embed.tokens.weight and head.weight are one parameter, and the plan treats them"),
        ({"blocks.0.mlp.up": Column(chunks=5)}, "blocks.0.mlp.up has 384 output features, not chunks 5 of heads of 1"),
        ({"blocks.0.mlp.up": Column(chunks=(2, 382), head_dim=4)}, "not chunks (2, 382) of heads of 4"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_a_sentence(plan, message):
    assert message in refused(GPT(NANO), plan)


def test_heads_that_do_not_divide_name_the_sizes_that_do():
    config = preset("nano", num_layers=1, num_heads=12, num_kv_heads=6, model_dim=8, head_dim=2, hidden_dim=18)
    says = refused(GPT(config), gpt_plan(config), ranks=4)
    assert (
        says == "blocks.0.attention.qkv has 6 heads of 2 features, which tp=4 does not divide; try: tp=1 or 2 or 3 or 6"
    )
    config = replace(config, num_kv_heads=12, hidden_dim=9)
    says = refused(GPT(config), gpt_plan(config), ranks=4)
    assert says == "blocks.0.mlp.up has 9 output features, which tp=4 does not divide; try: tp=1 or 3"


class Doubled(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("part", "rule", "message"),
    [
        (nn.Dropout(0.1), Replica(), "part drops out with p=0.1: tp=2 ranks would draw differently"),
        (Doubled(4, 4), Column(), "part is of type Doubled, and Column() is for torch's Linear"),
        (nn.Embedding(4, 4, padding_idx=0), Vocab(), "part has padding_idx=0"),
        (nn.Embedding(4, 4, max_norm=1.0), Vocab(), "part has max_norm=1.0"),
        (nn.Linear(3, 4), Row(), "part has 3 input features, which tp=2 does not divide; try: tp=1 or 3"),
    ],
)
def test_a_part_that_cannot_be_cut_is_a_sentence(part, rule, message):
    assert message in refused(nn.ModuleDict({"part": part}), {"part": rule})


def test_cut_rows_need_a_plan_that_names_every_parameter():
    plan = {name: rule for name, rule in gpt_plan(NANO).items() if name != "blocks.*.*_norm"}
    says = refused(GPT(NANO), plan, sequence=True)
    assert (
        'the plan does not name blocks.0.attention_norm.weight; try: "blocks.0.attention_norm.weight": Replica()'
        in says
    )


def test_a_model_is_cut_once():
    def run(group: Group) -> None:
        model = GPT(NANO)
        tensor_parallel(model, gpt_plan(NANO), group)
        with pytest.raises(UserError, match=r"embed.tokens is of type VocabEmbedding, and Vocab\(\) is for torch's"):
            tensor_parallel(model, gpt_plan(NANO), group)

    run_threads(run, 2)


def test_what_enters_must_be_told_and_a_head_with_a_bias_has_no_cut_loss():
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(2, 2)), "head": nn.Linear(2, 3)})
    tensor_parallel(model, {"mlp": Enter(), "mlp.0": Column(), "head": Vocab()}, SoloGroup())
    with pytest.raises(UserError, match="Sequential is called with keywords alone"):
        model["mlp"](input=torch.ones(1, 1, 2))
    with pytest.raises(UserError, match="knows no bias of the head"):
        model["head"].losses(torch.ones(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64))
