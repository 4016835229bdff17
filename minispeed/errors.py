"""Say what went wrong, with which values, and what to try.

A mistake of the user's is a `UserError`: the command line prints it as two lines and ends with exit code 2; from
Python it is a ValueError like any other. Everything else that is raised is a bug of ours and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake that the user can mend: `what` names the thing and the values, `fix` what to type instead."""

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(f"{what}; try: {fix}" if fix else what)
        self.what, self.fix = what, fix


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name most like `name`, or "" where none is alike."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=0.5)), "")
