"""Read a configuration: what was given, through the table, into a `Config` in which every value is known.

    given values -> sifted by the table -> optimizer and schedule by their own tables -> what follows from the others

Batch sizes are tied by train_batch_size = micro x accumulation x data-parallel ranks: one or two of the three give the
rest. https://www.deepspeed.ai/docs/config-json/#batch-size-related-parameters
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from minispeed.config.check import DeepSpeedConfigError, shown, typed
from minispeed.config.key import Given, Sifted, build, sift
from minispeed.config.load import gather, load
from minispeed.config.optimizers import OPTIMIZER, read_optimizer, read_scheduler
from minispeed.config.schema import Config
from minispeed.config.table import TABLE

TRAIN, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
BATCH = (TRAIN, MICRO, ACCUMULATION)
STAGE, OVERLAP = "zero_optimization.stage", "zero_optimization.overlap_comm"
GRADIENTS, MESSAGES = "data_types.grad_accum_dtype", "communication_data_type"
SWITCHES = "fp16.enabled, bf16.enabled"
WIDTH = ("tensor_parallel.autotp_size", "tensor_parallel.tp.tp_size")
DEVICES = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")


def read_config(
    source: Mapping[str, Any] | str | Path | None,
    *,
    data_parallel: int = 1,
    ranks: int | None = None,
    flat: Mapping[str, Any] = {},
) -> Config:
    """Read a configuration with DeepSpeed's keys.

    source         a dict, or the path of a JSON file
    data_parallel  ranks that share a batch
    ranks          instead of it, all ranks: those that share each layer's width have the same rows
    flat           settings in the flat dialect; see `minispeed.config.flat`
    Raises         DeepSpeedConfigError that names the key, the value and the fix
    """
    raw = load(source)
    given, notes = gather(raw, flat)
    found = sift(TABLE, given)
    _refuse_contradictions(found.values, given)
    is_free = not found.values[STAGE] or found.values["zero_allow_untested_optimizer"]
    _settle("optimizer", "AdamW", given, found, partial(read_optimizer, any_of_torch=is_free))
    _settle("scheduler", "WarmupLR", given, found, partial(read_scheduler, lr=found.values.get(f"{OPTIMIZER}lr")))
    _settle_batch(found, given, data_parallel if ranks is None else ranks // _width(found.values, given, ranks))
    _derive(found)
    return build(Config, found.values, notes=(*notes, *found.notes), origins=found.origins, raw=raw)


def _refuse_contradictions(values: Mapping[str, Any], given: Mapping[str, Given]) -> None:
    """Raise DeepSpeedConfigError if two values cannot both be, or one names a place that is not here."""
    if values["fp16.enabled"] and values["bf16.enabled"]:
        names = f'"{given["fp16.enabled"].name}" and "{given["bf16.enabled"].name}"'
        raise DeepSpeedConfigError(
            f"{names} are both true, and there is one compute dtype", fix=typed("fp16.enabled", False)
        )
    for name in DEVICES:
        if values[name] == "nvme":
            what = f'"{name}" is "nvme", and nothing is offloaded to NVMe here'
            raise DeepSpeedConfigError(what, fix=typed(name, "cpu"))
    if values[DEVICES[1]] == "cpu" and values[STAGE] != 3:
        what = f'"{given[DEVICES[1]].name}" asks for parameters on the CPU at stage {values[STAGE]}; only stage 3 can'
        raise DeepSpeedConfigError(what, fix=typed(STAGE, 3))
    width, other = (values[name] for name in WIDTH)
    if width and other not in (1, width):
        what = f'"{given[WIDTH[0]].name}" is {width}, but "{given[WIDTH[1]].name}" is {other}'
        raise DeepSpeedConfigError(what, fix=typed(WIDTH[1], width))


def _width(values: Mapping[str, Any], given: Mapping[str, Given], ranks: int) -> int:
    """Return how many ranks share each layer's width.  Raises DeepSpeedConfigError if they do not divide all"""
    name, width = max(((name, values[name]) for name in WIDTH), key=lambda pair: pair[1])
    if ranks % max(1, width):
        what = f'"{given[name].name}" is {width}, which does not divide {ranks} rank{"s" * (ranks != 1)}'
        raise DeepSpeedConfigError(what, fix=f"{-(-ranks // width) * width} ranks, or {typed(name, 1)}")
    return max(1, width)


def _settle(part: str, usual: str, given: Mapping[str, Given], found: Sifted, read: Callable[..., Any]) -> None:
    """Add the settings of the optimizer or the schedule, by the table of its type; without a type there is none."""
    prefix, kind = f"{part}.params.", f"{part}.type"
    settings = {name: one for name, one in given.items() if name.startswith(prefix)}
    del found.origins[prefix[:-1]]
    if kind not in given:
        del found.origins[kind]
        if settings:
            what = f'"{next(iter(settings.values())).name}" is given, but no "{kind}"'
            raise DeepSpeedConfigError(what, fix=typed(kind, usual))
        return
    name, own = read(given[kind], settings)
    if name.lower() != given[kind].value.lower():
        found.origins[kind] = f"derived from {kind} {given[kind].value}"
    found.values.update({**own.values, kind: name})
    found.values[prefix[:-1]] = {key.removeprefix(prefix): value for key, value in own.values.items()}
    found.origins.update(own.origins)
    found.notes.extend(own.notes)


def _settle_batch(found: Sifted, given: Mapping[str, Given], ranks: int) -> None:
    """Derive what is not given of the batch.  Raises DeepSpeedConfigError if the product is another"""
    values = found.values
    train, micro, accumulation = (values[name] for name in BATCH)
    if train is None and micro is None:
        what = f'the configuration has neither "{TRAIN}" nor "{MICRO}"'
        raise DeepSpeedConfigError(what, fix=f"adding {typed(MICRO, 8)}")
    if accumulation is None and None in (train, micro):
        accumulation = 1
    if train is None:
        train = micro * accumulation * ranks
    micro = micro or max(1, train // (accumulation * ranks))
    accumulation = accumulation or max(1, train // (micro * ranks))
    product = micro * accumulation * ranks
    if train != product:
        names = [given[name].name if name in given else name for name in BATCH]
        what = f'"{names[0]}" is {shown(train)}, but "{names[1]}" {shown(micro)} x "{names[2]}" {shown(accumulation)}'
        what += f" x {ranks} data-parallel rank{'s' * (ranks != 1)} = {shown(product)}"
        raise DeepSpeedConfigError(what, fix=typed(names[0], product))
    sources = ", ".join(name for name in BATCH if values[name] is not None)
    for name, value in zip(BATCH, (train, micro, accumulation)):
        if values[name] is None and not (name == ACCUMULATION and sources in (TRAIN, MICRO)):
            found.origins[name] = f"derived from {sources}"
        values[name] = value


def _derive(found: Sifted) -> None:
    """Fill in the defaults that follow from other values."""
    values = found.values
    dtype = "fp16" if values["fp16.enabled"] else "bf16" if values["bf16.enabled"] else "fp32"
    is_accumulated = values[ACCUMULATION] > 1
    derived = {
        OVERLAP: (values[STAGE] == 3, STAGE),
        GRADIENTS: ("fp32", ACCUMULATION) if is_accumulated else (dtype, SWITCHES),
        MESSAGES: (dtype, SWITCHES),
    }
    for name, (value, source) in derived.items():
        if values[name] is None:
            values[name], found.origins[name] = value, f"derived from {source}"
