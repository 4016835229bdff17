"""What does our training step cost on one device, beside a plain PyTorch loop and DDP?

    python benchmarks/gpu_step.py                       GPT-2 (124M) and Llama-3.2-1B shapes on one GPU
    python benchmarks/gpu_step.py --tiny --device cpu   the same code on a nano shape, in seconds; nothing is written

All train the same rows of 1024 tokens from the same weights, in bf16 with fp32 masters and moments, clipped, with
torch's fused AdamW kernel. Their first losses must agree, and the last ones are in the table:

    plain          a loop by hand: the model in bf16, its masters copied to it after each step (no autocast); every
                   row is one document, so attention is causal and nothing else
    plain, packed  the same loop, with the mask that keeps packed documents apart; ours always has it
    ddp            the loop of "plain, packed" under DistributedDataParallel, on one rank
    zero 0 to 3    minispeed.Engine at that stage, on one rank

A round lets each of them build, warm up, run and go, so that its peak memory is its own and the rounds interleave.
MFU: 6 P operations a token (forward 2, backward 4: Kaplan et al. 2020, section 2.1, https://arxiv.org/abs/2001.08361;
the products inside attention are left out) over the device's dense bf16 peak, as its maker states it.

Letters: P parameters, B batch, T tokens.
"""

import argparse
import contextlib
import copy
import gc
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))

from report import report, table

from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.processes import connect
from minispeed.engine import Engine, MicroBatch
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.precision import Precision
from minispeed.schedules import constant

COMPUTE = torch.bfloat16
LR, BETAS, CLIP = 1e-4, (0.9, 0.99), 1.0
EQUAL = 1e-3  # largest relative difference of first losses; bf16 kernels differ in the order of their sums
WARM_UP = 3

PEAKS = {  # word of a device's name: dense bf16 TFLOP/s in NVIDIA's data sheets; the first that fits counts
    "B200": 2250,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312,
    "A40": 149.7,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
}

Step = Callable[[MicroBatch], float | torch.Tensor]


class Sample(NamedTuple):
    """One contestant in one round: its losses, the seconds of a step, and its peak memory (bytes, None on a CPU)."""

    first: float
    last: float
    seconds: float
    peak: int | None


def plain(model: nn.Module, *, packed: bool, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> Step:
    """Return the step of a loop as one would write it by hand."""
    masters = [p.detach() for p in model.parameters()]
    model.to(COMPUTE)  # gives each parameter new memory; the masters keep theirs
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    run = wrap(model)

    def step(rows: MicroBatch) -> torch.Tensor:
        documents = dict(positions=rows.positions, documents=rows.documents) if packed else {}
        loss = run(rows.tokens, rows.labels, **documents).sum() / rows.tokens.numel()  # every token is supervised
        loss.backward()
        for master, p in zip(masters, parameters, strict=True):
            master.grad, p.grad = p.grad.to(master.dtype), None
        nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        optimizer.zero_grad()
        return loss.detach()

    return step


def ours(model: nn.Module, group: Group, stage: int) -> Step:
    """Return the step of our engine."""
    precision = Precision(COMPUTE, accumulate=COMPUTE)  # one micro-batch: gradients stay bf16, as in the plain loop
    settings: dict[str, Any] = dict(lr=LR, betas=BETAS, clip=CLIP, schedule=constant, zero=stage)
    engine = Engine(model, group, precision=precision, **settings)
    return lambda rows: engine.train_step([rows]).loss


def contestants(group: Group) -> dict[str, Callable[[nn.Module], Step]]:
    """Return who competes: name -> what makes a step of an fp32 model on its device."""
    found: dict[str, Callable[[nn.Module], Step]] = {
        "plain": lambda model: plain(model, packed=False),
        "plain, packed": lambda model: plain(model, packed=True),
        "ddp": lambda model: plain(model, packed=True, wrap=DistributedDataParallel),
    }
    return found | {f"zero {stage}": lambda model, stage=stage: ours(model, group, stage) for stage in range(4)}


def draw_rows(config: GPTConfig, batch: int, length: int, device: torch.device) -> MicroBatch:
    """Return rows of random tokens, every next one to be learnt.  (B, T)"""
    drawn = torch.randint(config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    places = torch.arange(length, device=device).expand(batch, length).contiguous()
    zeros = torch.zeros_like(places)
    return MicroBatch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(), places, zeros, zeros)


def measure(build: Callable[[], Step], rows: MicroBatch, steps: int) -> Sample:
    """Build one contestant, warm it up, and time `steps` steps together."""
    on_gpu = rows.tokens.is_cuda
    gc.collect()  # hooks make circles: what the one before held is freed here
    before = torch.cuda.memory_allocated() if on_gpu else 0
    step = build()
    first, *_ = [float(step(rows)) for _ in range(WARM_UP)]
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        last = step(rows)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    return Sample(first, float(last), seconds, torch.cuda.max_memory_allocated() - before if on_gpu else None)


def compare(model: nn.Module, group: Group, rows: MicroBatch, *, steps: int, repeats: int) -> dict[str, list[Sample]]:
    """Measure every contestant in each of `repeats` rounds, each from a copy of the same weights.

    Raises  AssertionError if one has another first loss than the plain loop: it does not compute the same
    """
    device, samples = rows.tokens.device, {name: [] for name in contestants(group)}
    for _ in range(repeats):
        for name, make in contestants(group).items():
            samples[name].append(measure(lambda: make(copy.deepcopy(model).to(device)), rows, steps))
            got, expected = samples[name][-1].first, samples["plain"][0].first
            assert abs(got - expected) <= EQUAL * expected, f"{name}: first loss {got}, the plain loop's {expected}"
    return samples


def fitting(
    model: nn.Module, group: Group, draw: Callable[[int], MicroBatch], batch: int, **settings: int
) -> tuple[int, dict[str, list[Sample]]]:
    """Compare on rows of `batch`, or half as many, until everybody's step fits the device's memory."""
    while True:
        try:
            return batch, compare(model, group, draw(batch), **settings)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            print(f"out of memory: starting again with {batch} rows a step", flush=True)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device in operations per second, None if it is not in the table."""
    fits = (peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name))
    peak = next(fits, None)
    return None if peak is None else peak * 1e12


def utilisation(num_parameters: int, tokens_per_second: float, peak: float | None) -> float | None:
    """Return MFU: the model's 6 P operations a token, as a share of what the device could do at most."""
    return None if peak is None else 6 * num_parameters * tokens_per_second / peak


def lines(
    title: str,
    num_parameters: int,
    batch: int,
    length: int,
    samples: Mapping[str, Sequence[Sample]],
    peak: float | None,
) -> list[dict[str, Any]]:
    """Return a row of the table for each contestant; spread: (slowest - fastest) / median of the rounds."""
    found, tokens = [], batch * length
    for name, of_name in samples.items():
        seconds = [sample.seconds for sample in of_name]
        median = statistics.median(seconds)
        peaks = [sample.peak for sample in of_name if sample.peak is not None]
        found.append(
            {
                "model": title,
                "contestant": name,
                "rows": batch,
                "tokens/s": tokens / median,
                "spread": (max(seconds) - min(seconds)) / median,
                "x plain": statistics.median(sample.seconds for sample in samples["plain"]) / median,
                "MFU": utilisation(num_parameters, tokens / median, peak),
                "peak bytes": max(peaks, default=None),
                "first loss": of_name[0].first,
                "last loss": of_name[0].last,
            }
        )
    return found


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[Group]:
    """Hold a process group of one rank, which DDP needs."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory(prefix="minispeed-") as folder:
        group = connect(backend, f"file://{folder}/rendezvous", rank=0, size=1, timeout=600.0)
        try:
            yield group
        finally:
            dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="a nano shape and short rows")
    parser.add_argument("--models", nargs="+", default=["gpt2", "llama-3.2-1b"], help="presets")
    parser.add_argument("--batch", type=int, default=16, help="rows a step; halved until a step fits")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed together")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--group", choices=("solo", "torch"), default="solo", help="ours: no group, or NCCL's (gloo's)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny --device cpu runs the same code without one")
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    length, models = (32, ["nano"]) if args.tiny else (1024, args.models)
    rows: list[dict[str, Any]] = []
    with one_rank(device) as torch_group:
        group: Group = torch_group if args.group == "torch" else SoloGroup()
        for name in models:
            model = GPT(preset(name))
            batch, samples = fitting(
                model,
                group,
                lambda batch: draw_rows(model.config, batch, length, device),
                args.batch,
                steps=args.steps,
                repeats=args.repeats,
            )
            rows += lines(name, sum(p.numel() for p in model.parameters()), batch, length, samples, peak)
    if args.tiny:
        print(table(rows))
    else:
        report("gpu_step", rows, peak=peak, row=length, **vars(args))
    return rows


if __name__ == "__main__":
    main()
