"""Plan a run: every layout ranked, the best explained, a configuration written that `minispeed sft` takes. No torch."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from minispeed.chat.commands import PlanOptions
from minispeed.chat.shape import shape_of
from minispeed.errors import UserError
from minispeed.ledger.job import Job
from minispeed.plan.report import impossible, text, to_json
from minispeed.plan.request import Request
from minispeed.plan.search import Found, search
from minispeed.plan.why import changes
from minispeed.profiles import MEASURED, Profile, check_machine, load
from minispeed.published import PUBLISHED
from minispeed.sizes import parse_size

DEVICES_FIT, NOTHING_FITS = 0, 1
LEAST_MEMORY = 10**6  # bytes: less was meant in another unit


def plan(options: PlanOptions) -> int:
    """Do `minispeed plan`. Returns the exit code: 1 where nothing fits."""
    request = request_of(options)
    if (sentence := check_machine(request.profile)) and not options.json:
        print(f"note: {sentence}", file=sys.stderr)
    found = search(request)
    offered = [] if found.ranked else list(changes(found))
    if options.json:
        print(json.dumps(to_json(found, top=options.top, changes=offered), indent=1))
    elif found.ranked:
        print(text(found, top=options.top))
    else:
        print(impossible(found, offered))
    if not found.ranked:
        return NOTHING_FITS
    if options.out is not None:
        write_config(options.out, options, found)
        print(f"\nwritten: {options.out}; minispeed sft --config {options.out} --data FILE --out RUN", file=sys.stderr)
    return DEVICES_FIT


def request_of(options: PlanOptions) -> Request:
    """Return what the options ask for."""
    memory = None if options.memory is None else parse_size(options.memory)
    if memory is not None and memory < LEAST_MEMORY:
        raise UserError(f"--memory {options.memory} is {memory:,} bytes", fix=f"--memory {memory}GB")
    profile = choose_profile(options.profile, memory)
    model = shape_of(options.model)
    if options.attention:
        model = replace(model, attention=options.attention)
    return Request(
        model=model,
        devices=options.devices,
        rows=options.batch,
        tokens=options.seq,
        memory=memory or profile.memory,
        profile=profile,
        dtype=options.dtype,
        lora_rank=options.lora_rank,
        fixed=fixed_of(options),
    )


def choose_profile(name: str | None, memory: int | None) -> Profile:
    """Return the profile of that name; without one this machine's own, or the published one of about that memory."""
    if name is not None:
        return load(name)
    if memory is None:
        return load("measured") if MEASURED.expanduser().exists() else PUBLISHED["h100"]
    return min(PUBLISHED.values(), key=lambda one: abs(one.memory - memory))


def fixed_of(options: Any) -> dict[str, Any]:
    """Return the choices that were made by options, by the planner's names."""
    named = {"dp": "dp", "pp": "pp", "sp": "sp", "tp": "tp", "zero": "zero", "micro_batch": "micro_batch"}
    named |= {"recompute": "recompute", "offload": "offload", "schedule": "pipeline_schedule", "sequence": "sequence"}
    given = {name: getattr(options, option) for name, option in named.items()}
    return {name: value for name, value in given.items() if value is not None}


def sft_options(job: Job) -> dict[str, Any]:
    """Return a job as options of `minispeed sft`."""
    layout = job.layout
    return {
        "ranks": job.devices,
        "dp": job.mesh.dp,
        "pp": layout.pp,
        "pipeline_schedule": layout.schedule,
        "virtual_stages": layout.virtual,
        "sp": layout.sp,
        "sequence": layout.sequence,
        "tp": layout.tp,
        "sequence_parallel": layout.tokens,
        "zero": job.zero,
        "micro_batch": job.micro_batch,
        "recompute": job.recompute,
        "offload_optimizer": job.offload_optimizer,
        "offload_param": job.offload_param,
    }


def write_config(path: Path, options: PlanOptions, found: Found) -> None:
    """Write the best as a configuration: the blocks that `minispeed sft` and `minispeed simulate --config` read.

    Raises  UserError if there is a file already
    """
    job = found.ranked[0].job
    block = {"model": options.model, "dtype": job.dtype, "seq": job.tokens, "batch": job.rows, **sft_options(job)}
    simulated = {name: value for name, value in block.items() if name not in ("ranks", "dp", "offload_param")}
    simulated |= {"devices": job.devices, "profile": options.profile or found.request.profile.name}
    block |= {"lora_rank": job.lora_rank} if job.lora_rank else {}
    if path.exists():
        raise UserError(f"{path} is there already", fix=f"another --out, or remove {path}")
    path.write_text(json.dumps({"sft": block, "simulate": simulated}, indent=1) + "\n", encoding="utf-8")
