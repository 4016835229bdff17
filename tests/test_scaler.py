"""The loss scaler against the rules as its users know them, and what the engine does with it."""

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.collective.threads import run_threads
from minispeed.engine import Engine, MicroBatch
from minispeed.errors import UserError
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.precision import Precision
from minispeed.scaler import LossScaler
from minispeed.schedules import constant
from minispeed.testing.measure import InMemory

CONFIG = preset("nano", vocab_size=17, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, hidden_dim=8)


def rule_book(overflows, *, window, hysteresis, consecutive, floor, scale):
    """Say it once more, otherwise: count good steps since the last change of luck instead of iterations."""
    scales, good, patience = [], 0, hysteresis
    for overflow in overflows:
        if overflow:
            good = 0
            if patience > 1:
                patience -= 1
            else:
                scale = max(scale / 2, floor)
        else:
            good += 1
            if consecutive:
                patience = hysteresis
            if good % window == 0:
                scale, patience = scale * 2, hysteresis
        scales.append(scale)
    return scales


@given(
    overflows=st.lists(st.booleans(), max_size=60),
    window=st.integers(1, 7),
    hysteresis=st.integers(1, 4),
    consecutive=st.booleans(),
    floor=st.sampled_from([0.25, 1.0, 64.0]),
)
def test_any_sequence_of_overflows_follows_the_rules(overflows, window, hysteresis, consecutive, floor):
    state = LossScaler(
        scale=2.0**8, window=window, hysteresis=hysteresis, consecutive_hysteresis=consecutive, floor=floor
    )
    scales = []
    for overflow in overflows:
        state = state.after(overflow)
        scales.append(state.scale)
    rules = dict(window=window, hysteresis=hysteresis, consecutive=consecutive, floor=floor, scale=2.0**8)
    assert scales == rule_book(overflows, **rules)
    assert LossScaler(**state.state()) == state


@given(st.lists(st.booleans(), max_size=20))
def test_a_static_scale_stays(overflows):
    state = LossScaler.static(8.0)
    for overflow in overflows:
        state = state.after(overflow)
    assert state.scale == 8.0 and state.iteration == len(overflows)


@pytest.mark.parametrize("wrong", [dict(window=0), dict(hysteresis=0), dict(scale=0.0), dict(floor=-1.0)])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match="scale"):
        LossScaler(**wrong)


def engine(group, *, compute=torch.float16, scaler=None, zero=0, seed=0):
    scaler = scaler or LossScaler(scale=2.0**10)
    model = GPT(CONFIG, seed=seed)
    return Engine(model, group, precision=Precision(compute), schedule=constant, lr=1e-3, zero=zero, scaler=scaler)


def rows(seed, rank=0):
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    tokens, labels = (torch.randint(0, 17, (2, 5), generator=generator) for _ in range(2))
    zeros = torch.zeros_like(tokens)
    return MicroBatch(tokens, labels, torch.arange(5).expand(2, 5).contiguous(), zeros, zeros)


def held(run):
    return [(piece.name, piece.tensor.clone()) for piece in run.pieces()]


def same(one, other):
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True))


def test_fp16_without_a_scaler_is_refused():
    with pytest.raises(UserError, match="no loss scaler.*LossScaler"):
        Engine(GPT(CONFIG), precision=Precision(torch.float16), schedule=constant, lr=1e-3)


@given(
    scale=st.sampled_from([1.0, 8.0, 2.0**20]),
    seed=st.integers(0, 99),
    compute=st.sampled_from(["float32", "bfloat16"]),
)
def test_the_scale_is_divided_out_again(scale, seed, compute):
    dtype = getattr(torch, compute)
    plain, scaled = (engine(None, compute=dtype, scaler=LossScaler.static(s), seed=seed) for s in (1.0, scale))
    for step in range(3):
        reports = [run.train_step([rows(seed + step)]) for run in (plain, scaled)]
        assert reports[0].norm == reports[1].norm  # powers of two are exact
    assert same(held(plain), held(scaled))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_are_unscaled_in_the_masters_dtype(dtype):
    """A half-precision gradient over its scale may be below that dtype's smallest number."""
    run = engine(None, compute=dtype)
    for unit in run.sharded.units:
        unit.gradient = torch.ones(unit.layout.shard_size, dtype=dtype)
        unit.give_gradients(1e-30)
        assert all(master.grad.eq(1e-30).all() and master.grad.dtype == torch.float32 for master in unit.masters)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_small_gradients_survive_in_fp16_because_of_the_scale(stage):
    def train(group, scale):
        run = engine(group, scaler=LossScaler.static(scale), zero=stage)
        for p in run.model.parameters():
            p.register_hook(lambda gradient: (gradient * 2.0**-26).clamp(-(2.0**-25) * scale, 2.0**-25 * scale))
        return run.train_step([rows(0, group.rank)], watch_small=True)

    for report in run_threads(lambda group: train(group, 1.0), 2):  # below half of the smallest number: rounded to zero
        assert report.norm == 0 and set(report.too_small.values()) == {0.0}
    for report in run_threads(lambda group: train(group, 2.0**16), 2):
        assert report.norm > 0 and report.too_small["blocks.0.mlp.up"] > 0.9
        assert report.too_small.keys() == {name.rpartition(".")[0] for name, p in GPT(CONFIG).named_parameters()}


@given(
    ranks=st.integers(1, 4),
    stage=st.integers(0, 3),
    bad=st.integers(0, 3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
def test_overflow_on_one_rank_skips_the_step_on_all(ranks, stage, bad, seed, dtype):
    """And the run goes on bit for bit as one that starts there with the scaler as the skip left it."""

    def train(group):
        run = engine(group, compute=dtype, zero=stage, scaler=LossScaler(scale=2.0**10, hysteresis=1))
        run.train_step([rows(seed, group.rank)])
        before = held(run)
        poison = run.model.norm.weight.register_hook(
            lambda gradient: gradient * float("inf") if group.rank == bad % ranks else gradient
        )
        report = run.train_step([rows(seed + 1, group.rank)])
        poison.remove()
        assert report.skipped and report.scale == 2.0**10 and run.scaler.scale == 2.0**9
        assert same(held(run), before)
        fresh = engine(group, compute=dtype, zero=stage, scaler=run.scaler, seed=seed + 1)
        fresh.load(InMemory(run.pieces()), step=2, num_updates=1)
        reports = [each.train_step([rows(seed + 2, group.rank)]) for each in (run, fresh)]
        assert reports[0] == reports[1] and not reports[0].skipped
        assert same(held(run), held(fresh))
        return report

    reports = run_threads(train, ranks)
    assert all(report == reports[0] for report in reports)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_scale_that_can_go_no_lower_names_parameter_step_and_rank(stage):
    def train(group):
        run = engine(group, zero=stage, scaler=LossScaler(scale=1.0))
        run.train_step([rows(0, group.rank)])
        up = run.model.blocks[0].mlp.up.weight
        up.register_hook(lambda gradient: gradient * float("nan") if group.rank == 1 else gradient)
        report = run.train_step([rows(1, group.rank)])
        assert run.train_step([rows(2, group.rank)]).skipped  # and nothing is left over from the search
        return report.nonfinite

    told = run_threads(train, 3)
    assert told == ["step 1: the gradient of blocks.0.mlp.up.weight on rank 1 is not finite"] * 3


def test_large_gradients_have_a_norm():
    """The squares of finite elements may overflow fp32; the step is not skipped for that."""
    run = engine(None, compute=torch.float32, scaler=LossScaler.static(1.0))
    run.model.norm.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    report = run.train_step([rows(0)])
    assert not report.skipped and report.norm == pytest.approx(1e30 * 8**0.5)
