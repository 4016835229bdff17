"""Write docs/config.md: every key of the table, what it takes, and what it does here or why it does not."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from typing import Any

from minispeed.config.flat import FLAT
from minispeed.config.key import REFUSED, Key
from minispeed.config.optimizers import NOT_MADE, OPTIMIZERS, schedule_keys
from minispeed.config.table import TABLE
from minispeed.schedules import SCHEDULES

INTRODUCTION = """\
# Every key of a DeepSpeed configuration

Made from the code by `minispeed explain --keys`. `minispeed explain FILE` shows what one file comes to.

A key is *honoured*; or it has *no effect*, and a line is printed that says why; or it is *refused*, which is an error
unless its value switches it off (false, null, `{"enabled": false}`, or what stands under "default"). Any other key is
an error that names the nearest one. So is the value `"auto"`: nothing here fills it in. The keys and defaults are those
of DeepSpeed 0.19.8: [its page](https://www.deepspeed.ai/docs/config-json/) and what its code takes beyond that."""


def page() -> str:
    """Return the page, in Markdown."""
    parts = [INTRODUCTION]
    sections: dict[str, dict[str, Key]] = {}
    for name, key in TABLE.items():
        block = name.partition(".")[0] if "." in name else "the top level"
        sections.setdefault(block, {})[name] = key
    for block, keys in sections.items():
        parts += [f"## {block}", _table(keys)]
    parts += ["## The optimizers", *_optimizers(), "## The schedules", *_schedules(), "## The flat dialect", *_flat()]
    return "\n\n".join(parts) + "\n"


def _table(keys: Mapping[str, Key]) -> str:
    return _rows(
        ("key", "type", "default", "kind", "what it does, or why not"),
        ((f"`{name}`", _type(key), _default(key), key.kind, key.what) for name, key in keys.items()),
    )


def _type(key: Key) -> str:
    return "" if key.kind == REFUSED else key.type.words


def _default(key: Key) -> str:
    if key.alias:
        return ""
    if key.derived or key.default is MISSING:
        return key.derived or "required"
    return f"`{json.dumps(key.default)}`"


def _optimizers() -> list[str]:
    settings = {name: keys for name, keys in OPTIMIZERS.items() if keys is not None}
    torch = ", ".join(f"`{name}`" for name in OPTIMIZERS if name not in settings)
    parts = []
    for keys in {id(keys): keys for keys in settings.values()}.values():
        names = ", ".join(f"`{name}`" for name, those in settings.items() if those is keys)
        parts += [f"`optimizer.params` of {names}:", _table(keys)]
    return [
        *parts,
        f"torch's {torch} take the settings of torch.optim; from stage 1 on they need `zero_allow_untested_optimizer`.",
        _rows(("refused", "because"), ((f"`{name}`", why) for name, why in NOT_MADE.items())),
    ]


def _schedules() -> list[str]:
    rows = (
        (f"`{name}`", f"`{setting}`", key.type.words, _default(key) if setting != "warmup_max_lr" else RISES_TO)
        for name in SCHEDULES
        for setting, key in schedule_keys(name).items()
    )
    return [
        "What they mean is said in `minispeed/schedules.py`.",
        _rows(("scheduler.type", "scheduler.params", "type", "default"), rows),
    ]


RISES_TO = "the optimizer's lr"


def _flat() -> list[str]:
    rows = ((f"`{name}`", f"`{flat.key}`", flat.what) for name, flat in FLAT.items())
    return [
        "Settings of one level, given to `minispeed.initialize` by name, with a configuration or in place of one:",
        _rows(("name", "key", ""), rows),
    ]


def _rows(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows])
