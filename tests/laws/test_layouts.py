"""The law of the project, whole: however ranks share a GPT and its rows, it is the same training run.

Against a plain loop on one device, in float64: every step's loss, norm and number of tokens, and all parameters after
three steps of SGD (whose first step is the gradient) or AdamW, read back from the checkpoint that the layout writes.
"""

import math
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from minispeed.axes import Layout
from minispeed.checkpoint import Checkpoint, save
from minispeed.collective.group import Group
from minispeed.collective.threads import run_threads
from minispeed.collective.world import World
from minispeed.engine import Engine, MicroBatch, Report
from minispeed.errors import UserError
from minispeed.model.chunk import layer_costs
from minispeed.model.config import GPTConfig
from minispeed.model.dropout import cells_of
from minispeed.model.generate import Answer, generate
from minispeed.model.gpt import GPT
from minispeed.model.init import draw as drawn
from minispeed.model.lora import LoRA, add_lora
from minispeed.model.loss import IGNORED
from minispeed.model.presets import preset
from minispeed.model.recompute import recompute
from minispeed.optim import SGD, AdamW, decay_groups
from minispeed.pipeline.partition import partition
from minispeed.precision import Precision
from minispeed.scaler import LossScaler
from minispeed.schedules import constant
from minispeed.testing.pool import shared_pool

STEPS, TOKENS = 3, 8
LR = 1e-3
DILATED = {"deep": "dwa", "deep_dilation": 2, "deep_period": 2}
SHARES = st.sampled_from([0.0, 0.1, 0.5])  # that are dropped
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: AdamW(groups, lr=LR, betas=(0.9, 0.99)),
    "sgd": lambda groups: SGD(groups, lr=LR),
}


@dataclass(frozen=True)
class Case:
    """One drawn layout of one drawn model and its rows."""

    config: GPTConfig
    layout: Layout
    dp: int
    stage: int
    micro: int
    optimizer: str
    clip: float
    recompute: str
    lora: LoRA | None
    share: float
    packed: bool
    empty: bool
    seed: int

    @property
    def ranks(self) -> int:
        return self.dp * self.layout.ranks

    @property
    def axes(self) -> dict[str, Any]:
        """What the table of what was covered counts; "-" where an axis does not matter."""
        layout, config = self.layout, self.config
        return {
            "pp": layout.pp,
            "dp": self.dp,
            "sp": layout.sp,
            "tp": layout.tp,
            "zero": self.stage,
            "schedule": layout.schedule if layout.pp > 1 else "-",
            "virtual": layout.virtual if layout.pp > 1 else "-",
            "micro": self.micro,
            "sequence": layout.sequence if layout.sp > 1 else "-",
            "tokens": layout.tokens if layout.tp > 1 else "-",
            "recompute": self.recompute,
            "lora": f"trains {self.lora.train}" if self.lora else "-",
            "lora_dropout": self.lora.dropout if self.lora else "-",
            "packed": self.packed,
            "empty": self.empty,
            "deep": config.deep + " tasks" * (config.deep_tasks > 1),
            "positions": config.positions,
            "norm": config.norm,
            "mlp": config.mlp,
            "qk_norm": config.qk_norm,
            "qkv_bias": config.qkv_bias,
            "out_bias": config.out_bias,
            "mlp_bias": config.mlp_bias,
            "tied": config.tied,
            "grouped": config.num_kv_heads < config.num_heads,
            "attention": config.attention,
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            "optimizer": self.optimizer,
            "clip": self.clip,
        }


@st.composite
def cases(draw: st.DrawFn, most: int = 8) -> Case:
    layout, dp = draw(layouts(most))
    config, lora = draw(configs(layout)), draw(st.none() | st.none() | adapters())
    bounds = partition(layer_costs(make(config, lora)), layout.stages)
    if any(begin == end - 1 and begin in (0, config.num_layers + 1) for begin, end in pairwise(bounds)):
        layout = replace(layout, schedule={"zb_h1": "1f1b"}.get(layout.schedule, layout.schedule))  # nothing to split
    return Case(
        config=config,
        layout=layout,
        dp=dp,
        stage=draw(st.integers(0, 3)),
        micro=draw(st.integers(1, 3)) * (layout.pp if layout.schedule == "interleaved" else 1),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        clip=draw(st.sampled_from([0.0, 0.01, 1.0])),
        recompute=draw(st.sampled_from(["none", "all", "2", "attention"])),
        lora=lora,
        share=draw(st.floats(0, 1)),
        packed=draw(st.booleans()),
        empty=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def layouts(draw: st.DrawFn, most: int) -> tuple[Layout, int]:
    """Draw axes whose product is at most `most`, and how each cuts, and dp; the axes come in any order of size."""
    left, sizes = most, {}
    for axis in draw(st.permutations(["pp", "dp", "sp", "tp"])):
        sizes[axis] = draw(st.sampled_from([size for size in (2, 1, 3, 2, 4, 1) if size <= left]))
        left //= sizes[axis]
    dp = sizes.pop("dp")
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zb_h1"]))
    virtual = draw(st.integers(1, 2)) if schedule in ("gpipe", "interleaved") and sizes["pp"] > 1 else 1
    sequence = draw(st.sampled_from(["ulysses", "ring"]))
    tokens = sizes["tp"] in (2, 4) and sizes["sp"] in (1, 2) and draw(st.booleans())
    return Layout(**sizes, schedule=schedule, virtual=virtual, sequence=sequence, tokens=tokens), dp


@st.composite
def configs(draw: st.DrawFn, layout: Layout) -> GPTConfig:
    """Draw a GPT of a few hundred parameters that the layout can cut; its vocabulary need not divide."""
    heads = layout.tp * (layout.sp if layout.sequence == "ulysses" else 1)
    kv = heads * draw(st.integers(1, 2))
    attention = draw(st.sampled_from(["fused", "tiled", "reference"]))
    plain = GPTConfig(
        vocab_size=draw(st.integers(2, 5 if layout.schedule == "zb_h1" else 23)),  # or the ends are stages of their own
        max_positions=TOKENS,
        num_layers=draw(st.integers(max(1, layout.stages - 2), layout.stages + 2)),
        model_dim=draw(st.sampled_from([3, 8])),
        num_heads=kv * draw(st.integers(1, 2)),
        num_kv_heads=kv,
        head_dim=2,
        hidden_dim=layout.tp * draw(st.integers(1, 3)),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        norm_eps=0.1,  # of 1e-5 every norm has a gradient of 300, at a token of which dropout has left nothing
        positions=draw(st.sampled_from(["rotary", "learned"])),
        mlp=draw(st.sampled_from(["swiglu", "gelu"])),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        attention=attention,
        dropout=draw(SHARES),
        attention_dropout=draw(SHARES) if attention != "fused" and layout.sp == 1 else 0.0,
    )
    deep = draw(st.sampled_from([{}, *({"deep": mask} for mask in ("x0", "unet", "dwa")), DILATED]))
    try:
        return replace(plain, **deep, deep_tasks=draw(st.integers(1, 3)) if deep else 1)
    except UserError:  # too few layers for the mask
        return plain


def adapters() -> st.SearchStrategy[LoRA]:
    return st.builds(
        LoRA,
        rank=st.integers(1, 3),
        alpha=st.sampled_from([1.0, 3.0]),
        targets=st.sampled_from([("attention.qkv",), ("attention.out", "mlp.up"), ("mlp.*",)]),
        dropout=SHARES,
        train=st.sampled_from(["lora", "all"]),
    )


def make(config: GPTConfig, lora: LoRA | None, seed: int = 0) -> GPT:
    """Make the whole model; its adapters, if any, have been trained already, so that all of them have gradients."""
    model = GPT(config, seed=seed).to(torch.float64)
    if lora is not None:
        add_lora(model, lora, seed=seed)
        for name, p in model.named_parameters():
            if name.endswith("lora.b.weight"):
                p.data.copy_(drawn(seed, name, p.shape, 0.3))
    return model


def rows(case: Case, step: int) -> MicroBatch:
    """Draw the rows of a step: one per replica and micro-batch, learnt from unevenly, the first perhaps not at all."""
    generator = torch.Generator().manual_seed(case.seed + step)
    shape = (case.dp * case.micro, TOKENS)
    tokens, labels = (torch.randint(0, case.config.vocab_size, shape, generator=generator) for _ in range(2))
    labels[torch.rand(shape, generator=generator) >= case.share] = IGNORED
    if case.empty:
        labels[0] = IGNORED
    cuts = torch.rand(shape, generator=generator) < (0.4 if case.packed else 0.0)
    documents = cuts.cumsum(1)
    places = torch.arange(TOKENS).expand(shape)
    begins = torch.where(cuts, places, 0).cummax(1).values
    tasks = torch.randint(0, case.config.deep_tasks, shape, generator=generator)
    return MicroBatch(tokens, labels, places - begins, documents, tasks, cells_of(range(shape[0]), TOKENS))


def plain(case: Case) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Train as anybody would on one device; return losses and norms, and the parameters."""
    model = make(case.config, case.lora, case.seed)
    groups = decay_groups(model, 0.1)
    made = [{"params": [model.get_parameter(n) for n in g["names"]], "weight_decay": g["weight_decay"]} for g in groups]
    optimizer = OPTIMIZERS[case.optimizer](made)
    found = []
    for step in range(STEPS):
        batch = rows(case, step)
        optimizer.zero_grad()
        attached = {"positions": batch.positions, "documents": batch.documents, "tasks": batch.tasks}
        losses = model(batch.tokens, batch.labels, **attached, cells=batch.cells, step=step)
        loss = losses.sum() / max(1, batch.num_supervised)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        for gradient in gradients:
            gradient *= case.clip / norm if case.clip and norm > case.clip else 1.0
        optimizer.step()
        found.append((loss.item(), norm))
    return found, dict(model.named_parameters())


def cut(case: Case, group: Group, folder: Path) -> list[Report]:
    """Train as one rank of the layout, and leave a checkpoint in the folder."""
    model = make(case.config, case.lora, case.seed)
    recompute(model, case.recompute)
    engine = Engine(
        model,
        group,
        layout=case.layout,
        precision=Precision(torch.float64),
        schedule=constant,
        lr=LR,
        zero=case.stage,
        weight_decay=0.1,
        clip=case.clip,
        optimizer=OPTIMIZERS[case.optimizer],
    )
    replica, reports = engine.lines.dp.rank, []
    for step in range(STEPS):
        mine = [field.view(case.micro, case.dp, 1, TOKENS)[:, replica] for field in rows(case, step)]
        reports.append(engine.train_step([MicroBatch(*(part[micro] for part in mine)) for micro in range(case.micro)]))
    save(folder / "c", engine.pieces(), {}, group)
    return reports


def cut_in(world: World, case: Case, folder: Path) -> list[Report]:
    return cut(case, world.group, folder)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() <= 1e-10 * max(1.0, b.abs().max().item())


def check(case: Case, *, processes: bool = False) -> None:
    with tempfile.TemporaryDirectory() as name:
        if processes:
            ran = shared_pool().run(cut_in, case, Path(name), ranks=case.ranks)
        else:
            ran = run_threads(lambda group: cut(case, group, Path(name)), case.ranks)
        check_run(case, ran, Path(name))


def check_run(case: Case, ran: list[list[Report]], folder: Path) -> None:
    """Compare what the ranks reported, and what they wrote into the folder, with a plain loop."""
    expected, parameters = plain(case)
    stored = Checkpoint(folder / "c")
    for name, tensor in parameters.items():
        found = stored.tensor(f"parameters/{name}")
        assert found is not None and found.shape == tensor.shape, name
        same = close if tensor.requires_grad else torch.equal  # what is frozen stays as it is, to the bit
        assert same(found, tensor), f"{name} differs by {(found - tensor).abs().max():.2e}"
    for reports in ran:
        assert reports == ran[0]
        for report, numbers in zip(reports, expected, strict=True):
            got = (report.loss, report.norm)
            assert close(*(torch.tensor(pair, dtype=torch.float64) for pair in (got, numbers))), (got, numbers)


@given(case=cases())
@settings(print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_cut_is_the_same_training_run(case, covered):
    check(case)
    covered.append(case.axes)


def write(case: Case, group: Group, prompts: list[list[int]]) -> list[Answer]:
    """Answer as one rank of the layout."""
    model = make(case.config, case.lora, case.seed)
    engine = Engine(model, group, layout=case.layout, precision=Precision(torch.float64), lr=LR, zero=case.stage)
    with engine.reading() as reader:
        return generate(reader, prompts, stop=[0], max_new=3)


@given(cases(), st.lists(st.integers(1, TOKENS - 1), min_size=1, max_size=3))
@settings(print_blob=True)
def test_every_cut_writes_the_same(case, lengths):
    generator = torch.Generator().manual_seed(case.seed)
    prompts = [torch.randint(0, case.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    expected = generate(make(case.config, case.lora, case.seed), prompts, stop=[0], max_new=3)
    assert run_threads(lambda group: write(case, group, prompts), case.ranks) == [expected] * case.ranks


def tiny(group: Group, **layout: Any) -> Engine:
    config = preset("nano", num_layers=4, model_dim=4, num_heads=2, num_kv_heads=2, head_dim=2, hidden_dim=4)
    model = GPT(replace(config, vocab_size=5, max_positions=TOKENS, tied=False)).to(torch.float64)
    return Engine(model, group, layout=Layout(**layout), precision=Precision(torch.float64), lr=LR)


def some_rows(seed: int) -> MicroBatch:
    tokens, labels = torch.randint(0, 5, (2, 1, TOKENS), generator=torch.Generator().manual_seed(seed))
    zeros = torch.zeros_like(tokens)
    return MicroBatch(tokens, labels, torch.arange(TOKENS)[None], zeros, zeros)


@pytest.mark.parametrize("layout", [{"pp": 2}, {"tp": 2}, {"sp": 2}])
def test_ranks_of_one_copy_that_bring_other_rows_are_named(layout):
    with pytest.raises(UserError, match="ranks 0 and 1 share a copy of the model, and bring different rows"):
        run_threads(lambda group: tiny(group, **layout).train_step([some_rows(group.rank)]), 2)


@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "schedule": "zb_h1"}, {"pp": 2, "tp": 2}])
def test_what_is_not_finite_is_named_where_the_backward_met_it_first(layout):
    def train(group: Group) -> str:
        engine = tiny(group, **layout)
        engine.scaler = LossScaler(scale=1.0, floor=1.0)
        with torch.no_grad():
            for part in engine.parts:
                for name, p in part.sharded.module.named_parameters():
                    if name == "blocks.3.mlp_norm.weight":
                        p.fill_(math.nan)
        return engine.train_step([some_rows(0)]).nonfinite

    ranks = 2 * layout.get("tp", 1)
    for found in run_threads(train, ranks):
        assert f"on rank {ranks // 2} " in found and ("head" in found or "norm" in found), found


@pytest.mark.parametrize("frozen", ["embed blocks.0 blocks.1", "blocks.2 blocks.3 norm head"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_stage_may_be_frozen(frozen, schedule):
    def train(group: Group) -> dict[str, torch.Tensor]:
        config = preset("nano", num_layers=4, model_dim=4, num_heads=2, num_kv_heads=2, head_dim=2, hidden_dim=4)
        model = GPT(replace(config, vocab_size=5, max_positions=TOKENS, tied=False)).to(torch.float64)
        for name in frozen.split():
            model.get_submodule(name).requires_grad_(False)
        layout = Layout(pp=group.size, schedule=schedule if group.size > 1 else "1f1b")
        engine = Engine(model, group, layout=layout, precision=Precision(torch.float64), lr=LR, optimizer=SGD)
        for step in range(2):
            engine.train_step([some_rows(step), some_rows(step + 9)])
        return {piece.name: piece.tensor.clone() for piece in engine.pieces() if piece.name.startswith("parameters/")}

    (expected,) = run_threads(train, 1)
    for found in run_threads(train, 2):
        assert found and all(close(tensor, expected[name]) for name, tensor in found.items())


@given(cases(most=4))
@settings(max_examples=8, print_blob=True)
def test_processes_over_gloo_too(case):
    check(case, processes=True)
