"""Run a pipeline: each rank follows its program, computes its stages, and exchanges bundles with its neighbours.

A rank keeps what actions give (`actions.GIVES`) under the name of the value, and drops it after the last action of its
program that needs it: so it holds as many micro-batches as the schedule says, and no more. Messages that stand side by
side are one exchange, all in flight together. Only what holds a boundary's first message is taken apart, message by
message, for the receiver must learn what will come before it can wait for it; programs of `with_messages` allow that.

GPipe, Huang et al. 2019, section 2.3. https://arxiv.org/abs/1811.06965
Narayanan et al. 2021, section 2.2. https://arxiv.org/abs/2104.04473
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from minispeed.collective.group import Group, Message
from minispeed.errors import UserError
from minispeed.pipeline.actions import (
    BACKWARD,
    COMPUTE,
    PARTNER,
    Action,
    Kind,
    Program,
    Value,
    calls,
    gives,
    needs,
    num_stages,
    peer,
)
from minispeed.pipeline.bundle import (
    Bundle,
    Forms,
    buffers,
    check_alike,
    forms_of,
    header_of,
    read_header,
)
from minispeed.pipeline.clock import Clock, WallClock
from minispeed.pipeline.stage import Made, Stage
from minispeed.pipeline.timeline import Event, Time, Timeline

Observe = Callable[[int, Bundle], None]


def ignore(micro: int, outputs: Bundle) -> None:
    """Observe nothing."""


def execute(
    programs: Sequence[Program],
    stages: Mapping[int, Stage],
    group: Group,
    *,
    observe: Observe = ignore,
    clock: Clock | None = None,
    device: torch.device = torch.device("cpu"),
) -> Timeline:
    """Run my program; every rank of the group calls this with the programs of all.

    programs  of `with_messages`, REDUCE or not, or of `forward_only`: these run without autograd
    stages    those that my program runs, by their numbers
    observe   called with (micro, outputs) of the last stage, on its rank, as they are made; without their graph
    clock     the wall's if not given, in seconds; a `LogicalClock` makes the events those of `simulate`
    device    where what comes from other ranks is put
    Returns   the events of this rank (`clock.gather` has all ranks'). Gradients have been added to what was there
    Sends     each value once; for each boundary, before its first message, 8 bytes and a header
    Raises    UserError if programs and group or stages do not fit, the last stage has no loss, an action finds no
              inputs, or a stage gives bundles of different forms
    """
    _check(programs, stages, group)
    run = _Rank(programs, stages, group, observe, clock or WallClock(), device)
    mine = programs[group.rank]
    with torch.set_grad_enabled(any(action.kind in BACKWARD for action in mine)):
        for call in calls(mine):
            if call[0].kind in PARTNER:
                run.exchange(call)
            else:
                run.compute(call[0])
    return Timeline(group.size, run.events)


class _Rank:
    """What one rank holds while it runs its program."""

    def __init__(
        self,
        programs: Sequence[Program],
        stages: Mapping[int, Stage],
        group: Group,
        observe: Observe,
        clock: Clock,
        device: torch.device,
    ) -> None:
        self.stages, self.group, self.observe, self.clock, self.device = stages, group, observe, clock, device
        self.num_stages, program = num_stages(programs), programs[group.rank]
        self.split = {action.stage for action in program if action.kind == "BW"}
        self.last_use = {value: action for action in program for value in needs(action, self.num_stages)}
        self.values: dict[Value, Made] = {}
        self.forms: dict[int, Forms] = {}  # of what leaves a stage
        self.announced: set[int] = set()
        self.events: list[Event] = []
        self.run: dict[Kind, Callable[[Action], None]] = {
            "F": self._forward,
            "B": self._backward,
            "BI": self._backward,
            "BW": self._weights,
            "REDUCE": self._reduce,
        }

    def compute(self, action: Action) -> None:
        """Run an action that is no message."""
        start = self.clock.now()
        self.run[action.kind](action)
        self.clock.compute(action)
        self._finish(action, start, self.clock.now())

    def exchange(self, call: Sequence[Action]) -> None:
        """Send and receive what one call names."""
        start = self.clock.now()
        new = [message for message in call if self._is_new(message)]
        for messages in [[message] for message in call] if new else [call]:
            if messages[0] in new:
                self._announce(messages[0])
            self._transfer(messages, start)

    def _forward(self, action: Action) -> None:
        stage, micro = action.stage, action.micro
        inputs = self._take(Value("activations", stage - 1, micro)).bundle if stage else ()
        made = self.stages[stage].forward(inputs, micro, is_split=stage in self.split)
        if stage == self.num_stages - 1:
            self.observe(micro, tuple(x.detach() for x in made.bundle))
        else:
            forms = forms_of(made.bundle)
            check_alike(forms, self.forms.setdefault(stage, forms), stage, micro)
        self.values[Value("activations", stage, micro)] = made

    def _backward(self, action: Action) -> None:
        stage, micro = action.stage, action.micro
        is_last = stage == self.num_stages - 1
        gradients = None if is_last else self._take(Value("gradients", stage + 1, micro)).bundle
        made = self._take(Value("activations", stage, micro))
        self.values[Value("gradients", stage, micro)] = self.stages[stage].give_back(made, gradients, micro)

    def _weights(self, action: Action) -> None:
        made = self._take(Value("gradients", action.stage, action.micro))
        self.stages[action.stage].add_weights(made, action.micro)

    def _reduce(self, action: Action) -> None:
        self.stages[action.stage].backward.reduce(action.micro)

    def _is_new(self, message: Action) -> bool:
        """Return whether a message must be announced: the first activations over a boundary."""
        return message.kind in ("SEND_F", "RECV_F") and _carried(message).stage not in self.announced

    def _announce(self, message: Action) -> None:
        """Let the receiver know the forms of what will come over a boundary."""
        stage, other = _carried(message).stage, peer(message, self.group.size)
        self.announced.add(stage)
        if message.kind == "SEND_F":
            header = header_of(self.forms[stage])
            self.group.exchange([(torch.tensor([header.numel()]), other)], []).wait()
            self.group.exchange([(header, other)], []).wait()
        else:
            length = torch.empty(1, dtype=torch.int64)
            self.group.exchange([], [(length, other)]).wait()
            header = torch.empty(int(length), dtype=torch.uint8)
            self.group.exchange([], [(header, other)]).wait()
            self.forms[stage] = read_header(header)

    def _transfer(self, messages: Sequence[Action], start: Time) -> None:
        """Exchange the bundles and the clocks' stamps of some messages, all in flight together."""
        sends: list[Message] = []
        recvs: list[Message] = []
        stamps: list[list[Tensor]] = []
        for message in messages:
            is_sent, value, other = message.kind.startswith("SEND"), _carried(message), peer(message, self.group.size)
            if not is_sent:
                self.values[value] = Made(self._room(value))
            ways = (sends, recvs) if is_sent else (recvs, sends)
            ways[0].extend((buffer, other) for buffer in buffers(self._take(value).bundle))
            mine = self.clock.stamp(start, self.device)
            stamps.append([torch.empty_like(x) for x in mine])
            sends += [(x, other) for x in mine]
            recvs += [(x, other) for x in stamps[-1]]
        self.group.exchange(sends, recvs).wait()
        for message, stamp in zip(messages, stamps, strict=True):
            self._finish(message, start, self.clock.meet(message, start, stamp))

    def _room(self, value: Value) -> Bundle:
        """Return memory for a bundle that comes from another rank."""
        if value.what == "activations":
            forms = self.forms[value.stage]
            return tuple(form.empty(self.device).requires_grad_(form.has_gradient) for form in forms)
        forms = self.forms[value.stage - 1]
        return tuple(form.empty(self.device) for form in forms if form.has_gradient)

    def _take(self, value: Value) -> Made:
        if value not in self.values:
            what = f"rank {self.group.rank} has come to an action without {value}"
            raise UserError(what, fix="with_messages(programs), the same on every rank")
        return self.values[value]

    def _finish(self, action: Action, start: Time, end: Time) -> None:
        """Note an action, and drop what no later one needs."""
        self.events.append(Event(self.group.rank, action, start, end))
        for value in [*needs(action, self.num_stages), *gives(action)]:
            if self.last_use.get(value, action) == action:
                self.values.pop(value, None)


def _carried(message: Action) -> Value:
    """Return the value that a message sends or receives."""
    return (needs(message, message.stage + 2) or gives(message))[0]


def _check(programs: Sequence[Program], stages: Mapping[int, Stage], group: Group) -> None:
    """Raise UserError unless group, programs and stages fit each other."""
    if len(programs) != group.size:
        raise UserError(f"{len(programs)} programs for {group.size} ranks", fix="one for each rank, of with_messages")
    wanted = sorted({action.stage for action in programs[group.rank] if action.kind in COMPUTE})
    if wanted != sorted(stages):
        what = f"rank {group.rank} was given the stages {sorted(stages)}, its program runs {wanted}"
        raise UserError(what, fix="those stages s for which s % ranks is the rank")
    last = num_stages(programs) - 1
    trains = any(action.kind in BACKWARD for action in programs[group.rank])
    if trains and last in stages and stages[last].loss is None:
        raise UserError(f"stage {last} is the last and has no loss to differentiate", fix="Stage(run=..., loss=...)")
