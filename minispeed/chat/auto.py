"""Let the planner choose what of a run's layout was left open, for `minispeed sft --auto`, and say why.

Planned for are the model and the rows that were opened, on as many devices as there are ranks, each with its share of
this machine's memory. An option that is not at its default is kept.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

import torch

from minispeed.chat.calibrate import host_memory
from minispeed.chat.plan import sft_options
from minispeed.chat.sft_options import PLANNED, SftOptions
from minispeed.errors import UserError
from minispeed.model.config import GPTConfig
from minispeed.plan.report import why_not
from minispeed.plan.request import Request, line_of
from minispeed.plan.search import Found, search
from minispeed.profiles import MEASURED, Profile, check_machine, load
from minispeed.published import PUBLISHED
from minispeed.sizes import spell_size

KNOBS: Mapping[str, str] = {"pipeline_schedule": "schedule", "virtual_stages": "virtual", "sequence_parallel": "tokens"}
ROOM = 0.9  # of a device's memory that a plan may fill: other things live there too
SHOWN = 12  # reasons


def open_ones(options: SftOptions) -> list[str]:
    """Return the options that the planner is to choose.

    Raises  UserError if one that is to be planned has a value
    """
    defaults = {field.name: None if field.default is MISSING else field.default for field in fields(SftOptions)}
    said = {name: getattr(options, name) for name in PLANNED if getattr(options, name) != defaults[name]}
    for name in options.auto:
        if name in said:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is left to the planner, and is {said[name]}", fix=f"{flag} {said[name]}, or auto")
    wanted = (
        {*options.auto, "micro_batch"} if options.auto else set()
    )  # the usual rows at once are for the usual layout
    return [name for name in PLANNED if name not in said and (name in wanted or "all" in wanted)]


def plan_run(
    options: SftOptions, config: GPTConfig, *, planned: list[str], devices: int, device: torch.device
) -> tuple[SftOptions, list[str]]:
    """Return the options with those planned that were left open, and what to say of it.

    options  with --seq, --batch and --dtype chosen
    Raises   UserError if nothing fits, with what the least needs, or the fixed options leave no layout
    """
    assert options.seq is not None and options.batch is not None
    profile = profile_of(options.profile, device)
    request = Request(
        model=replace(config, attention=options.attention),
        devices=devices,
        rows=options.batch,
        tokens=options.seq,
        memory=round(ROOM * memory_of(device, devices)),
        profile=profile,
        dtype=options.dtype,
        lora_rank=options.lora_rank,
        lora_targets=tuple(options.lora_targets),
        fixed=fixed_by(options, planned),
    )
    found = search(request)
    if not found.ranked:
        raise _nothing(found)
    chosen = {name: value for name, value in sft_options(found.ranked[0].job).items() if name in planned}
    return replace(options, auto=[], **chosen), [*_said(found, profile)]


def fixed_by(options: SftOptions, planned: list[str]) -> dict[str, Any]:
    """Return the choices that are made already, by the planner's names."""
    fixed = {
        KNOBS.get(name, name): getattr(options, name)
        for name in PLANNED
        if name not in planned and not name.startswith("offload") and getattr(options, name) is not None
    }
    if options.offload_optimizer or options.offload_param or "offload_optimizer" not in planned:
        fixed["offload"] = "all" if options.offload_param else "optimizer" if options.offload_optimizer else "none"
    return fixed


def profile_of(name: str | None, device: torch.device) -> Profile:
    """Return the profile of that name; without one what was measured here, or the published one of this GPU.

    Raises  UserError where none is known
    """
    if name is not None:
        return load(name)
    if MEASURED.expanduser().exists():
        return load("measured")
    if device.type == "cuda":
        title, memory = (
            torch.cuda.get_device_name(device).lower(),
            torch.cuda.get_device_properties(device).total_memory,
        )
        alike = [one for key, one in PUBLISHED.items() if key.split("-")[0] in title]
        if alike:
            return min(alike, key=lambda one: abs(one.memory - memory))
    what = "how fast this machine is, nobody has measured"
    raise UserError(what, fix="minispeed calibrate, which takes a minute; or --profile with a published machine")


def memory_of(device: torch.device, ranks: int) -> int:
    """Return the bytes of memory that a rank of this machine has: of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory() // ranks


def _said(found: Found, profile: Profile) -> list[str]:
    """Return what was planned, and what speaks against the rest."""
    best = found.ranked[0]
    sentence = check_machine(profile)
    lines = [f"note: {sentence}"] if sentence else []
    lines.append(
        f"planned: {line_of(best.job)}: {spell_size(best.memory.total)} of {spell_size(found.request.memory)} a rank, "
        f"{best.tokens_per_second:,.0f} tokens/s expected ({found.count:,} candidates; rates: {profile.name})"
    )
    return lines + [f"  not {line}" for line in why_not(found)[:SHOWN]]


def _nothing(found: Found) -> UserError:
    """Say what the least of all candidates needs, or what forbids them all."""
    least = min(found.least.values(), key=lambda one: one.memory.total, default=None)
    if least is None:
        why = "; ".join(f"{one.name} {one.value}: {one.reason}" for one in found.refusals)
        fixed = ", ".join(f"{name} {value}" for name, value in found.request.fixed.items())
        return UserError(
            f"no layout can be: fixed are {fixed or 'none'}" + f"; {why}" * bool(why), fix="fewer of these"
        )
    what = f"the least that a layout needs is {spell_size(least.memory.total)} a rank ({line_of(least.job)})"
    return UserError(
        f"{what}, and there is {spell_size(found.request.memory)}", fix="shorter rows, --lora-rank 8, ranks"
    )
