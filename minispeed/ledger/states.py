"""Say in closed form what a run holds and sends; a run that is counted must agree, to the byte.

The ZeRO paper's table is the same for every model because it knows only P, the number of parameters:

    bytes held by a rank, 16-bit + Adam     stage 0   stage 1          stage 2          stage 3
    gradients in 16 bits (the paper)        16 P      4 P + 12 P/N     2 P + 14 P/N     16 P/N
    gradients in fp32                       18 P      6 P + 12 P/N     2 P + 16 P/N     18 P/N

A real buffer is padded until N divides it: `held` and `sent` count that in, from the sizes of the units.

ZeRO, Rajbhandari et al. 2020, sections 3.1, 5 and 7. https://arxiv.org/abs/1910.02054
Letters: N ranks, P parameters, S elements of a unit's shard, g micro-batches of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

ADAM_MOMENTS = 2
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}  # of an element


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Bytes of an element; for what, see `minispeed.zero.gradients.Dtypes`."""

    compute: int
    master: int
    collect: int
    reduce: int
    gradient: int

    @classmethod
    def of(cls, dtypes: Any) -> "Widths":
        """Return those of `Dtypes`."""
        return cls(**{field.name: getattr(dtypes, field.name).itemsize for field in fields(cls)})

    @classmethod
    def named(cls, compute: str, *, zero: int, accumulate: str | None = None, reduce: str | None = None) -> "Widths":
        """Return those of a run in a dtype, as the engine chooses them.

        accumulate, reduce  as `minispeed.precision.Precision`; None: the masters' dtype, and the compute dtype
        """
        master = max(BYTES[compute], BYTES["fp32"])
        gradient = BYTES[accumulate] if accumulate else master
        return cls(
            compute=BYTES[compute],
            master=master,
            collect=BYTES[compute] if zero >= 2 else gradient,
            reduce=BYTES[reduce or compute],
            gradient=gradient,
        )


@dataclass(frozen=True)
class Held:
    """Bytes on one rank, temporary ones left out: what is there from one unit's backward to the next."""

    parameters: int
    gradients: int
    optimizer: int  # masters, where they are not the parameters themselves, and moments

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer


def held(
    units: Sequence[int],
    *,
    ranks: int,
    stage: int,
    widths: Widths,
    moments: int = ADAM_MOMENTS,
    frozen: Sequence[int] = (),
) -> Held:
    """Return what a rank holds of trainable units of these many elements, padding included.

    Padding has no moments: a rank whose shards end in padding holds that much less of them.

    frozen  elements of units that are not trained (of all but the adapters, with LoRA): parameters alone
    ZeRO, section 3.1 for the categories, 5.1 to 5.3 for the stages. LoRA, Hu et al. 2021, section 4.2.
    """
    (whole, mine), (whole_frozen, mine_frozen) = (_padded(part, ranks, stage) for part in (units, frozen))
    has_masters = widths.master != widths.compute
    parameters = mine + mine_frozen if stage == 3 else whole + whole_frozen
    return Held(
        parameters=parameters * widths.compute,
        gradients=whole * widths.collect if stage == 1 else mine * widths.gradient,
        optimizer=mine * (has_masters + moments) * widths.master,
    )


def _padded(units: Sequence[int], ranks: int, stage: int) -> tuple[int, int]:
    """Return the elements of the units' buffers, and those of them that are this rank's."""
    if stage == 0:
        return sum(units), sum(units)
    mine = sum(shard_size(unit, ranks) for unit in units)
    return ranks * mine, mine


def sent(units: Sequence[int], *, ranks: int, stage: int, micro: int = 1) -> float:
    """Return the elements that a rank sends in a step of `micro` micro-batches, on average over the ranks.

    In units of P (N - 1)/N: 2, 2, g + 1 and 3 g. Each unit is used once in a forward; nothing stays whole at stage 3.

    ZeRO, section 7: stages 1 and 2 send what data parallelism does, stage 3 half as much again.
    """
    times = {0: 2, 1: 2, 2: micro + 1, 3: 3 * micro}[stage]
    padded = [unit if stage == 0 else ranks * shard_size(unit, ranks) for unit in units]
    return times * sum(padded) * (ranks - 1) / ranks


def paper_bytes(parameters: int, *, ranks: int, stage: int, gradient_bytes: int = 2) -> float:
    """Return the paper's figure for 16-bit parameters and Adam with fp32 masters, nothing padded.

    ZeRO, figure 1 and section 3.1: 2 bytes of parameter, 2 of gradient, 12 of optimizer states.
    """
    cut = {0: (1, 1, 1), 1: (1, 1, ranks), 2: (1, ranks, ranks), 3: (ranks, ranks, ranks)}[stage]
    return sum(parameters * size / by for size, by in zip((2, gradient_bytes, 12), cut))


def shard_size(elements: int, ranks: int) -> int:
    """Return S: an equal part for each rank, rounded up."""
    return -(-elements // ranks)
