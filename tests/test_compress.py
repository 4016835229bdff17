"""Laws of gradients that travel as signs: nothing is lost, ranks stay equal, a message is as long as the code says."""

from math import ceil, prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

import minispeed
from minispeed.axes import Layout
from minispeed.chat.build import build_engine
from minispeed.chat.sft_options import SftOptions
from minispeed.collective.group import SoloGroup
from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Trace, Traced
from minispeed.collective.world import World, inside
from minispeed.engine import Engine, MicroBatch
from minispeed.errors import UserError
from minispeed.layout import FlatLayout
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.optim import AdamW
from minispeed.precision import Precision
from minispeed.scaler import LossScaler
from minispeed.schedules import constant
from minispeed.testing.measure import InMemory
from minispeed.testing.strategies import ranks as sizes_of_groups, seeds, shapes
from minispeed.zero.compress import Code, compress, decompress, pack, unpack
from minispeed.zero.frozen import FrozenAdamW, adamw_for
from minispeed.zero.onebit import OneBit, OneBitSum
from minispeed.zero.summing import InFull, Wire

lengths_of_blocks = st.lists(st.integers(1, 40), min_size=1, max_size=6)
CONFIG = GPTConfig(
    vocab_size=11, max_positions=16, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, hidden_dim=10
)


@given(st.lists(st.booleans(), max_size=50))
def test_bits_come_back_and_eight_are_a_byte(bits):
    x = torch.tensor(bits, dtype=torch.bool)
    assert pack(x).numel() == ceil(len(bits) / 8) and torch.equal(unpack(pack(x), len(bits)), x)


@given(lengths_of_blocks, seeds, st.sampled_from([1e-8, 1.0, 1e6]))
def test_what_is_said_and_what_is_owed_is_what_was_given(lengths, seed, size):
    x, of = draw_numbers(sum(lengths), seed) * size, torch.tensor(lengths)
    said = decompress(*compress(x, of), of)
    owed = x - said
    assert (said + owed - x).abs().max() <= 1e-12 * x.abs().max()
    assert torch.equal(said.sign(), torch.where(x >= 0, 1.0, -1.0).double())
    for block, one in zip(x.split(lengths), said.split(lengths), strict=True):
        torch.testing.assert_close(one.abs(), block.abs().mean().expand_as(one), rtol=1e-12, atol=0)


@given(st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=6), seeds)
def test_of_small_integers_bit_for_bit(lengths, seed):
    """A mean over a power of two of them is exact, and so is all that follows."""
    x = torch.randint(-64, 65, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).float()
    code = Code(tuple(lengths), len(lengths) + 2, torch.float32)
    said = code.read(code.write(x))
    assert torch.equal(said + (x - said), x)
    assert code.write(x).numel() == code.num_bytes == 4 * (len(lengths) + 2) + ceil(x.numel() / 8)


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so():
    lengths = torch.tensor([3, 2])
    said = decompress(*compress(torch.tensor([0.0, -0.0, 0.0, 1.0, -3.0]), lengths), lengths)
    assert said.tolist() == [0, 0, 0, 2, -2]
    said = decompress(*compress(torch.tensor([1.0, 1.0, 1.0, 1.0, torch.inf]), lengths), lengths)
    assert said[:3].isfinite().all() and not said[3:].isfinite().any()


@settings(deadline=None, max_examples=60)
@given(shapes, sizes_of_groups, st.booleans(), st.integers(1, 9), st.integers(0, 2), st.booleans(), seeds)
def test_over_any_number_of_steps_nothing_is_lost(shapes, ranks, whole, block, freeze_step, skips, seed):
    """What was added to the parameters, and what all owe, is the sum of the gradients of all ranks and steps.

    A step that is dropped counts for nothing. Where ranks get the whole sum, they get the same bits.
    """
    named = {str(index): shape for index, shape in enumerate(shapes)}
    total, steps = sum(map(prod, named.values())), 4
    gradients = draw_numbers(ranks * steps * total, seed).view(ranks, steps, total)

    def summed(group):
        layout = FlatLayout(named, 1 if whole else ranks)
        wire = Wire(group=group, layout=layout, whole=whole, reduce=torch.float64, exact=torch.float64, predivide=2.0)
        summing = OneBitSum(wire, OneBit(freeze_step=freeze_step, block=block))
        applied = torch.zeros(layout.size if whole else layout.shard_size, dtype=torch.float64)
        for step in range(steps):
            full = torch.zeros(layout.size, dtype=torch.float64)
            full[:total] = gradients[group.rank, step]
            work, mine = summing.start(full)
            work.wait()
            if skips and step == 2:
                summing.undo()
            else:
                applied += mine
                summing.keep()
        assert (summing.owed is None) == (freeze_step >= summing.num_updates)
        owed = torch.zeros(summing.layout.size, dtype=torch.float64) if summing.owed is None else summing.owed
        part = summing.owed_by_sum if summing.owed_by_sum is not None else owed.new_zeros(summing.layout.shard_size)
        return applied, owed, part

    applied, owed, parts = zip(*run_threads(summed, ranks), strict=True)
    if whole:
        assert all(torch.equal(one, applied[0]) for one in applied)
    reached = applied[0] if whole else torch.cat(applied)
    counted = [step for step in range(steps) if not (skips and step == 2)]
    true = gradients[:, counted].sum((0, 1)) / 2
    found = reached[:total] + sum(owed)[:total] + torch.cat(parts)[:total]
    assert total == 0 or (found - true).abs().max() <= 1e-12 * gradients.abs().max()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1])
def test_ranks_stay_bitwise_equal_and_send_what_the_code_says(ranks, stage):
    def train(group):
        trace = Trace()
        engine = make(Traced(group, trace), stage, OneBit(block=16))
        one_step(engine, group.rank)
        trace.clear()
        one_step(engine, group.rank)
        messages = sum(unit.summing.codes[0].num_bytes for unit in engine.sharded.units)
        sent = messages * (ranks - 1)
        assert trace.sent("all_to_all") == sent
        gathered = sum(unit.layout.shard_size * 8 for unit in engine.sharded.units) * (ranks - 1)
        assert trace.sent("all_gather") == (gathered if stage else sent)
        return values(engine)

    first, *others = run_threads(train, ranks)
    assert all(torch.equal(first, other) for other in others)


def test_a_message_is_a_bit_an_element_and_a_number_a_block():
    def code(group):
        layout = FlatLayout({"a": (100, 3), "b": (7,)}, group.size)
        how = OneBit(block=64)
        wire = Wire(group=group, layout=layout, whole=False, reduce=torch.float32, exact=torch.float32, predivide=1.0)
        return [(one.lengths, one.num_bytes) for one in how.summing(wire).codes]

    size = 4 * 5 + ceil(154 / 8)  # room for as many blocks as the longer list has
    assert run_threads(code, 2) == [[((64, 64, 26), size), ((64, 64, 18, 7, 1), size)]] * 2


def test_copies_of_a_parameter_that_tp_does_not_cut_stay_equal():
    """Norms lie on both ranks of tp, among slices that differ: a scale over both would pull them apart."""

    def train(group):
        engine = make(group, 0, OneBit(block=64), layout=Layout(tp=2))
        for _ in range(3):
            one_step(engine, engine.lines.dp.rank)
        with engine.sharded.gathered() as model:
            return {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name}

    first, *others = run_threads(train, 4)
    assert first and all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(pp=2, schedule="zb_h1"), Layout(sp=2), Layout(tp=2)])
@pytest.mark.parametrize("stage", [0, 1])
def test_whatever_else_is_cut_replicas_stay_bitwise_equal(layout, stage):
    def train(group):
        engine = make(group, stage, OneBit(block=16), layout=layout)
        for _ in range(2):
            one_step(engine, engine.lines.dp.rank, micro=2)
        found = {}
        for part in engine.parts:
            with part.sharded.gathered() as module:
                found |= {part.logical[name]: p.detach().clone() for name, p in module.named_parameters()}
        return engine.lines.coords, found

    for coords, found in (ranks := run_threads(train, 4)):
        for others, same in ranks:
            if all(coords[axis] == others[axis] for axis in ("pp", "tp")):
                assert all(torch.equal(x, y) for x, y in zip(found.values(), same.values(), strict=True))


def test_until_the_freeze_step_nothing_differs_from_sums_in_full():
    def train(group, how):
        engine = make(group, 0, how)
        return [(one_step(engine, group.rank), values(engine))[1] for _ in range(3)]

    plain = run_threads(lambda group: train(group, InFull()), 2)[0]
    onebit = run_threads(lambda group: train(group, OneBit(freeze_step=2)), 2)[0]
    assert [torch.equal(a, b) for a, b in zip(plain, onebit, strict=True)] == [True, True, False]


def test_a_skipped_step_leaves_what_is_owed():
    def train(group):
        engine = make(group, 0, OneBit())
        one_step(engine, group.rank)
        before = [unit.summing.owed.clone() for unit in engine.sharded.units]
        with torch.no_grad():
            for unit in engine.sharded.units:
                unit.add(next(iter(unit.parameters)), torch.full_like(next(iter(unit.parameters.values())), torch.nan))
        one_step(engine, group.rank)
        assert engine.skipped
        return all(torch.equal(a, unit.summing.owed) for a, unit in zip(before, engine.sharded.units, strict=True))

    assert run_threads(train, 2) == [True, True]


def test_a_loaded_run_owes_nothing_and_warms_up_again():
    def train(group):
        engine = make(group, 0, OneBit(freeze_step=1))
        for _ in range(2):
            one_step(engine, group.rank)
        assert all(unit.summing.owed is not None for unit in engine.sharded.units)
        engine.load(InMemory(engine.pieces()), step=2, num_updates=2)
        return all(unit.summing.owed is None and unit.summing.num_updates == 0 for unit in engine.sharded.units)

    assert run_threads(train, 1) == [True]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(zero=2), "stage 2"),
        (dict(zero=3), "stage 3"),
        (dict(precision=Precision(torch.float32, reduce=torch.float16)), "fp16"),
        (dict(compression=OneBit(block=0)), "blocks of 0"),
    ],
)
def test_where_it_cannot_be_it_is_refused(settings, says):
    how = dict(precision=Precision(torch.float32), compression=OneBit(), scaler=LossScaler()) | settings
    with pytest.raises(UserError, match=says):
        Engine(GPT(CONFIG), **how)


@given(seeds, st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=20)
def test_the_second_moment_stays_and_the_kernel_agrees_with_the_loop(seed, freeze_step, fused):
    gradients = draw_numbers(5 * 6, seed).view(5, 6)
    gradients[:, 0] = 0
    gradients[:freeze_step, 1] = 0
    start = draw_numbers(6, seed + 1)
    how = dict(lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    frozen, plain = FrozenAdamW([p], freeze_step=freeze_step, **how), AdamW([q], **how)
    w, m = start.clone(), torch.zeros(6, dtype=torch.float64)
    v = torch.zeros_like(m)
    for t, g in enumerate(gradients, 1):
        p.grad, q.grad = g.clone(), g.clone()
        frozen.step()
        plain.step()
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g * g if t <= freeze_step else v
        root = (v / (1 - 0.99 ** min(t, freeze_step))).sqrt() + 1e-8
        w = w * (1 - 0.01) - 0.1 / (1 - 0.9**t) * torch.where(v > 0, m / root, 0.0)
        torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)
        assert torch.equal(p, q) or t > freeze_step
    torch.testing.assert_close(frozen.state[p]["exp_avg_sq"], v, rtol=1e-12, atol=0)


def test_who_has_a_warm_up_freezes_and_who_has_none_does_not():
    of = [torch.nn.Parameter(torch.ones(2))]
    made = [type(adamw_for(how, lr=1.0)([{"params": of}])) for how in (InFull(), OneBit(), OneBit(freeze_step=3))]
    assert made == [AdamW, AdamW, FrozenAdamW]
    with pytest.raises(UserError, match="freeze_step 0"):
        FrozenAdamW(of, freeze_step=0)


def test_a_configuration_says_how_gradients_travel():
    """By DeepSpeed's key in which dtype; by one of our own as signs, after so many updates."""
    says = {"train_batch_size": 2, "optimizer": {"type": "AdamW"}, "communication_data_type": "bf16"}
    says |= {"compression": "onebit", "compression_freeze_step": 1}

    def train(group):
        trace = Trace()
        with inside(World(Traced(group, trace), torch.device("cpu"))):
            engine, *_ = minispeed.initialize(model=torch.nn.Linear(3, 2), config=says)
            trace.clear()
            for _ in range(2):
                engine.backward(engine(torch.ones(1, 3)).sum())
                engine.step()
        assert type(engine.core.optimizer) is FrozenAdamW
        assert {unit.summing.how for unit in engine.core.sharded.units} == {OneBit(freeze_step=1)}
        return trace.count("all_to_all"), [event.bytes for event in trace.events if event.kind == "all_reduce"]

    for compressed, summed in run_threads(train, 2):
        assert compressed == 1 and summed.count(8 * 2) == 1 and 8 * 4 not in summed


def test_options_say_it_too():
    words = dict(model="nano", data=[], out=Path("nowhere"), seq=8, batch=2, micro_batch=2, lr=1e-3, warmup=0)
    options = SftOptions(**words, weight_decay=0.1, dtype="fp32", reduce_dtype="bf16", compression="onebit")
    chat = SimpleNamespace(model=GPT(CONFIG), source=None)
    engine = build_engine(options, chat, SoloGroup(), constant)
    assert engine.precision.reduce == torch.bfloat16
    assert isinstance(engine.optimizer, FrozenAdamW) and engine.optimizer.freeze_step == options.freeze_step
    assert all(unit.summing.how == OneBit(freeze_step=options.freeze_step) for unit in engine.sharded.units)


def draw_numbers(count: int, seed: int) -> torch.Tensor:
    """Draw normal numbers, in float64, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    return x * torch.logspace(-3, 3, max(count, 1), dtype=torch.float64)[torch.randperm(count, generator=generator)]


def make(group, stage: int, how, *, layout: Layout = Layout()) -> Engine:
    return Engine(
        GPT(CONFIG).double(), group, precision=Precision(torch.float64), zero=stage, compression=how, layout=layout
    )


def one_step(engine: Engine, rank: int, *, micro: int = 1):
    tokens = (torch.arange(8)[None] * (rank + 2)) % CONFIG.vocab_size
    zeros = torch.zeros_like(tokens)
    return engine.train_step([MicroBatch(tokens, tokens.roll(-1, 1), torch.arange(8)[None], zeros, zeros)] * micro)


def values(engine: Engine) -> torch.Tensor:
    with engine.sharded.gathered() as model:
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])
