"""Train one small GPT under four layouts, on ranks that are threads, and measure how far the results lie apart.

However ranks share a model and its rows, it is the same training run: in float64 the layouts may differ by the rounding
of sums that are added in another order, and by nothing else. Beside that stands what each layout costs a rank: the
bytes that it holds, counted as storages, and the messages that it sends. The rows are those that the demo trains on.

The table of bytes by ZeRO stage: Rajbhandari et al. 2020, section 5. https://arxiv.org/abs/1910.02054
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minispeed.axes import Layout
from minispeed.census import storage_bytes
from minispeed.chat.evaluate import micro_batches
from minispeed.chat.pack import Batch, Packing
from minispeed.checkpoint import Checkpoint, save
from minispeed.collective.group import Group
from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Event, Trace, Traced
from minispeed.engine import Engine, MicroBatch, Report
from minispeed.errors import UserError
from minispeed.figures import draw_timelines
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.pipeline.timeline import Timeline
from minispeed.precision import Precision
from minispeed.spans import Row, Run, row_of

STEPS, ROWS = 10, 8  # rows of a step, on all ranks together
LR, CLIP, DECAY = 1e-3, 1.0, 0.1
FEWEST_DIGITS = 9  # a mistake in a gradient leaves 3 to 6; rounding alone leaves 12 or more


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """So many ranks, how they share the model, and the ZeRO stage among those that hold the same of it.

    micro  rows of a micro-batch
    """

    name: str
    ranks: int
    micro: int
    layout: Layout = Layout()
    zero: int = 0


ARRANGEMENTS = (
    Arrangement(name="one device", ranks=1, micro=4),
    Arrangement(name="dp 4, ZeRO-3", ranks=4, micro=1, zero=3),
    Arrangement(
        name="pp 2 x tp 2 x dp 2, ZeRO-1, 1F1B", ranks=8, micro=1, layout=Layout(pp=2, tp=2, schedule="1f1b"), zero=1
    ),
    Arrangement(name="sp 2 x tp 2", ranks=4, micro=4, layout=Layout(sp=2, tp=2)),
)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank says of its run; bytes, messages, bytes sent and spans are of the last step."""

    reports: list[Report]
    held: int
    messages: int
    sent: int
    row: Row


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An arrangement, what its ranks said, and how far its parameters ended from those of one device.

    difference  of the tensor that is farthest off: max |a - b| / max(1, max |b|)
    """

    arrangement: Arrangement
    ranks: list[Seen]
    difference: float

    @property
    def digits(self) -> float:
        """How many digits it has in common with one device; infinitely many where all bits are equal."""
        if not self.difference < 1:  # nor is nan
            return 0
        return math.floor(-math.log10(self.difference)) if self.difference else math.inf


@dataclass(frozen=True)
class Proof:
    """The outcomes of all arrangements, one device first."""

    outcomes: Sequence[Outcome]

    @property
    def worst(self) -> Outcome:
        """The one that is farthest from one device."""
        return min(self.outcomes, key=lambda outcome: outcome.digits)

    @property
    def holds(self) -> bool:
        """Whether the differences are no more than rounding."""
        return self.worst.digits >= FEWEST_DIGITS

    @property
    def sentence(self) -> str:
        """What came out, in one line."""
        worst = self.worst
        if not self.holds:
            return (
                f"{worst.arrangement.name} trains another model than one device: after {STEPS} steps they differ by "
                f"{worst.difference:.1e}, where rounding explains less than 1e-{FEWEST_DIGITS:02}"
            )
        most = max(outcome.arrangement.ranks for outcome in self.outcomes)
        how = "bit for bit" if math.isinf(worst.digits) else f"to {worst.digits} digits"
        return f"{most} ranks, one process, the same model {how}"

    def table(self) -> str:
        """Lay the outcomes out, a line each, and say below what the columns are."""
        width = max(len(outcome.arrangement.name) for outcome in self.outcomes)
        lines = [f"{'layout':{width}}  ranks  difference  bytes per rank  messages  MB sent"]
        for outcome in self.outcomes:
            held, messages, sent = (
                max(getattr(rank, name) for rank in outcome.ranks) for name in ("held", "messages", "sent")
            )
            off = f"{outcome.difference:.1e}" if outcome.difference else "exact"
            shown = off if outcome is not self.outcomes[0] else "-"
            name, ranks = outcome.arrangement.name, outcome.arrangement.ranks
            lines.append(f"{name:{width}}  {ranks:5}  {shown:>10}  {held:14,}  {messages:8,}  {sent / 1e6:7.2f}")
        lines.append(f"difference: of any parameter after {STEPS} steps, |a - b| / max(1, max |b|); bytes: parameters,")
        lines.append("gradients and moments; messages and MB: of one step; each of the rank that has most")
        return "\n".join(lines)

    def draw(self, path: Path) -> str:
        """Draw the last step of the pipeline; return a line that says where, or how to get it drawn."""
        (piped,) = (outcome for outcome in self.outcomes if outcome.arrangement.layout.pp > 1)
        run = Run([rank.row for rank in piped.ranks])
        try:
            return f"drawn: {draw_timelines(path, [(piped.arrangement.name, run)])}"
        except UserError as error:
            return f"{path} is not drawn: {error}"


def small(config: GPTConfig, *, seq: int) -> GPTConfig:
    """Return a small model of the same family and tokenizer, which every arrangement can cut."""
    return replace(
        config,
        max_positions=seq,
        num_layers=2,
        model_dim=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        hidden_dim=176,
    )


def rows_of(packing: Packing) -> list[Batch]:
    """Return the rows of as many steps as are trained, in the packing's order, epoch after epoch."""
    return [packing.batch(*divmod(step, packing.steps_per_epoch())) for step in range(STEPS)]


def prove(config: GPTConfig, steps: Sequence[Batch], *, seed: int = 0) -> Proof:
    """Train a model of that shape on these rows under every arrangement; print a line for each as it runs."""
    outcomes: list[Outcome] = []
    expected: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory(prefix="minispeed-") as folder, one_thread_each():
        for arrangement in ARRANGEMENTS:
            print(f"{arrangement.name}: ", end="", flush=True)
            start, path = time.perf_counter(), Path(folder) / str(len(outcomes))
            seen = run_threads(partial(train, config, steps, arrangement, path, seed), arrangement.ranks)
            found = parameters(path)
            expected = expected or found
            outcomes.append(Outcome(arrangement=arrangement, ranks=seen, difference=difference(found, expected)))
            first, *_, last = seen[0].reports
            print(f"loss {first.loss:.3f} to {last.loss:.3f}, {time.perf_counter() - start:.1f} s")
    return Proof(outcomes)


def train(
    config: GPTConfig, steps: Sequence[Batch], arrangement: Arrangement, folder: Path, seed: int, group: Group
) -> Seen:
    """Train as one rank, leave a checkpoint of all ranks in the folder, and say what the last step took."""
    trace = Trace()
    engine = Engine(
        GPT(config, seed=seed).to(torch.float64),
        Traced(group, trace),
        layout=arrangement.layout,
        precision=Precision(torch.float64),
        lr=LR,
        zero=arrangement.zero,
        weight_decay=DECAY,
        clip=CLIP,
    )
    *before, last = (micro_batches(batch, arrangement.micro, engine.lines.dp) for batch in steps)
    reports = [engine.train_step(rows) for rows in before]
    trace.clear()
    report, held = train_step_counted(engine, last)
    events, timeline = list(trace.events), engine.runner.timeline
    assert timeline is not None
    save(folder, engine.pieces(), {}, group)
    return Seen(
        reports=[*reports, report],
        held=held,
        messages=sum(event.sent > 0 for event in events),
        sent=sum(event.sent for event in events),
        row=row_of(group.rank, timeline=timeline, members=engine.lines.pp.members, events=beside(timeline, events)),
    )


def beside(timeline: Timeline, events: Sequence[Event]) -> list[Event]:
    """Return the events without the messages between stages: the timeline has those itself."""
    over = max(action.end for action in timeline.events)
    return [event for event in events if event.kind not in ("send", "recv") or event.start >= over]


def train_step_counted(engine: Engine, rows: Sequence[MicroBatch]) -> tuple[Report, int]:
    """Train a step, not the first; return with its report the bytes of parameters, gradients and optimizer states.

    Gradients come and go, so they are counted whenever a parameter gets its own and when the optimizer begins, and the
    most stands. What is there for a moment alone does not count: the parameters of a layer at work, and at stages 2 and
    3 its gradients.
    """
    units, most = [unit for part in engine.parts for unit in part.units], 0

    def count(*_: object) -> None:
        nonlocal most
        kept = [unit.gradient for unit in units] + [unit.full for unit in units if unit.stage < 2]
        coming = [unit for unit in units if unit.stage < 2 and unit.full is None and unit.has_gradients]  # to a buffer
        room = sum(unit.layout.size * unit.dtypes.collect.itemsize for unit in coming)
        most = max(most, room + storage_bytes([*kept, *(master.grad for unit in units for master in unit.masters)]))

    with contextlib.ExitStack() as stack:
        stack.callback(engine.optimizer.register_step_pre_hook(count).remove)
        for part in engine.parts:
            stack.enter_context(part.sharded.watching(count))
        report = engine.train_step(rows)
    states = [value for state in engine.optimizer.state.values() for value in state.values() if value.dim()]
    return report, most + storage_bytes([*states, *(x for unit in units for x in (unit.flat, unit.shard, unit.master))])


def parameters(folder: Path) -> dict[str, Tensor]:
    """Return the whole parameters out of a checkpoint, whatever layout wrote it."""
    stored = Checkpoint(folder)
    names = [name for name in stored.shapes if name.startswith("parameters/")]
    return {name: tensor for name in names if (tensor := stored.tensor(name)) is not None}


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return max |a - b| / max(1, max |b|) of the tensor where that is largest; nan where a number is none."""
    assert found.keys() == expected.keys()
    apart = [(found[name] - b).abs().max() / b.abs().max().clamp(min=1) for name, b in expected.items()]
    return torch.stack(apart).max().item()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch compute with one thread: the ranks are as many threads as there is work for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
