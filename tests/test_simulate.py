"""Laws of simulated steps: work counted as torch counts it, calls on the right links, bubbles of the closed forms."""

import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minispeed.__main__ import main
from minispeed.axes import Layout
from minispeed.chat.simulate import letters
from minispeed.ledger.job import Job
from minispeed.mesh import AXES, Mesh
from minispeed.model.flops import step_flops
from minispeed.model.gpt import GPT, describe
from minispeed.model.presets import preset
from minispeed.pipeline.simulate import simulate
from minispeed.plan.network import Network
from minispeed.plan.step import Part, StageCost, pipeline_cost, programs, stage_costs, step
from minispeed.plan.work import block, head
from minispeed.profiles import Link, Rates
from minispeed.published import PUBLISHED
from minispeed.spans import run_of

H100 = PUBLISHED["h100"]
FREE = Link(latency=0.0, bandwidth=1e300)
NANO = preset("nano", num_layers=6, max_positions=64)
SHAPES = {
    "nano": preset("nano"),
    "rmsnorm": preset("nano", norm="rmsnorm"),
    "gpt2": preset("gpt2", model_dim=96, num_heads=4, num_kv_heads=4, head_dim=24, hidden_dim=384, vocab_size=512),
    "shared heads": preset("nano", model_dim=96, num_heads=4, num_kv_heads=2, head_dim=24, norm="rmsnorm"),
    "biases": preset("nano", qkv_bias=True, bias=True),
}
VIEWS = {"view", "t", "transpose", "_unsafe_view", "slice", "unsqueeze", "squeeze", "expand", "detach", "alias",
         "split", "split_with_sizes", "unbind", "select", "as_strided", "permute", "new_empty_strided"}  # fmt: skip
PRODUCTS = {"mm", "addmm"}


class Counting(TorchDispatchMode):
    """Count what torch carries out: operations, and the bytes that those which are no products read and write."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        self.operations += name not in VIEWS
        if name not in VIEWS | PRODUCTS:
            self.bytes += sum(x.nbytes for x in tensors([args, out]))
        return out


def tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


def machine(*, per_machine=8, link=FREE, between=FREE, flops=1e12, overhead=0.0, bandwidth=1e300, **other):
    """Return a profile whose other rates cost nothing."""
    rates = Rates(ranks=1, flops={"fp32": flops}, bandwidth=bandwidth, overhead=overhead, link=link)
    return replace(H100, per_machine=per_machine, rates=(rates,), between=between, peak={"fp32": flops}, **other)


def job(layout=Layout(), *, devices=1, rows=4, **other):
    return Job(
        **dict(model=NANO, devices=devices, rows=rows, tokens=64, micro_batch=1, layout=layout, dtype="fp32") | other
    )


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_block_does_the_operations_that_are_counted(shape):
    config, B, T = SHAPES[shape], 2, 64
    layer = GPT(config).blocks[0]
    tokens = torch.zeros(B, T, dtype=torch.long)
    more = dict(positions=None, documents=None, tasks=None, cache=None, drops=(None, None))
    x = torch.ones(B, T, config.model_dim, requires_grad=True)
    rows = describe(config, torch.float32, tokens, **more)
    with Counting() as forward:
        y = layer(x, rows)
    gradient = torch.ones_like(y)
    with Counting() as backward:
        torch.autograd.grad(y, (x, *layer.parameters()), gradient)
    said = block(config, rows=B, tokens=T, width=4)
    assert (said.forward.operations, said.backward.operations) == (forward.operations, backward.operations)
    assert said.forward.bytes == pytest.approx(forward.bytes, rel=0.05)
    assert said.backward.bytes == pytest.approx(backward.bytes, rel=0.05)


@pytest.mark.parametrize("n", [512, 1024, 4096])
def test_the_loss_does_the_operations_that_are_counted(n):
    config = preset("nano", vocab_size=2048)
    labels, features = torch.zeros(1, n, dtype=torch.long), torch.ones(1, n, 128, requires_grad=True)
    module = GPT(config).head
    with Counting() as forward:
        losses = module.losses(features, labels)
    with Counting() as backward:
        losses.sum().backward()
    said = head(config, rows=1, tokens=n, width=4)
    norm = (1, 1 + 1)  # the last norm is counted with the head; here a sum is, and its backward is a view
    assert (said.forward.operations - norm[0], said.backward.operations - norm[0]) == pytest.approx(
        (forward.operations, backward.operations), abs=1
    )


@pytest.mark.parametrize("recompute", ["none", "attention", "all", "2"])
@given(rows=st.integers(1, 3), micro=st.integers(1, 3), supervised=st.sampled_from([0.25, 1.0]))
def test_one_device_that_only_multiplies_takes_the_flops_of_the_closed_form(recompute, rows, micro, supervised):
    run = job(rows=rows * micro, micro_batch=micro, recompute=recompute, supervised=supervised)
    found = step(run, machine())
    n = round(run.rows * run.tokens * supervised)
    flops = step_flops(NANO, rows=run.rows, tokens=run.tokens, supervised=n, recompute=recompute)
    assert found.seconds == pytest.approx(flops.hardware / 1e12)
    assert found.mfu == pytest.approx(flops.model / flops.hardware)
    assert found.tokens_per_second == pytest.approx(run.rows * run.tokens / found.seconds)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
@given(p=st.integers(1, 5), groups=st.integers(1, 4), v=st.integers(1, 3))
def test_the_bubble_of_the_drawn_timeline_is_the_closed_form_where_messages_are_free(schedule, p, groups, v):
    m, v = groups * p, v if schedule == "interleaved" and p > 1 else 1
    one = StageCost(
        forward=Part(compute=1.0), backward=Part(compute=2.0), weights=1.0, reduce=0.0, send=0.0, send_back=0.0
    )
    timeline = simulate(programs(schedule, p, v, m, False), pipeline_cost([one] * (p * v)))
    expected = Fraction(p - 1, v * m + p - 1)
    assert run_of(timeline, "seconds").bubble == pytest.approx(float(expected))


@settings(deadline=None)
@given(p=st.integers(1, 4), m=st.integers(1, 6))
def test_uneven_stages_wait_for_the_slowest_of_them(p, m):
    """All forwards, then all backwards: each way takes every stage once, and the slowest m - 1 times more."""
    run, fast = job(Layout(pp=p, schedule="gpipe"), devices=p, rows=m), machine()
    costs = stage_costs(run, Network(run.mesh, fast))
    ways = [[c.forward.total for c in costs], [c.backward.total for c in costs]]
    assert step(run, fast).timeline.length == pytest.approx(sum(sum(way) + (m - 1) * max(way) for way in ways))


layouts = st.builds(
    lambda schedule, pp, sp, tp, sequence, tokens: Layout(
        pp=pp,
        schedule=schedule if pp > 1 else "1f1b",
        virtual=2 if schedule == "interleaved" and pp > 1 else 1,
        sp=sp,
        tp=tp,
        sequence=sequence,
        tokens=tokens and tp > 1,
    ),
    st.sampled_from(["gpipe", "1f1b", "interleaved", "zb_h1"]),
    *[st.sampled_from([1, 2]) for _ in range(3)],
    st.sampled_from(["ulysses", "ring"]),
    st.booleans(),
)
cases = dict(layout=layouts, dp=st.integers(1, 3), zero=st.integers(0, 3), recompute=st.sampled_from(["none", "all"]))


@settings(deadline=None)
@given(**cases, offload=st.booleans(), prefetch=st.sampled_from([0, 1]), overlap=st.booleans(), on_cpu=st.booleans())
def test_the_parts_of_a_step_are_the_whole_of_it(layout, dp, zero, recompute, offload, prefetch, overlap, on_cpu):
    devices = dp * layout.ranks
    more = dict(zero=zero, recompute=recompute, offload_optimizer=offload, prefetch=prefetch, overlap=overlap)
    found = step(job(layout, devices=devices, rows=4 * dp, dtype="bf16", **more), replace(H100, on_cpu=on_cpu))
    assert sum(found.breakdown.values()) == pytest.approx(found.seconds)
    assert all(seconds >= -1e-12 for seconds in found.breakdown.values())
    for axis, ranks in {"tp": layout.tp, "sp": layout.sp, "pp": layout.pp}.items():
        assert (found.breakdown[axis] > 0) == (ranks > 1) or axis == "sp"  # a ring's may all be hidden
    assert (found.breakdown["zero"] > 0) == (dp * layout.sp > 1)


@settings(deadline=None)
@given(**cases)
def test_whatever_may_hide_never_makes_a_step_longer(layout, dp, zero, recompute):
    run = job(layout, devices=dp * layout.ranks, rows=4 * dp, dtype="bf16", zero=zero, recompute=recompute, prefetch=1)
    bare = replace(run, overlap=False, prefetch=0)
    seconds = [step(run, H100).seconds, step(bare, H100).seconds, step(run, replace(H100, on_cpu=True)).seconds]
    assert seconds == pytest.approx(sorted(seconds))


@given(st.tuples(*[st.integers(1, 4)] * 4), st.integers(1, 12))
def test_a_group_on_several_machines_speaks_over_the_network(sizes, per_machine):
    mesh = Mesh(world=sizes[0] * sizes[1] * sizes[2] * sizes[3], **dict(zip(AXES, sizes)))
    between = Link(latency=1.0, bandwidth=1.0)
    network = Network(mesh, machine(per_machine=per_machine, between=between))
    for axis in AXES:
        machines = [{rank // per_machine for rank in line} for line in mesh.lines(axis)]
        assert (network.link(axis) == between) == any(len(ranks) > 1 for ranks in machines)
    for rank in range(mesh.pp):
        ends = [(mesh.rank(pp=rank, dp=d, sp=s, tp=t), mesh.rank(pp=(rank + 1) % mesh.pp, dp=d, sp=s, tp=t))
                for d in range(mesh.dp) for s in range(mesh.sp) for t in range(mesh.tp)]  # fmt: skip
        crosses = any(a // per_machine != b // per_machine for a, b in ends)
        assert (network.to_next(rank) == between) == crosses


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(tp=2), Layout(sp=2)])
def test_more_devices_than_one_machine_has_pay_for_the_network(layout):
    run = job(layout, devices=4, rows=8)
    slow = Link(latency=1.0, bandwidth=1e300)
    assert step(run, machine(per_machine=4, between=slow)).seconds < 1
    assert step(run, machine(per_machine=2, between=slow)).seconds > 1


@given(st.integers(2, 64), st.floats(0, 1), st.floats(1, 1e9))
def test_a_ring_sends_the_parts_of_a_buffer_round(ranks, latency, size):
    link = Link(latency=latency, bandwidth=7.0)
    network = Network(Mesh(world=ranks, dp=ranks), machine(per_machine=ranks, link=link))
    expected = (ranks - 1) * latency + size * (ranks - 1) / ranks / 7
    assert network.gather("dp", size) == pytest.approx(expected)
    assert network.all_reduce("dp", size) == pytest.approx(2 * expected)


@pytest.mark.parametrize("devices", [8, 64, 512])
def test_more_replicas_are_no_more_events(devices):
    layout = Layout(pp=4, tp=2)
    run = job(layout, devices=devices, rows=8 * devices // 8, dtype="bf16", zero=1)
    events = step(run, H100).timeline.events
    # of each micro-batch: 4 F, 4 B, and 3 messages each way at both their ends; of each stage one reduction
    assert len(events) == 8 * (4 + 4 + 3 * 2 * 2) + 4


@pytest.mark.parametrize("pp", [1, 2])
def test_reductions_are_of_each_micro_batch_from_stage_2_on(pp):
    kinds = {}
    for zero in range(4):
        run = job(Layout(pp=pp), devices=2 * pp, rows=8, zero=zero)
        events = step(run, machine()).timeline.events
        kinds[zero] = sum(event.action.kind == "REDUCE" for event in events)
    assert kinds == {0: pp, 1: pp, 2: 4 * pp, 3: 4 * pp}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_shards_send_what_the_zero_paper_says(zero):
    """In units of the parameters x (N - 1)/N: 2, 2, g + 1 and 3 g, with nothing to hide behind."""
    run = job(devices=4, rows=8, zero=zero, overlap=False)
    seen = step(run, machine(link=Link(latency=0.0, bandwidth=1e6), flops=1e12)).breakdown["zero"]
    size = sum(p.numel() for p in GPT(NANO).parameters()) * 4
    times = {0: 2, 1: 2, 2: run.micros + 1, 3: 3 * run.micros}[zero]
    assert seen == pytest.approx(times * size * 3 / 4 / 1e6, rel=1e-6)


def test_the_letters_of_a_timeline_are_what_ranks_do():
    one = StageCost(
        forward=Part(compute=1.0), backward=Part(compute=2.0), weights=1.0, reduce=0.0, send=0.0, send_back=0.0
    )
    lines = letters(simulate(programs("1f1b", 2, 1, 2, False), pipeline_cost([one] * 2)), 9)
    assert lines[:2] == ["  rank 0   |FF..BB.BB|", "  rank 1   |.FBBFBB..|"]
    assert "F forward, B backward" in lines[2]


def said(capsys, *words):
    code = main(["simulate", *words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_says_how_long_and_who_waits(capsys):
    words = ("--model", "gpt2", "--devices", "64", "--pp", "4", "--tp", "2", "--zero", "1", "--batch", "64")
    code, out, _ = said(capsys, *words)
    assert code == 0
    assert "gpt2 on 64 x h100: pp 4 x dp 8 x tp 2; 1f1b, ZeRO 1, bf16, 8 micro-batches of 1 x 1024 tokens" in out
    for what in ("a step takes", "tokens/s", "MFU", "bubble", "rank 3   bubble", "at most 4 in flight", "F forward"):
        assert what in out


def test_the_command_draws_where_it_is_told_to(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = said(capsys, "--model", "nano", "--devices", "2", "--pp", "2", "--out", str(tmp_path / "step.svg"))
    assert code == 0 and f"drawn: {tmp_path / 'step.svg'}" in out
    assert (tmp_path / "step.svg").read_text().count("rank 1")


def test_without_matplotlib_the_timeline_is_drawn_in_letters(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = said(capsys, "--model", "nano", "--devices", "2", "--pp", "2", "--out", str(tmp_path / "step.svg"))
    assert code == 0 and "F forward" in out and "drawing needs matplotlib" in out
    assert not (tmp_path / "step.svg").exists()


def test_a_deepspeed_configuration_fills_in_what_it_says(capsys, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True},
                                "zero_optimization": {"stage": 3}}))  # fmt: skip
    words = ("--model", "gpt2", "--devices", "4", "--deepspeed", str(path))
    assert "dp 4; ZeRO 3, bf16, 4 micro-batches of 2 x 1024 tokens" in said(capsys, *words)[1]
    code, _, err = said(capsys, *words, "--zero", "1")
    assert code == 2 and "--zero is 1" in err and "has 3 as ZeRO stage" in err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--model", "gpt2", "--profile", "h10"), "published: v100, a100-40gb"),
        (("--model", "gpt3"), "gpt2"),
        (("--model", "gpt2", "--profile", "v100", "--dtype", "bf16"), "no products in bf16"),
        (("--model", "gpt2", "--seq", "2048"), "--seq 1024"),
        (("--model", "gpt2", "--devices", "6", "--pp", "4"), "the world has 6"),
        (("--model", "nano", "--devices", "64", "--pp", "64"), "64"),
    ],
)
def test_what_cannot_be_simulated_is_said(capsys, words, what):
    code, _, err = said(capsys, *words)
    assert code == 2 and what in err and "Traceback" not in err


def test_simulating_needs_no_torch():
    script = "import sys; from minispeed.__main__ import main; main(['simulate', '--model', 'nano', '--pp', '2', "
    script += "'--devices', '4']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
