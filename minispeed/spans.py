"""What each rank did when, whoever noted it: rows of spans, one row a rank.

A pipeline's `Timeline` knows stage and micro-batch of each action, a `Trace` knows the bytes of each message; both
become spans here, which `chrome` writes and reads and `figures` draws. Times are microseconds, the unit of the trace
files; of a simulation one unit stands as one second, and the run says so.

Needs no torch.
"""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from minispeed.pipeline.actions import PARTNER, Kind, peer
from minispeed.pipeline.timeline import Timeline

if TYPE_CHECKING:
    from minispeed.collective.trace import Event

Unit: TypeAlias = Literal["seconds", "simulated units"]
MICRO = 1_000_000
SAME = 1e-3  # microseconds; what touches may overlap by the rounding of its times

COMPUTE = ("forward", "backward", "backward input", "backward weight")
MESSAGES = ("send", "receive", "reduce", "gather", "all to all", "broadcast")
ACTIONS: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "BI": "backward input",
    "BW": "backward weight",
    "SEND_F": "send",
    "RECV_F": "receive",
    "SEND_B": "send",
    "RECV_B": "receive",
    "REDUCE": "reduce",
}
CALLS = {
    "all_reduce": "reduce",
    "reduce_scatter": "reduce",
    "all_gather": "gather",
    "all_to_all": "all to all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
}


class Span(NamedTuple):
    """Something that a rank did for a while."""

    kind: str  # one of COMPUTE or MESSAGES; of another tool's file, whatever it says
    name: str
    start: float  # microseconds
    duration: float  # microseconds
    args: Mapping[str, Any]  # of ours: stage and micro, or group, bytes and sent; peer (of the world) of a message

    @property
    def end(self) -> float:
        """When it was over, microseconds."""
        return self.start + self.duration


class Sample(NamedTuple):
    """The memory in use from one moment on."""

    at: float  # microseconds
    bytes: int


@dataclass(frozen=True)
class Row:
    """What one rank did, and the memory that it used, where that was sampled."""

    rank: int | str  # of the world; of another tool's file, its process
    spans: list[Span]
    memory: list[Sample] = field(default_factory=list)
    name: str = ""

    @property
    def label(self) -> str:
        """What stands before the row."""
        return self.name or f"rank {self.rank}"


@dataclass(frozen=True)
class Run:
    """The rows of all ranks; what one second of their times means; and what a reader left out, by phase."""

    rows: list[Row]
    unit: Unit = "seconds"
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def start(self) -> float:
        """The first start, microseconds."""
        return min((span.start for row in self.rows for span in row.spans), default=0.0)

    @property
    def length(self) -> float:
        """The time from the first start to the last end, microseconds."""
        return max((span.end for row in self.rows for span in row.spans), default=self.start) - self.start

    @property
    def bubble(self) -> float | None:
        """The share of all ranks' time in which they do not compute, 0 to 1; None where no span computes."""
        busy = [span.duration for row in self.rows for span in row.spans if span.kind in COMPUTE]
        return 1 - sum(busy) / (len(self.rows) * self.length) if sum(busy) else None


def run_of(timeline: Timeline, unit: Unit) -> Run:
    """Return the run of a whole timeline, such as a simulated one."""
    return Run([row_of(rank, timeline=timeline) for rank in range(timeline.ranks)], unit)


def row_of(
    rank: int,
    *,
    timeline: Timeline | None = None,
    members: Sequence[int] = (),
    events: Iterable["Event"] = (),
    memory: Sequence[Sample] = (),
) -> Row:
    """Return one rank's row out of what its pipeline and its traced groups noted, on one clock.

    rank     of the world
    members  the pipeline's ranks in the world, in order; without any, they are the first of the world
    events   of the rank's traces; those of other ranks are left out

    A message between stages is in the timeline and in the events: it becomes one span, with stage, micro-batch and
    bytes. Where the two do not have as many messages to the same rank, both are kept as they are.
    """
    calls = spans_of_events(events, rank)
    if timeline is None:
        return Row(rank, calls, list(memory))
    actions = spans_of_timeline(timeline, rank, members or range(timeline.ranks))
    sizes: defaultdict[tuple[str, int | None], deque[int]] = defaultdict(deque)
    for span in calls:
        sizes[_way(span)].append(span.args["bytes"])
    counts = Counter(_way(span) for span in actions if "peer" in span.args)
    same = {way for way, count in counts.items() if count == len(sizes[way])}
    joined = [
        span._replace(args={**span.args, "bytes": sizes[_way(span)].popleft()}) if _way(span) in same else span
        for span in actions
    ]
    return Row(rank, joined + [span for span in calls if _way(span) not in same], list(memory))


def spans_of_timeline(timeline: Timeline, rank: int, members: Sequence[int]) -> list[Span]:
    """Return what a rank of the world, one of the pipeline's `members`, did in a timeline's program."""
    spans = []
    for _, action, start, end in timeline.of(members.index(rank)):
        kind = ACTIONS[action.kind]
        to = {"peer": members[peer(action, timeline.ranks)]} if action.kind in PARTNER else {}
        args = {"stage": action.stage, "micro": action.micro, **to}
        spans.append(Span(kind, f"{kind} {action.micro}", float(start * MICRO), float((end - start) * MICRO), args))
    return spans


def spans_of_events(events: Iterable["Event"], rank: int) -> list[Span]:
    """Return the calls and messages of one rank of the world."""
    spans = []
    for event in events:
        if event.rank == rank:
            to = {} if event.peer is None else {"peer": event.peer}
            args = {"group": event.group, "bytes": event.bytes, "sent": event.sent, **to}
            start, duration = event.start * MICRO, (event.end - event.start) * MICRO
            spans.append(Span(CALLS[event.kind], f"{event.kind} {event.group}", start, duration, args))
    return spans


def lanes(spans: Sequence[Span]) -> list[tuple[bool, int]]:
    """Place each span in a lane where nothing runs at the same time: (is it a message?, index of the lane).

    Messages have lanes of their own. The fewest lanes suffice; the lower are filled first.
    """
    places: list[tuple[bool, int]] = [(False, 0)] * len(spans)
    for is_message in (False, True):
        free: list[int] = []
        used: list[tuple[float, int]] = []  # end and index, a heap
        mine = [index for index, span in enumerate(spans) if (span.kind in MESSAGES) == is_message]
        for index in sorted(mine, key=lambda index: _turn(spans[index])):
            while used and used[0][0] <= spans[index].start + SAME:
                heapq.heappush(free, heapq.heappop(used)[1])
            lane = heapq.heappop(free) if free else len(used)
            heapq.heappush(used, (spans[index].end, lane))
            places[index] = (is_message, lane)
    return places


def _turn(span: Span) -> tuple[float, bool, str, float]:
    """What decides who chooses a lane first; what lasts no time leaves it at once."""
    return span.start, span.duration > 0, span.kind, -span.duration


def _way(span: Span) -> tuple[str, int | None]:
    """Which way a message goes, and to whom."""
    return span.kind, span.args.get("peer")
