"""The one table: every key by its dotted name, as "zero_optimization.stage".

The honoured keys are declared by the sections of a `Config`; after them the ones without effect, the refused ones, and
other names of keys.
"""

from collections.abc import Mapping
from typing import Any

from minispeed.config.check import BLOCK, BOOLEAN
from minispeed.config.key import NO_EFFECT, REFUSED, Key, honoured_keys
from minispeed.config.no_effect import NO_EFFECT_WHY, ZERO
from minispeed.config.refused import REFUSED_WHY
from minispeed.config.schema import Config

CPU = {True: "cpu", False: "none"}
STAGE3 = (
    "prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters "
    "max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold "
    "use_all_reduce_for_fetch_params allgather_sequential"
)
Alias = tuple[str, Mapping[Any, Any]]
ALIASES: dict[str, Alias] = {
    **{f"{ZERO}{name}": (f"{ZERO}stage3_{name}", {}) for name in STAGE3.split()},
    f"{ZERO}stage3_gather_fp16_weights_on_model_save": (f"{ZERO}stage3_gather_16bit_weights_on_model_save", {}),
    f"{ZERO}cpu_offload": (f"{ZERO}offload_optimizer.device", CPU),
    f"{ZERO}cpu_offload_param": (f"{ZERO}offload_param.device", CPU),
    "tensor_parallel.tensor_parallel.tp_size": ("tensor_parallel.tp.tp_size", {}),
}


def table() -> dict[str, Key]:
    """Return the table."""
    keys = dict(honoured_keys(Config))
    for why, silent in NO_EFFECT_WHY.items():
        keys |= {name: Key(kind, default, NO_EFFECT, why) for name, (kind, default) in silent.items()}
    for (why, fix), harmless in REFUSED_WHY.items():
        keys |= {name: Key(BLOCK, value, REFUSED, why, fix=fix) for name, value in harmless.items()}
    bfloat16: dict[str, Alias] = {f"bfloat16.{name[5:]}": (name, {}) for name in keys if name.startswith("bf16.")}
    for name, (alias, stands_for) in (ALIASES | bfloat16).items():
        kind = BOOLEAN if stands_for else keys[alias].type
        what = f"another name of `{alias}`" + (", `cpu` where true" if stands_for else "")
        keys[name] = Key(kind, None, keys[alias].kind, what, alias=alias, stands_for=stands_for)
    return keys


TABLE = table()
OPEN = ("optimizer.params", "scheduler.params")  # what may be in them depends on the type beside
BLOCKS = {name[:place] for name in TABLE for place in range(len(name)) if name[place] == "."} | {*OPEN}
