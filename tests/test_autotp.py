"""Laws of tensor parallelism by DeepSpeed's calls: however many ranks share layers, the run is a plain loop's."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_deepspeed_engine import close, config_of, fill, on_ranks
from torch import Tensor, nn

import minispeed
from minispeed.checkpoint import Checkpoint
from minispeed.config import DeepSpeedConfigError, read_config
from minispeed.deepspeed.autotp import plan_for
from minispeed.errors import UserError
from minispeed.model.gpt import GPT
from minispeed.model.lora import LoRA, add_lora
from minispeed.model.presets import preset
from minispeed.tensor.plan import Column, Enter, Replica, Row, gpt_plan
from minispeed.zero import Init

transformers = pytest.importorskip("transformers")

ROWS, TOKENS, STEPS = 2, 5, 3
COMMON = dict(vocab_size=19, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=2,
    max_position_embeddings=8,
    **COMMON,
)
GPT2 = dict(n_embd=12, n_layer=2, n_head=4, n_positions=8, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, **COMMON)
NAMES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}


def hf(kind: str, **more: Any) -> nn.Module:
    """Build a tiny model of a family, with values that all ranks draw alike."""
    name = NAMES.get(kind)
    if name is None:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **more}))
    else:
        config = getattr(transformers, f"{name}Config")(**{**LLAMA, **more})
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    model = model.double().train()
    fill(model, 0)
    return model


KINDS = ["gpt2", *sorted(NAMES)]
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
PARAMS = {"AdamW": dict(lr=0.001, weight_decay=0.1), "SGD": dict(lr=0.1)}


def tokens(replicas: int, accumulation: int, step: int) -> Tensor:
    shape = (accumulation, replicas, ROWS, TOKENS)
    return torch.randint(3, 19, shape, generator=torch.Generator().manual_seed(step))


@dataclass(frozen=True)
class Way:
    """How a run is cut and goes on, cut otherwise, from a checkpoint; and what else may matter."""

    tp: int
    then: int
    replicas: int
    stage: int
    accumulation: int
    clip: float
    optimizer: str
    recomputed: str

    def config(self, tp: int) -> dict[str, Any]:
        optimizer = {"type": self.optimizer, "params": PARAMS[self.optimizer]}
        cut = {"tensor_parallel": {"autotp_size": tp}}
        return config_of(self.stage, self.accumulation, self.clip, optimizer=optimizer, **cut)


ways = st.builds(
    Way,
    tp=st.sampled_from([1, 2, 4]),
    then=st.sampled_from([1, 2, 4]),
    replicas=st.integers(1, 2),
    stage=st.integers(0, 3),
    accumulation=st.integers(1, 2),
    clip=st.sampled_from([0.0, 0.1]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    recomputed=st.sampled_from(["", "reentrant", "not reentrant"]),
)


def clipped(model: nn.Module, most: float) -> float:
    """Bring a gradient down to a norm, and return what it was: torch's own call adds 1e-6 to it."""
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    for p in model.parameters():
        p.grad *= most / norm if most and norm > most else 1.0
    return norm


def plain(model: nn.Module, way: Way) -> tuple[list[list[float]], list[float], dict[str, Tensor]]:
    """Train as anybody would; return each step's losses, its norm, and the parameters."""
    optimizer = OPTIMIZERS[way.optimizer](model.parameters(), **PARAMS[way.optimizer])
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        found = [model(input_ids=x, labels=x).loss for x in tokens(way.replicas, way.accumulation, step).flatten(0, 1)]
        (sum(found) / len(found)).backward()
        losses.append([loss.item() for loss in found])
        norms.append(clipped(model, way.clip))
        optimizer.step()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def train(rank: int, kind: str, way: Way, tp: int, steps: range, folder: str) -> tuple[Any, ...]:
    """Train some steps as one rank, from the checkpoint of the step before and into another."""
    model = hf(kind)
    if way.recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": way.recomputed == "reentrant"})
    engine, *_ = minispeed.initialize(model=model, config=way.config(tp))
    if steps.start:
        engine.load_checkpoint(folder)
    losses, norms = [], []
    for step in steps:
        mine = tokens(way.replicas, way.accumulation, step)[:, engine.core.lines.dp.rank]
        found = []
        for x in mine:
            loss = engine(input_ids=x, labels=x).loss
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        losses.append(found)
        norms.append(engine.get_global_grad_norm())
    engine.save_checkpoint(folder)
    return losses, norms


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # the name that scripts use
@given(st.sampled_from(KINDS), ways)
@settings(max_examples=10, print_blob=True)
def test_any_width_is_the_plain_loop_and_goes_on_under_another(kind, way):
    losses, norms, parameters = plain(hf(kind), way)
    with tempfile.TemporaryDirectory() as folder:
        for tp, steps in ((way.tp, range(2)), (way.then, range(2, STEPS))):
            ran = on_ranks(tp * way.replicas, lambda rank: train(rank, kind, way, tp, steps, folder))
            for rank, (got_losses, got_norms) in enumerate(ran):
                mine = [of[rank // tp :: way.replicas] for of in losses[steps.start : steps.stop]]
                assert got_losses == [pytest.approx(of, rel=1e-10) for of in mine]
                assert got_norms == pytest.approx(norms[steps.start : steps.stop], rel=1e-10)
        stored = Checkpoint(Path(folder) / f"global_step{STEPS}")
        assert close({name: stored.tensor(f"parameters/{name}") for name in parameters}, parameters)


def adapted(kind: str, targets: tuple[str, ...]) -> nn.Module:
    """Build a tiny model with adapters, none of whose values is zero."""
    model = hf(kind)
    trained = add_lora(model, LoRA(rank=3, alpha=2.0, targets=targets), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in trained:
            p = model.get_parameter(name)
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    return model


@given(
    st.sampled_from(sorted(NAMES)),
    st.sampled_from([("q_proj", "v_proj"), ("o_proj", "mlp.*"), ("self_attn.*", "mlp.*", "lm_head")]),
    st.integers(0, 3),
)
@settings(max_examples=5)
def test_a_model_with_adapters_is_the_plain_loop_cut_in_two(kind, targets, stage):
    way = Way(2, 2, 1, stage, 1, 0.0, "AdamW", "")
    model = adapted(kind, targets)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([model.get_parameter(name) for name in trained], **PARAMS["AdamW"])
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        (x,) = tokens(1, 1, step).flatten(0, 1)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    def cut(rank: int) -> list[float]:
        engine, *_ = minispeed.initialize(model=adapted(kind, targets), config=way.config(2))
        found = []
        for step in range(STEPS):
            (x,) = tokens(1, 1, step).flatten(0, 1)
            loss = engine(input_ids=x, labels=x).loss
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        engine.save_checkpoint(folder)
        return found

    with tempfile.TemporaryDirectory() as folder:
        assert on_ranks(2, cut) == [pytest.approx(losses, rel=1e-10)] * 2
        stored = Checkpoint(Path(folder) / f"global_step{STEPS}")
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        assert close({name: stored.tensor(f"parameters/{name}") for name in parameters}, parameters)


def test_of_an_adapter_b_is_cut_with_a_column_and_a_with_a_row():
    def shapes(rank):
        engine, *_ = minispeed.initialize(
            model=adapted("llama", ("mlp.*",)), config=Way(2, 2, 1, 0, 1, 0.0, "AdamW", "").config(2)
        )
        mlp = engine.module.model.layers[0].mlp
        return [tuple(p.shape) for leaf in (mlp.up_proj, mlp.down_proj) for p in leaf.lora.parameters()]

    assert on_ranks(2, shapes) == [[(3, 16), (4, 3), (3, 4), (16, 3)]] * 2


# ---- the plan


def test_the_plan_of_a_family_is_read_from_its_names():
    mlp = {"mlp": Enter("hidden_states"), "mlp.gate_proj": Column(), "mlp.up_proj": Column(), "mlp.down_proj": Row()}
    heads = {f"self_attn.{name}_proj": Column(head_dim=2) for name in "qkv"}
    llama = {**mlp, **heads, "self_attn": Enter("hidden_states"), "self_attn.o_proj": Row()}
    norms = {f"self_attn.{name}_norm": Replica(on="heads") for name in "qk"}
    gpt2 = {
        "attn": Enter("hidden_states", sizes=("num_heads", "split_size")),
        "attn.c_attn": Column(chunks=3, head_dim=3),
        "attn.c_proj": Row(),
        "mlp": Enter("hidden_states"),
        "mlp.c_fc": Column(),
        "mlp.c_proj": Row(),
    }
    for kind in ("llama", "qwen2", "mistral"):
        assert plan_for(hf(kind)) == {f"model.layers.*.{name}": rule for name, rule in llama.items()}
    assert plan_for(hf("qwen3")) == {f"model.layers.*.{name}": rule for name, rule in {**llama, **norms}.items()}
    assert plan_for(hf("gpt2")) == {f"transformer.h.*.{name}": rule for name, rule in gpt2.items()}
    config = preset("nano", vocab_size=5)
    assert plan_for(GPT(config)) == gpt_plan(config)


def test_layers_that_differ_have_rules_of_their_own():
    model = hf("llama")
    model.model.layers[1].self_attn.head_dim = 4
    plan = plan_for(model)
    assert plan["model.layers.0.self_attn.q_proj"] == Column(head_dim=2)
    assert plan["model.layers.1.self_attn.q_proj"] == Column(head_dim=4)
    assert plan["model.layers.*.self_attn.o_proj"] == Row()


def test_attention_counts_the_heads_that_are_here():
    def sizes(rank):
        engine = started("gpt2", tp=2)
        attention = engine.module.transformer.h[0].attn
        return attention.num_heads, attention.split_size, attention.head_dim

    assert on_ranks(2, sizes) == [(2, 6, 3)] * 2


FOREIGN = {
    "gpt_neox.layers.0.attention.query_key_value": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    ),
    "model.layers.0.self_attn.q_proj": lambda: transformers.Olmo2ForCausalLM(  # its norms are over all heads together
        transformers.Olmo2Config(**LLAMA)
    ),
    "model.layers.0.mlp": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**LLAMA, num_local_experts=2)
    ),
    "transformer.h.0.crossattention.c_attn": lambda: hf("gpt2", add_cross_attention=True),
    "0.weight": lambda: nn.Sequential(nn.Linear(2, 2)),
    "of any layer": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("named", FOREIGN)
def test_what_has_no_place_is_named_with_the_families_that_are_known(named):
    with pytest.raises(UserError, match=named) as caught:
        plan_for(FOREIGN[named]())
    assert "q_proj, k_proj, v_proj -> o_proj (attention of Llama, Mistral, Qwen2, Qwen3)" in caught.value.fix
    assert "c_fc -> c_proj (MLP of GPT-2)" in caught.value.fix


def test_a_parameter_beside_the_linears_of_attention_has_no_place():
    model = hf("llama")
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(8))
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.sinks"):
        plan_for(model)


def started(kind: str, tp: int, config: dict[str, Any] | None = None, stage: int = 0, **more: Any) -> Any:
    optimizer = {"type": "SGD", "params": {"lr": 0.1}}
    config = config_of(stage, 1, 0.0, tensor_parallel={"autotp_size": tp}, optimizer=optimizer, **(config or {}))
    return minispeed.initialize(model=hf(kind, **more), config=config)[0]


@pytest.mark.parametrize(
    ("kind", "tp", "more", "what"),
    [
        ("llama", 8, {}, "self_attn.k_proj has 4 heads of 2 features, which tp=8 does not divide"),
        ("gpt2", 8, {}, "attn has 4 num_heads, which tp=8 does not divide"),
        ("gpt2", 8, {"n_head": 3, "n_embd": 9}, "attn has 3 num_heads, which tp=8 does not divide"),
        ("llama", 8, {"intermediate_size": 12}, "which tp=8 does not divide"),
        ("gpt2", 2, {"resid_pdrop": 0.1}, "drops out with p=0.1"),
        ("llama", 2, {"attention_dropout": 0.1}, "self_attn drops out with p=0.1"),
    ],
)
def test_sizes_that_cannot_be_cut_are_named(kind, tp, more, what):
    with pytest.raises(UserError, match=what):
        on_ranks(tp, lambda rank: started(kind, tp, **more))


# ---- the configuration


def test_ranks_of_one_model_share_their_rows():
    asked = {"train_batch_size": 12, "tensor_parallel": {"autotp_size": 2}}
    assert read_config(asked, ranks=8).batch.micro == 3
    spelt = {"train_batch_size": 12, "tensor_parallel": {"tensor_parallel": {"tp_size": 2}}}
    assert read_config(spelt, ranks=8).tensor_parallel.ranks == 2
    assert read_config(spelt, ranks=8).batch.micro == 3
    both = {"train_batch_size": 4, "tensor_parallel": {"autotp_size": 2, "tp": {"tp_size": 2}}}
    assert read_config(both, ranks=2).tensor_parallel.ranks == 2
    assert read_config({"train_batch_size": 4}, ranks=2).tensor_parallel.ranks == 1
    with pytest.raises(DeepSpeedConfigError, match='"tensor_parallel.autotp_size" is 2, which does not divide 3 ranks'):
        read_config(asked, ranks=3)
    with pytest.raises(DeepSpeedConfigError, match='autotp_size" is 4, but "tensor_parallel.tp.tp_size" is 2'):
        read_config({**asked, "tensor_parallel": {"autotp_size": 4, "tp": {"tp_size": 2}}}, ranks=8)


def test_the_loader_gives_neighbours_the_same_rows_and_replicas_others():
    rows = [torch.tensor([row]) for row in range(8)]

    def seen(rank):
        config = config_of(
            0, 1, 0.0, tensor_parallel={"autotp_size": 2}, optimizer={"type": "SGD", "params": {"lr": 1}}
        )
        _, _, loader, _ = minispeed.initialize(model=hf("llama"), config=config, training_data=rows)
        return sorted(torch.cat(list(loader)).flatten().tolist())

    first, second, third, fourth = on_ranks(4, seen)
    assert first == second and third == fourth
    assert sorted(first + third) == list(range(8))


@pytest.mark.parametrize("given_as", ["argument", "keyword"])
def test_different_rows_on_ranks_of_one_model_are_an_error_at_once(given_as):
    def run(rank):
        engine = started("llama", tp=2)
        x = tokens(2, 1, 0)[0, rank]
        return engine(x) if given_as == "argument" else engine(input_ids=x)

    with pytest.raises(UserError, match="0 and 1 were given different rows"):
        on_ranks(2, run)


def test_tp_model_init_says_the_size_before():
    def run(rank, size=2, configured=None, dtype=torch.float32, group=None):
        model = minispeed.tp_model_init(hf("llama"), tp_size=size, dtype=dtype, tp_group=group)
        cut = {} if configured is None else {"tensor_parallel": {"autotp_size": configured}}
        config = config_of(0, 1, 0.0, optimizer={"type": "SGD", "params": {"lr": 1}}, **cut)
        return minispeed.initialize(model=model, config=config)[0].core.layout.tp

    assert on_ranks(2, run) == [2, 2] == on_ranks(2, lambda rank: run(rank, configured=2))
    with pytest.raises(UserError, match='autotp_size" is 2, and tp_model_init was given 4'):
        on_ranks(4, lambda rank: run(rank, 4, configured=2))
    with pytest.raises(UserError, match="given torch.float16, and the configuration computes in fp32"):
        on_ranks(2, lambda rank: run(rank, dtype=torch.float16))

    def in_group(rank, lines):
        group = next(g for g in [minispeed.comm.new_group(line) for line in lines] if g.rank >= 0)
        return run(rank, group=group)

    assert on_ranks(4, lambda rank: in_group(rank, [[0, 1], [2, 3]])) == [2] * 4
    with pytest.raises(UserError, match=r"tp_group is of ranks \[., .\], with .* it is \[(0, 1|2, 3)\]"):
        on_ranks(4, lambda rank: in_group(rank, [[0, 2], [1, 3]]))


def test_what_cannot_be_cut_is_a_sentence():
    def unoptimised(rank):
        config = {"train_batch_size": 2, "tensor_parallel": {"autotp_size": 2}}
        minispeed.initialize(model=hf("llama"), config=config)

    def in_pieces(rank):
        with Init():
            model = hf("llama")
        config = config_of(
            3, 1, 0.0, tensor_parallel={"autotp_size": 2}, optimizer={"type": "SGD", "params": {"lr": 1}}
        )
        minispeed.initialize(model=model, config=config)

    for run, what in ((unoptimised, "no optimizer to train it"), (in_pieces, "born in pieces")):
        with pytest.raises(UserError, match=what):
            on_ranks(2, run)


# ---- whole tensors


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_what_the_engine_gives_out_is_whole(kind, stage, tmp_path):
    expected = hf(kind).state_dict()
    gather = {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}}

    def run(rank):
        config = {**config_of(stage, 1, 0.0), **gather, "tensor_parallel": {"autotp_size": 2}}
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.1}}
        engine, *_ = minispeed.initialize(model=hf(kind), config=config)
        with pytest.raises(UserError, match=r"state_dict\(\) of a module of which each rank holds slices"):
            engine.module.state_dict()
        assert engine.save_16bit_model(tmp_path)
        return engine.module_state_dict()

    states = on_ranks(4, run)
    saved = torch.load(tmp_path / "pytorch_model.bin")
    for state in [*states, saved]:
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], x) for name, x in expected.items())
    hf(kind).load_state_dict(saved)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_first_ranks_state_is_taken_whole(stage):
    wanted = {name: x + 1 for name, x in hf("gpt2").state_dict().items()}

    def run(rank):
        engine = started("gpt2", tp=2, stage=stage)
        engine.load_module_state_dict({name: x + rank for name, x in wanted.items()})
        return engine.module_state_dict()

    for state in on_ranks(4, run):
        assert all(torch.equal(state[name], x) for name, x in wanted.items())


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_one_parameter_is_read_and_set_whole(kind, stage):
    from minispeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
    )

    alone = hf(kind)
    x = tokens(1, 1, 0)[0, 0]
    alone(input_ids=x, labels=x).loss.backward()

    def run(rank):
        optimizer = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
        config = config_of(stage, 1, 0.0, tensor_parallel={"autotp_size": 2}, optimizer=optimizer)
        engine, *_ = minispeed.initialize(model=hf(kind), config=config)
        engine.backward(engine(input_ids=x, labels=x).loss)
        named = dict(engine.module.named_parameters())
        found = {name: safe_get_full_grad(p) for name, p in named.items()}
        for p in named.values():
            safe_set_full_grad(p, safe_get_full_grad(p) * 2)
        engine.step()
        twice = {name: safe_get_full_optimizer_state(p, "momentum_buffer") for name, p in named.items()}
        for p in named.values():
            whole = safe_get_full_fp32_param(p)
            safe_set_full_fp32_param(p, torch.arange(whole.numel(), dtype=whole.dtype).view_as(whole))
        return found, twice, engine.module_state_dict()

    expected = {name: p.grad for name, p in alone.named_parameters()}
    for found, twice, state in on_ranks(4, run):
        assert close(found, expected) and found.keys() == expected.keys()
        assert close(twice, {name: 2 * grad for name, grad in expected.items()})
        assert all(torch.equal(state[n].flatten(), torch.arange(g.numel()).double()) for n, g in expected.items())
