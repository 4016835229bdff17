"""ZeRO-Offload: what stays on a device when the optimizer's states live on its host, and what crosses in between.

    python benchmarks/papers/offload.py            seconds
    python benchmarks/papers/offload.py --quick    fewer ranks; nothing is written

A GPT trains steps at stage 2 on ranks that are threads, with `Offload(states=...)`. Here both places are the same
memory, so that a byte is counted to the place that the run assigns it to.

ZeRO-Offload, Ren et al. 2021. https://arxiv.org/abs/2101.06840
Letters: M parameters (the paper's), N ranks, g micro-batches of a step.
"""

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry import Entry, Row, run
from zero_memory import CONFIG

from minispeed.collective.group import Group
from minispeed.collective.threads import run_threads
from minispeed.engine import Engine, MicroBatch
from minispeed.model.gpt import GPT
from minispeed.precision import Precision
from minispeed.schedules import constant
from minispeed.testing.measure import measure_held
from minispeed.zero.sharded import Offload

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Counted:
    """Bytes for each parameter of the model.

    device, host  what lies there all the time, on the rank that holds most
    crossed       what went from one to the other in a step, all ranks together
    """

    device: float
    host: float
    crossed: float


@lru_cache
def count(*, ranks: int = 1, micro: int = 1, offload: bool = True, gradient: torch.dtype = torch.bfloat16) -> Counted:
    """Train at stage 2 in bf16, shards of gradients in `gradient`; count the second step."""
    M = sum(p.numel() for p in GPT(CONFIG).parameters())

    def train(group: Group) -> tuple[int, int, int]:
        engine = Engine(
            GPT(CONFIG),
            group,
            precision=Precision(torch.bfloat16, accumulate=gradient),
            schedule=constant,
            lr=1e-3,
            zero=2,
            offload=Offload(states=HOST if offload else None),
        )
        units = engine.sharded.units
        engine.train_step(rows(micro))
        before = sum(unit.moved for unit in units)
        held = measure_held(engine, lambda: engine.train_step(rows(micro)))
        away = held.optimizer if all(unit.has_states_away for unit in units) else 0
        return held.total - away, away, sum(unit.moved for unit in units) - before

    device, host, crossed = zip(*run_threads(train, ranks))
    return Counted(max(device) / M, max(host) / M, sum(crossed) / M)


def rows(micro: int) -> list[MicroBatch]:
    """Return a step of some micro-batches."""
    tokens = torch.arange(8)[None]
    zeros = torch.zeros_like(tokens)
    return [MicroBatch(tokens, tokens, tokens, zeros, zeros)] * micro


def entry(quick: bool) -> Entry:
    """Return the paper's statements with what was counted."""
    many = (2,) if quick else (2, 4, 8)
    return Entry(
        topic="offload",
        title="ZeRO-Offload: bytes on the device and over the bus",
        source="ZeRO-Offload, Ren et al. 2021",
        link="https://arxiv.org/abs/2101.06840",
        rows=[*one_device(), *crossing(), *(row for ranks in many for row in several(ranks))],
        notes=[
            "Counted: a GPT at stage 2 in bf16, gradients in bf16, a step after the first; bytes of the rank that "
            "holds most, divided by the parameters M. Activations, the paper's as ours, are left out.",
            "Device and host were the same memory here: a byte counts where the run assigns it (masters and moments "
            "to the host, parameters and gradients to the device), and crossing is counted where the copy is made, "
            "not on a bus. How long it takes, and that it overlaps with the backward, is not measured.",
            "The paper sends a gradient to the host as soon as it is there, so that 2 M is all that a device keeps; "
            "here the summed shard waits on the device for the end of the step, which the clip's norm needs: the "
            "paper's strategy of 4 M on one device. On N it is 2 M + 2 M/N, and nears the 2 M.",
            "Because gradients cross once a step, micro-batches do not add to it. Gradients summed in fp32, the "
            "default here, cross in 4 bytes: 6 M in place of 4 M.",
            "On the host the paper keeps 16-bit gradients too (14 M); here they arrive as fp32 gradients of the "
            "masters, 4 M/N more that live from the clip to the update and are not in the row.",
        ],
    )


def one_device() -> list[Row]:
    """Return what table 1 says of a single device."""
    plain, away = count(offload=False), count()
    return [
        Row(
            claim=claim,
            section="section 3.4, table 1",
            paper=paper,
            closed_form=ours,
            measured=measured,
            unit="bytes a parameter",
        )
        for claim, paper, ours, measured in (
            ("all on the device: 16 M bytes there", 16, 16, plain.device),
            ("states and update on the host: 4 M", 4, 4, away.device),
            ("gradients there as well: 2 M", 2, None, "not built"),
        )
    ]


def crossing() -> list[Row]:
    """Return what crosses in a step of one device."""
    return [
        Row(claim=claim, section=section, paper=paper, closed_form=ours, measured=measured, unit="bytes a parameter")
        for claim, section, paper, ours, measured in (
            ("gradients go in 2 M bytes, parameters come back in 2 M", "section 3.3", 4, 4, count().crossed),
            ("the same, 4 micro-batches a step", "from section 3.3", None, 4, count(micro=4).crossed),
            ("the same, gradients in fp32", "from section 3.3", None, 6, count(gradient=torch.float32).crossed),
        )
    ]


def several(ranks: int) -> list[Row]:
    """Return what section 4.2 says of N devices, each with an N-th of gradients and states."""
    found = count(ranks=ranks)
    return [
        Row(
            claim=f"{claim}, N = {ranks}",
            section="section 4.2",
            paper=paper,
            closed_form=ours,
            measured=is_,
            unit="bytes a parameter",
        )
        for claim, paper, ours, is_ in (
            ("all devices together exchange 4 M bytes with the host", 4, 4, found.crossed),
            ("a device keeps its parameters, 2 M, and here 2 M/N of gradients", 2, 2 + 2 / ranks, found.device),
            ("a rank has 12 M/N of masters and moments on the host", None, 12 / ranks, found.host),
        )
    ]


if __name__ == "__main__":
    run(entry)
