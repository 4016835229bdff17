"""Models in HuggingFace's form: GPT-2, Llama, Qwen2, Qwen3 and StableLM, from a folder into our GPT and out again.

config.py    config.json <-> GPTConfig, key by key
weights.py   which tensors of the files are which parameter of ours
read.py      a folder as a source of parameters, of which any slice is read alone
write.py     a folder that `transformers` loads

Names are found when they are first asked for: whoever reads a config.json alone does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minispeed.model.hf.config import is_hf as is_hf, read_config as read_config
    from minispeed.model.hf.read import HFSource as HFSource, load as load, resolve as resolve
    from minispeed.model.hf.write import save as save

_HOMES = {"is_hf": "config", "read_config": "config", "HFSource": "read", "load": "read", "resolve": "read"}
_HOMES |= {"save": "write"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
