"""Say what a bug report needs to know of a machine: versions, devices, links, dtypes, disk, and how fast ranks speak.

All of it is asked or measured here and now: a dtype is supported if a matrix product in it runs, and its speed stands
beside it; a bandwidth is that of an all-reduce that ran, and whose sum was right. What fails is a line of the report,
and the rest is reported all the same.

Bandwidth is 2 (N - 1)/N x bytes / seconds, what each rank of a ring sends in that time, so it can be compared between
numbers of ranks (NVIDIA's "bus bandwidth", https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).

Letters: N ranks.
"""

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minispeed.chat.commands import DoctorOptions
from minispeed.collective.launch import Backend, launch, under_torchrun
from minispeed.collective.world import World
from minispeed.errors import UserError
from minispeed.precision import DTYPES
from minispeed.version import __version__

BYTES = 16_000_000  # of the buffer that an all-reduce sums
WARM_UP, REPEATS = 2, 5
FAST = 1.3  # times fp32's speed, from which on bf16 is worth its rounding
CACHE = Path("~/.cache/minispeed")


def doctor(options: DoctorOptions) -> int:
    """Do `minispeed doctor`. Returns the exit code."""
    if under_torchrun():
        raise UserError(
            "doctor looks at one machine, and torchrun has started it several times", fix="minispeed doctor"
        )
    found = examine(options.ranks)
    print(json.dumps(found, indent=1) if options.json else as_text(found))
    return 0


def several_gpus_hint() -> str | None:
    """Return how to use all GPUs, for a process that uses one of several; None where nothing is left unused."""
    count = torch.cuda.device_count()
    if count < 2 or under_torchrun():
        return None
    words = sys.argv[1:] if sys.argv[1:2] == ["sft"] else ["sft", "..."]
    line = f"torchrun --nproc-per-node {count} -m minispeed {shlex.join(words)}"
    return f"{count} GPUs are here, and one is used; to use all: {line}"


def examine(ranks: int) -> dict[str, Any]:
    """Return everything that the report says, as JSON can hold it.

    ranks    processes between which gloo's bandwidth is measured; 0: no bandwidth is measured
    Returns  products: GFLOP/s by device and dtype, null where torch has no such product; free_gb: 1e9 bytes;
             links: row a, column b: whether GPU a reads the memory of GPU b directly
    """
    places = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {
        "versions": versions(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpus": gpus(),
        "links": links(),
        "products": {
            place: {name: product_speed(torch.device(place), dtype) for name, dtype in DTYPES.items()}
            for place in places
        },
        "free_gb": {"here": free_gb(Path.cwd()), "cache": free_gb(CACHE.expanduser())},
        "all_reduce": all_reduces(ranks),
        "hint": several_gpus_hint(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of what a result depends on, None for what torch was built without."""
    nccl = dist.is_available() and dist.is_nccl_available()
    return {
        "minispeed": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "os": platform.platform(),
        "CUDA": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
    }


def cpu_model() -> str:
    """Return the processor's name, as far as the system tells it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def gpus() -> list[dict[str, Any]]:
    """Return name, memory (GiB) and driver of every GPU that torch can use."""
    driver = asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": gpu.name, "memory_gib": gpu.total_memory / 2**30, "driver": driver} for gpu in found]


def asked(*command: str) -> str | None:
    """Return the first line that a program prints; None if it is not there, or fails, or takes 20 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def links() -> list[list[bool]]:
    """Return which GPU (row) can read which GPU's (column) memory without the host's help."""
    every = range(torch.cuda.device_count())
    return [[a == b or torch.cuda.can_device_access_peer(a, b) for b in every] for a in every]


def product_speed(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the speed of a matrix product in GFLOP/s, the best of four; None if torch has none here."""
    size = 4096 if device.type == "cuda" else 512
    try:
        x = torch.ones(size, size, dtype=dtype, device=device)
        return 2 * size**3 / min(_seconds_of_product(x) for _ in range(4)) / 1e9
    except RuntimeError:
        return None


def _seconds_of_product(x: torch.Tensor) -> float:
    _finish(x.device)
    start = time.perf_counter()
    x @ x
    _finish(x.device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_gb(place: Path) -> float:
    """Return the free disk space, in 1e9 bytes, where this folder is or will be."""
    there = next(parent for parent in [place.absolute(), *place.absolute().parents] if parent.exists())
    return shutil.disk_usage(there).free / 1e9


def all_reduces(ranks: int) -> list[dict[str, Any]]:
    """Measure an all-reduce between `ranks` processes over gloo, and between all GPUs over NCCL; 0 ranks: neither."""
    asked_for: list[tuple[Backend, int]] = [("gloo", ranks)]
    if torch.cuda.device_count() > 1:
        asked_for.append(("nccl", torch.cuda.device_count()))
    return [measure_all_reduce(backend, size) for backend, size in asked_for] if ranks else []


def measure_all_reduce(backend: Backend, ranks: int) -> dict[str, Any]:
    """Return the seconds of an all-reduce on its slowest rank, and the bandwidth; or why there is none."""
    row: dict[str, Any] = {"backend": backend, "ranks": ranks, "bytes": BYTES}
    try:
        seconds = max(launch(time_all_reduce, ranks=ranks, backend=backend, timeout=60.0))
    except Exception as error:  # whatever it is: processes that cannot speak are what the report is read for
        return row | {"failed": f"{type(error).__name__}: {error}"}
    return row | {"seconds": seconds, "gb_per_s": 2 * (ranks - 1) / ranks * BYTES / seconds / 1e9}


def time_all_reduce(world: World) -> float:
    """Return the median of this rank's seconds.  Raises RuntimeError if a sum is wrong"""
    x, times = torch.empty(BYTES // 4, dtype=torch.float32, device=world.device), []
    for _ in range(WARM_UP + REPEATS):
        x.fill_(1)
        _finish(world.device)
        start = time.perf_counter()
        world.group.all_reduce(x).wait()
        _finish(world.device)
        times.append(time.perf_counter() - start)
        if not (x == world.size).all():
            raise RuntimeError(f"the sum of ones over {world.size} ranks is not {world.size} everywhere")
    return statistics.median(times[WARM_UP:])


def as_text(found: dict[str, Any]) -> str:
    """Lay out what `examine` found, a label and a line each."""
    cpu, free = found["cpu"], found["free_gb"]
    rows = [(name, version or "none in this torch") for name, version in found["versions"].items()]
    rows.append(("CPU", f"{cpu['model']}, {cpu['cores']} cores, of which torch uses {cpu['threads']}"))
    rows += [
        (f"GPU {index}", f"{gpu['name']}, {gpu['memory_gib']:.1f} GiB, driver {gpu['driver'] or 'unknown'}")
        for index, gpu in enumerate(found["gpus"])
    ]
    rows += [("links", line) for line in link_lines(found["links"])]
    rows += [("products", f"{place}: {speed_line(speeds)}") for place, speeds in found["products"].items()]
    rows.append(("disk", f"{free['here']:.1f} GB free here, {free['cache']:.1f} GB in {CACHE}"))
    rows += [("all-reduce", all_reduce_line(row)) for row in found["all_reduce"]]
    rows += [("hint", found["hint"])] if found["hint"] else []
    return "\n".join(f"{label:11}{text}" for label, text in rows)


def link_lines(links: list[list[bool]]) -> list[str]:
    """Return the matrix of links, or why there is none."""
    if len(links) < 2:
        return ["one GPU, so nothing to link" if links else "no GPU that torch can use, so none between GPUs"]
    head = "reads  " + "  ".join(f"{b:>3}" for b in range(len(links)))
    marks = [["-" if a == b else "yes" if link else "no" for b, link in enumerate(row)] for a, row in enumerate(links)]
    return [head, *(f"GPU {a:<3}" + "  ".join(f"{mark:>3}" for mark in row) for a, row in enumerate(marks))]


def speed_line(speeds: dict[str, float | None]) -> str:
    """Return the dtypes of one device and how fast they are."""
    spelt = [f"{name} {'not supported' if speed is None else f'{speed:,.0f}'}" for name, speed in speeds.items()]
    is_fast = (speeds["bf16"] or 0) >= FAST * (speeds["fp32"] or 0)
    return f"{', '.join(spelt)} GFLOP/s; bf16 is {'fast' if is_fast else 'not fast'} here"


def all_reduce_line(row: dict[str, Any]) -> str:
    """Return one measured bandwidth, or why it could not be measured."""
    what = f"{row['bytes'] / 1e6:.0f} MB between {row['ranks']} processes over {row['backend']}"
    if "failed" in row:
        return f"{what} failed: {row['failed']}"
    return f"{what}: {row['seconds'] * 1e3:.1f} ms, {row['gb_per_s']:.2f} GB/s"
