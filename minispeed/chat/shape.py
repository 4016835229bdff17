"""Find a model's shape by its name: a preset, a run, a HuggingFace directory, or a JSON file of our fields."""

import json
from pathlib import Path

from minispeed.errors import UserError, nearest
from minispeed.model.config import GPTConfig
from minispeed.model.hf.config import from_json, is_hf, read_config
from minispeed.model.presets import PRESETS

CONFIG = "config.json"  # of a run, in its directory


def shape_of(name: str) -> GPTConfig:
    """Return the shape of a model that is named as `minispeed sft --model` names it.

    Raises  UserError naming the nearest preset, or the file that is none
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name).expanduser()
    if path.is_dir() and is_hf(path):
        return read_config(path)
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        known = ", ".join(PRESETS)
        what = f"no preset is called {name!r}, and no model is there; presets: {known}"
        raise UserError(what, fix=f"--model {nearest(name, PRESETS) or 'tiny'}, or a model's directory")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds no object but {type(values).__name__}")
        return from_json(values) if {"model_type", "architectures"} & values.keys() else GPTConfig.from_dict(values)
    except (ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not a model's configuration: {error}") from error
