"""Laws of the training step: how the rows are cut changes nothing, masters remember, bad gradients are no update."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from minispeed.collective.threads import run_threads
from minispeed.engine import Engine, MicroBatch
from minispeed.errors import UserError
from minispeed.model.gpt import GPT
from minispeed.model.loss import IGNORED
from minispeed.model.presets import preset
from minispeed.precision import Precision, choose_precision
from minispeed.schedules import constant
from minispeed.testing.measure import InMemory
from minispeed.testing.models import small_configs


def rows(vocab_size: int, num_rows: int, seed: int, share: float) -> MicroBatch:
    """Draw rows in which about `share` of the labels are learnt from."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, 6)
    tokens, labels = (torch.randint(0, vocab_size, shape, generator=generator) for _ in range(2))
    labels[torch.rand(shape, generator=generator) >= share] = IGNORED
    documents = torch.randint(0, 2, shape, generator=generator).sort(dim=1).values
    return MicroBatch(tokens, labels, torch.arange(6).expand(shape), documents, torch.zeros_like(tokens))


def cut(whole: MicroBatch, sizes: list[int]) -> list[MicroBatch]:
    return [MicroBatch(*parts) for parts in zip(*(field.split(sizes) for field in whole))]


def engine(config, seed: int = 0, compute: torch.dtype = torch.float64, **settings) -> Engine:
    made = {"schedule": constant, "lr": 1e-3, "weight_decay": 0.1, "clip": 1.0} | settings
    return Engine(GPT(config, seed=seed), precision=Precision(compute), **made)


def held(run: Engine) -> dict[str, torch.Tensor]:
    """Copy all that a checkpoint of one rank would hold; each tensor is one piece there."""
    return {piece.name: piece.tensor.detach().clone() for piece in run.pieces()}


def masters(run: Engine) -> dict[str, torch.Tensor]:
    return {name.partition("/")[2]: t for name, t in held(run).items() if name.startswith("parameters/")}


@given(
    small_configs(),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
@settings(max_examples=30)
def test_micro_batches_change_neither_gradient_nor_parameter(config, sizes, share, seed):
    whole, split = engine(config, seed), engine(config, seed)
    for step in range(3):
        batch = rows(config.vocab_size, sum(sizes), seed + step, share)
        one, many = whole.train_step([batch]), split.train_step(cut(batch, sizes))
        for name in ("loss", "norm", "num_supervised", "num_tokens"):
            assert getattr(one, name) == pytest.approx(getattr(many, name), rel=1e-10, abs=1e-10)
    for name, p in whole.model.named_parameters():
        assert (p - split.model.get_parameter(name)).abs().max() <= 1e-10 * max(1, p.abs().max().item())


def test_the_update_is_the_mean_loss_of_the_supervised_tokens():
    """Against autograd and torch's own AdamW on the plain mean, with the clip at work."""
    config = preset("nano")
    ours = engine(config, weight_decay=0.0, clip=0.1)
    model = GPT(config).to(torch.float64)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(3):
        batch = rows(512, 4, step, 0.5)
        losses = model(batch.tokens, batch.labels, positions=batch.positions, documents=batch.documents)
        theirs.zero_grad()
        losses[batch.labels != IGNORED].mean().backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, 0.1 / norm.item())
        theirs.step()
        assert ours.train_step(cut(batch, [1, 3])).norm == pytest.approx(norm.item(), rel=1e-10, abs=1e-10)
    for name, p in model.named_parameters():
        assert (ours.model.get_parameter(name) - p).abs().max() <= 1e-10


def test_masters_remember_steps_that_bf16_would_lose():
    tiny = engine(preset("nano"), compute=torch.bfloat16, lr=1e-6, weight_decay=0.0)
    name = "blocks.0.attention.qkv.weight"
    before = masters(tiny)[name].clone()
    for step in range(3):
        tiny.train_step([rows(512, 2, step, 0.8)])
    master, p = masters(tiny)[name], tiny.model.get_parameter(name)
    assert 0 < (master - before).abs().max().item() < 1e-5
    assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
    assert torch.equal(p, master.view_as(p).to(torch.bfloat16))


def test_masters_start_from_the_unrounded_weights():
    model = GPT(preset("nano"))
    exact = model.embed.tokens.weight.detach().clone()
    half = Engine(model, precision=Precision(torch.bfloat16), schedule=constant, lr=1e-3)
    assert torch.equal(masters(half)["embed.tokens.weight"].view_as(exact), exact)
    full = engine(preset("nano"), compute=torch.float32)
    assert all(unit.master.data_ptr() == unit.flat.data_ptr() for unit in full.sharded.units)  # not a copy


def test_a_gradient_that_is_not_finite_is_no_update():
    run = engine(preset("nano"))
    run.train_step([rows(512, 2, 0, 0.5)])
    before = held(run)
    bad = run.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    report = run.train_step([rows(512, 2, 1, 0.5)])
    bad.remove()
    assert report.skipped and (run.step, run.num_updates) == (2, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(run).items())
    assert not run.train_step([rows(512, 2, 1, 0.5)]).skipped


@pytest.mark.parametrize("compute", [torch.float64, torch.float32, torch.bfloat16])
def test_loaded_tensors_go_on_bit_for_bit(compute):
    straight, first, second = (engine(preset("nano"), compute=compute) for _ in range(3))
    for step in range(2):
        straight.train_step([rows(512, 2, step, 0.5)])
        first.train_step([rows(512, 2, step, 0.5)])
    second.load(InMemory(first.pieces()), step=first.step, num_updates=first.num_updates)
    for step in range(2, 4):
        reports = [run.train_step([rows(512, 2, step, 0.5)]) for run in (straight, second)]
        assert reports[0] == reports[1]
    assert held(straight).keys() == held(second).keys() and len(held(straight)) == 3 * len(masters(straight)) + 2
    for name, tensor in held(straight).items():
        assert torch.equal(tensor, held(second)[name])


def test_precision_by_name():
    assert choose_precision("bfloat16").name == "bf16" and choose_precision("fp64").master == torch.float64
    assert choose_precision("auto").compute in (torch.bfloat16, torch.float32)
    with pytest.raises(UserError, match="'bf61'.*--dtype bf16"):
        choose_precision("bf61")


@pytest.mark.parametrize(
    "differ, message",
    [
        (dict(lr=2e-3), r"lr is 0.001 on rank 0, 0.002 on rank 1"),
        (dict(zero=2), r"ZeRO stage is 1 on rank 0, 2 on rank 1"),
        (dict(config=preset("nano", num_layers=1)), r"blocks.1.attention_norm.weight is \(128,\).* rank 0, not there"),
        (dict(config=preset("nano", vocab_size=7)), r"embed.tokens.weight is \(512, 128\).*rank 0, \(7, 128\)"),
        (dict(compute=torch.bfloat16), r"precision is .*float32.* on rank 0, .*bfloat16.* on rank 1"),
    ],
)
def test_ranks_that_were_started_differently_are_named_with_both_values(differ, message):
    def start(group):
        made = dict(config=preset("nano"), lr=1e-3, zero=1) | (differ if group.rank == 1 else {})
        compute = made.pop("compute", torch.float32)
        model = GPT(made.pop("config"))
        Engine(model, group, precision=Precision(compute), schedule=constant, **made)

    with pytest.raises(UserError, match=message):
        run_threads(start, 3)


def test_a_loss_is_one_number_with_a_gradient():
    run = engine(preset("nano"))
    with pytest.raises(UserError, match=r"shape \(3,\)"):
        run.sharded.backward(torch.ones(3, requires_grad=True), last=True)
    with pytest.raises(UserError, match="no gradient"):
        run.sharded.backward(torch.ones(()), last=True)
