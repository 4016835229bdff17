"""Laws of LoRA: adapters add what the paper's formula says, cost what the closed forms say, and can be merged.

That no layout changes a training run with adapters is a law of tests/laws/test_layouts.py.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from minispeed.axes import Layout
from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Trace, Traced
from minispeed.engine import Engine, MicroBatch
from minispeed.errors import UserError
from minispeed.ledger import Widths, held, shard_size
from minispeed.model import hf
from minispeed.model.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from minispeed.model.dropout import PARTS, cells_of
from minispeed.model.gpt import GPT
from minispeed.model.init import draw as drawn
from minispeed.model.lora import AdapterDropping, LoRA, LoRALinear, adapter_names, add_lora, lora_groups
from minispeed.model.merge import merge, merged, put_adapters
from minispeed.model.presets import preset
from minispeed.optim import SGD
from minispeed.placement import Replicated, cut
from minispeed.precision import Precision
from minispeed.tensor.parallel import tensor_parallel
from minispeed.tensor.plan import Column, Replica, Row, gpt_plan
from minispeed.testing.measure import measure_held
from minispeed.testing.models import small_configs
from minispeed.testing.strategies import seeds

TOKENS = 6
NANO = preset(
    "nano", vocab_size=7, num_layers=2, model_dim=4, num_heads=2, num_kv_heads=2, head_dim=2, hidden_dim=6, tied=False
)
TARGETS = st.sampled_from([("attention.*", "mlp.*"), ("attention.qkv",), ("blocks.0.mlp.down", "attention.out")])
SETTINGS = st.builds(LoRA, rank=st.integers(1, 9), alpha=st.sampled_from([1.0, 5.0]), targets=TARGETS)


def adapted(config, lora, seed=0):
    """Return a model with adapters none of which is zero."""
    model = GPT(config, seed=seed).to(torch.float64)
    add_lora(model, lora, seed=seed)
    return trained(model)


def trained(model):
    with torch.no_grad():
        for name in adapter_names(model):
            model.get_parameter(name).copy_(drawn(1, name, model.get_parameter(name).shape, 0.3))
    return model


def some_tokens(config, seed=0):
    return torch.randint(0, config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


def rows(seed, config=NANO):
    tokens, labels = some_tokens(config, seed), some_tokens(config, seed + 1)
    zeros = torch.zeros_like(tokens)
    places = torch.arange(TOKENS).expand(2, TOKENS).contiguous()
    return MicroBatch(tokens, labels, places, zeros, zeros, cells_of(range(2), TOKENS))


# ---- what an adapter adds


class Own(nn.Module):
    """What a user might write: a Linear under two names, one inside a list, and none that need know of rows."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3, bias=False)
        self.again = self.up
        self.list = nn.ModuleList([nn.Linear(3, 3)])
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(drawn(0, name, p.shape, 0.5))

    def forward(self, x):
        return self.list[0](self.down(torch.tanh(self.up(x)))) + self.down(self.again(x))


@given(st.integers(1, 5), st.sampled_from([1.0, 16.0]), seeds)
def test_an_adapter_adds_b_a_x_times_alpha_over_r(rank, alpha, seed):
    model = Own().to(torch.float64)
    W, bias, x = model.up.weight, model.up.bias, torch.ones(2, 3, dtype=torch.float64)
    before = model(x)
    names = add_lora(model, LoRA(rank=rank, alpha=alpha, targets=("up", "list.*")), seed=seed)
    assert names == [f"{home}.lora.{half}.weight" for home in ("up", "list.0") for half in "ab"]
    assert model.again is model.up and model.up.weight is W and "up.weight" in dict(model.named_parameters())
    assert torch.equal(model(x), before)
    A, B = model.get_parameter(names[0]), model.get_parameter(names[1])
    assert A.shape == (rank, 3) and B.shape == (4, rank) and not B.any()
    assert 0 < A.abs().max() <= 1 / math.sqrt(3)
    trained(model)
    assert torch.allclose(model.up(x), x @ (W + alpha / rank * B @ A).T + bias, rtol=0, atol=1e-12)


@given(small_configs(), SETTINGS, seeds)
def test_merged_and_unmerged_agree(config, lora, seed):
    model = adapted(config, lora, seed)
    tokens, plain = some_tokens(config, seed), GPT(config).to(torch.float64)
    named, unmerged = {name: p.detach().clone() for name, p in model.named_parameters()}, model.logits(tokens)
    assert not torch.allclose(unmerged, GPT(config, seed=seed).to(torch.float64).logits(tokens), atol=1e-6)
    merge(model)
    assert (model.logits(tokens) - unmerged).abs().max() <= 1e-12 * max(1, unmerged.abs().max())
    folded = merged(named, lora)
    assert set(folded) == set(dict(model.named_parameters())) == set(dict(plain.named_parameters()))
    assert all(torch.equal(folded[name], p) for name, p in model.named_parameters())
    plain.load_state_dict(folded, strict=not config.tied)
    assert torch.equal(plain.logits(tokens), model.logits(tokens))


@given(small_configs(), seeds)
def test_each_a_is_drawn_from_seed_and_name_alone(config, seed):
    config = replace(config, num_layers=2)
    both, one = (GPT(config, seed=seed) for _ in range(2))
    add_lora(both, LoRA(targets=("attention.*", "mlp.*")), seed=seed)
    add_lora(one, LoRA(targets=("mlp.down",)), seed=seed)
    for name in adapter_names(one):
        assert torch.equal(one.get_parameter(name), both.get_parameter(name))
    other = GPT(config, seed=seed)
    add_lora(other, LoRA(targets=("mlp.down",)), seed=seed + 1)
    a, next_a = (f"blocks.{block}.mlp.down.lora.a.weight" for block in range(2))
    assert not torch.equal(one.get_parameter(a), other.get_parameter(a))
    assert not torch.equal(one.get_parameter(a), one.get_parameter(next_a))


@pytest.mark.parametrize("train", ["lora", "all"])
def test_what_is_trained_is_what_it_says(train):
    model = GPT(NANO)
    before = [name for name, _ in model.named_parameters()]
    model.norm.requires_grad_(False)
    names = add_lora(model, LoRA(train=train, targets=("mlp.*",)), seed=0)
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]
    adapters = adapter_names(model)
    assert set(names) == set(adapters) | (
        {name for name in before if not name.startswith("norm.")} if train == "all" else set()
    )
    assert len(adapters) == 2 * 3 * NANO.num_layers


def test_adapters_with_a_rate_of_their_own_are_a_group_of_their_own():
    for train in ("lora", "all"):
        model = GPT(NANO)
        lora = LoRA(train=train, lr=1e-2)
        names = add_lora(model, lora, seed=0)
        groups = lora_groups(model, lora, 0.1, lr=1e-3)
        assert sorted(name for group in groups for name in group["names"]) == sorted(names)
        assert groups[-1]["names"] == adapter_names(model) and groups[-1]["lr_factor"] == pytest.approx(10)
        assert not any("lr_factor" in group for group in groups[:-1]) and len(groups) == (1 if train == "lora" else 3)
        shared = lora_groups(model, replace(lora, lr=None), 0.1, lr=1e-3)
        assert sorted(name for group in shared for name in group["names"]) == sorted(names)
        assert not any("lr_factor" in group for group in shared)
        Engine(model, precision=Precision(torch.float32), param_groups=groups).train_step([rows(0)])


# ---- dropout


def read_by(model, module, **step):
    """Return what a module was given in a forward and backward, with recomputation or without."""
    seen = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    batch = rows(0)
    model(batch.tokens, batch.labels, cells=batch.cells, **step).sum().backward()
    hook.remove()
    return seen


@given(st.sampled_from([0.1, 0.5]), st.sampled_from([0.0, 0.3]), seeds)
@settings(max_examples=10)
def test_an_adapter_alone_reads_a_part_of_the_features(p, stream, seed):
    config = replace(NANO, dropout=stream)
    model, without = (adapted(config, LoRA(dropout=each), seed) for each in (p, 0.0))
    model.recomputed = frozenset({"blocks.0", "blocks.1"})
    leaf, others = model.blocks[0].mlp.up, (model.blocks[0].mlp.gate, model.blocks[1].mlp.up)
    first, again = read_by(model, leaf.lora.a, step=3)
    (whole, *_) = read_by(model, leaf, step=3)
    assert torch.equal(first, again)
    kept = first != 0
    scale = PARTS / (PARTS - round(p * PARTS))
    assert torch.equal(first, torch.where(kept, whole * scale, 0.0))
    elsewhere = [read_by(model, one.lora.a, step=3)[0] for one in others] + [read_by(model, leaf.lora.a, step=4)[0]]
    assert p < 0.5 or not any(torch.equal(kept, found != 0) for found in elsewhere)
    assert torch.equal(read_by(model, leaf.lora.a, step=3)[0], first)
    tokens = some_tokens(config)
    assert torch.equal(model.logits(tokens), without.logits(tokens))  # nothing is dropped where nothing is trained


def test_about_the_share_that_was_asked_for_is_dropped():
    model = adapted(replace(NANO, model_dim=64), LoRA(dropout=0.25))
    dropped = torch.cat([(read_by(model, model.blocks[1].mlp.up.lora.a, step=step)[0] == 0) for step in range(8)])
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / dropped.numel()))


def test_merging_takes_the_dropout_away_too():
    model = adapted(NANO, LoRA(dropout=0.5))
    merge(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    batch = rows(0)
    assert torch.equal(model(batch.tokens, batch.labels, step=0), model(batch.tokens, batch.labels))
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_the_streams_dropout_may_be_set_before_or_after_the_adapters():
    before, after = GPT(replace(NANO, dropout=0.0)), GPT(replace(NANO, dropout=0.0))
    before.set_dropout(0.25, seed=9)
    for model in (before, after):
        add_lora(model, LoRA(dropout=0.5), seed=3)
    after.set_dropout(0.25, seed=9)
    with torch.no_grad():
        for model in (before, after):
            for name in adapter_names(model):
                model.get_parameter(name).fill_(0.1)
    batch = rows(0)
    one, two, none = (
        model(batch.tokens, batch.labels, cells=batch.cells, step=step)
        for model, step in ((before, 0), (after, 0), (before, None))
    )
    assert torch.equal(one, two) and not torch.equal(one, none)
    assert after.config.dropout == 0.25 and isinstance(after.dropping, AdapterDropping)


# ---- cut by width


def plan_of_own():
    """Cut the pair, and keep what follows whole, where the stream is cut by tokens too."""
    return {"up": Column(), "down": Row(), "list.*": Replica()}


@pytest.mark.parametrize("sequence", [False, True])
def test_a_users_own_module_is_cut_with_its_adapters(sequence):
    """Columns, rows, and what stays whole on each rank's own tokens: gradients are those of the whole module."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            own = Own()
            self.up, self.down, self.list = own.up, own.down, own.list

        def forward(self, x):
            return self.list[0](self.down(torch.tanh(self.up(x))))

    def build():
        model = Chain().to(torch.float64)
        add_lora(model, LoRA(rank=2, targets=("up", "down", "list.0")), seed=0)
        return trained(model)

    x = drawn(0, "x", (2, 4, 3), 1.0).to(torch.float64)
    whole = build()
    whole(x).square().sum().backward()

    def train(group):
        model = build()
        placement = tensor_parallel(model, plan_of_own(), group, sequence_parallel=sequence)
        mine = x.chunk(2, 1)[group.rank] if sequence else x
        model(mine).square().sum().backward()
        for name, p in model.named_parameters():
            of = whole.get_parameter(name)
            if of.requires_grad:
                assert torch.allclose(p.grad, cut(of.grad, placement[name], rank=group.rank, size=2), atol=1e-12), name
            else:
                assert p.grad is None, name

    run_threads(train, 2)


def traced(config, lora, *, sequence):
    """Return what rank 0 of two sends forward and backward, (kind, bytes) each, and the adapters that are whole."""

    def run(group):
        trace, model = Trace(), GPT(config).to(torch.float64)
        if lora is not None:
            add_lora(model, lora, seed=0)
        placement = tensor_parallel(model, gpt_plan(config), Traced(group, trace), sequence_parallel=sequence)
        loss = model(rows(0).tokens, rows(0).labels).sum()
        num_forward = len(trace.events)
        loss.backward()
        sent = [(event.kind, event.bytes) for event in trace.events]
        whole = {n: p.nbytes for n, p in model.named_parameters() if ".lora." in n and placement[n] == Replicated()}
        return sent[:num_forward], sent[num_forward:], whole

    return run_threads(run, 2)[0]


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("sequence", [False, True])
def test_adapters_send_nothing_but_gradients_of_what_is_whole(mlp, sequence):
    """As many messages as without, of as many bytes; and one sum of the gradient of each A of a column, B of a row."""
    config = replace(NANO, mlp=mlp)
    plain_forward, plain_backward, _ = traced(config, None, sequence=sequence)
    forward, backward, whole = traced(config, LoRA(rank=3, train="all"), sequence=sequence)
    columns = {"attention.qkv.lora.a", "mlp.up.lora.a"} | ({"mlp.gate.lora.a"} if mlp == "swiglu" else set())
    ends = columns | {"attention.out.lora.b", "mlp.down.lora.b"}
    assert set(whole) == {f"blocks.{block}.{end}.weight" for block in range(config.num_layers) for end in ends}
    assert forward == plain_forward
    assert sorted(backward) == sorted(plain_backward + [("all_reduce", size) for size in whole.values()])


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("zero", [0, 3])
def test_gradients_of_weights_that_wait_are_whole(zero, tokens):
    """zb_h1 puts off gradients of weights, and those of tensor parallelism's whole ones are sums over ranks."""

    def train(group, **layout):
        model = adapted(NANO, LoRA(rank=2, dropout=0.25))
        precision = Precision(torch.float64)
        engine = Engine(model, group, layout=Layout(**layout), precision=precision, lr=1e-1, zero=zero, optimizer=SGD)
        for step in range(2):
            engine.train_step([rows(step), rows(step + 9)])
        return {
            p.name: p.tensor for p in engine.pieces() if p.name.endswith(("qkv.lora.a.weight", "out.lora.b.weight"))
        }

    (expected,) = run_threads(train, 1)
    layout = {"pp": 2, "tp": 2, "schedule": "zb_h1", "tokens": tokens}
    for found in run_threads(lambda group: train(group, **layout), 4):
        assert found
        for name, tensor in found.items():
            assert torch.allclose(tensor.view(-1), expected[name].view(-1), rtol=0, atol=1e-10), name


# ---- what it costs


@given(
    ranks=st.integers(1, 4),
    stage=st.integers(0, 3),
    compute=st.sampled_from([torch.bfloat16, torch.float32]),
    train=st.sampled_from(["lora", "all"]),
)
@settings(max_examples=20)
def test_a_rank_holds_of_what_is_frozen_its_parameters_alone(ranks, stage, compute, train):
    def run(group):
        model = GPT(NANO)
        add_lora(model, LoRA(rank=2, train=train), seed=0)
        engine = Engine(model, group, precision=Precision(compute), zero=stage)
        engine.train_step([rows(group.rank)])
        found = measure_held(engine, lambda: engine.train_step([rows(group.rank)]))
        sizes: dict[bool, list[int]] = {True: [], False: []}
        for unit in engine.sharded.units:
            sizes[unit.trainable].append(unit.num_elements)
        kept = [unit.master for unit in engine.sharded.units if unit.trainable and compute != torch.float32]
        states = [value for state in engine.optimizer.state.values() for value in state.values() if value.dim()]
        return found, sum(tensor.nbytes for tensor in kept + states), sizes, engine.sharded.dtypes

    for rank, (found, optimizer, sizes, dtypes) in enumerate(run_threads(run, ranks)):
        expected = held(sizes[True], ranks=ranks, stage=stage, widths=Widths.of(dtypes), frozen=sizes[False])
        assert (sum(sizes[False]) > 0) == (train == "lora")
        shards = [(size, shard_size(size, ranks)) for size in sizes[True]]
        padding = sum(S - max(0, min(S, size - rank * S)) for size, S in shards) if stage else 0
        assert (found.parameters, found.gradients) == (expected.parameters, expected.gradients)
        assert optimizer == expected.optimizer - 2 * padding * dtypes.master.itemsize


# ---- peft's files


LLAMA = replace(NANO, norm="rmsnorm", num_kv_heads=1, tied=True)
GPT2 = replace(NANO, norm="layernorm", positions="learned", mlp="gelu", qkv_bias=True, bias=True)


@pytest.mark.parametrize("config", [LLAMA, replace(LLAMA, qkv_bias=True), GPT2], ids=["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("targets", [("attention.*", "mlp.*"), ("blocks.1.attention.qkv", "mlp.down")])
def test_an_adapter_in_pefts_files_is_the_same_sum_over_transformers_tensors(config, targets, tmp_path):
    """W + alpha/r B A, tensor by tensor of the base's folder, is the folder of the merged model; and back again."""
    lora = LoRA(rank=2, alpha=5.0, targets=targets)
    model = adapted(config, lora)
    hf.save(tmp_path / "base", config, dict(GPT(config).to(torch.float64).named_parameters()))
    save_adapter(tmp_path / "a", dict(model.named_parameters()), lora, config, base="base")
    says, stored = json.loads((tmp_path / "a" / CONFIG).read_text()), load_file(tmp_path / "a" / WEIGHTS)
    by_hand = load_file(tmp_path / "base" / "model.safetensors")
    ends = {name.rsplit(".", 2)[0] for name in stored}
    assert len(stored) == 2 * len(ends)
    for name in ends:
        assert any(name.endswith(f".{target}") for target in says["target_modules"])
        delta = 2.5 * stored[f"{name}.lora_B.weight"] @ stored[f"{name}.lora_A.weight"]
        target = by_hand[name.removeprefix("base_model.model.") + ".weight"]
        target += delta.T if says["fan_in_fan_out"] else delta

    back, weights = load_adapter(tmp_path / "a")
    again = GPT(config).to(torch.float64)
    add_lora(again, back, seed=7)
    put_adapters(again, weights)
    assert (back.rank, back.scale) == (lora.rank, lora.scale)
    assert dict(again.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in again.named_parameters())

    merge(model)
    hf.save(tmp_path / "merged", config, dict(model.named_parameters()))
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.allclose(by_hand[name], found[name], rtol=0, atol=1e-12) for name in {**by_hand, **found})


@pytest.mark.parametrize("config", [LLAMA, replace(LLAMA, tied=False), GPT2], ids=["llama", "untied", "gpt2"])
def test_embedding_and_head_that_were_trained_too_lie_beside_the_adapters(config, tmp_path):
    lora = LoRA(rank=2, targets=("attention.*",))
    model = adapted(config, lora)
    save_adapter(tmp_path, dict(model.named_parameters()), lora, config, ends=True)
    says, stored = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    embedding = "transformer.wte" if config is GPT2 else "model.embed_tokens"
    assert says["modules_to_save"] == [embedding.split(".")[1], "lm_head"]
    assert torch.equal(stored[f"base_model.model.{embedding}.weight"], model.embed.tokens.weight)
    assert torch.equal(stored["base_model.model.lm_head.weight"], model.head.weight)

    doubles = [f"base_model.model.lm_head.{name}.weight" for name in ("modules_to_save", "original_module")]
    save_file({**stored, **{name: torch.zeros(7, 4) for name in doubles}}, tmp_path / WEIGHTS)  # as peft may
    back, weights = load_adapter(tmp_path)
    again = GPT(config, seed=5).to(torch.float64)
    add_lora(again, back, seed=7)
    put_adapters(again, weights)
    learnt = [name for name, _ in model.named_parameters() if ".lora." in name or name in weights]
    assert all(torch.equal(again.get_parameter(name), model.get_parameter(name)) for name in learnt)
    assert {"embed.tokens.weight", "head.weight"} <= weights.keys()
    if config.tied:
        with pytest.raises(UserError, match="are one parameter here, and differ in the files"):
            put_adapters(again, {**weights, "head.weight": weights["head.weight"] + 1})
    with pytest.raises(UserError, match=r"embed.tokens.weight is \(8, .* among the adapters, and \(7,"):
        put_adapters(again, {**weights, "embed.tokens.weight": weights["embed.tokens.weight"].new_zeros(8, 4)})


def changed(folder, *, config={}, weights=lambda stored: stored):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    save_file(weights(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def without(part):
    return lambda stored: {name: tensor for name, tensor in stored.items() if part not in name}


def added(name, *, of="layers.1.self_attn.q_proj.lora_A.weight", more=0):
    """Return what gives a tensor, new or not, the values of another one and something more."""
    return lambda stored: {**stored, f"base_model.model.{name}": stored[f"base_model.model.model.{of}"] + more}


AS_IT_WAS = without("nothing of that name")


@pytest.mark.parametrize(
    "says, config, weights",
    [
        ("use_dora is True", {"use_dora": True}, AS_IT_WAS),
        ("bias is 'all'", {"bias": "all"}, AS_IT_WAS),
        ("peft_type is 'IA3'", {"peft_type": "IA3"}, AS_IT_WAS),
        ("modules_to_save is", {"modules_to_save": ["norm"]}, AS_IT_WAS),
        ("rank_pattern is", {"rank_pattern": {"q_proj": 3}}, AS_IT_WAS),
        ("init_lora_weights is 'pissa'", {"init_lora_weights": "pissa"}, AS_IT_WAS),
        (
            "blocks.1.attention.qkv have .* different",
            {},
            added("model.layers.1.self_attn.q_proj.lora_A.weight", more=1),
        ),
        ("blocks.1.attention.qkv is of 2 of query", {}, without("layers.1.self_attn.q_proj")),
        ("blocks.1.mlp.up has no lora_B", {}, without("layers.1.mlp.up_proj.lora_B")),
        ("q_proj.lora_C.weight belongs to no Linear", {}, added("model.layers.1.self_attn.q_proj.lora_C.weight")),
        ("lm_head.lora_A.weight belongs to no Linear", {}, added("lm_head.lora_A.weight")),
    ],
)
def test_files_that_mean_another_model_are_refused(says, config, weights, tmp_path):
    lora = LoRA()
    save_adapter(tmp_path, dict(adapted(LLAMA, lora).named_parameters()), lora, LLAMA)
    load_adapter(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((tmp_path / CONFIG).read_text()) | config))
    save_file(weights(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=says):
        load_adapter(tmp_path)


# ---- mistakes


@pytest.mark.parametrize(
    "says, settings",
    [
        ("rank is 0", {"rank": 0}),
        ("alpha is 0.0", {"alpha": 0.0}),
        ("alpha is nan", {"alpha": math.nan}),
        ("dropout is 1.0", {"dropout": 1.0}),
        ("targets are 'mlp.up'", {"targets": "mlp.up"}),
        (r"targets are \(\)", {"targets": ()}),
        ("train 'none'", {"train": "none"}),
        ("lr is -1", {"lr": -1.0}),
    ],
)
def test_settings_that_make_no_adapter_are_refused(says, settings):
    with pytest.raises(UserError, match=says):
        LoRA(**settings)


@pytest.mark.parametrize(
    "says, config, targets",
    [
        ("'attention.qk' matches no Linear of this GPT; try: attention.qkv", NANO, ("mlp.up", "attention.qk")),
        ("'q_proj' matches no Linear of this GPT; try: attention.out, attention.qkv, mlp.down", NANO, ("q_proj",)),
        ("targets name head, of type Head", NANO, ("head",)),
        ("targets name embed.tokens, of type Embedding", NANO, ("*",)),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused_and_nothing_is_changed(says, config, targets):
    model = GPT(config)
    with pytest.raises(UserError, match=says):
        add_lora(model, LoRA(targets=targets), seed=0)
    assert all(p.requires_grad for p in model.parameters()) and not adapter_names(model)


def test_a_weight_with_another_use_is_refused():
    model = Own()
    model.list[0].weight = nn.Parameter(torch.zeros(3, 4))
    model.down.weight = model.list[0].weight
    with pytest.raises(UserError, match="down and list.0 are one weight"):
        add_lora(model, LoRA(targets=("down",)), seed=0)


def test_what_cannot_be_is_said():
    model = GPT(NANO)
    with pytest.raises(UserError, match="this GPT has no adapters to merge"):
        merge(model)
    with pytest.raises(UserError, match="none of the 1 tensors is an adapter's"):
        merged({"a.weight": torch.zeros(1)}, LoRA())
    with pytest.raises(UserError, match="a.lora.a.weight is there without a.lora.b.weight"):
        merged({"a.weight": torch.zeros(1), "a.lora.a.weight": torch.zeros(1)}, LoRA())
    with pytest.raises(UserError, match="no Own tells its layers; try: dropout=0.0"):
        add_lora(Own(), LoRA(dropout=0.1, targets=("up",)), seed=0)
    add_lora(model, LoRA(rank=2), seed=0)
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(model, LoRA(), seed=0)
    weights = {name: model.get_parameter(name).detach() for name in adapter_names(model)}
    a, *_ = weights
    for given_, says in (
        ({n: t for n, t in weights.items() if n != a}, "is not there among the adapters"),
        (weights | {"more": weights[a]}, r"more is \(2, 4\) among the adapters, and not there in the model"),
        (weights | {a: weights[a][:1]}, r"is \(1, 4\) among the adapters, and \(2, 4\) in the model"),
    ):
        with pytest.raises(UserError, match=says):
            put_adapters(model, given_)
