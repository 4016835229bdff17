"""Models that are born in pieces, and parameters that are looked at and changed while they are in pieces."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from minispeed.census import Census
from minispeed.collective.group import SoloGroup
from minispeed.collective.threads import run_threads
from minispeed.engine import Engine, MicroBatch
from minispeed.errors import UserError
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.precision import Precision
from minispeed.schedules import constant
from minispeed.testing.models import small_configs
from minispeed.testing.odd import OddConfig, OddModel
from minispeed.testing.pool import shared_pool
from minispeed.zero.absent import owner_of
from minispeed.zero.init import GatheredParameters, Init


class HomeMade(nn.Module):
    """Initialised in all the ways that people know."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.two = nn.Linear(3, 5, bias=False)
        self.table = nn.Embedding(7, 3)
        self.gain = nn.Parameter(torch.randn(4))
        self.tied = nn.Linear(3, 7)
        self.tied.weight = self.table.weight
        nn.init.orthogonal_(self.two.weight)
        with torch.no_grad():
            self.gain.mul_(2.0)
            self.one.weight[0].zero_()
        self.apply(self.start)

    def start(self, module):
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(0.0, 0.3)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.fill_(0.5)


def values(model):
    with GatheredParameters(model.parameters()):
        return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_in_pieces_has_the_values_of_a_whole_one():
    torch.manual_seed(3)
    expected = values(HomeMade())
    torch.manual_seed(3)
    with Init(SoloGroup()):
        model = HomeMade()
    assert (
        owner_of(model.one.weight).is_released and model.one.weight.shape == (3, 5) and model.one.weight.numel() == 15
    )
    assert same(values(model), expected)


def test_every_rank_has_rank_0s_values():
    """Threads share torch's generator: what the ranks draw is different, and only rank 0's counts."""

    def build(group):
        with Init(group):
            model = HomeMade()
        return values(model)

    whole = run_threads(build, 3)
    assert all(same(one, whole[0]) for one in whole)
    assert whole[0]["one.weight"][0].eq(0).all() and whole[0]["one.bias"].eq(0.5).all()
    assert whole[0]["table.weight"].eq(whole[0]["tied.weight"]).all() and whole[0]["gain"].ne(0).all()


def test_a_view_that_outlives_its_turn_is_refused_and_told_how():
    kept = []

    class Keeps(nn.Linear):
        def reset_parameters(self):
            kept.append(self.weight[0])

    with pytest.raises(UserError, match="view of weight of a Keeps.*GatheredParameters"), Init(SoloGroup()):
        Keeps(3, 4)
    with Init(SoloGroup()):
        model = nn.Linear(3, 4)
        model.weight[0].detach().zero_()
    assert values(model)["weight"][0].eq(0).all() and values(model)["weight"][1].ne(0).all()
    with pytest.raises(UserError, match="weight of a Linear is released.*GatheredParameters"):
        model.weight[0]


@given(
    st.one_of(st.builds(OddConfig, tied=st.booleans(), frozen=st.booleans()), small_configs()),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_our_models_in_pieces_too(config, ranks, seed):
    make = OddModel if isinstance(config, OddConfig) else GPT

    def build(group):
        with Init(group):
            model = make(config, seed=seed)
        return values(model)

    expected = values(make(config, seed=seed))
    assert all(same(one, expected) for one in run_threads(build, ranks))


CONFIG = preset(
    "nano", vocab_size=50, num_layers=6, model_dim=32, num_heads=1, num_kv_heads=1, head_dim=32, hidden_dim=64
)


def peak(world, kind):
    make = {"gpt": lambda: GPT(CONFIG), "linears": lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))}[kind]
    with Census() as census, Init(world.group):
        model = make()
    return census.peak, [p.numel() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["gpt", "linears"])
def test_no_rank_ever_holds_the_model_whole(kind):
    ranks = 4
    for most, sizes in shared_pool().run(peak, kind, ranks=ranks):
        padded = sum(math.ceil(size / ranks) for size in sizes)
        assert padded * 4 <= most <= 4 * (padded + 4 * max(sizes)) < 4 * 0.75 * sum(sizes)


def engine(group, stage, compute=torch.float32):
    return Engine(GPT(CONFIG), group, precision=Precision(compute), schedule=constant, lr=1e-3, zero=stage)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_change_inside_gathered_parameters_reaches_masters_and_every_rank(stage, compute):
    def change(group):
        run = engine(group, stage, compute)
        before = {name: m.clone() for name, m in masters(run)}
        gain = run.model.blocks[1].mlp_norm.weight
        with GatheredParameters([gain], modifier_rank=1), torch.no_grad():
            if group.rank == 1:
                gain[3] = 7.0
        with GatheredParameters(gain):
            assert gain[3] == 7.0 and gain[4] == 1.0
        after = dict(masters(run))
        moved = sum(int((after[name] != before[name]).sum()) for name in before)
        run.sharded.publish()
        with GatheredParameters(gain):
            assert gain[3] == 7.0
        return moved

    moved = run_threads(change, 3)
    assert (moved == [1, 1, 1]) if stage == 0 else (sum(moved) == 1)  # no other master lost its precision


def masters(run):
    return [(f"{index}", unit.master) for index, unit in enumerate(run.sharded.units)]


def test_a_change_that_nobody_owns_is_an_error():
    def change(group):
        run = engine(group, 3)
        with GatheredParameters([run.model.norm.weight]), torch.no_grad():
            run.model.norm.weight.fill_(2.0)

    with pytest.raises(UserError, match="modifier_rank=0"):
        run_threads(change, 2)


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_a_replacement_that_nobody_owns_is_an_error_too(stage):
    """`p.data = value` is no change of the tensor that was there. No stage: a parameter that no engine has."""
    group = SoloGroup()
    with Init(group):
        model = nn.Linear(1, 1, bias=False)
    p = model.weight if stage is None else engine(group, stage).model.norm.weight
    with pytest.raises(UserError, match="modifier_rank=0"), GatheredParameters(p):
        p.data = p.data.clone()


def test_parameters_that_are_not_to_be_gathered_stay_released():
    with Init(SoloGroup()):
        model = nn.Linear(1, 1)
    with GatheredParameters(model.parameters(), enabled=False):
        assert owner_of(model.weight).is_released


def test_a_released_parameter_shows_its_name_and_shape_and_no_memory():
    def look(group):
        run = engine(group, 3)
        p = run.model.blocks[0].mlp.up.weight
        assert p.shape == (64, 32) and p.dim() == 2 and p.size(0) == 64 and len(p) == 64 and p.dtype == torch.float32
        assert "released parameter blocks.0.mlp.up.weight of shape (64, 32)" in repr(p)
        for read in (
            lambda: p + 1,
            lambda: p.sum(),
            lambda: p.tolist(),
            lambda: p[0],
            lambda: p.data,
            lambda: p.clone(),
        ):
            with pytest.raises(UserError, match="blocks.0.mlp.up.weight is released.*GatheredParameters"):
                read()
        return sum(p.numel() for p in run.model.parameters())

    assert run_threads(look, 2) == [sum(p.numel() for p in GPT(CONFIG).parameters())] * 2


def test_a_view_kept_from_a_look_stays_readable_and_training_goes_on():
    """The memory under it is not taken back: to read it would kill the process."""

    def look(group):
        run = engine(group, 3)
        with run.sharded.gathered():
            kept = {name: p.detach() for name, p in run.model.named_parameters()}
        with GatheredParameters([run.model.norm.weight]):
            gain = run.model.norm.weight.detach()
        tokens = torch.arange(8)[None]
        zeros = torch.zeros_like(tokens)
        for _ in range(2):
            run.train_step([MicroBatch(tokens, tokens, tokens, zeros, zeros)])
        fresh = GPT(CONFIG)
        assert all(torch.equal(kept[name], p) for name, p in fresh.named_parameters()) and gain.eq(1).all()
        with run.sharded.gathered():
            assert not torch.equal(run.model.embed.tokens.weight, kept["embed.tokens.weight"])

    run_threads(look, 3)
