"""List what each rank of a job holds of the model, unit by unit, as the engine cuts and shards it.

    every parameter -> its slice of tp -> the layers of a stage -> the unit of a layer

The cut by depth makes the stage that computes with most parameters as small as can be; what several stages hold (a tied
embedding, alpha) is a unit alone in each. Adapters and what they leave frozen are units apart.

Letters: L blocks.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from minispeed.ledger.job import Job
from minispeed.model.config import GPTConfig
from minispeed.model.shapes import Shape, layer_of, parameters
from minispeed.pipeline.partition import partition

TIED = "embed.tokens.weight"


class Unit(NamedTuple):
    """What is gathered and reduced together, on each rank of tp.

    stage      of the pipeline
    elements   of a tp rank's slice, no padding of ZeRO's included
    trains     whether it has gradients
    """

    stage: int
    name: str
    elements: int
    trains: bool


@lru_cache(maxsize=1024)
def bounds(model: GPTConfig, stages: int, lora_rank: int = 0, lora_targets: tuple[str, ...] = ()) -> tuple[int, ...]:
    """Return where the stages of a pipeline begin, and the number of layers, L + 2; UserError if they are too many."""
    costs = [0] * (model.num_layers + 2)
    for shape in _shapes(model, lora_rank, lora_targets):
        layer = layer_of(shape.name, model.num_layers)
        if layer:  # the embedding looks up: it costs nothing
            costs[layer] += shape.size
        if shape.name == "head.weight" or (shape.name == TIED and model.tied):
            costs[-1] += shape.size
    return tuple(partition(costs, stages))


def units(job: Job, pp_rank: int) -> list[Unit]:
    """Return the units of a rank of the pipeline, in the order of its stages and of their layers."""
    return list(
        _units(job.model, job.lora_rank, job.lora_targets, job.layout.pp, job.layout.stages, pp_rank, job.layout.tp)
    )


@lru_cache(maxsize=4096)
def _units(
    model: GPTConfig, lora_rank: int, targets: tuple[str, ...], pp: int, stages: int, pp_rank: int, tp: int
) -> tuple[Unit, ...]:
    shapes = _shapes(model, lora_rank, targets)
    if pp == 1:
        return tuple(_divide(0, shapes, frozenset(), tp))
    cuts = bounds(model, stages, lora_rank, targets)
    found: list[Unit] = []
    for stage in range(pp_rank, stages, pp):
        here = _of_stage(shapes, model, cuts[stage], cuts[stage + 1])
        found += _divide(stage, here, _tied(model, cuts, pp), tp)
    return tuple(found)


@lru_cache(maxsize=256)
def _shapes(model: GPTConfig, lora_rank: int, targets: tuple[str, ...]) -> tuple[Shape, ...]:
    return tuple(parameters(model, lora_rank=lora_rank, lora_targets=targets))


def _of_stage(shapes: Sequence[Shape], model: GPTConfig, first: int, last: int) -> list[Shape]:
    """Return the parameters of layers first .. last - 1, the head's, and alpha."""
    is_last = last == model.num_layers + 2
    head = TIED if model.tied else "head.weight"
    own = []
    for shape in shapes:
        layer = layer_of(shape.name, model.num_layers)
        is_here = layer is not None and first <= layer < last
        if is_here or (is_last and shape.name == head) or shape.name == "deep.alpha":
            own.append(shape)
    return own


def _tied(model: GPTConfig, cuts: Sequence[int], pp: int) -> frozenset[str]:
    """Return the names of which several stages have copies."""
    is_apart = model.tied and len(cuts) > 2
    return frozenset({"deep.alpha"} | ({TIED} if is_apart else set()))


def _divide(stage: int, shapes: Sequence[Shape], alone: frozenset[str], tp: int) -> list[Unit]:
    """Put the parameters of each layer together, those that train and those that do not."""
    sizes: dict[tuple[str, bool], int] = {}
    for shape in shapes:
        home = ".".join(shape.name.split(".")[:2]) if shape.name.startswith("blocks.") else shape.name.split(".")[0]
        if shape.name in alone:
            home = f"{shape.name} alone"
        key = (home, shape.trains)
        sizes[key] = sizes.get(key, 0) + shape.local_size(tp)
    return [Unit(stage, name, size, trains) for (name, trains), size in sizes.items()]
