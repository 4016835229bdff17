"""Show what each rank did when: read from the trace files of runs, or simulated from a schedule and its costs.

A simulation needs no model and no processes: a schedule's programs with their messages run on virtual ranks with
clocks (`pipeline/simulate.py`). Either way rows of spans come out, which one function draws. Needs no torch.
"""

from collections.abc import Sequence

from minispeed.chat.commands import TimelineOptions
from minispeed.chrome import read_trace, write_trace
from minispeed.errors import UserError
from minispeed.figures import draw_timelines, summary
from minispeed.pipeline.actions import Program, num_stages
from minispeed.pipeline.messages import with_messages
from minispeed.pipeline.schedule import SCHEDULES, with_reductions
from minispeed.pipeline.simulate import Cost, PerStage, simulate
from minispeed.spans import Run, run_of

COSTS = {"f": ("f",), "b": ("b",), "bi": ("bi",), "bw": ("bw",), "send": ("send_f", "send_b"), "reduce": ("reduce",)}
ONLY_SIMULATED = ("ranks", "micros", "virtual", "trace_out", *(f"cost_{name}" for name in COSTS))
EXAMPLE = "minispeed timeline --schedule 1f1b"


def timeline(options: TimelineOptions) -> int:
    """Do `minispeed timeline`. Returns the exit code."""
    runs = _simulated(options) if options.schedule and not options.files else _read(options)
    for title, run in runs:
        print(summary(title, run))
        if run.left_out:
            counts = ", ".join(f"{count} of ph {phase}" for phase, count in run.left_out.items())
            print(f"  left out, being no complete events: {counts}")
    if options.out is not None:
        print(f"drawn: {draw_timelines(options.out, runs, same_scale=options.same_scale)}")
    if options.trace_out is not None:
        ((_, run),) = runs
        write_trace(options.trace_out, run.rows, run.unit)
        print(f"written: {options.trace_out}; it opens in https://ui.perfetto.dev")
    return 0


def _read(options: TimelineOptions) -> list[tuple[str, Run]]:
    """Read the files, each by its name, once there is no doubt that they are what is meant."""
    if not options.files:
        raise UserError("timeline needs a trace file or a --schedule", fix=f"{EXAMPLE}, or minispeed timeline run.json")
    given = [name for name in ("schedule", *ONLY_SIMULATED) if getattr(options, name) not in (None, [])]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        what = f"{flags} would simulate, but {options.files[0]} is a file to read"
        raise UserError(what, fix=f"{EXAMPLE} --trace-out simulated.json, then both files together")
    return [(str(path), read_trace(path)) for path in options.files]


def _simulated(options: TimelineOptions) -> list[tuple[str, Run]]:
    """Run the schedule on virtual ranks."""
    assert options.schedule is not None
    ranks, micros, virtual = options.ranks or 4, options.micros or 8, options.virtual or 1
    programs = SCHEDULES[options.schedule](ranks, micros, virtual)
    cost = _cost(options, programs)
    programs = with_messages(programs, cost)
    if options.cost_reduce:
        programs = with_reductions(programs, each_micro=False)
    stages = f", {virtual} stages on each rank" if virtual > 1 else ""
    title = f"{options.schedule}, {ranks} rank{'s' * (ranks > 1)}, {micros} micro-batch{'es' * (micros > 1)}{stages}"
    return [(title, run_of(simulate(programs, cost), "simulated units"))]


def _cost(options: TimelineOptions, programs: Sequence[Program]) -> Cost:
    """Return the costs that are given, of actions that the programs have."""
    stages, kinds = num_stages(programs), {action.kind for program in programs for action in program}
    costs: dict[str, PerStage] = {}
    for name, fields in COSTS.items():
        given, flag = getattr(options, f"cost_{name}"), f"--cost-{name}"
        if given and name in ("f", "b", "bi", "bw") and name.upper() not in kinds:
            others = ", ".join(f"--cost-{kind.lower()}" for kind in sorted(kinds))
            raise UserError(f"{options.schedule} has no action for {flag}", fix=others)
        if given and len(given) not in (1, stages):
            what = f"{flag} has {len(given)} numbers, but there are {stages} stages"
            raise UserError(what, fix=f"one number, or {stages}")
        costs |= dict.fromkeys(fields, given[0] if len(given) == 1 else tuple(given)) if given else {}
    return Cost(**costs)
