"""Laws of a pipeline that runs: it is the plain loop over micro-batches, in the memory and the time of its schedule."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.threads import run_threads
from minispeed.collective.world import World
from minispeed.errors import UserError
from minispeed.pipeline.actions import PARTNER, num_stages, partner
from minispeed.pipeline.bundle import Bundle, buffers, forms_of, header_of, read_header
from minispeed.pipeline.clock import LogicalClock, gather, packed, unpacked
from minispeed.pipeline.deferred import Deferred
from minispeed.pipeline.execute import execute
from minispeed.pipeline.messages import forward_only, with_messages
from minispeed.pipeline.schedule import SCHEDULES, gpipe, with_reductions, zb_h1
from minispeed.pipeline.simulate import Cost, simulate
from minispeed.pipeline.stage import Autograd, Stage
from minispeed.pipeline.timeline import Timeline
from minispeed.testing.pool import shared_pool
from minispeed.testing.strategies import seeds

VOCABULARY, ROWS, TOKENS = 7, 2, 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A schedule, and the model that runs under it; plain numbers, to be shipped."""

    schedule: str
    ranks: int
    micros: int
    virtual: int
    seed: int = 0
    width: int = 4
    is_recomputed: bool = False
    each_micro: bool = False

    def programs(self):
        computing = SCHEDULES[self.schedule](self.ranks, self.micros, self.virtual)
        return with_reductions(with_messages(computing), each_micro=self.each_micro)


@st.composite
def cases(draw):
    schedule, ranks = draw(st.sampled_from(sorted(SCHEDULES))), draw(st.integers(1, 4))
    is_interleaved = schedule == "interleaved"
    return Case(
        schedule=schedule,
        ranks=ranks,
        micros=ranks * draw(st.integers(1, 2)) if is_interleaved else draw(st.integers(1, 6)),
        virtual=draw(st.integers(1, 3)) if schedule in ("gpipe", "interleaved") else 1,
        seed=draw(seeds),
        width=draw(st.integers(1, 4)),
        is_recomputed=draw(st.booleans()),
        each_micro=draw(st.booleans()),
    )


# ---- a model whose stages hand on tensors of all kinds


class Part(nn.Module):
    """One stage: a stream, a second stream that is relayed or scaled, the embedding's weight for the head, and more."""

    def __init__(self, index: int, case: Case) -> None:
        super().__init__()
        self.index, self.case = index, case
        self.is_last = index == case.ranks * case.virtual - 1
        self.norm, self.linear = nn.LayerNorm(case.width), nn.Linear(case.width, case.width)
        self.out = nn.Linear(case.width, case.width, bias=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(case.width, case.width).requires_grad_(False)
        if not index:
            self.embedding = nn.Embedding(VOCABULARY, case.width)
            self.weight_again = nn.Linear(case.width, VOCABULARY, bias=False)
            self.weight_again.weight = self.embedding.weight

    def forward(self, bundle: Bundle, micro: int) -> Bundle:
        if not self.index:
            bundle = self.begin(micro)
        x, side, head, *rest = bundle
        again = partial(checkpoint, use_reentrant=False) if self.case.is_recomputed else lambda f, *args: f(*args)
        x = again(self.block, x, side, head)
        if self.is_last:
            assert [one.tolist() for one in rest] == [one.tolist() for one in freight(micro)]
            return (F.cross_entropy(again(F.linear, x, head).flatten(0, 1), ids_of(micro).flatten(), reduction="none"),)
        return x, side if self.index % 2 else side * self.scale, head, *rest

    def begin(self, micro: int) -> Bundle:
        x = self.embedding(ids_of(micro))
        self_likeness = self.weight_again(x).mean()
        return x.transpose(0, 1), x[0] * 2 + self_likeness, self.embedding.weight, *freight(micro)

    def block(self, x: Tensor, side: Tensor, head: Tensor) -> Tensor:
        y = self.out(torch.tanh(self.linear(self.norm(x))) * head.mean(0)) + self.frozen(x)
        return x + y + (side.sum(0) if self.index % 2 else 0)


def ids_of(micro: int) -> Tensor:
    return torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) * (micro + 1) % VOCABULARY


def freight(micro: int) -> Bundle:
    """What gets no gradient: integers, flags, halves, nothing at all."""
    return (
        ids_of(micro).int(),
        ids_of(micro) > 2,
        torch.full((), micro, dtype=torch.bfloat16),
        torch.empty(0, 3),
    )


def parts_of(case: Case) -> nn.ModuleList:
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        return nn.ModuleList(Part(index, case) for index in range(case.ranks * case.virtual)).double()


def loss_of(case: Case, outputs: Bundle, micro: int) -> Tensor:
    return outputs[0].sum() * (micro + 1) / case.micros


def gradients_of(parts: nn.ModuleList, stages: Iterable[int]) -> dict[str, Tensor]:
    named = {f"{s}.{name}": p for s in stages for name, p in parts[s].named_parameters() if p.requires_grad}
    return {name: p.grad for name, p in named.items() if p.grad is not None}


@dataclass
class Run:
    losses: dict[int, Tensor]
    gradients: dict[str, Tensor]
    timeline: Timeline | None = None


def plain_loop(case: Case) -> Run:
    parts, run = parts_of(case), Run({}, {})
    for micro in range(case.micros):
        bundle: Bundle = ()
        for part in parts:
            bundle = part(bundle, micro)
        loss_of(case, bundle, micro).backward()
        run.losses[micro] = bundle[0].detach()
    run.gradients = gradients_of(parts, range(len(parts)))
    return run


# A model is built from torch's default generator, which threads share: so before they start.
def pipelined(case: Case, parts: nn.ModuleList, group: Group) -> Run:
    run = Run({}, {})
    mine = range(group.rank, len(parts), group.size)
    stages = {s: Stage(run=parts[s], loss=partial(loss_of, case) if parts[s].is_last else None) for s in mine}
    run.timeline = execute(
        case.programs(), stages, group, observe=lambda micro, outputs: run.losses.update({micro: outputs[0]})
    )
    run.gradients = gradients_of(parts, mine)
    return run


def pipelined_in(world: World, case: Case) -> Run:
    return pipelined(case, parts_of(case), world.group)


def assert_close(got: Tensor, expected: Tensor, name: object) -> None:
    assert got.shape == expected.shape
    difference = (got - expected).abs().max().item()
    assert difference <= 1e-10 * max(1.0, expected.abs().max().item()), f"{name} differs by {difference:.2e}"


def assert_all_close(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name], name)


def check(case: Case, runs: list[Run]) -> None:
    expected = plain_loop(case)
    assert_all_close(runs[-1].losses, expected.losses)
    assert not any(run.losses for run in runs[:-1])
    together = {name: gradient for run in runs for name, gradient in run.gradients.items()}
    assert len(together) == sum(len(run.gradients) for run in runs)
    assert_all_close(together, expected.gradients)
    for rank, (run, program) in enumerate(zip(runs, case.programs(), strict=True)):
        assert [event.action for event in run.timeline.events] == program
        assert {event.rank for event in run.timeline.events} == {rank}
        assert all(event.start <= event.end for event in run.timeline.events)


@given(cases())
@settings(print_blob=True)
def test_any_schedule_is_the_plain_loop(case):
    parts = parts_of(case)
    check(case, run_threads(partial(pipelined, case, parts), case.ranks))


@given(cases().filter(lambda case: not case.is_recomputed))
@settings(max_examples=4, print_blob=True)
def test_processes_over_gloo_too(case):
    check(case, shared_pool().run(pipelined_in, case, ranks=case.ranks))


def test_a_group_of_one_runs_each_micro_batch_through():
    case = Case(schedule="zb_h1", ranks=1, micros=3, virtual=1)
    check(case, [pipelined(case, parts_of(case), SoloGroup())])


# ---- time


exact = st.integers(0, 5) | st.fractions(0, 5, max_denominator=12)
costs = st.one_of(*(st.lists(one, min_size=7, max_size=7) for one in (exact, st.floats(0, 5, allow_subnormal=False))))


def trivial(index: int, stages: int, shape: tuple[int, ...] = (2,)) -> Stage:
    weight = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    linear = nn.Linear(*shape, *shape, dtype=torch.float64)
    return Stage(
        run=lambda inputs, micro: (linear(inputs[0] * weight if index else weight),),
        loss=(lambda outputs, micro: outputs[0].sum()) if index == stages - 1 else None,
    )


def trivial_stages(programs, rank):
    stages = num_stages(programs)
    return {index: trivial(index, stages) for index in range(rank, stages, len(programs))}


@given(cases(), costs)
def test_by_the_logical_clock_a_run_is_its_simulation(case, of_kinds):
    cost = Cost(**dict(zip(("f", "b", "bi", "bw", "send_f", "send_b", "reduce"), of_kinds, strict=True)))
    computing = SCHEDULES[case.schedule](case.ranks, case.micros, case.virtual)
    programs = with_reductions(with_messages(computing, cost), each_micro=case.each_micro)

    def run(group):
        timeline = execute(programs, trivial_stages(programs, group.rank), group, clock=LogicalClock(cost))
        return gather(timeline, group)

    expected = simulate(programs, cost)
    assert run_threads(run, case.ranks) == [expected] * case.ranks


@given(st.one_of(st.integers(-(2**62), 2**62), st.fractions(max_denominator=10**9), st.floats(allow_nan=False)))
def test_a_time_travels_unchanged(moment):
    assert unpacked(packed(moment)) == moment
    assert isinstance(unpacked(packed(moment)), float) == isinstance(moment, float)


@given(cases())
def test_messages_stand_in_one_order_on_all_ranks_and_need_no_company(case):
    """Both ends of each pair have the same order, and sent one by one the messages all arrive."""
    programs = [[a for a in program if a.kind != "REDUCE"] for program in case.programs()]
    left = [list(program) for program in programs]
    while any(left):
        heads = {program[0]: program for program in left if program}
        able = [a for a in heads if a.kind not in PARTNER or partner(a) in heads]
        assert able, f"nobody can go on: {sorted(heads)}"
        for action in able:
            heads[action].pop(0)


# ---- memory


class Counted:
    """Run a part, and count the micro-batches whose activations are alive whenever it returns."""

    def __init__(self, part: Part, alive: list, peaks: list) -> None:
        self.part, self.alive, self.peaks = part, alive, peaks

    def __call__(self, inputs: Bundle, micro: int) -> Bundle:
        outputs = self.part(inputs, micro)
        self.alive.append(((self.part.index, micro), [weakref.ref(x) for x in (*inputs[:2], *outputs[:2])]))
        self.peaks.append(num_alive(self.alive))
        return outputs


def num_alive(alive):
    return len({of for of, references in alive if any(reference() is not None for reference in references)})


@given(cases())
def test_a_rank_holds_no_more_micro_batches_than_its_schedule_says(case):
    parts, programs = parts_of(case), case.programs()

    def run(group):
        alive, peaks = [], []
        stages = {
            s: Stage(run=Counted(parts[s], alive, peaks), loss=partial(loss_of, case))
            for s in range(group.rank, len(parts), group.size)
        }
        held = execute(programs, stages, group).peak_in_flight(group.rank)
        assert num_alive(alive) == 0
        return max(peaks), held

    for peak, held in run_threads(run, case.ranks):
        assert peak == held if case.schedule != "zb_h1" else peak <= held


# ---- evaluation


@given(cases())
def test_forward_only_gives_the_outputs_in_order_and_no_gradient(case):
    parts, expected = parts_of(case), plain_loop(case)
    programs = forward_only(case.programs())
    seen = []

    def without_graph(part, inputs, micro):
        outputs = part(inputs, micro)
        assert all(x.grad_fn is None for x in outputs)
        return outputs

    def run(group):
        stages = {s: Stage(run=partial(without_graph, parts[s])) for s in range(group.rank, len(parts), group.size)}
        execute(programs, stages, group, observe=lambda micro, outputs: seen.append((micro, outputs[0])))

    run_threads(run, case.ranks)
    assert [micro for micro, _ in seen] == list(range(case.micros))
    assert_all_close(dict(seen), expected.losses)
    assert gradients_of(parts, range(len(parts))) == {}


# ---- whose gradients


class Noted(Autograd):
    """Autograd that writes down what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def whole(self, tensors, gradients, micro):
        self.calls.append(("B", micro))
        super().whole(tensors, gradients, micro)

    def inputs(self, tensors, gradients, micro):
        self.calls.append(("BI", micro))
        super().inputs(tensors, gradients, micro)

    def weights(self, gradients, micro):
        self.calls.append(("BW", micro))
        super().weights(gradients, micro)

    def reduce(self, micro):
        self.calls.append(("REDUCE", micro))


@given(cases())
def test_a_backward_is_asked_in_the_order_of_the_program(case):
    parts, programs = parts_of(case), case.programs()

    def run(group):
        noted = {s: Noted() for s in range(group.rank, len(parts), group.size)}
        stages = {s: Stage(run=parts[s], loss=partial(loss_of, case), backward=noted[s]) for s in noted}
        execute(programs, stages, group)
        return {s: one.calls for s, one in noted.items()}

    for program, by_stage in zip(programs, run_threads(run, case.ranks), strict=True):
        for stage, called in by_stage.items():
            kinds = ("B", "BI", "BW", "REDUCE")
            assert called == [(a.kind, a.micro) for a in program if a.stage == stage and a.kind in kinds]


# ---- weights put off


class Layers(nn.Module):
    """Linears of every kind: with and without bias, either of them frozen, used twice, tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.bare, self.twice = nn.Linear(4, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 4)
        self.still, self.unmoved = nn.Linear(4, 4), nn.Linear(4, 4)
        self.still.bias.requires_grad_(False)
        self.unmoved.weight.requires_grad_(False)
        self.norm, self.table = nn.LayerNorm(4), nn.Embedding(6, 4)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.norm(self.bare(self.plain(x).tanh())) + self.table(ids)
        x = self.twice(self.twice(x).tanh()) + self.still(x) + self.unmoved(x)
        x = x + F.linear(x, self.plain.weight.T @ self.plain.weight)  # no leaf: made in the input half
        return F.linear(input=x, weight=self.table.weight, bias=None)


LINEARS, IN_THE_INPUT_HALF = 8, {"norm.weight", "norm.bias", "table.weight", "plain.weight", "unmoved.bias"}


@given(seeds, st.sampled_from([(), (3,), (2, 3)]), st.sampled_from([None, False, True]))
def test_put_off_weight_gradients_are_the_same_ones(seed, rows, use_reentrant):
    """Recomputed or not: None, or torch's checkpoint in either form."""
    torch.manual_seed(seed)
    layers, ids = Layers().double(), torch.randint(6, rows)
    x = torch.randn(*rows, 4, dtype=torch.float64, requires_grad=True)
    layers(x, ids).square().sum().backward()
    tensors = [*layers.named_parameters(), ("x", x)]
    expected = {name: p.grad for name, p in tensors if p.grad is not None}
    layers.zero_grad()
    x.grad = None
    deferred = Deferred()
    with deferred:
        y = layers(x, ids) if use_reentrant is None else checkpoint(layers, x, ids, use_reentrant=use_reentrant)
        assert deferred.num_linears == LINEARS
        torch.autograd.backward((y.square().sum(),), None)
    assert {name for name, p in layers.named_parameters() if p.grad is not None} == IN_THE_INPUT_HALF
    assert_close(x.grad, expected["x"], "x")
    with torch.no_grad():
        Autograd().weights(deferred.gradients(), 0)
    assert list(deferred.gradients()) == []
    assert_all_close({name: p.grad for name, p in tensors if p.grad is not None}, expected)


# ---- what travels


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=3), st.booleans()), max_size=4), seeds)
def test_a_header_tells_the_forms_and_bytes_are_the_tensor(tensors, seed):
    dtypes = (torch.float64, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.bool, torch.int16)
    bundle = tuple(
        torch.zeros(shape, dtype=dtypes[(seed + index) % 6 if not grad else index % 3]).requires_grad_(grad)
        for index, (shape, grad) in enumerate(tensors)
    )
    forms = read_header(header_of(forms_of(bundle)))
    assert forms == forms_of(bundle)
    room = tuple(form.empty(torch.device("cpu")) for form in forms)
    for mine, theirs in zip(buffers(room), buffers(bundle), strict=True):
        mine.copy_(theirs)
    assert [str(x) for x in room] == [str(x.detach()) for x in bundle]


# ---- mistakes


def run_both(programs, stages_of, **more):
    return run_threads(lambda group: execute(programs, stages_of(group.rank), group, **more), 2)


def of_shape(shape_of):
    """Two stages, the first of which gives a tensor of a shape for each micro-batch."""
    first = Stage(run=lambda inputs, micro: (torch.ones(shape_of(micro), requires_grad=True) * 2,))
    last = Stage(run=lambda inputs, micro: inputs, loss=lambda outputs, micro: outputs[0].sum())
    return lambda rank: {rank: (first, last)[rank]}


TWO = with_messages(gpipe(2, 2))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: SCHEDULES["interleaved"](4, 3, 1), r"in groups of 4, one for each rank, but there are 3; try: 4"),
        (
            lambda: execute(TWO, trivial_stages(TWO, 0), SoloGroup()),
            r"2 programs for 1 ranks; try: one for each rank",
        ),
        (
            lambda: run_both(TWO, lambda rank: {0: trivial(0, 2)}),
            r"rank 1 was given the stages \[0\], its program runs \[1\]; try: those stages s",
        ),
        (
            lambda: run_both(TWO, lambda rank: {rank: trivial(rank, 3)}),
            r"stage 1 is the last and has no loss to differentiate; try: Stage",
        ),
        (
            lambda: run_both(gpipe(2, 2), lambda rank: {rank: trivial(rank, 2)}),
            r"rank . has come to an action without the (activations of stage 0|gradients of stage 1), micro 0; try",
        ),
        (
            lambda: run_both(TWO, of_shape(lambda micro: (2, 3 + micro))),
            r"stage 0 gives \(float32 \(2, 4\)\) for micro-batch 1, but gave \(float32 \(2, 3\)\) before; try: micro-b",
        ),
        (
            lambda: run_both(with_messages(zb_h1(2, 2)), of_shape(lambda micro: (2,))),
            r"two halves of a stage without torch.nn.functional.linear; try: nn.Linear in every",
        ),
        (
            lambda: execute(
                gpipe(1, 1),
                {0: Stage(run=lambda inputs, micro: torch.ones(2), loss=lambda outputs, micro: outputs[0])},
                SoloGroup(),
            ),
            r"a stage's run returned a Tensor; try: a tuple of tensors",
        ),
    ],
)
def test_mistakes_name_both_values_and_the_fix(run, message):
    with pytest.raises(UserError, match=message):
        run()
