"""Which template a model talks by: the checkpoint's own, ours, or one from a file; and how a saved one is read back."""

import json
from pathlib import Path

from minispeed.chat.jinja import JinjaTemplate
from minispeed.chat.template import ChatTemplate, Template
from minispeed.errors import UserError

SAVED = "template.json"


def load_template(path: Path | str) -> ChatTemplate:
    """Read what a template's `save` wrote, of either kind.  Raises UserError where it is no such file"""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        if isinstance(content, dict) and content.get("kind") == "jinja":
            return JinjaTemplate(tuple(content["files"].items()), content["date"])
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # `Template` names what is wrong
    return Template.load(path)


def choose_template(name: str, folder: Path | None) -> ChatTemplate:
    """Return the template that a model is to be trained with.

    name    "auto": the checkpoint's own, ours where it has none; "ours"; or a file: a .jinja, or a saved template
    folder  the checkpoint; None for a new model
    Raises  UserError where there is no such file, or a .jinja comes without a checkpoint
    """
    if name == "auto" and folder is not None:
        saved = folder / SAVED
        return load_template(saved) if saved.exists() else JinjaTemplate.read(folder) or Template()
    if name in ("auto", "ours"):
        return Template()
    if not name.endswith(".jinja"):
        return load_template(name)
    if folder is None:
        raise UserError(f"--template {name} needs the tokens of a checkpoint", fix="--model DIR, or no --template")
    if not Path(name).is_file():
        raise UserError(f"there is no template {name}", fix="--template auto")
    template = JinjaTemplate.read(folder, source=Path(name).read_text("utf-8"))
    assert template is not None
    return template
