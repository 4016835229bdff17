"""Say which of a run's checkpoints are kept: the last few, every so many steps, and those that have a name."""

from collections.abc import Collection

from minispeed.errors import UserError


def to_delete(steps: Collection[int], *, last: int = 1, every: int = 0, named: Collection[int] = ()) -> list[int]:
    """Return the steps whose checkpoints go, in order.

    last    as many of the newest stay
    every   all at a multiple of this stay; 0: none for that
    named   all of these stay
    Raises  UserError if `last` or `every` is below 0
    """
    for what, count in (("last", last), ("every", every)):
        if count < 0:
            raise UserError(f"of checkpoints, {what} {count} would be kept", fix=f"{what}=0 or more")
    newest = sorted(steps)[len(steps) - min(last, len(steps)) :]
    stay = {*newest, *named, *(step for step in steps if every and step % every == 0)}
    return sorted(set(steps) - stay)
