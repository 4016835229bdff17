"""Names that are imported when they are first asked for: a module's `__getattr__` from a table.

`minispeed --help` must not wait for torch, and a name must not be looked up before its file can be imported.

Module `__getattr__`: PEP 562.  https://peps.python.org/pep-0562/
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(module: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of a module whose names live elsewhere.

    module  its `__name__`
    homes   name -> the module that holds it; a name whose home is `module.name` is that module itself

        __getattr__, __dir__ = lazily(__name__, {"logger": "minispeed.deepspeed.logging"})
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home = import_module(homes[name])
        return home if homes[name] == f"{module}.{name}" else getattr(home, name)

    return find, lambda: sorted({*vars(sys.modules[module]), *homes})
