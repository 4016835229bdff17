"""Laws of the trace: what it says a collective sends is what its ring sends, byte for byte."""

import math

import torch
from hypothesis import given, strategies as st

from minispeed.collective import rings
from minispeed.collective.launch import launch
from minispeed.collective.trace import Trace, Traced
from minispeed.testing.strategies import ranks, sizes


def sent_by_each(world, size, dtype, root):
    """(what the trace says, what the ring's messages add up to) for every collective."""
    n, dt = world.size, getattr(torch, dtype)
    small, large = torch.zeros(size, dtype=dt), torch.zeros(n * size, dtype=dt)
    plain, ringed = Trace(), Trace()
    group, messages = Traced(world.group, plain), Traced(world.group, ringed)
    calls = {
        "all_reduce": [small],
        "all_gather": [large, small],
        "reduce_scatter": [small, large],
        "broadcast": [small, root],
    }
    figures = []
    for kind, args in calls.items():
        ringed.clear()
        getattr(group, kind)(*args).wait()
        getattr(rings, kind)(messages, *args)
        figures.append((kind, plain.sent(kind), ringed.sent()))
        assert ringed.sent("recv") == 0
    return figures


@given(ranks, sizes, st.sampled_from(["float64", "float32", "bfloat16", "bool"]), st.integers(0, 6))
def test_bytes_sent_are_those_of_the_rings_messages(n, size, dtype, root):
    per_rank = launch(sent_by_each, size, dtype, root % n, ranks=n)
    for figures in per_rank:
        assert all(said == counted for _, said, counted in figures)
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    totals = {
        kind: sum(dict((k, s) for k, s, _ in figures)[kind] for figures in per_rank) for kind, _, _ in per_rank[0]
    }
    whole = n * size * width
    assert totals == {
        "all_reduce": 2 * size * width * (n - 1),
        "all_gather": whole * (n - 1),
        "reduce_scatter": whole * (n - 1),
        "broadcast": size * width * (n - 1),
    }


def test_events_name_kind_group_rank_peer_bytes_and_time():
    def talk(world):
        trace = Trace()
        pair = Traced(world.subgroup([[0, 2], [1, 3]]), trace, name="dp")
        x, y = torch.zeros(6), torch.zeros(6)
        pair.exchange([(x, 1 - pair.rank), (x, pair.rank)], [(y, 1 - pair.rank), (y, pair.rank)]).wait()
        pair.all_to_all(y, x).wait()
        Traced(world.group, trace).broadcast(x, 3).wait()
        assert all(0 <= event.start <= event.end for event in trace.events)
        return trace

    for rank, trace in enumerate(launch(talk, ranks=4)):
        other, children = (rank + 2) % 4, {3: 2, 0: 1}.get(rank, 0)
        assert [event[:6] for event in trace.events] == [
            ("send", "dp", rank, other, 24, 24),
            ("send", "dp", rank, rank, 24, 0),
            ("recv", "dp", rank, other, 24, 0),
            ("recv", "dp", rank, rank, 24, 0),
            ("all_to_all", "dp", rank, None, 24, 12),
            ("broadcast", "world", rank, 3, 24, 24 * children),
        ]
        assert trace.sent(group="dp") == 36
        assert trace.count() == 6 and trace.count("send", group="dp") == 2


def test_a_call_ends_when_wait_returns_and_only_once():
    class Slow:
        rank, size, members = 0, 2, (0, 1)

        def all_reduce(self, x, op):
            return self

        def wait(self):
            waits.append(len(trace.events))

    trace, waits = Trace(), []
    work = Traced(Slow(), trace).all_reduce(torch.zeros(3), "sum")
    assert trace.events == []
    work.wait()
    work.wait()
    assert waits == [0, 1] and trace.count("all_reduce") == 1
    assert not math.isnan(trace.events[0].end)


def test_a_traced_subgroup_keeps_the_trace():
    def talk(world):
        trace = Trace()
        Traced(world.group, trace, name="world").subgroup([[0, 1], [2]]).all_reduce(torch.zeros(4)).wait()
        return trace.sent("all_reduce", group="world")

    assert launch(talk, ranks=3) == [16, 16, 0]
