"""Laws of process ranks on gloo: the same results as thread ranks, truly asynchronous, a failure named."""

import subprocess
import sys
import time

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from test_threads import all_collectives, definitions, same_bits

from minispeed.collective import processes
from minispeed.collective.flight import FlightRecorder, last_operation
from minispeed.collective.group import CollectiveError
from minispeed.collective.launch import launch
from minispeed.errors import UserError
from minispeed.mesh import Mesh
from minispeed.testing.pool import GlooPool, shared_pool
from minispeed.testing.strategies import seeds, sizes

dtypes = st.sampled_from(["float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"])


@settings(max_examples=25)
@given(st.integers(1, 4), sizes, dtypes, seeds, st.integers(0, 3))
@example(3, 5, "bool", 0, 0)
def test_collectives_are_their_definitions(n, size, dtype, seed, root):
    args = (seed, size, dtype, root % n)
    for rank, got in enumerate(shared_pool().run(all_collectives, *args, ranks=n)):
        for ours, expected in zip(got, definitions(rank, n, *args), strict=True):
            assert same_bits(ours, expected)


def large_on_rings(world, size):
    """Collectives above the size from which they run as rings, and what they replace, on small integers."""
    n, group = world.size, world.group
    small, large = torch.arange(size) % 7 + world.rank, torch.arange(n * size) % 7 * (world.rank + 1)
    small, large = small.float(), large.float()
    gathered, scattered, summed = torch.empty(n * size), torch.empty(size), large.clone()
    calls = [
        group.all_gather(gathered, small),
        group.reduce_scatter(scattered, large),
        group.all_reduce(summed),
    ]
    for work in reversed(calls):  # the order of waiting is free
        work.wait()
    pieces = [torch.arange(size) % 7 + float(rank) for rank in range(n)]
    assert torch.equal(gathered, torch.cat(pieces))
    assert torch.equal(scattered, summed[world.rank * size : (world.rank + 1) * size])
    return gathered.nbytes


@pytest.mark.parametrize("n", [2, 3, 4])
def test_rings_carry_large_buffers(n):
    size = 400_000
    held = shared_pool().run(large_on_rings, size, ranks=n)
    assert min(held) >= processes.RING_BYTES["reduce_scatter"]
    assert held[0] < processes.RING_BYTES["all_gather"] or n > 2


def subgroup_sums(world, lines_of):
    """The sum of 2^rank over my line along each axis, nested lines included."""
    sums = []
    for lines in lines_of:
        x = torch.tensor([2**world.rank])
        group = world.subgroup(lines)
        group.all_reduce(x).wait()
        one = group.subgroup([[rank] for rank in range(group.size)])
        one.all_reduce(x).wait()
        sums.append((x.item(), group.members, one.size))
    return sums


def test_subgroups_are_the_lines_of_the_mesh():
    lines_of = [Mesh(world=4, dp=2, tp=2).lines(*axes) for axes in [("dp",), ("tp",), ("dp", "tp"), ()]]
    for rank, sums in enumerate(shared_pool().run(subgroup_sums, lines_of, ranks=4)):
        for lines, (held, members, one) in zip(lines_of, sums, strict=True):
            assert rank in members in lines
            assert held == sum(2**member for member in members)
            assert one == 1


def messages(world):
    """Two messages each way round a ring and one to myself, in one exchange; then one each way by turns."""
    group, n = world.group, world.size
    right, left = (world.rank + 1) % n, (world.rank - 1) % n
    mine = [torch.full((k,), 10.0 * world.rank + k) for k in (3, 4, 5, 0)]
    came = [torch.zeros(k) for k in (3, 4, 5, 0)]
    sends = [(mine[0], right), (mine[1], right), (mine[2], world.rank), (mine[3], left)]
    recvs = [(came[0], left), (came[1], left), (came[2], world.rank), (came[3], right)]
    group.exchange(sends, recvs).wait()
    return [x.tolist() for x in came]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_messages_of_one_exchange_arrive_in_order(n):
    for rank, came in enumerate(shared_pool().run(messages, ranks=n)):
        left = (rank - 1) % n
        assert came == [[10.0 * left + 3] * 3, [10.0 * left + 4] * 4, [10.0 * rank + 5] * 5, []]


def late(world, seconds):
    """Rank 1 comes late: how long do the calls, and the waits, of rank 0 take?"""
    x, whole, part = torch.ones(4), torch.ones(1 << 20), torch.empty((1 << 20) // world.size)
    if world.rank == 1:
        time.sleep(seconds)
    start = time.perf_counter()
    calls = [world.group.all_reduce(x), world.group.reduce_scatter(part, whole)]
    issued = time.perf_counter() - start
    for work in calls:
        work.wait()
    return issued, time.perf_counter() - start


def test_calls_return_before_the_others_have_come():
    issued, waited = shared_pool().run(late, 0.8, ranks=2)[0]
    assert issued < 0.4 < waited


def fail_on_one(world):
    if world.rank == 1:
        raise KeyError("mine")
    world.group.all_reduce(torch.zeros(1)).wait()


def who(world):
    return world.rank


def test_the_pool_shows_the_first_error_and_goes_on_with_new_processes():
    pool = GlooPool(2, timeout=10)
    try:
        with pytest.raises(KeyError, match="mine"):
            pool.run(fail_on_one, ranks=2)
        assert pool.run(who, ranks=2) == [0, 1]
        with pytest.raises(CollectiveError, match=r"rank 0 stopped at .* in late"):
            pool.run(late, 100, ranks=2, timeout=1)
    finally:
        pool.close()


def gone(world, rank):
    import os
    import signal

    world.group.all_reduce(torch.zeros(1)).wait()
    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    world.group.all_reduce(torch.zeros(2)).wait()  # the last operation


def test_a_killed_rank_ends_the_job_and_is_named():
    start = time.monotonic()
    with pytest.raises(CollectiveError, match=r"rank 1 was killed by SIGKILL") as error:
        launch(gone, 1, ranks=2, backend="gloo", timeout=60)
    assert time.monotonic() - start < 60
    assert "rank 1: 1 (done) all_reduce(sum) of 1 float32 at " in str(error.value)
    assert "rank 0: 2 (failed) all_reduce(sum) of 2 float32 at " in str(error.value)


def stray(world, how):
    world.group.all_reduce(torch.zeros(1)).wait()
    if world.rank == 1 and how == "sleeps":
        time.sleep(1000)  # the long sleep
    if world.rank == 1 and how == "returns":
        return
    if world.rank == 1 and how == "mistakes":
        world.group.all_to_all(torch.zeros(3), torch.zeros(3)).wait()
    world.group.all_reduce(torch.zeros(3)).wait()  # where they wait


@pytest.mark.parametrize(
    ("how", "message", "ranks"),
    [
        ("sleeps", r"rank 1 stopped at {file}:\d+ in stray, and the other ranks gave up waiting", 2),
        ("returns", r"rank 1 returned, and the other ranks gave up waiting for it", 2),
        (
            "mistakes",
            r"rank 1 stopped in an operation that the others were not in: 2 \(failed\) all_to_all of 3",
            3,
        ),
    ],
)
def test_when_the_timeout_strikes_the_rank_that_stopped_is_named(how, message, ranks, capfd):
    with pytest.raises(CollectiveError, match=message.format(file=__file__)) as error:
        launch(stray, how, ranks=ranks, backend="gloo", timeout=1)
    assert "rank 0: 2 (failed) all_reduce(sum) of 3 float32 at " in str(error.value)
    assert f"{__file__}:" in str(error.value)
    printed = capfd.readouterr().err  # each rank that waited prints its last operations
    waiting = [rank for rank in range(ranks) if rank != 1]
    assert all(f"rank {rank} gave up; its last operations:\n  1 (done) all_red" in printed for rank in waiting)


def error_of_its_own(world):
    if world.rank == 1:
        raise UserError("a bad value 3", fix="2")
    world.group.all_reduce(torch.zeros(1)).wait()


def test_the_error_of_a_rank_is_raised_as_it_was_with_its_traceback():
    with pytest.raises(UserError, match="a bad value 3; try: 2") as error:
        launch(error_of_its_own, ranks=2, backend="gloo", timeout=10)
    assert (error.value.what, error.value.fix) == ("a bad value 3", "2")
    assert "on rank 1:" in str(error.value.__cause__) and "in error_of_its_own" in str(error.value.__cause__)


def test_the_flight_record_outlives_its_writer(tmp_path):
    path = tmp_path / "record"
    assert last_operation(path) is None
    recorder = FlightRecorder(3, path, keep=2)
    for text in ("a", "b", "c" * 5000):
        recorder.become(recorder.begin(text), "waiting")
    assert [operation.text[0] for operation in recorder.operations] == ["b", "c"]
    assert last_operation(path).text == "c" * 1000
    operation = recorder.begin("d")
    assert last_operation(path) == operation
    assert f"{__file__}:" in operation.site


ORPHANS = """
import os, sys, time
from minispeed import launch

def sleep(world):
    print(os.getpid(), flush=True)
    time.sleep(10_000)

if __name__ == "__main__":
    launch(sleep, ranks=2, backend="gloo")
"""


@pytest.mark.timeout(120)
def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    launcher = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert all(int(launcher.stdout.readline()) for _ in range(2))
    launcher.kill()
    launcher.wait()
    assert launcher.stdout.read() == ""  # which ends when no rank holds the pipe any more: all have ended
    launcher.stdout.close()
