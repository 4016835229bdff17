"""Run a pipeline without a model: virtual ranks with clocks, which tell how long it takes and whether it ever ends.

An action moves its rank's clock on by the action's cost. An exchange waits until each of its messages has met its
partner: the k-th message from one rank to another is the k-th that the other receives. A message begins at the later
of the two clocks. So nothing is buffered, and a program that needs buffering is a deadlock here.

MPI, the Message Passing Interface 4.0, section 3.5 on programs that need buffering. https://www.mpi-forum.org/docs/
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minispeed.errors import UserError
from minispeed.pipeline.actions import Action, Program, Value, calls, gives, needs, num_stages, partner, peer
from minispeed.pipeline.timeline import Event, Time, Timeline

PerStage = Time | Sequence[Time]


class Deadlock(UserError):
    """Ranks that wait for each other, or for one that has finished; `cycle` has each with what it waits in."""

    def __init__(self, what: str, cycle: Sequence[tuple[int, Action]]) -> None:
        super().__init__(what, fix="with_messages(programs), which finds an order that needs no buffering")
        self.cycle = list(cycle)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The time of each action, of any unit: one number for all stages, or a sequence with one for each.

    `send_f` and `send_b` are the times of a message from its stage to the next and to the one before.
    """

    f: PerStage = 1
    b: PerStage = 2
    bi: PerStage = 1
    bw: PerStage = 1
    send_f: PerStage = 0
    send_b: PerStage = 0
    reduce: PerStage = 0

    def __call__(self, action: Action) -> Time:
        """Return the time of an action; of a message, only the sender's counts."""
        time: PerStage = getattr(self, action.kind.lower())
        return time[action.stage] if isinstance(time, Sequence) else time


def simulate(programs: Sequence[Program], cost: Callable[[Action], Time]) -> Timeline:
    """Run one program on each of the virtual ranks, all from time 0.

    Raises  Deadlock, which names the cycle, if some ranks can never go on
            UserError if an action runs without its inputs, or two ends of a message disagree about it
    """
    run = _Run(programs, cost)
    ready = deque(range(len(programs)))
    while ready:
        ready.extend(run.advance(ready.popleft()))
    if run.waiting:
        raise run.deadlock()
    place = {action: index for program in programs for index, action in enumerate(program)}
    return Timeline(len(programs), sorted(run.events, key=lambda event: (event.rank, place[event.action])))


@dataclass(eq=False)
class _Exchange:
    """What a rank waits in: when it came, which messages have not met their partners, and when the last met ends."""

    rank: int
    start: Time
    unmet: list[Action]
    end: Time


class _Run:
    """The state of all ranks."""

    def __init__(self, programs: Sequence[Program], cost: Callable[[Action], Time]) -> None:
        self.ranks, self.stages, self.cost = len(programs), num_stages(programs), cost
        self.calls = [deque(calls(program)) for program in programs]  # what is still to be begun
        self.clocks: list[Time] = [0] * self.ranks
        self.values: list[set[Value]] = [set() for _ in programs]
        self.waiting: dict[int, _Exchange] = {}
        self.posted: defaultdict[tuple[int, int], deque[tuple[Action, _Exchange]]] = defaultdict(deque)  # by from, to
        self.events: list[Event] = []

    def advance(self, rank: int) -> list[int]:
        """Run a rank until it waits or has finished; return the others that can go on now."""
        freed: list[int] = []
        while self.calls[rank] and rank not in self.waiting:
            call = self.calls[rank].popleft()
            for action in call:
                self._check_inputs(rank, action)
            if call[0].kind.startswith(("SEND", "RECV")):
                freed += self._exchange(rank, call)
            else:
                start = self.clocks[rank]
                self.clocks[rank] = start + self.cost(call[0])
                self._note(rank, call[0], start, self.clocks[rank])
        return [other for other in freed if other != rank]

    def deadlock(self) -> Deadlock:
        """Follow who waits for whom until a rank comes again or has finished, and put it in words."""
        path: list[int] = []
        rank = min(self.waiting)
        while rank in self.waiting and rank not in path:
            path.append(rank)
            rank = peer(self.waiting[rank].unmet[0], self.ranks)
        path = path[path.index(rank) :] if rank in path else path
        cycle = [(member, self.waiting[member].unmet[0]) for member in path]
        text = ", ".join(f"rank {r} waits in {action} for rank {peer(action, self.ranks)}" for r, action in cycle)
        ending = "ranks wait for each other: " + text if rank in path else f"{text}, which has finished"
        return Deadlock(ending, cycle)

    def _exchange(self, rank: int, messages: list[Action]) -> list[int]:
        """Offer all messages at once; return the ranks whose exchange is complete."""
        start = self.clocks[rank]
        mine = self.waiting[rank] = _Exchange(rank, start, list(messages), start)
        freed = []
        for message in messages:
            other_rank = peer(message, self.ranks)
            way = (rank, other_rank) if message.kind.startswith("SEND") else (other_rank, rank)
            if not self.posted[way] or self.posted[way][0][1].rank == rank:
                self.posted[way].append((message, mine))
                continue
            met, other = self.posted[way].popleft()
            if partner(message) != met:
                what = f"rank {rank}'s {message} meets rank {other_rank}'s {met}"
                raise UserError(what, fix="messages between two ranks in the same order on both")
            sent = message if message.kind.startswith("SEND") else met
            end = max(start, other.start) + self.cost(sent)
            freed += self._meet(mine, message, end) + self._meet(other, met, end)
        return freed

    def _meet(self, exchange: _Exchange, message: Action, end: Time) -> list[int]:
        """Complete one message; return its rank if that was the exchange's last."""
        self._note(exchange.rank, message, exchange.start, end)
        exchange.unmet.remove(message)
        exchange.end = max(exchange.end, end)
        if exchange.unmet:
            return []
        self.clocks[exchange.rank] = exchange.end
        del self.waiting[exchange.rank]
        return [exchange.rank]

    def _note(self, rank: int, action: Action, start: Time, end: Time) -> None:
        self.events.append(Event(rank, action, start, end))
        self.values[rank].update(gives(action))

    def _check_inputs(self, rank: int, action: Action) -> None:
        for value in needs(action, self.stages):
            if value not in self.values[rank]:
                what = f"rank {rank} runs {action} without {value}"
                raise UserError(what, fix="with_messages(programs), or the actions in another order")
