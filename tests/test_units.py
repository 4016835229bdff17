"""What the ledger says a rank holds of a model, unit by unit, is what the engine makes."""

import torch
from hypothesis import given, settings, strategies as st

from minispeed.axes import Layout
from minispeed.collective.threads import run_threads
from minispeed.engine import Engine
from minispeed.ledger.job import Job
from minispeed.ledger.units import units
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.lora import LoRA, add_lora
from minispeed.model.shapes import parameters
from minispeed.precision import Precision


@st.composite
def shapes(draw):
    kv = draw(st.sampled_from([2, 4]))
    return GPTConfig(
        vocab_size=draw(st.integers(3, 40)),
        max_positions=16,
        num_layers=draw(st.integers(2, 5)),
        model_dim=draw(st.sampled_from([3, 8])),
        num_heads=kv * draw(st.integers(1, 2)),
        num_kv_heads=kv,
        head_dim=draw(st.sampled_from([2, 4])),
        hidden_dim=2 * draw(st.integers(1, 6)),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        positions=draw(st.sampled_from(["rotary", "learned"])),
        mlp=draw(st.sampled_from(["swiglu", "gelu"])),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        deep=draw(st.sampled_from(["none", "x0", "dwa"])),
    )


TARGETS = [(), ("attention.qkv",), ("mlp.*", "attention.out"), ("*.mlp.down",)]


@given(shapes(), st.sampled_from([0, 3]), st.sampled_from(TARGETS))
def test_the_parameters_are_the_models_own(config, rank, targets):
    model = GPT(config)
    if rank:
        add_lora(model, LoRA(rank=rank, **({"targets": targets} if targets else {})), seed=0)
    found = {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
    said = parameters(config, lora_rank=rank, lora_targets=targets)
    assert {of.name: (of.shape, of.trains) for of in said} == found


@settings(max_examples=settings.default.max_examples // 4)
@given(
    shapes(),
    st.sampled_from([0, 2]),
    st.sampled_from([1, 2]),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]),
    st.integers(0, 3),
)
def test_the_units_are_the_engines_own(config, rank, tp, depth, zero):
    (pp, virtual) = depth
    pp, virtual = (pp, virtual) if pp * virtual <= config.num_layers + 2 else (1, 1)
    layout = Layout(pp=pp, virtual=virtual, tp=tp, schedule="gpipe")
    job = Job(
        model=config, devices=2 * pp * tp, rows=2, tokens=4, micro_batch=1, layout=layout, zero=zero, lora_rank=rank
    )

    def build(group):
        model = GPT(config)
        if rank:
            add_lora(model, LoRA(rank=rank), seed=0)
        engine = Engine(model, group, precision=Precision(torch.float32), layout=layout, zero=zero)
        return engine.lines.coords["pp"], [
            (part.stage, unit.num_elements, unit.trainable) for part in engine.parts for unit in part.units
        ]

    for pp_rank, found in run_threads(build, job.devices):
        assert sorted((u.stage, u.elements, u.trains) for u in units(job, pp_rank)) == sorted(found)
