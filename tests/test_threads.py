"""Laws of thread ranks: collectives are their definitions, mistakes are found when made, order is kept."""

import re
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.collective.group import CollectiveError, SoloGroup
from minispeed.collective.launch import launch
from minispeed.collective.world import current_world
from minispeed.errors import UserError
from minispeed.mesh import Mesh
from minispeed.testing.strategies import meshes, ranks, seeds, sizes

dtypes = st.sampled_from(["float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"])


def drawn(seed, rank, size, dtype):
    """Small integers (so that sums are exact in every dtype), different on every rank."""
    generator = torch.Generator().manual_seed(seed + rank)
    return torch.randint(0, 5, (size,), generator=generator).to(getattr(torch, dtype))


def reduced(xs, op):
    """The definition, on all ranks' tensors at once."""
    stacked = torch.stack(xs)
    if xs[0].dtype == torch.bool:
        return stacked.all(0) if op == "min" else stacked.any(0)
    return {"sum": stacked.sum(0), "max": stacked.amax(0), "min": stacked.amin(0)}[op].to(xs[0].dtype)


def same_bits(x, y):
    """Whether dtype and bytes agree; to `torch.equal`, a bool whose byte is 2 is True."""
    return x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def all_collectives(world, seed, size, dtype, root):
    """Every collective on the same drawn input; returns the results in a fixed order."""
    group, n, dt = world.group, world.size, getattr(torch, dtype)
    small, large = drawn(seed, world.rank, size, dtype), drawn(seed, world.rank, n * size, dtype)
    results = []
    for op in ("sum", "max", "min"):
        x = small.clone()
        group.all_reduce(x, op).wait()
        results.append(x)
    gathered, inside_out = torch.empty(n * size, dtype=dt), torch.empty(n * size, dtype=dt)
    group.all_gather(gathered, small).wait()
    mine = inside_out[world.rank * size : (world.rank + 1) * size]
    mine.copy_(small)
    group.all_gather(inside_out, mine).wait()
    scattered, swapped, sent = torch.empty(size, dtype=dt), torch.empty(n * size, dtype=dt), small.clone()
    group.reduce_scatter(scattered, large).wait()
    group.all_to_all(swapped, large).wait()
    group.broadcast(sent, root).wait()
    return [*results, gathered, inside_out, scattered, swapped, sent]


def definitions(rank, n, seed, size, dtype, root):
    """What `all_collectives` must return on one rank."""
    smalls = [drawn(seed, r, size, dtype) for r in range(n)]
    larges = [drawn(seed, r, n * size, dtype) for r in range(n)]
    mine = slice(rank * size, (rank + 1) * size)
    return [
        *(reduced(smalls, op) for op in ("sum", "max", "min")),
        torch.cat(smalls),
        torch.cat(smalls),
        reduced(larges, "sum")[mine],
        torch.cat([large[mine] for large in larges]),
        smalls[root],
    ]


@given(ranks, sizes, dtypes, seeds, st.integers(0, 6), st.booleans())
def test_collectives_are_their_definitions(n, size, dtype, seed, root, lockstep):
    args = (seed, size, dtype, root % n)
    for rank, got in enumerate(launch(all_collectives, *args, ranks=n, lockstep=lockstep)):
        for ours, expected in zip(got, definitions(rank, n, *args), strict=True):
            assert same_bits(ours, expected)


@given(sizes, dtypes, seeds)
def test_a_group_of_one_needs_no_threads(size, dtype, seed):
    solo = type("World", (), {"group": SoloGroup(), "rank": 0, "size": 1})
    for ours, expected in zip(
        all_collectives(solo, seed, size, dtype, 0), definitions(0, 1, seed, size, dtype, 0), strict=True
    ):
        assert torch.equal(ours, expected)


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), sizes), max_size=12))
def test_messages_of_one_exchange_arrive_in_order(n, messages):
    """Any set of messages, several between the same two ranks and some to myself among them."""
    messages = [(source % n, target % n, size) for source, target, size in messages]

    def step(world):
        sends = [(torch.full((k,), float(i)), b) for i, (a, b, k) in enumerate(messages) if a == world.rank]
        recvs = [(i, torch.empty(k), a) for i, (a, b, k) in enumerate(messages) if b == world.rank]
        world.group.exchange(sends, [(x, peer) for _, x, peer in recvs]).wait()
        return all((x == i).all() for i, x, _ in recvs)

    # between two ranks the sizes must come in the same order on both sides: they do, both follow `messages`
    assert all(launch(step, ranks=n))


@given(meshes(largest=12), st.lists(st.sampled_from(["pp", "dp", "sp", "tp"]), unique=True))
def test_subgroups_are_the_lines_of_the_mesh(mesh, axes):
    def total(world):
        x = torch.tensor([2**world.rank])
        group = world.subgroup(mesh.lines(*axes))
        group.all_reduce(x).wait()
        return x.item(), group.members

    for rank, (held, members) in enumerate(launch(total, ranks=mesh.world)):
        assert rank in members in mesh.lines(*axes)
        assert held == sum(2**member for member in members)


def test_sums_are_in_rank_order_every_time():
    """1e16 + 1 - 1e16 depends on the order: the same bits on every rank and in every run."""
    terms = [1e16, 1.0, -1e16, 1.0]

    def total(world):
        x = torch.tensor([terms[world.rank]], dtype=torch.float64)
        world.group.all_reduce(x).wait()
        return x.item()

    expected = ((terms[0] + terms[1]) + terms[2]) + terms[3]
    assert all(launch(total, ranks=4) == [expected] * 4 for _ in range(20))


def catch(world, call):
    try:
        call(world)
    except CollectiveError as error:
        return str(error)
    return None


def line(text):
    """The number of the line of this file that holds `text` first."""
    with open(__file__) as file:
        return next(number for number, row in enumerate(file, 1) if text in row)


def other_operation(world):
    x = torch.zeros(4)
    if world.rank == 1:
        world.group.broadcast(x, 0)  # the odd call
    else:
        world.group.all_reduce(x)  # the usual call


def other_size(world):
    world.group.all_reduce(torch.zeros(4 + (world.rank == 1)))


def other_dtype(world):
    world.group.all_reduce(torch.zeros(4, dtype=torch.int32 if world.rank == 1 else torch.float32))


def other_lines(world):
    world.subgroup([[0, 1], [2]] if world.rank == 1 else [[0], [1, 2]])


def other_group(world):
    pair = world.subgroup([[0, 1], [2]])
    (pair if world.rank == 1 else world.group).all_reduce(torch.zeros(1))


def exchange_against_collective(world):
    if world.rank == 1:
        world.group.exchange([(torch.zeros(1), 0)], [])
    else:
        world.group.all_reduce(torch.zeros(1))


def message_of_another_size(world):
    x = torch.zeros(4 + world.rank)
    world.group.exchange([(x, 1)] if world.rank == 0 else [], [(x, 0)] if world.rank == 1 else [])
    world.group.all_reduce(torch.zeros(1))


def circle_of_sends(world):
    x = torch.zeros(1)
    world.group.exchange([(x, (world.rank + 1) % world.size)], [])
    world.group.exchange([], [(x, (world.rank - 1) % world.size)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            other_operation,
            r"called (broadcast from 0|all_reduce\(sum\)) of 4 float32 at .*, but rank . called",
        ),
        (other_size, r"of [45] float32 at .*, but rank . called all_reduce\(sum\) of [54] float32"),
        (
            other_dtype,
            r"of 4 (float32|int32) at .*, but rank . called all_reduce\(sum\) of 4 (int32|float32)",
        ),
        (other_lines, r"subgroup\(\[\[0.*, but rank . called subgroup"),
        (other_group, r"ranks wait for each other: rank \d called all_reduce.*rank \d called all_reduce"),
        (exchange_against_collective, r"ranks wait for each other: .*exchange\(1 float32 to 0\)"),
        (message_of_another_size, r"4 float32 to 1.*5 float32 from 0|5 float32 from 0.*4 float32 to 1"),
        (circle_of_sends, r"ranks wait for each other: (.*exchange\(1 float32 to \d\)){3}"),
    ],
)
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.timeout(20)
def test_a_mistake_raises_on_every_rank_with_the_call_sites(call, message, lockstep):
    heard = []

    def listen(world):
        heard.append(catch(world, call))
        raise CollectiveError("seen")

    with pytest.raises(CollectiveError, match=message) as error:
        launch(listen, ranks=3, lockstep=lockstep)
    assert lockstep or len(heard) == 3  # in lockstep, a rank whose turn never came has called nothing
    assert set(heard) == {str(error.value)}  # every rank, the same words
    assert len(re.findall(rf"{__file__}:\d+ in {call.__name__}", str(error.value))) >= 2


def test_call_sites_are_the_lines_of_the_two_calls():
    with pytest.raises(CollectiveError) as error:
        launch(other_operation, ranks=2)
    assert f"{__file__}:{line('# the odd call')} in" in str(error.value)
    assert f"{__file__}:{line('# the usual call')} in" in str(error.value)


@pytest.mark.timeout(20)
def test_a_rank_that_returned_is_missed_at_once():
    def early(world):
        if world.rank != 1:
            world.group.all_reduce(torch.zeros(1))

    with pytest.raises(CollectiveError, match=r"rank \d called all_reduce.* in early, but rank 1 has returned"):
        launch(early, ranks=3)


def test_a_circle_through_three_ranks_is_found_while_a_fourth_still_runs():
    running = threading.Event()

    def circle(world):
        if world.rank == 3:
            assert running.wait(20), "the circle was not found while this rank was running"
            return
        try:
            world.group.exchange([(torch.zeros(1), (world.rank + 1) % 3)], [])
        finally:
            running.set()

    with pytest.raises(CollectiveError, match="ranks wait for each other"):
        launch(circle, ranks=4)


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.timeout(20)
def test_a_rank_that_raises_frees_the_others_and_its_error_is_shown(lockstep):
    freed = Counter()

    def fail(world):
        if world.rank == 2:
            raise KeyError("mine")
        try:
            world.group.all_reduce(torch.zeros(1))
        except CollectiveError as error:
            freed[str(error)] += 1
            raise

    with pytest.raises(KeyError, match="mine"):
        launch(fail, ranks=4, lockstep=lockstep)
    assert all("rank 2 raised: KeyError('mine')" in text for text in freed)
    assert lockstep or sum(freed.values()) == 3


def test_lockstep_prints_in_rank_order(capfd):
    def talk(world):
        pair = world.subgroup([[0, 2], [1, 3]])
        for step in range(3):
            print(step, world.rank)
            (pair if step == 1 else world.group).all_reduce(torch.zeros(1))

    for _ in range(5):
        launch(talk, ranks=4, lockstep=True)
        rows = capfd.readouterr().out.splitlines()
        assert [row for row in rows if row[0] != "2"] == [f"{step} {rank}" for step in (0, 1) for rank in range(4)]
        assert sorted(rows[8:]) == [f"2 {rank}" for rank in range(4)]


def test_one_rank_at_a_time_in_lockstep():
    running = Counter()

    def step(world):
        for _ in range(5):
            running["now"] += 1
            alone = running["now"] == 1
            torch.ones(50) @ torch.ones(50)
            running["now"] -= 1
            assert alone
            world.group.all_reduce(torch.zeros(1))

    launch(step, ranks=4, lockstep=True)


def test_functions_of_the_prompt_run_on_threads():
    scope = {}
    exec("def f(world): return world.rank, world.size", scope)
    assert launch(scope["f"], ranks=3) == [(0, 3), (1, 3), (2, 3)]


def test_the_world_is_known_to_its_thread_only():
    assert launch(lambda world: current_world() is world, ranks=3) == [True] * 3
    assert (current_world().rank, current_world().size) == (0, 1)


def test_backward_runs_in_the_thread_of_its_rank():
    def step(world):
        seen = []
        x = torch.ones(1, requires_grad=True)
        x.register_hook(lambda grad: seen.append(threading.current_thread().name))
        (2 * x).sum().backward()
        return seen, torch._C._is_multithreading_enabled()  # what decides it for tensors on a GPU

    assert launch(step, ranks=3) == [(["rank 0"], False), (["rank 1"], False), (["rank 2"], False)]
    assert torch._C._is_multithreading_enabled()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda g: g.all_gather(torch.zeros(5), torch.zeros(2)),
            "over 2 ranks: x has 2 elements, out 5; try: out of 4",
        ),
        (
            lambda g: g.reduce_scatter(torch.zeros(2), torch.zeros(2)),
            "x has 2 elements, out 2; try: out of 1",
        ),
        (
            lambda g: g.all_to_all(torch.zeros(3), torch.zeros(3)),
            "x has 3 elements; try: a multiple of the number",
        ),
        (lambda g: g.all_reduce(torch.zeros(2, 2).t()[:1]), r"x of shape \(1, 2\) is not contiguous"),
        (lambda g: g.all_reduce(torch.zeros(2), "mean"), "no reduction 'mean'; try: sum, max, min"),
        (lambda g: g.broadcast(torch.zeros(2), 2), "root 2 in a group of 2"),
        (lambda g: g.exchange([(torch.zeros(2), -1)], []), "exchange with rank -1 in a group of 2"),
        (
            lambda g: g.all_gather(torch.zeros(4), torch.zeros(2, dtype=torch.int64)),
            "out is torch.float32 on cpu, x",
        ),
        (lambda g: g.subgroup([[0]]), r"the lines hold the ranks \[0\] of a group of 2"),
        (lambda g: g.subgroup([[1, 0]]), r"the line \[1, 0\] is not in rank order; try: \[0, 1\]"),
    ],
)
def test_wrong_buffers_name_the_numbers(call, message):
    with pytest.raises(UserError, match=message):
        launch(lambda world: call(world.group), ranks=2)


def test_meshes_of_the_wrong_size_are_named_before_anybody_waits():
    with pytest.raises(UserError, match="the lines hold the ranks"):
        launch(lambda world: world.subgroup(Mesh(world=2, dp=2).lines("dp")), ranks=4)
