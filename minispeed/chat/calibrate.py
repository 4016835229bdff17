"""Measure how fast this machine is, once for each number of ranks that are busy at once, and keep it as a profile.

    launch 1, 2, 4 processes -> each measures while the others do (`speeds.py`) -> the middle of the ranks' rates
    times of collectives     -> latency and bandwidth: the line  seconds = messages x latency + bytes / bandwidth

A profile is a JSON file (`minispeed.profiles`) that planning and simulating divide by. What they make of it is checked
at once: the time of a real block beside the time that the rates predict for it.

Hockney 1994, The communication challenge for MPP, for the line. https://doi.org/10.1016/S0167-8191(06)80021-9
"""

import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minispeed.chat.commands import CalibrateOptions
from minispeed.chat.speeds import CPU, CUDA, QUICK, Sample, check_model, measure
from minispeed.collective.launch import Backend, launch, under_torchrun
from minispeed.errors import UserError
from minispeed.plan.work import block
from minispeed.precision import DTYPES
from minispeed.profiles import MEASURED, Link, Profile, Rates, this_machine
from minispeed.sizes import spell_size

Measured = dict[str, Any]  # of one rank, as `speeds.measure`
CGROUP = Path("/sys/fs/cgroup/memory.max")


def calibrate(options: CalibrateOptions) -> int:
    """Do `minispeed calibrate`. Returns the exit code."""
    if under_torchrun():
        raise UserError("calibrate starts its own ranks, and torchrun has started it", fix="minispeed calibrate")
    path = (options.out or MEASURED).expanduser()
    backend, counts = _counts(options.ranks)
    found: dict[int, list[Measured]] = {}
    for ranks in counts:
        if sys.stderr.isatty():
            print(f"measuring with {ranks} rank{'s' * (ranks > 1)} busy ...", file=sys.stderr, flush=True)
        found[ranks] = launch(measure, options.quick, options.threads, tuple(DTYPES), ranks=ranks, backend=backend)
    profile = profile_of(found, on_gpu=backend == "nccl")
    print(table(profile))
    print("\n".join(check_lines(profile, found, options.quick)))
    profile.save(path)
    name = "measured" if options.out is None else str(path)
    print(f"\nwritten: {path}; to plan or simulate with it: --profile {name}")
    return 0


def profile_of(found: dict[int, list[Measured]], *, on_gpu: bool) -> Profile:
    """Return the profile of what the ranks measured, by how many were busy.

    Where there was no second rank to speak to, and between machines, the link is what was measured next to it: that of
    two ranks, that of most ranks, or the way to the host's memory.
    """
    host = _host_link(found[max(found)])
    links = {
        ranks: fit([sample for rank in each for sample in rank["samples"]])
        for ranks, each in found.items()
        if ranks > 1
    }
    nearest = links[min(links)] if links else host
    rates = tuple(_rates(ranks, each, links.get(ranks, nearest)) for ranks, each in sorted(found.items()))
    threads = ", ".join(f"{each[0]['threads']}" for _, each in sorted(found.items()))
    counts = ", ".join(map(str, sorted(found)))
    machine = this_machine()
    if on_gpu:
        machine += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    memory = host_memory()
    per_machine = torch.cuda.device_count() if on_gpu else max(found)
    return Profile(
        name=machine,
        source=f"measured on {machine}; torch {torch.__version__}, {threads} threads a rank for {counts} busy ranks; "
        "between machines: as between ranks here, nothing else was there to measure",
        per_machine=per_machine,
        memory=torch.cuda.get_device_properties(0).total_memory if on_gpu else memory // per_machine,
        rates=rates,
        between=rates[-1].link,
        host=host,
        host_memory=memory,
        machine=machine,
        on_cpu=not on_gpu,
    )


def fit(samples: Sequence[Sample]) -> Link:
    """Return the latency and bandwidth whose times are nearest to those of the samples, each error relative to its own.

    Neither is negative: where the best latency would be, it is 0; where longer messages took no longer, the bandwidth
    is the highest that any of them reached.
    """
    rows = [(s.messages / s.seconds, s.bytes / s.seconds) for s in samples]  # times (latency, 1 / bandwidth): near 1
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(row[i] for row in rows) for i in (0, 1))
    inverse = (b * aa - a * ab) / (aa * bb - ab * ab)
    if inverse <= 0:
        inverse = 1 / max(row[1] for row in rows)
    latency = (a - ab * inverse) / aa
    return Link(latency=latency, bandwidth=1 / inverse) if latency >= 0 else Link(latency=0.0, bandwidth=bb / b)


def host_memory() -> int:
    """Return the bytes of memory that this process's group may use."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    return min(whole, int(limit)) if limit.isdecimal() else whole


def table(profile: Profile) -> str:
    """Return the rates, a row for each number of busy ranks."""
    dtypes = list(profile.rates[0].flops)
    head = ["busy ranks", *(f"{dtype} GFLOP/s" for dtype in dtypes), "GB/s", "operation", "message", "link GB/s"]
    rows = [
        [
            str(at.ranks),
            *(f"{at.flops[dtype] / 1e9:,.1f}" for dtype in dtypes),
            f"{at.bandwidth / 1e9:,.1f}",
            f"{at.overhead * 1e6:.1f} us",
            f"{at.link.latency * 1e6:.0f} us",
            f"{at.link.bandwidth / 1e9:,.2f}",
        ]
        for at in profile.rates
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in [head, *rows]]
    memory = f"{spell_size(profile.memory)} a rank, {spell_size(profile.host_memory)} the machine"
    return "\n".join([profile.source, f"memory: {memory}", "", *lines])


def check_lines(profile: Profile, found: dict[int, list[Measured]], quick: bool) -> list[str]:
    """Return how far the rates miss the time of a real block, for each number of busy ranks and each dtype."""
    sizes = QUICK if quick else CUDA if torch.cuda.is_available() and torch.cuda.device_count() else CPU
    lines = [
        "",
        f"A block of width {check_model(sizes).model_dim}, forward and backward, measured and as the rates say:",
    ]
    for ranks, each in sorted(found.items()):
        for dtype in each[0]["block"]:
            seconds = statistics.median(rank["block"][dtype] for rank in each)
            work = block(check_model(sizes), rows=sizes.rows, tokens=sizes.tokens, width=DTYPES[dtype].itemsize)
            said = (work.forward + work.backward).seconds(profile.at(ranks), dtype)
            lines.append(
                f"  {ranks} busy, {dtype}: {seconds * 1e3:9.2f} ms, {said * 1e3:9.2f} ms  ({said / seconds - 1:+.0%})"
            )
    return lines


def _counts(asked: Sequence[int]) -> tuple[Backend, list[int]]:
    """Return over what the ranks speak, and the numbers of them to measure with."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return "gloo", sorted(set(asked) or {1, 2, 4})
    too_many = [ranks for ranks in asked if ranks > gpus]
    if too_many:
        what = f"{too_many[0]} ranks on nccl need as many GPUs, this machine has {gpus}"
        raise UserError(what, fix=f"--ranks {gpus}")
    return "nccl", sorted(set(asked) or {ranks for ranks in (1, 2, 4, 8, gpus) if ranks <= gpus})


def _rates(ranks: int, each: Sequence[Measured], link: Link) -> Rates:
    def middle(name: str) -> float:
        return statistics.median(rank[name] for rank in each)

    def middles(name: str) -> dict[str, float]:
        rates = {dtype: [rank[name][dtype] for rank in each] for dtype in each[0][name]}
        return {dtype: statistics.median(of) for dtype, of in rates.items() if all(of)}

    return Rates(
        ranks=ranks,
        flops=middles("flops"),
        bandwidth=middle("bandwidth"),
        overhead=middle("overhead"),
        link=link,
        attention=middles("attention"),
        between=middles("between"),
    )


def _host_link(each: Sequence[Measured]) -> Link:
    latencies, bandwidths = zip(*(rank["host"] for rank in each))
    return Link(latency=statistics.median(latencies), bandwidth=statistics.median(bandwidths))
