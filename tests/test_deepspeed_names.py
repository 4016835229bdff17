"""Laws of DeepSpeed's calls that need no engine: the same values on any ranks; sentences for what cannot be."""

import argparse
import copy
import csv
import json
import math
import os
import random
import socket
import subprocess
import sys
import threading
import types
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import given, strategies as st
from torch import nn

import minispeed
from minispeed import comm, zero
from minispeed.collective.group import CollectiveError, SoloGroup
from minispeed.collective.world import World, current_world, inside
from minispeed.deepspeed import checkpointing, logging as words, lr_schedules as schedulers, monitor, timers
from minispeed.deepspeed.accelerator import TENSORS, Accelerator
from minispeed.deepspeed.adam import DeepSpeedCPUAdam, FusedAdam
from minispeed.deepspeed.comm import exchange
from minispeed.deepspeed.devices import OnDevice
from minispeed.deepspeed.loader import RepeatingLoader, make_loader
from minispeed.errors import UserError
from minispeed.optim import SGD
from minispeed.schedules import SCHEDULES, schedule_by_name
from minispeed.testing.pool import shared_pool
from minispeed.zero.absent import owner_of

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def settled():
    """This process is a world of one, until the test is over."""
    minispeed.init_distributed()
    yield
    comm.destroy_process_group()


# ------------------------------------------------------------------------------------------ who is there


def test_alone_a_script_is_one_rank_on_every_thread():
    assert not comm.is_initialized()
    with pytest.raises(UserError, match=r"nobody knows yet.*try: deepspeed.init_distributed\(\)"):
        comm.get_rank()
    minispeed.init_distributed(dist_backend="gloo")
    world = current_world()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(current_world()))
    thread.start()
    thread.join()
    minispeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=9))
    assert current_world() is world is seen[0] and isinstance(world.group, SoloGroup)
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 0)
    assert not torch.autograd.is_multithreading_enabled()
    assert not torch.distributed.is_initialized()
    comm.destroy_process_group()
    assert not comm.is_initialized() and torch.autograd.is_multithreading_enabled()


def who(world):
    minispeed.init_distributed("gloo", rank=0, world_size=99)
    comm.destroy_process_group()
    comm.barrier()
    return current_world() is world, comm.get_rank(), comm.get_local_rank(), comm.get_world_size()


def test_inside_launch_the_world_that_stands_stays():
    expected = [(True, rank, rank, 3) for rank in range(3)]
    assert minispeed.launch(who, ranks=3) == shared_pool().run(who, ranks=3) == expected


SCRIPT = """
import os
import sys
import torch
import torch.distributed
import minispeed as deepspeed
import minispeed.comm as dist
from minispeed.deepspeed.groups import group_of

rank, file, port = int(sys.argv[1]), *sys.argv[2:]

def check(way):
    x = torch.tensor([rank + 1.0])
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    theirs = torch.distributed.new_group([0, 1])
    y = torch.tensor([rank + 1.0])
    dist.all_reduce(y, group=theirs)
    assert group_of(torch.distributed.group.WORLD) is dist.get_world_group()
    dist.all_reduce(y, op=torch.distributed.ReduceOp.MAX, group=torch.distributed.group.WORLD)
    print(way, x.item(), y.item(), dist.get_rank(theirs), dist.get_local_rank(), dist.get_world_size(), flush=True)

deepspeed.init_distributed("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
check("file")
deepspeed.init_distributed("nccl")
dist.destroy_process_group()
place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
deepspeed.init_distributed()
check("environment")
dist.destroy_process_group()
torch.distributed.init_process_group("gloo", init_method=f"file://{file}-2", rank=rank, world_size=2)
deepspeed.init_distributed(dist_init_required=False)
check("adopted")
torch.distributed.destroy_process_group()
"""


def test_processes_meet_in_a_file_by_the_environment_or_have_met(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(rank), str(tmp_path / "meet"), port],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (out, err) in enumerate(said):
        ways = ("file", "environment", "adopted")
        assert out.splitlines() == [f"{way} 1.5 3.0 {number} {number} 2" for way in ways], err
        assert ("init_distributed('nccl'): the ranks talk over" in err) == (number == 0)
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (dict(dist_backend="nccll"), {}, "no backend 'nccll'; try: nccl"),
        (dict(dist_backend="mpi"), {}, "no backend 'mpi'; try: nccl or gloo"),
        (dict(rank=1), {}, "rank 1 of -1; try: rank and world_size, or neither"),
        (dict(world_size=2), {}, "rank -1 of 2; try: rank and world_size"),
        (dict(init_method="tcp://x:1"), {}, "init_method is 'tcp://x:1', and nobody says which rank this is"),
        (dict(dist_init_required=False), {}, "no process group; try: dist_init_required=True"),
        ({}, {"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes, and none is told where they meet"),
    ],
)
def test_who_cannot_be_found_is_told(monkeypatch, arguments, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        minispeed.init_distributed(**arguments)
    assert message in str(caught.value)
    assert not comm.is_initialized()


# ------------------------------------------------------------------------------------------ collectives

shapes = st.lists(st.integers(0, 4), max_size=3)


def values(seed, rank, shape, spread=9):
    """Small whole numbers, so that every sum is exact."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-spread, spread, tuple(shape), generator=generator).double()


def strided(x):
    """The same tensor, not contiguous where it can be: every second number of a longer one."""
    return torch.stack([x, x + 0.5], dim=-1)[..., 0]


def reductions(world, seed, shape, is_async):
    everyone = [values(seed, rank, shape) for rank in range(world.size)]
    stacked = torch.stack(everyone)
    expected = {
        comm.ReduceOp.SUM: stacked.sum(0),
        comm.ReduceOp.AVG: stacked.sum(0) / world.size,
        comm.ReduceOp.MAX: stacked.amax(0),
        comm.ReduceOp.MIN: stacked.amin(0),
        torch.distributed.ReduceOp.SUM: stacked.sum(0),
    }
    root = seed % world.size
    for op, total in expected.items():
        x, y = strided(everyone[world.rank]), nn.Parameter(everyone[world.rank].clone())
        handle = comm.all_reduce(x, op=op, async_op=is_async)
        assert (handle is not None) == is_async
        if handle is not None:
            handle.wait()
            handle.wait()
        comm.reduce(y, root, op)
        assert torch.equal(x, total) and torch.equal(y, total if world.rank == root else everyone[world.rank])
    x = strided(everyone[world.rank])
    comm.broadcast(x, src=root)
    assert torch.equal(x, everyone[root])


def layouts(world, seed, shape, is_async):
    rank, size = world.rank, world.size
    everyone = [values(seed, r, shape) for r in range(size)]
    wide = [values(seed, 100 + r, (size, *shape)) for r in range(size)]

    def done(handle):
        if handle is not None:
            handle.wait()

    into, places = torch.zeros(size, *shape).double(), [strided(torch.zeros(shape).double()) for _ in range(size)]
    done(comm.all_gather_into_tensor(into, everyone[rank], async_op=is_async))
    done(comm.all_gather(places, strided(everyone[rank]), async_op=is_async))
    assert torch.equal(into, torch.stack(everyone)) and torch.equal(torch.stack(places), into)
    summed, mean = (torch.zeros(shape).double() for _ in range(2))
    done(comm.reduce_scatter_tensor(summed, wide[rank], async_op=is_async))
    done(comm.reduce_scatter(mean, list(wide[rank]), comm.ReduceOp.AVG, async_op=is_async))
    total = torch.stack(wide).sum(0)[rank]
    assert torch.equal(summed, total) and torch.equal(mean, total / size)
    column, listed = torch.zeros(size, *shape).double(), [torch.zeros(shape).double() for _ in range(size)]
    done(comm.all_to_all_single(column, wide[rank], async_op=is_async))
    done(comm.all_to_all(listed, list(wide[rank]), async_op=is_async))
    assert torch.equal(column, torch.stack([one[rank] for one in wide]))
    assert torch.equal(torch.stack(listed), column)
    root = seed % size
    gathered = [torch.zeros(shape).double() for _ in range(size)] if rank == root else None
    done(comm.gather(strided(everyone[rank]), gathered, dst=root, async_op=is_async))
    assert gathered is None or torch.equal(torch.stack(gathered), into)
    mine = strided(torch.zeros(shape).double())
    done(comm.scatter(mine, list(wide[root]) if rank == root else None, src=root, async_op=is_async))
    assert torch.equal(mine, wide[root][rank])


def uneven(world, seed, sizes):
    """Rank r sends sizes[r][p] rows to rank p."""
    out = torch.full((sum(sizes[p][world.rank] for p in range(world.size)), 2), -1.0).double()
    rows = [[values(seed, 10 * r + p, (sizes[r][p], 2)) for p in range(world.size)] for r in range(world.size)]
    incoming = [sizes[p][world.rank] for p in range(world.size)]
    comm.all_to_all_single(out, torch.cat(rows[world.rank]), incoming, sizes[world.rank])
    assert torch.equal(out, torch.cat([rows[p][world.rank] for p in range(world.size)]))


def objects(world, seed):
    rank, size = world.rank, world.size
    everyone = [{"rank": r, "text": "x" * (r * seed % 50), "t": torch.arange(r)} for r in range(size)]
    got, whole = [None] * size, [rank, everyone[rank]]
    comm.all_gather_object(got, everyone[rank])
    assert [(one["rank"], one["text"], one["t"].tolist()) for one in got] == [
        (one["rank"], one["text"], one["t"].tolist()) for one in everyone
    ]
    root = seed % size
    comm.broadcast_object_list(whole, src=root)
    assert whole[0] == root and whole[1]["text"] == everyone[root]["text"]
    assert rank != root or whole[1] is everyone[root]  # who sends keeps its own


def parts(world, seed, members):
    """A group of some ranks, and those outside it."""
    group = comm.new_group(members)
    inner = sorted(members)
    assert comm.get_all_ranks_from_group(group) == inner
    if world.rank not in inner:
        assert (comm.get_rank(group), comm.get_world_size(group)) == (-1, -1)
        with pytest.raises(UserError, match=rf"rank {world.rank} called .* not in: \[{inner[0]}"):
            comm.all_reduce(torch.zeros(1), group=group)
        return
    assert (comm.get_rank(group), comm.get_world_size(group)) == (inner.index(world.rank), len(inner))
    assert comm.get_global_rank(group, comm.get_rank(group)) == world.rank
    x, root = values(seed, world.rank, (3,)), inner[seed % len(inner)]
    comm.all_reduce(x, group=group)
    assert torch.equal(x, sum(values(seed, r, (3,)) for r in inner))
    comm.broadcast(y := values(seed, world.rank, (3,)), root, group=group)
    assert torch.equal(y, values(seed, root, (3,)))
    absent = next((r for r in range(world.size) if r not in inner), 99)
    with pytest.raises(UserError, match=rf"rank {absent} is not in the group"):
        comm.broadcast(y, absent, group=group)


def circle(world, seed):
    """Each sends to the next, all at once, and then one after the other."""
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    x, y = strided(values(seed, world.rank, (2, 3))), strided(torch.zeros(2, 3).double())
    messages = [comm.P2POp(comm.isend, x, after), comm.P2POp(comm.irecv, y, before)]
    for handle in comm.batch_isend_irecv(messages):
        handle.wait()
    assert torch.equal(y, values(seed, before, (2, 3)))
    if world.rank:
        assert comm.recv(y, src=before) == before
    if after:
        comm.send(y + 1 if world.rank else y.fill_(0.0), after)
    assert world.rank == 0 or y.eq(world.rank - 1).all()


CASES = {
    "reductions": (reductions, st.tuples(st.integers(0, 99), shapes, st.booleans())),
    "layouts": (layouts, st.tuples(st.integers(0, 99), shapes, st.booleans())),
    "uneven": (
        uneven,
        st.tuples(
            st.integers(0, 99), st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=4, max_size=4)
        ),
    ),
    "objects": (objects, st.tuples(st.integers(0, 99))),
    "parts": (parts, st.tuples(st.integers(0, 99), st.sets(st.integers(0, 3), min_size=1).map(list))),
    "circle": (circle, st.tuples(st.integers(0, 99))),
}


@pytest.mark.parametrize("name", CASES)
@given(st.data(), st.integers(1, 4))
def test_calls_by_name_do_what_their_names_say(name, data, ranks):
    check, arguments = CASES[name]
    drawn = data.draw(arguments)
    ranks = 4 if name in ("parts", "uneven") else max(ranks, 2) if name == "circle" else ranks
    minispeed.launch(check, *drawn, ranks=ranks)


def test_the_same_calls_on_processes():
    for name, arguments in {
        "reductions": (3, [2, 3], True),
        "layouts": (4, [3, 1], False),
        "uneven": (5, [[0, 2, 1, 0], [1, 1, 0, 3], [2, 0, 0, 1], [1, 2, 3, 0]]),
        "objects": (7,),
        "parts": (1, [2, 0]),
        "circle": (2,),
    }.items():
        shared_pool().run(CASES[name][0], *arguments, ranks=4)


def test_what_is_empty_does_not_travel():
    class Noting(SoloGroup):
        def exchange(self, sends, recvs):
            noted.append((len(sends), len(recvs)))

    noted, empty, full = [], torch.zeros(0, 3), torch.zeros(2, 3)
    for sent, received in ((empty, full), (full, empty)):
        exchange(Noting(), [sent], [received])
    assert noted == [(0, 1), (1, 0)]


def test_two_threads_that_both_send_first_are_told():
    def both(world):
        comm.isend(torch.zeros(1), 1 - world.rank)
        comm.irecv(torch.zeros(1), 1 - world.rank)

    with pytest.raises(CollectiveError, match="ranks wait for each other"):
        minispeed.launch(both, ranks=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: comm.all_reduce(torch.zeros(1), "PRODUCT"), "no reduction PRODUCT; try: SUM, AVG, MIN, MAX"),
        (lambda: comm.all_reduce(torch.zeros(1, dtype=torch.int), comm.ReduceOp.AVG), "mean of torch.int32 is no"),
        (lambda: comm.all_gather([], torch.zeros(1)), "tensor_list has 0 tensors for 1 ranks"),
        (lambda: comm.reduce_scatter_tensor(torch.zeros(1), torch.zeros(1), comm.ReduceOp.MAX), "SUM or AVG"),
        (lambda: comm.all_to_all_single(torch.zeros(2), torch.zeros(2), [1, 1], [1, 1]), "split_sizes has 2"),
        (lambda: comm.recv(torch.zeros(1)), "recv from any rank; try: src=RANK"),
        (lambda: comm.send(torch.zeros(1), 0, tag=3), "a message with tag 3"),
        (lambda: comm.P2POp(torch.distributed.isend, torch.zeros(1), 0), "try: deepspeed.comm.isend"),
        (lambda: comm.all_gather_object([], 1), "object_list has 0"),
        (lambda: comm.barrier(group="all"), "'all' is no group"),
        (lambda: comm.broadcast(torch.zeros(1), 1), r"rank 1 is not in the group \[0\]"),
    ],
)
def test_a_call_that_cannot_be_is_told(settled, call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_summary_says_where_calls_are_counted(settled, capsys):
    comm.log_summary()
    assert "not counted here; minispeed.collective.trace.Traced" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ the device


def test_the_cpu_by_deepspeeds_names():
    cpu = Accelerator(CPU)
    assert [cpu.device_name(), cpu.device_name(3), cpu.current_device_name(), cpu.current_device()] == ["cpu"] * 4
    assert (cpu.device_count(), cpu.communication_backend_name(), cpu.is_available()) == (1, "gloo", True)
    assert cpu.supported_dtypes() == [torch.float32, torch.float16, torch.bfloat16]
    for nothing in (cpu.synchronize, cpu.empty_cache, cpu.range_pop, cpu.reset_peak_memory_stats):
        assert nothing() is None
    cpu.set_device(3)
    cpu.range_push("here")
    assert 0 < cpu.memory_allocated() <= cpu.max_memory_allocated() < cpu.total_memory()
    assert cpu.available_memory() < cpu.total_memory()
    x = torch.zeros(2)
    assert cpu.pin_memory(x) is x and cpu.on_accelerator(x) and cpu.random() is torch.random
    with cpu.stream(cpu.current_stream()):
        pass
    for name, dtype in TENSORS.items():
        made = getattr(cpu, name)([1, 0])
        assert made.dtype == dtype and made.device == CPU
    with pytest.raises(AttributeError, match="no 'device_nam'; try: device_name"):
        cpu.device_nam  # noqa: B018
    state = cpu.get_rng_state()
    drawn = [torch.rand(2) for _ in (cpu.manual_seed(5), cpu.manual_seed_all(5))]
    cpu.manual_seed(5)
    assert torch.equal(torch.rand(2), drawn[0])
    cpu.set_rng_state(state)


def test_the_device_is_that_of_this_threads_world():
    with inside(World(SoloGroup(), torch.device("cuda", 2))):
        gpu = minispeed.get_accelerator()
        assert comm.get_local_rank() == 2
    assert (gpu.device_name(), gpu.device_name(1), gpu.communication_backend_name()) == ("cuda", "cuda:1", "nccl")
    assert minispeed.launch(lambda world: minispeed.get_accelerator().device_name(world.rank), ranks=2) == ["cpu"] * 2


@pytest.mark.gpu
def test_a_gpu_by_deepspeeds_names():
    gpu = Accelerator(torch.device("cuda", 0))
    assert (gpu.current_device(), gpu.current_device_name()) == (0, "cuda:0") and gpu.device_count() >= 1
    before = gpu.memory_allocated()
    x = gpu.FloatTensor([1.0] * 1000)
    assert gpu.on_accelerator(x) and gpu.memory_allocated() > before
    assert gpu.max_memory_allocated() >= gpu.memory_allocated() < gpu.memory_reserved() < gpu.total_memory()
    assert gpu.pin_memory(torch.zeros(2)).is_pinned() and torch.float32 in gpu.supported_dtypes()
    with gpu.stream(gpu.Stream()):
        gpu.range_push("here")
        gpu.range_pop()
    gpu.synchronize()
    state = gpu.get_rng_state()
    gpu.set_rng_state(state)
    gpu.empty_cache()
    gpu.reset_peak_memory_stats()
    assert gpu.available_memory() < gpu.total_memory()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_are_born_in_a_dtype_on_a_device(requires_grad):
    with OnDevice(torch.bfloat16, "cpu"):
        made = [
            torch.empty(2),
            torch.zeros(2),
            torch.ones(2),
            torch.rand(2),
            torch.randn(2, requires_grad=requires_grad),
        ]
        made += [torch.full((2,), 1.5), torch.tensor([1.5]), torch.linspace(0, 1, 3)]
        kept = [torch.zeros(2, dtype=torch.float64), torch.tensor([1]), torch.full((2,), 1)]
        layer = nn.Linear(2, 3)
    assert {x.dtype for x in [*made, *layer.parameters()]} == {torch.bfloat16}
    assert [x.dtype for x in kept] == [torch.float64, torch.int64, torch.int64]
    assert made[4].requires_grad == requires_grad and made[4].is_leaf
    assert torch.zeros(2).dtype == torch.float32
    with OnDevice(dtype=torch.float16):
        assert {(p.device.type, p.dtype) for p in nn.Linear(2, 3).parameters()} == {("meta", torch.float16)}
    with OnDevice(dtype=torch.float16, device="meta", enabled=False):
        assert torch.zeros(2).dtype == torch.float32 and torch.zeros(2).device == CPU
    with OnDevice(dtype=None, device="meta"):
        assert torch.zeros(2).dtype == torch.float32 and torch.zeros(2).device.type == "meta"


# ------------------------------------------------------------------------------------------ data


class Numbered(SoloGroup):
    def __init__(self, rank, size):
        self.rank, self.size, self.members = rank, size, tuple(range(size))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 7), st.booleans(), st.integers(0, 9))
def test_the_ranks_share_the_rows(num_rows, ranks, micro_batch, drop_last, seed):
    state = torch.get_rng_state()
    loaders = [
        make_loader(
            list(range(num_rows)),
            micro_batch=micro_batch,
            group=Numbered(rank, ranks),
            collate_fn=list,
            drop_last=drop_last,
            seed=seed,
        )
        for rank in range(ranks)
    ]
    epochs = [[list(loader) for loader in loaders] for _ in range(2)]
    assert epochs[0] == epochs[1]  # DeepSpeed's order is that of every epoch, unless the script sets one
    share = -(-num_rows // ranks)
    num_batches = share // micro_batch if drop_last else -(-share // micro_batch)
    for loader, batches in zip(loaders, epochs[0]):
        assert len(loader) == len(batches) == num_batches
        assert all(len(batch) == micro_batch for batch in batches[:-1])
    if not drop_last:
        rows = [row for batches in epochs[0] for batch in batches for row in batch]
        assert set(rows) == set(range(num_rows)) and len(rows) == share * ranks
    for loader in loaders:
        loader.sampler.set_epoch(1)
    assert num_rows < 20 or drop_last or [list(loader) for loader in loaders] != epochs[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_order_is_deepspeeds_and_batches_are_tensors():
    rows = [(torch.tensor([float(row)]), row) for row in range(11)]
    for named in ({}, {"seed": 3}):
        sampler = torch.utils.data.DistributedSampler(range(11), num_replicas=2, rank=1, **named)
        batches = list(make_loader(rows, micro_batch=4, group=Numbered(1, 2), **named))
        assert torch.cat([numbers for _, numbers in batches]).tolist() == list(sampler)
        assert batches[0][0].shape == (4, 1)


@pytest.mark.parametrize(("rows", "message"), [(iter([1]), "list_iterator, of which no row"), ([], "has no rows")])
def test_data_without_rows_is_refused(rows, message):
    with pytest.raises(UserError, match=message):
        make_loader(rows, micro_batch=1, group=SoloGroup())


@given(st.lists(st.integers(), min_size=1, max_size=5), st.integers(0, 20))
def test_a_repeating_loader_is_a_circle(batches, count):
    loader = RepeatingLoader(batches)
    assert iter(loader) is loader
    assert [next(loader) for _ in range(count)] == [batches[k % len(batches)] for k in range(count)]
    assert list(RepeatingLoader([])) == []


# ------------------------------------------------------------------------------------------ time


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when told."""
    now = [100.0]
    monkeypatch.setattr(timers.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_throughput_counts_from_the_start_step_on(clock):
    said = []
    timer = timers.ThroughputTimer(12, device=CPU, start_step=2, steps_per_output=2, printing=said.append)
    timer.stop(global_step=True)
    assert timer.global_step_count == 0  # nothing was begun
    assert timer.avg_samples_per_sec() == -math.inf
    for step, seconds in enumerate([50.0, 60.0, 1.0, 2.0, 3.0]):
        for is_last in (False, True):
            timer.start()
            clock(seconds)
            timer.stop(global_step=is_last)
            clock(1000.0)  # between micro-steps nobody counts
        assert timer.global_step_count == step + 1
        if step < 2:
            assert timer.avg_samples_per_sec() == -math.inf
    assert timer.avg_samples_per_sec() == pytest.approx(12 * 3 / 12.0)
    assert timer.total_elapsed_time == 12.0 and timer.micro_step_count == 10
    (line,) = said
    assert line.startswith(
        "epoch=0/micro_step=8/global_step=4, RunningAvgSamplesPerSec=4, CurrSamplesPerSec=3, MemAllocated="
    )
    timer.update_epoch_count()
    assert (timer.epoch_count, timer.micro_step_count) == (1, 0)
    timer.start()
    clock(1.0)
    timer.stop(global_step=True, report_speed=False)
    assert len(said) == 1 and timer.avg_samples_per_sec() == pytest.approx(12 * 4 / 13.0)


def test_named_timers_add_up_and_print_one_line(clock, capsys):
    watches = timers.SynchronizedWallClockTimer(CPU)
    for seconds in (1.0, 2.0):
        with watches("forward"):
            clock(seconds)
        watches("step").start()
        clock(0.5)
        watches("step").stop()
    assert watches("forward").elapsed(reset=False) == 3000.0
    with inside(World(Numbered(1, 2), CPU)):
        watches.log(["forward"], reset=False)
    assert capsys.readouterr().out == ""
    with inside(World(Numbered(0, 2), CPU)):
        watches.log(["forward", "backward", "step"], normalizer=2)
    assert capsys.readouterr().out == "[Rank 0] time (ms) | forward: 1500.00 | step: 500.00\n"
    assert set(watches.get_timers()) == {"forward", "step"}
    watches("step").add(0.25)
    assert watches("step").elapsed() == 250.0
    watches("step").start()
    clock(4.0)
    assert watches("step").elapsed() == 4000.0  # it begins anew, and runs on
    clock(5.0)
    watches("step").stop()
    assert watches("step").elapsed() == 5000.0 and watches("step").elapsed() == watches("forward").elapsed() == 0.0
    with pytest.raises(AssertionError, match="'step' does not run"):
        watches("step").stop()
    watches("step").start()
    with pytest.raises(AssertionError, match="'step' runs already"):
        watches("step").start()


# ------------------------------------------------------------------------------------------ curves


def test_csv_files_are_laid_out_as_deepspeeds(tmp_path):
    for rank in (0, 1):
        for samples in (8, 16):  # the second is a resumed run
            other = monitor.CSVMonitor(True, str(tmp_path / "other"), rank=rank)
            curves = monitor.Monitors(monitor.CSVMonitor(True, str(tmp_path / str(rank)), "job", rank=rank), other)
            assert curves.enabled
            curves.write(samples, train_loss=torch.tensor(2.5), lr=1e-3)
            curves.write_events([("my loss", 1, samples)])
    folder = tmp_path / "0" / "job"
    read = {path.name: list(csv.reader(path.read_text().splitlines())) for path in folder.iterdir()}
    assert read == {
        "Train_Samples_train_loss.csv": [["step", "train_loss"], ["8", "2.5"], ["16", "2.5"]],
        "Train_Samples_lr.csv": [["step", "lr"], ["8", "0.001"], ["16", "0.001"]],
        "my_loss.csv": [["step", "my loss"], ["8", "1.0"], ["16", "1.0"]],
    }
    assert not (tmp_path / "1").exists()
    assert {path.name for path in (tmp_path / "other" / "DeepSpeedJobName").iterdir()} == set(read)


def test_what_is_off_writes_nothing(tmp_path):
    off = monitor.Monitors(
        monitor.CSVMonitor(False, str(tmp_path), rank=0), monitor.TensorBoardMonitor(False, str(tmp_path), rank=0)
    )
    off.write(1, lr=1.0)
    assert not off.enabled and not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_tensorboard_that_is_missing_is_told_on_every_rank(monkeypatch, rank):
    monkeypatch.setattr(monitor, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'not installed; try: python -m pip install "minispeed\[tensorboard\]"'):
        monitor.TensorBoardMonitor(True, rank=rank)


def test_tensorboard_gets_every_value(monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, log_dir):
            written.append(log_dir)

        def add_scalar(self, *event):
            written.append(event)

        def flush(self):
            written.append("flush")

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(monitor, "find_spec", lambda name: name == "tensorboard" or None)
    monitor.TensorBoardMonitor(True, "logs", "job", rank=1).write_events([("x", 1.0, 1)])
    assert written == []
    monitor.Monitors(monitor.TensorBoardMonitor(True, "logs", "job", rank=0)).write(32, lr=torch.tensor(0.5))
    assert written == [str(Path("logs") / "job"), ("Train/Samples/lr", 0.5, 32), "flush"]


def test_tensorboard_can_read_them(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed here")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor.Monitors(monitor.TensorBoardMonitor(True, str(tmp_path), "job", rank=0)).write(32, lr=0.5)
    events = EventAccumulator(str(tmp_path / "job")).Reload().Scalars("Train/Samples/lr")
    assert [(event.step, event.value) for event in events] == [(32, 0.5)]


# ------------------------------------------------------------------------------------------ learning rates

rates = st.floats(0.001, 1)
counts = st.integers(1, 12)
SETTINGS = {
    "LRRangeTest": dict(
        lr_range_test_min_lr=rates,
        lr_range_test_step_size=counts,
        lr_range_test_step_rate=rates,
        lr_range_test_staircase=st.booleans(),
    ),
    "OneCycle": dict(
        cycle_min_lr=rates,
        cycle_max_lr=rates,
        decay_lr_rate=rates,
        cycle_first_step_size=counts,
        cycle_second_step_size=counts | st.none(),
        cycle_first_stair_count=st.integers(0, 3),
        cycle_second_stair_count=st.integers(0, 3) | st.none(),
        decay_step_size=st.integers(0, 3),
        cycle_momentum=st.booleans(),
        cycle_min_mom=rates,
        cycle_max_mom=rates,
        decay_mom_rate=rates,
    ),
    "WarmupLR": dict(
        warmup_min_lr=rates,
        warmup_max_lr=rates,
        warmup_num_steps=counts,
        warmup_type=st.sampled_from(["log", "linear"]),
    ),
    "WarmupDecayLR": dict(
        total_num_steps=st.integers(12, 20),
        warmup_min_lr=rates,
        warmup_max_lr=rates,
        warmup_num_steps=counts,
        warmup_type=st.sampled_from(["log", "linear"]),
    ),
    "WarmupCosineLR": dict(
        total_num_steps=st.integers(12, 20),
        warmup_min_ratio=rates,
        warmup_num_steps=counts,
        cos_min_ratio=rates,
        warmup_type=st.sampled_from(["log", "linear"]),
    ),
}


def optimizer_of(*lrs, kind=torch.optim.Adam):
    return kind([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


@pytest.mark.parametrize("name", SETTINGS)
@given(st.data(), st.tuples(rates, rates), st.booleans())
def test_a_scheduler_sets_the_rate_of_the_coming_update(name, data, own, are_tensors):
    given_ = data.draw(st.fixed_dictionaries(SETTINGS[name]))
    optimizer = optimizer_of(*(torch.tensor(lr, dtype=torch.float64) if are_tensors else lr for lr in own))
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = getattr(schedulers, name)(optimizer, **given_)
    curve = schedule_by_name(name, **given_)
    bases = own if name == "WarmupCosineLR" else (1.0, 1.0)
    for update in range(30):
        expected = [base * curve(update) for base in bases]
        assert [float(group["lr"]) for group in optimizer.param_groups] == expected
        assert scheduler.get_lr() == scheduler.get_last_lr() == expected
        betas = (0.9, 0.999)
        if name == "OneCycle" and given_["cycle_momentum"]:
            betas = (curve.momentum(update), 0.99)
            assert scheduler.get_mom() == [betas] * 2
        assert [group["betas"] for group in optimizer.param_groups] == [betas] * 2
        assert scheduler.state_dict() == {"last_batch_iteration": update - 1}
        scheduler.step()
    assert not are_tensors or all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, before))
    scheduler.step(4)
    assert scheduler.get_lr() == [base * curve(5) for base in bases]


@pytest.mark.parametrize("name", SETTINGS)
@given(st.data())
def test_settings_may_be_given_in_deepspeeds_order(name, data):
    drawn = data.draw(st.fixed_dictionaries(SETTINGS[name]))
    assert set(drawn) == set(getattr(schedulers, name).settings) == {*SCHEDULES[name].__dataclass_fields__}
    one = getattr(schedulers, name)(optimizer_of(0.5), **drawn, last_batch_iteration=6)
    other = getattr(schedulers, name)(optimizer_of(0.5), *(drawn[setting] for setting in SETTINGS[name]), 6)
    assert one.get_lr() == other.get_lr() and one.last_batch_iteration == other.last_batch_iteration == 6
    assert one.get_last_lr() == [0.5]  # who goes on leaves the rate that the optimizer's state brings


@given(st.tuples(rates, rates), st.tuples(rates, rates), st.integers(0, 20))
def test_each_group_may_have_settings_of_its_own(lows, highs, update):
    scheduler = schedulers.WarmupLR(optimizer_of(0.3, 0.7), list(lows), highs, 9)
    scheduler.step(update - 1)
    pairs = [(lows[index], highs[index]) for index in range(2)]
    assert scheduler.get_last_lr() == [
        schedule_by_name("WarmupLR", warmup_min_lr=low, warmup_max_lr=high, warmup_num_steps=9)(update)
        for low, high in pairs
    ]
    own = schedulers.WarmupLR(optimizer_of(0.3, 0.7), warmup_num_steps=2)
    own.step(10)
    assert own.get_last_lr() == [0.3, 0.7]  # without a height of its own, up to the optimizer's


@given(st.integers(0, 20), st.integers(1, 5))
def test_a_scheduler_goes_on_from_its_state(before, after):
    whole, first = (schedulers.WarmupDecayLR(optimizer_of(0.1), 15, warmup_num_steps=4) for _ in range(2))
    for _ in range(before + after):
        whole.step()
    for _ in range(before):
        first.step()
    second = schedulers.WarmupDecayLR(optimizer_of(0.1), 15, warmup_num_steps=4)
    second.load_state_dict(first.state_dict())
    for _ in range(after):
        second.step()
    assert second.get_last_lr() == whole.get_last_lr() and second.state_dict() == whole.state_dict()


def test_a_scheduler_finds_the_optimizer_inside_a_wrapper():
    optimizer = optimizer_of(0.1)
    assert schedulers.WarmupLR(types.SimpleNamespace(optimizer=optimizer)).optimizer is optimizer
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert schedulers.VALID_LR_SCHEDULES == ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]


def test_momentum_without_betas_warns_and_stays():
    optimizer = optimizer_of(0.1, kind=SGD)
    with pytest.warns(UserWarning, match="cycles no momentum: SGD has no betas"):
        scheduler = schedulers.OneCycle(optimizer, 0.1, 1.0)
    scheduler.step()
    assert "betas" not in optimizer.param_groups[0] and optimizer.param_groups[0]["momentum"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((nn.Linear(1, 1),), {}, "Linear is no optimizer"),
        ((optimizer_of(0.1), 0.0), {"warmup_min_lr": 1.0}, "got warmup_min_lr twice; try: warmup_min_lr=1.0 alone"),
        ((optimizer_of(0.1), 0, 1, 2, "log", -1, 7), {}, "got 6 settings; try: at most 5: warmup_min_lr"),
        ((optimizer_of(0.1),), {"warmup_min": 1.0}, "no parameter 'warmup_min'; try: warmup_min_lr"),
        ((optimizer_of(0.1), [0.1, 0.2]), {}, "warmup_min_lr has 2 values, and the optimizer 1 groups"),
        ((optimizer_of(0.1),), {"warmup_type": "up"}, "no warm-up has the type 'up'"),
    ],
)
def test_settings_that_cannot_be_are_named(arguments, named, message):
    with pytest.raises(UserError, match=message):
        schedulers.WarmupLR(*arguments, **named)


# ------------------------------------------------------------------------------------------ optimizers


@pytest.mark.parametrize("kind", [FusedAdam, DeepSpeedCPUAdam])
@pytest.mark.parametrize("is_decoupled", [True, False])
@given(st.integers(0, 99), st.floats(0, 0.5))
def test_deepspeeds_adams_are_torchs(kind, is_decoupled, seed, decay):
    mode = {"adam_w_mode" if kind is FusedAdam else "adamw_mode": is_decoupled}
    start = values(seed, 0, (5,)) / 10
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = dict(lr=1e-3, betas=(0.8, 0.99), eps=1e-8, weight_decay=decay)
    reference = torch.optim.AdamW if is_decoupled else torch.optim.Adam
    both = [(ours, kind([ours], **settings, **mode)), (theirs, reference([theirs], **settings))]
    for step in range(3):
        for p, optimizer in both:
            p.grad = values(seed, step + 1, (5,))
            optimizer.step()
            optimizer.zero_grad()
            assert p.grad is None
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


def test_deepspeeds_adams_take_arguments_in_its_order():
    p = [nn.Parameter(torch.ones(1))]
    fused = FusedAdam(p, 0.1, True, (0.5, 0.6), 1e-4, False, 0.3, False, False).param_groups[0]
    on_cpu = DeepSpeedCPUAdam(p, 0.1, True, (0.5, 0.6), 1e-4, 0.3, False, False, True)
    wanted = dict(lr=0.1, betas=(0.5, 0.6), eps=1e-4, weight_decay=0.3)
    assert wanted.items() <= fused.items() and wanted.items() <= on_cpu.param_groups[0].items()
    assert not on_cpu.decoupled and DeepSpeedCPUAdam(p).decoupled and FusedAdam(p).param_groups[0]["betas"][1] == 0.999
    p[0].grad = torch.ones(1)
    FusedAdam(p, set_grad_none=False).zero_grad()
    assert p[0].grad.item() == 0.0
    for refused in (dict(amsgrad=True), dict(bias_correction=False)):
        with pytest.raises(UserError, match="; try: leaving it out"):
            FusedAdam(p, **refused)


# ------------------------------------------------------------------------------------------ parameters in pieces


WAYS = ["module", "default", "mpu", "data_parallel_group", "sequence_data_parallel_group"]


def build(world, seed, ways):
    """Build in one of several ways, look at it, change it."""

    def model():
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(values(seed, 7, p.shape))
        made[1].tied = made[0].weight
        return made

    whole = model()
    group = world.group if ways in ("module", "default") else world.subgroup([list(range(world.size))])
    if ways == "module":
        made = model()
        zero.Init(module=made)
    else:
        mpu = types.SimpleNamespace(get_data_parallel_group=lambda: group)
        named = {"default": {}, "mpu": {"mpu": mpu}}.get(ways, {ways: group})
        with zero.Init(config_dict_or_path={"anything": 1}, **named):
            made = model()
    assert all(owner_of(p).is_released for p in made.parameters())
    assert owner_of(made[0].weight).group is group
    with pytest.raises(UserError, match="is released"):
        made[0].weight.sum()
    zero.register_external_parameter(made, made[0].weight)
    zero.unregister_external_parameter(made, made[0].weight)
    with zero.GatheredParameters(made[0].weight, modifier_rank=world.size - 1, fwd_module=made):
        assert torch.equal(made[0].weight, whole[0].weight)
        with torch.no_grad():
            made[0].weight.fill_(float(world.rank))
    with zero.GatheredParameters(made.parameters()):
        assert made[0].weight.eq(world.size - 1).all() and torch.equal(made[0].bias, whole[0].bias)
        assert torch.equal(made[1].weight, whole[1].weight)


@given(st.integers(1, 4), st.integers(0, 99), st.sampled_from(WAYS))
def test_models_are_born_in_pieces_of_the_threads_world(ranks, seed, ways):
    minispeed.launch(build, seed, ways, ranks=ranks)


def test_init_starts_the_ranks_and_casts():
    assert not comm.is_initialized()
    off = zero.Init(enabled=False)
    with off, zero.GatheredParameters([], enabled=False):
        assert owner_of(nn.Linear(2, 2).weight) is None
    assert not comm.is_initialized()
    try:
        with zero.Init(dtype=torch.bfloat16, remote_device="cpu", mem_efficient_linear=False):
            layer = nn.Linear(2, 2)
        assert comm.is_initialized() and owner_of(layer.weight).is_released
        with zero.GatheredParameters(layer.weight):
            assert layer.weight.dtype == torch.bfloat16
    finally:
        comm.destroy_process_group()
    with pytest.raises(RuntimeError, match="Tensor is no torch.nn.Parameter"):
        zero.register_external_parameter(layer, torch.zeros(1))


# ------------------------------------------------------------------------------------------ words


def test_messages_come_from_the_ranks_they_are_for(capsys):
    def say(world):
        words.log_dist("one", ranks=[1])
        words.log_dist("every", ranks=[-1])
        words.log_dist("all")
        words.print_dist("first", ranks=[0])
        words.print_rank_0("zero")

    minispeed.launch(say, ranks=2, lockstep=True)
    said = [line.split("] ")[-2:] for line in capsys.readouterr().out.splitlines()]
    assert sorted(map(tuple, said)) == sorted(
        [("[Rank 1", "one"), ("[Rank 0", "first"), ("zero",)]
        + [(f"[Rank {rank}", word) for rank in (0, 1) for word in ("every", "all")]
    )
    words.log_dist("alone", ranks=[3])
    assert "[Rank -1] alone" in capsys.readouterr().out
    words.logger.setLevel("WARNING")
    try:
        words.log_dist("quiet")
        words.print_dist("loud")
    finally:
        words.logger.setLevel("INFO")
    assert capsys.readouterr().out == "[Rank -1] loud\n"


def test_memory_is_told_where_it_is_forced(capsys):
    words.see_memory_usage("here")
    assert capsys.readouterr().out == ""
    words.see_memory_usage("here", force=True)
    assert capsys.readouterr().out.startswith("here: allocated ")


def test_a_seed_is_everybodys():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = []
    for seed in (5, 5, 6):
        words.set_random_seed(seed)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[1] and not set(drawn[1]) & set(drawn[2])
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def test_flags_go_beside_the_scripts_own():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    assert minispeed.add_config_arguments(parser) is parser
    assert vars(parser.parse_args([])) == {
        "local_rank": -1,
        "deepspeed": False,
        "deepspeed_config": None,
        "deepscale": False,
        "deepscale_config": None,
    }
    given_ = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json", "--deepscale_config", "old.json"])
    assert given_.deepspeed and (given_.deepspeed_config, given_.deepscale_config) == ("ds.json", "old.json")
    tuned = minispeed.add_tuning_arguments(parser).parse_args(
        ["--lr_schedule", "OneCycle", "--cycle_momentum", "--warmup_num_steps", "7", "--cycle_max_lr", "2"]
    )
    assert (tuned.lr_schedule, tuned.cycle_momentum, tuned.warmup_num_steps) == ("OneCycle", True, 7)
    assert tuned.cycle_max_lr == 2.0 and tuned.cycle_second_step_size == -1 and not tuned.lr_range_test_staircase


@pytest.mark.parametrize("first", [True, False])
def test_a_scripts_own_local_rank_comes_before_ours(first):
    parser = argparse.ArgumentParser()
    if first:
        parser.add_argument("--local_rank", type=float, default=7.5)
    minispeed.add_config_arguments(parser)
    if not first:
        assert parser.parse_args(["--local_rank", "3"]).local_rank == 3
        parser.add_argument("--local_rank", type=float, default=7.5)
    assert parser.parse_args([]).local_rank == 7.5


# ------------------------------------------------------------------------------------------ recomputation


def test_recomputation_by_deepspeeds_names(capsys):
    calls = []

    def layer(x, *, scale):
        calls.append(scale)
        return torch.tanh(x * scale)

    grads = []
    for call in (layer, lambda x, scale: checkpointing.checkpoint(layer, x, scale=scale)):
        x = values(3, 0, (4,)).requires_grad_()
        call(x, scale=0.5).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads) and len(calls) == 3  # once; and twice where it is recomputed
    assert checkpointing.non_reentrant_checkpoint is checkpointing.checkpoint


def test_what_recomputation_cannot_is_printed_once(capsys):
    assert not checkpointing.is_configured()
    checkpointing.configure(None, num_checkpoints=4)
    assert checkpointing.is_configured() and capsys.readouterr().out == ""
    checkpointing.configure(None, deepspeed_config="ds.json", partition_activations=True, profile=True)
    assert capsys.readouterr().out == "activations are recomputed; without effect: partition_activations, profile\n"
    checkpointing.reset()
    assert not checkpointing.is_configured()


# ------------------------------------------------------------------------------------------ the configuration


def test_a_configuration_is_looked_at_by_the_names_of_its_keys(tmp_path):
    given_ = {"train_batch_size": 24, "fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    (tmp_path / "ds.json").write_text(json.dumps(given_))

    def read(world, source):
        config = minispeed.DeepSpeedConfig(source)
        return config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps

    for source in (given_, str(tmp_path / "ds.json")):
        assert minispeed.launch(read, source, ranks=3) == [(24, 8, 1)] * 3
    mpu = types.SimpleNamespace(get_data_parallel_world_size=lambda: 4)
    config = copy.copy(minispeed.DeepSpeedConfig(given_, mpu=mpu))
    assert (config.train_micro_batch_size_per_gpu, config.zero_optimization_stage, config.fp16_enabled) == (6, 2, True)
    with pytest.raises(AttributeError, match="no 'train_batch'; try: train_batch_size"):
        config.train_batch  # noqa: B018
    with pytest.raises(minispeed.DeepSpeedConfigError, match="train_batch_siz"):
        minispeed.DeepSpeedConfig({"train_batch_siz": 3})
