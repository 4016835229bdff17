"""A configuration by DeepSpeed's names: `DeepSpeedConfig("ds.json").train_micro_batch_size_per_gpu`.

What `initialize` reads is the `Config` of `minispeed/config/`; here a script looks at it, by the name of the key. A key
inside a block has the block's name before its own: `fp16_enabled`, `zero_optimization_stage`.

https://www.deepspeed.ai/docs/config-json/
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minispeed.collective.world import current_world
from minispeed.config import read_config, values_of
from minispeed.errors import nearest


class DeepSpeedConfig:
    """The value of every honoured key, those that follow from others too."""

    def __init__(self, config: Mapping[str, Any] | str | Path, mpu: Any = None, mesh_device: Any = None) -> None:
        """Read a dict or the path of a JSON file, for the ranks of this thread's world.

        mpu          whose data-parallel ranks share a batch; None: all, but for those that share each layer's width
        mesh_device  means nothing here
        Raises       DeepSpeedConfigError that names the key, the value and the fix
        """
        if mpu is None:
            self.config = read_config(config, ranks=current_world().size)
        else:
            self.config = read_config(config, data_parallel=mpu.get_data_parallel_world_size())
        self._values = {key.replace(".", "_"): value for key, value in values_of(self.config).items()}

    def __getattr__(self, name: str) -> Any:
        values = vars(self).get("_values", {})
        if name not in values:
            near = nearest(name, values)
            raise AttributeError(f"the configuration has no {name!r}" + (f"; try: {near}" if near else ""))
        return values[name]
