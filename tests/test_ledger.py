"""What the closed forms say and what real runs hold and send: equal, to the byte."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.axes import Layout
from minispeed.census import Census
from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Trace, Traced
from minispeed.engine import Engine, MicroBatch
from minispeed.ledger import Widths, held, paper_bytes, sent, shard_size
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.model.recompute import recompute
from minispeed.precision import Precision
from minispeed.schedules import constant
from minispeed.testing.measure import measure_held
from minispeed.testing.pool import shared_pool

CONFIG = preset(
    "nano", vocab_size=11, num_layers=2, model_dim=6, num_heads=1, num_kv_heads=1, head_dim=6, hidden_dim=5, tied=False
)
SCALARS = 16  # bytes: what is longer than this is no count or norm


def padding(sizes, ranks, rank):
    """Return the elements of this rank's shards that are nobody's: at the end of each unit."""
    shards = [(size, shard_size(size, ranks)) for size in sizes]
    return sum(S - max(0, min(S, size - rank * S)) for size, S in shards)


def rows(rank, micro):
    generator = torch.Generator().manual_seed(10 * rank + micro)
    tokens = torch.randint(0, 11, (2, 5), generator=generator)
    zeros = torch.zeros_like(tokens)
    return MicroBatch(tokens, tokens, torch.arange(5).expand(2, 5).contiguous(), zeros, zeros)


def make(group, stage, precision, **other):
    return Engine(GPT(CONFIG), group, precision=precision, schedule=constant, lr=1e-3, zero=stage, **other)


@given(
    ranks=st.integers(1, 8),
    stage=st.integers(0, 3),
    precision=st.builds(
        Precision,
        st.sampled_from([torch.bfloat16, torch.float32]),
        accumulate=st.sampled_from([None, torch.bfloat16]),
    ),
    micro=st.integers(1, 3),
)
def test_a_rank_holds_and_sends_what_the_closed_forms_say(ranks, stage, precision, micro):
    trace = Trace()

    def train(group):
        engine = make(Traced(group, trace), stage, precision)
        sizes = [unit.num_elements for unit in engine.sharded.units]
        step = [rows(group.rank, index) for index in range(micro)]
        engine.train_step(step)
        engine.group.all_reduce(torch.zeros(1)).wait()
        if group.rank == 0:
            trace.clear()
        engine.group.all_reduce(torch.zeros(1)).wait()
        found = measure_held(engine, lambda: engine.train_step(step))
        return found, sizes, engine.sharded.dtypes

    (_, sizes, dtypes), *_ = results = run_threads(train, ranks)
    for rank, (found, *_) in enumerate(results):
        expected = held(sizes, ranks=ranks, stage=stage, widths=Widths.of(dtypes))
        no_moments = 2 * padding(sizes, ranks, rank) * dtypes.master.itemsize if stage else 0
        assert found == replace(expected, optimizer=expected.optimizer - no_moments)
    elements = sum(event.sent for event in trace.events if event.bytes > SCALARS) / dtypes.reduce.itemsize
    assert elements == round(ranks * sent(sizes, ranks=ranks, stage=stage, micro=micro))


@given(
    dp=st.integers(2, 3),
    stage=st.integers(0, 3),
    micro=st.integers(1, 3),
    schedule=st.sampled_from(["gpipe", "1f1b", "zb_h1"]),
)
def test_each_stage_of_a_pipeline_sends_to_its_replicas_what_the_closed_form_says(dp, stage, micro, schedule):
    traces = [Trace() for _ in range(2 * dp)]

    def train(group):
        trace = traces[group.rank]
        layout = Layout(pp=2, schedule=schedule)
        engine = Engine(
            GPT(CONFIG), Traced(group, trace), layout=layout, precision=Precision(torch.float32), lr=1e-3, zero=stage
        )
        step = [rows(engine.lines.dp.rank, index) for index in range(micro)]
        engine.train_step(step)
        trace.clear()
        engine.train_step(step)
        return [unit.num_elements for part in engine.parts for unit in part.units]

    sizes = run_threads(train, 2 * dp)
    kinds = ("all_reduce", "reduce_scatter", "all_gather")  # between stages there are only messages
    found = [[e.sent for e in trace.events if e.kind in kinds and e.bytes > SCALARS] for trace in traces]
    for replicas in (range(dp), range(dp, 2 * dp)):  # those of a stage
        elements = sum(sum(found[rank]) for rank in replicas) / 4
        assert elements == round(dp * sent(sizes[replicas[0]], ranks=dp, stage=stage, micro=micro))


@given(ranks=st.integers(2, 5), threshold=st.sampled_from([0, 13, 67, 200, 10**6]), micro=st.integers(1, 2))
def test_small_units_stay_whole_at_stage_3(ranks, threshold, micro):
    """A unit under the threshold is gathered once a step, as at stage 2, and its parameters are always there."""
    trace = Trace()

    def train(group):
        engine = make(Traced(group, trace), 3, Precision(torch.float32), persistence=threshold)
        sizes = [unit.num_elements for unit in engine.sharded.units]
        step = [rows(group.rank, index) for index in range(micro)]
        engine.train_step(step)
        engine.group.all_reduce(torch.zeros(1)).wait()
        if group.rank == 0:
            trace.clear()
        engine.group.all_reduce(torch.zeros(1)).wait()
        engine.train_step(step)
        return sizes, [unit.is_released for unit in engine.sharded.units]

    sizes, released = run_threads(train, ranks)[0]
    assert released == [size >= threshold for size in sizes]
    elements = sum(event.sent for event in trace.events if event.bytes > SCALARS) / 4
    per_rank = (sent([size], ranks=ranks, stage=3 if size >= threshold else 2, micro=micro) for size in sizes)
    assert elements == round(ranks * sum(per_rank))


@pytest.mark.parametrize("what", ["none", "all", "attention"])
def test_recomputation_gathers_nothing_twice(what):
    """A layer that runs again in the backward is whole for it already, and stays so until its gradients are there."""
    trace = Trace()

    def train(group):
        engine = make(Traced(group, trace), 3, Precision(torch.float32))
        recompute(engine.model, what)
        engine.train_step([rows(group.rank, 0)])
        engine.group.all_reduce(torch.zeros(1)).wait()
        if group.rank == 0:
            trace.clear()
        engine.group.all_reduce(torch.zeros(1)).wait()
        engine.train_step([rows(group.rank, 0)])
        return [unit.num_elements for unit in engine.sharded.units]

    sizes = run_threads(train, 3)[0]
    elements = sum(event.sent for event in trace.events if event.bytes > SCALARS) / 4
    assert elements == round(3 * sent(sizes, ranks=3, stage=3))


@pytest.mark.parametrize("gradient_bytes, whole", [(2, 16), (4, 18)])
def test_the_papers_table(gradient_bytes, whole):
    """7.5 billion parameters on 64 ranks, figure 1 of the paper: 120, 31.4, 16.6 and 1.9 GB."""
    P = 7_500_000_000
    table = [paper_bytes(P, ranks=64, stage=stage, gradient_bytes=gradient_bytes) for stage in range(4)]
    assert table[0] == whole * P and table[3] == whole * P / 64
    if gradient_bytes == 2:
        assert [round(value / 1e9, 1) for value in table] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32])
def test_closed_forms_and_paper_agree_where_nothing_is_padded(stage, gradient):
    def dtypes_of(group):
        precision = Precision(torch.bfloat16, accumulate=gradient)
        return make(group, stage, precision).sharded.dtypes

    dtypes = run_threads(dtypes_of, 2)[0]
    exact = held([800, 1600], ranks=8, stage=stage, widths=Widths.of(dtypes))
    assert exact.total == paper_bytes(2400, ranks=8, stage=stage, gradient_bytes=gradient.itemsize)


def test_the_census_sees_what_autograd_holds_and_what_was_shrunk():
    x = torch.ones(1000, requires_grad=True)
    with Census([x]) as census:
        assert census.alive() == 4000
        y = (x * 2).exp()  # exp keeps its result for the backward
        z = y.sum()
        del y
        assert census.alive() == 4000 + 4000 + 4
        z.backward()
        del z
        assert census.alive() == 8000  # x and its gradient
        x.grad.untyped_storage().resize_(400)
        assert census.alive() == 4400
        x.grad = None
    assert census.peak >= 12_000


def peak(world, prefetch):
    """Return the bytes of one step beyond what is kept, on a process of its own, and the units' elements."""
    config = preset(
        "nano", vocab_size=8, num_layers=12, model_dim=32, num_heads=1, num_kv_heads=1, head_dim=32, hidden_dim=64
    )
    precision = Precision(torch.float32)
    engine = Engine(
        GPT(config), world.group, precision=precision, schedule=constant, lr=1e-3, zero=3, prefetch=prefetch
    )
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    micro = MicroBatch(tokens, tokens, torch.arange(2)[None], tokens, tokens)
    engine.train_step([micro])
    states = [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
    with Census([*states, *(unit.shard for unit in engine.sharded.units)]) as census:
        start = census.alive()
        engine.train_step([micro])
    return census.peak - start, [unit.num_elements for unit in engine.sharded.units]


def test_stage_3_never_holds_the_model_whole():
    """At its peak a step holds one unit's parameters and gradients beside the shards, with prefetch one more."""
    ranks = 4
    extra, sizes = shared_pool().run(peak, 0, ranks=ranks)[0]
    unit, whole = 4 * max(sizes), 4 * sum(sizes)
    prefetching, _ = shared_pool().run(peak, max(sizes), ranks=ranks)[0]
    # this rank's shards of all gradients; the unit; its gradient as autograd makes it and as it is sent; activations
    assert extra < whole / ranks + 4 * unit + 30_000 < 0.7 * whole
    assert extra + unit / 2 < prefetching <= extra + unit + 2_000
