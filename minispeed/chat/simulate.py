"""Simulate a training step on a cluster that is not there: how long it takes, who waits, and what that looks like.

The programs are those that a real run's ranks would follow, run on virtual ranks with clocks
(`pipeline/simulate.py`); what their actions take follows from closed forms and a profile of the machines
(`plan/step.py`). One pipeline is simulated: ranks along dp, sp and tp do alike. Needs no torch.
"""

from pathlib import Path

from minispeed.axes import Layout
from minispeed.chat.commands import SimulateOptions
from minispeed.chat.shape import shape_of
from minispeed.config import read_config
from minispeed.errors import UserError
from minispeed.figures import draw_timelines
from minispeed.ledger.job import Job
from minispeed.pipeline.actions import Kind
from minispeed.pipeline.timeline import Timeline
from minispeed.plan.step import Step, step
from minispeed.profiles import Profile, check_machine, load
from minispeed.spans import run_of

LETTERS: dict[Kind, str] = {"F": "F", "B": "B", "BI": "b", "BW": "w", "REDUCE": "r"}
WAITING = "."
MOST_ROWS = 32  # ranks that the text timeline has room for
GIVEN = {"batch": "rows", "micro_batch": "rows of a micro-batch", "zero": "ZeRO stage", "dtype": "dtype"}


def simulate(options: SimulateOptions) -> int:
    """Do `minispeed simulate`. Returns the exit code."""
    profile = load(options.profile)
    if warning := check_machine(profile):
        print(warning)
    job = job_of(options, profile)
    known = profile.at(job.devices).flops
    if job.dtype not in known:
        what = f"the profile {profile.name!r} has no products in {job.dtype}"
        raise UserError(what, fix=f"--dtype {next(iter(known))}")
    found = step(job, profile)
    print("\n".join([title(options.model, found), "", *summary(found), "", *rank_lines(found)]))
    print("", *picture(options.out, title(options.model, found), found, options.width), sep="\n")
    return 0


def job_of(options: SimulateOptions, profile: Profile) -> Job:
    """Return the run that the options and, where they leave something open, a DeepSpeed configuration describe."""
    layout = Layout(
        pp=options.pp,
        schedule=options.pipeline_schedule,
        virtual=options.virtual_stages,
        sp=options.sp,
        sequence=options.sequence,
        tp=options.tp,
        tokens=options.sequence_parallel,
    )
    model, replicas = shape_of(options.model), layout.mesh(options.devices).dp
    values = {name: getattr(options, name) for name in GIVEN} | {"prefetch": 0, "persistence": 0, "overlap": True}
    if options.deepspeed is not None:
        values |= _from_deepspeed(options.deepspeed, values, replicas)
    micro = values["micro_batch"] or 1
    zero, dtype = values.pop("zero") or 0, values.pop("dtype") or ("bf16" if "bf16" in profile.at(1).flops else "fp16")
    seq = options.seq or min(1024, model.max_positions)
    if seq > model.max_positions:
        raise UserError(
            f"rows of {seq} tokens, and the model reads {model.max_positions}", fix=f"--seq {model.max_positions}"
        )
    return Job(
        model=model,
        devices=options.devices,
        rows=values["batch"] or replicas * micro * 4 * options.pp,
        tokens=seq,
        micro_batch=micro,
        layout=layout,
        zero=zero,
        dtype=dtype,
        recompute=options.recompute,
        offload_optimizer=options.offload_optimizer,
        prefetch=values["prefetch"],
        persistence=values["persistence"],
        overlap=values["overlap"],
    )


def _from_deepspeed(path: Path, values: dict[str, object], replicas: int) -> dict[str, object]:
    """Return what a DeepSpeed configuration says of a step; UserError where an option says otherwise."""
    config = read_config(path, data_parallel=replicas)
    said: dict[str, object] = {
        "batch": config.batch.train,
        "micro_batch": config.batch.micro,
        "zero": config.zero.stage,
        "dtype": config.dtype,
    }
    for name, value in said.items():
        if values[name] not in (None, value):
            flag = "--" + name.replace("_", "-")
            what = f"{flag} is {values[name]}, and {path} has {value} as {GIVEN[name]}"
            raise UserError(what, fix=f"one of the two: no {flag}, or {value}")
    return said | {
        "prefetch": config.zero.prefetch_bucket_size if config.zero.stage == 3 else 0,
        "persistence": config.zero.param_persistence_threshold if config.zero.stage == 3 else 0,
        "overlap": bool(config.zero.overlap_comm),
    }


def title(model: str, found: Step) -> str:
    """Return what is simulated, in a line."""
    job = found.job
    sides = " x ".join(f"{axis} {length}" for axis, length in job.mesh.sizes.items() if length > 1) or "alone"
    batches = f"{job.micros} micro-batch{'es' * (job.micros > 1)} of {job.micro_batch}"
    plan = (
        f"{job.layout.schedule}, " * (job.layout.pp > 1)
        + f"ZeRO {job.zero}, {job.dtype}, {batches} x {job.tokens} tokens"
    )
    return f"{model} on {job.devices} x {found.profile.name}: {sides}; {plan}"


def summary(found: Step) -> list[str]:
    """Return how long a step takes, and what of it goes to what."""
    used = "" if found.mfu is None else f", MFU {found.mfu:.1%}"
    speed = f"{found.tokens_per_second:,.0f} tokens/s, {found.flops_per_second / 1e12:,.3g} TFLOP/s a device{used}"
    lines = [f"a step takes {_seconds(found.seconds)}: {speed}", ""]
    names = {"zero": "ZeRO's messages", "pp": "pipeline's messages", "tp": "tp's messages", "sp": "sp's messages"}
    for name, seconds in found.breakdown.items():
        if seconds > 0:
            lines.append(f"  {names.get(name, name):20} {_seconds(seconds):>9}  {seconds / found.seconds:6.1%}")
    return lines


def rank_lines(found: Step) -> list[str]:
    """Return the bubble of each rank of the pipeline, and how many micro-batches it holds at most."""
    timeline = found.timeline
    if timeline.ranks == 1:
        return [f"no pipeline; {timeline.peak_in_flight(0)} micro-batch in flight"]
    lines = [f"bubble {float(timeline.bubble):.1%} of all ranks' time, messages and reductions counted as waiting"]
    for rank in range(min(timeline.ranks, MOST_ROWS)):
        share = 1 - float(timeline.busy(rank) / timeline.length)
        lines.append(f"  rank {rank:<3} bubble {share:6.1%}, at most {timeline.peak_in_flight(rank)} in flight")
    return lines


def picture(path: Path | None, heading: str, found: Step, width: int) -> list[str]:
    """Draw the timeline into a file, or, without one or without matplotlib, in letters."""
    if path is not None:
        try:
            return [f"drawn: {draw_timelines(path, [(heading, run_of(found.timeline, 'seconds'))])}"]
        except UserError as error:
            if "matplotlib" not in error.what:
                raise
            return [*letters(found.timeline, width), f"{error.what}: {error.fix}"]
    return letters(found.timeline, width)


def letters(timeline: Timeline, width: int) -> list[str]:
    """Return a line for each rank: what it did in the middle of each of `width` equal spans of time."""
    start = min(event.start for event in timeline.events)
    lines = []
    for rank in range(min(timeline.ranks, MOST_ROWS)):
        row = [WAITING] * width
        for event in timeline.of(rank):
            letter = LETTERS.get(event.action.kind)
            if letter:
                first, last = ((moment - start) * width / timeline.length for moment in (event.start, event.end))
                for place in range(round(float(first)), round(float(last))):
                    row[place] = letter
        lines.append(f"  rank {rank:<3} |{''.join(row)}|")
    if timeline.ranks > MOST_ROWS:
        lines.append(f"  ... and {timeline.ranks - MOST_ROWS} more ranks")
    kinds = {event.action.kind for event in timeline.events}
    words = {"F": "forward", "B": "backward", "BI": "backward, inputs", "BW": "backward, weights", "REDUCE": "reduce"}
    legend = ", ".join(f"{LETTERS[kind]} {word}" for kind, word in words.items() if kind in kinds)
    return [*lines, f"  {legend}, {WAITING} waits or sends"]


def _seconds(seconds: float) -> str:
    size, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "us"))
    return f"{seconds:,.0f} s" if seconds >= 1000 else f"{seconds / size:.3g} {unit}"
