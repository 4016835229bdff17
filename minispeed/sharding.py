"""Shard what a rank holds of a cut model by ZeRO, stage by stage, and give the optimizer its masters.

Parameter groups are named on the whole model; each stage finds in them the names that it has.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from minispeed.cut import CutModel
from minispeed.errors import UserError
from minispeed.parts import Lines, Part
from minispeed.precision import Precision
from minispeed.zero.sharded import ShardedModel
from minispeed.zero.unit import Dtypes


def dtypes_for(precision: Precision, zero: int) -> Dtypes:
    """Return what a unit keeps its elements in at a ZeRO stage."""
    accumulate = precision.accumulate or precision.master
    return Dtypes(
        compute=precision.compute,
        master=precision.master,
        # stages 0 and 1 add up whole gradients before they are summed over ranks, stages 2 and 3 their shards after
        collect=precision.compute if zero >= 2 else accumulate,
        reduce=precision.reduce or precision.compute,
        gradient=accumulate,
    )


def shard_parts(
    cut: CutModel,
    lines: Lines,
    groups: Sequence[Mapping[str, Any]],
    units: Mapping[str, Sequence[str]] | None,
    **how: Any,
) -> list[Part]:
    """Shard each stage over the ranks that would hold copies of it.

    groups  the names of each parameter group under "names", those of the whole model; units likewise
    how     see `ShardedModel`
    """
    parts = []
    for piece in cut.pieces:
        sharded = ShardedModel(
            piece.module,
            lines.shards,
            param_groups=[piece.local(of["names"]) for of in groups],
            units=None if units is None else {where: piece.local(names) for where, names in units.items()},
            alone=piece.tied,
            **how,
        )
        parts.append(Part(piece.stage, piece.run, sharded, piece.logical))
    return parts


def make_optimizer(
    parts: Sequence[Part],
    groups: list[dict[str, Any]],
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    *,
    zero: int,
) -> torch.optim.Optimizer:
    """Make the optimizer of all masters of this rank.

    Writes  groups: "params" in the place of "names"
    Raises  UserError if the optimizer refuses them
    """
    masters = [part.sharded.masters_by_group(len(groups)) for part in parts]
    for index, of in enumerate(groups):
        del of["names"]
        of["params"] = [master for of_part in masters for master in of_part[index]]
    try:
        return make(groups)
    except ValueError as error:
        how = "each a whole tensor" if zero == 0 else f"at ZeRO stage {zero} flat shards of many"
        raise UserError(f"the optimizer refuses the parameters, {how}: {error}", fix="zero=0, or AdamW") from error
