"""Divide a model's parameters into units: what is gathered together, and what is reduced together.

A unit should be what is needed at one time (a layer), for stage 3 releases it by the unit, or, where nothing is
released, just large enough that one message is worth its start (a bucket).

Buckets: Li et al. 2020, PyTorch Distributed, section 3.2.3. https://arxiv.org/abs/2006.15704
"""

from collections.abc import Mapping, Sequence

from torch import nn

from minispeed.errors import UserError


def units_of(module: nn.Module) -> dict[str, list[str]]:
    """Divide a model: each element of a list of modules is a unit, so is each other child of the root.

    Returns  names of parameters by the name of the module that uses them; "" is the root
    """
    division: dict[str, list[str]] = {}
    homes = [
        f"{where}.{child}" if where else child
        for where, parent in module.named_modules()
        if isinstance(parent, (nn.ModuleList, nn.Sequential))
        for child, _ in parent.named_children()
    ]
    outermost = [home for home in homes if not any(home.startswith(f"{other}.") for other in homes)]
    for name, _ in module.named_parameters():
        home = next((home for home in outermost if name.startswith(f"{home}.")), name.rpartition(".")[0].split(".")[0])
        division.setdefault(home, []).append(name)
    return division


def buckets_of(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """Divide parameters by size alone: neighbours together, up to `most` elements; a longer one is alone.

    sizes    elements by name, in the model's order
    Returns  names by the bucket's name, which is no module's
    """
    if most < 1:
        raise UserError(f"a bucket of {most} elements", fix="1 or more")
    division: dict[str, list[str]] = {}
    filled = 0
    for name, size in sizes.items():
        if not division or filled + size > most:
            division[f"bucket {len(division)}"], filled = [], 0
        division[f"bucket {len(division) - 1}"].append(name)
        filled += size
    return division


def check_names(parts: Sequence[Sequence[str]], names: Sequence[str], what: str) -> None:
    """Raise UserError unless every name is in exactly one part."""
    given = [name for part in parts for name in part]
    for name in given:
        if name not in names:
            raise UserError(f"a {what} names {name}, which is not the model's", fix="names of model.named_parameters()")
        if given.count(name) > 1:
            raise UserError(f"{name} is in more than one {what}", fix="each name once")
    for name in names:
        if name not in given:
            raise UserError(f"{name} is in no {what}", fix="each name once")
