"""Say of a run of sft what the ledger knows of any job: what a rank holds, and how much of the device is used.

MFU, model FLOPs utilisation: the products that a step asks for, divided by what the devices could do in its time. PaLM,
Chowdhery et al. 2022, appendix B. https://arxiv.org/abs/2204.02311
"""

from collections.abc import Callable
from dataclasses import fields

import torch

from minispeed.chat.auto import profile_of
from minispeed.chat.build import Chosen, build_layout
from minispeed.chat.sft_options import SftOptions
from minispeed.engine import Report
from minispeed.errors import UserError
from minispeed.ledger.job import Job
from minispeed.ledger.memory import Memory
from minispeed.model.config import GPTConfig
from minispeed.model.flops import step_flops
from minispeed.sizes import spell_size


def job_of(options: SftOptions, config: GPTConfig, world: int, *, supervised: float = 1.0) -> Job:
    """Return the job that a run's options describe, on so many ranks.

    options     with what was left open filled in
    supervised  share of the tokens that are learnt from
    """
    chosen = Chosen.of(options)
    return Job(
        model=config,
        devices=world,
        rows=chosen.batch,
        tokens=chosen.seq,
        micro_batch=chosen.micro_batch,
        layout=build_layout(options),
        zero=options.zero,
        dtype=options.dtype,
        supervised=supervised,
        recompute=options.recompute,
        offload_optimizer=options.offload_optimizer,
        offload_param=options.offload_param,
        prefetch=options.prefetch,
        persistence=options.persistence,
        overlap=options.overlap,
        lora_rank=options.lora_rank,
        lora_targets=tuple(options.lora_targets),
    )


def memory_table(says: Memory, found: Memory) -> list[str]:
    """Lay out what a rank was to hold, and what it held when it held most."""
    names = [*(field.name for field in fields(Memory) if field.name != "host"), "total"]
    names += ["host"] if says.host or found.host else []
    lines = [f"{'memory of rank 0':16}  {'predicted':>10}  {'measured':>10}"]
    for name in names:
        pair = (f"{_signed(getattr(memory, name)):>10}" for memory in (says, found))
        lines.append(f"{name:16}  {'  '.join(pair)}")
    return lines


def _signed(size: int) -> str:
    return f"-{spell_size(-size)}" if size < 0 else spell_size(size)


def mfu_of(
    options: SftOptions, config: GPTConfig, world: int, device: torch.device
) -> Callable[[Report, float], float]:
    """Return what tells a step's MFU by its report and its seconds: 0 to 1; 0 where nobody knows how.

    The peak is that of the machine's profile; of a measured one without, the FLOPs a second that products reached. With
    adapters the frozen weights ask for other products than the closed form counts.
    """
    chosen = Chosen.of(options)
    try:
        profile = profile_of(options.profile, device)
    except UserError:
        return lambda report, seconds: 0.0
    reached = profile.at(world).flops if profile.machine else {}
    peak = profile.peak.get(options.dtype) or reached.get(options.dtype, 0.0)
    if not peak or options.lora_rank:
        return lambda report, seconds: 0.0

    def mfu(report: Report, seconds: float) -> float:
        flops = step_flops(config, rows=chosen.batch, tokens=chosen.seq, supervised=report.num_supervised)
        return flops.model / (seconds * peak * world)

    return mfu
