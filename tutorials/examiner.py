"""State what an exercise must do as laws, and say in plain words which of them some code breaks.

    @law("count() counts what is there", of="count", hints=("...", "...", "..."), size=st.integers(0, 9))
    def test_count(code, size):
        same(code.count([0] * size), size)

A law is a function of the code and of inputs that hypothesis draws; of all inputs that break it, hypothesis looks for
the smallest.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis.strategies import SearchStrategy


class Differs(AssertionError):
    """Something is not what it should be."""

    def __init__(self, what: str, found: object, expected: object) -> None:
        super().__init__(f"{what or 'it'} should be {expected}, and is {found}")
        self.what, self.found, self.expected = what, found, expected


class _Unwritten(BaseException):
    """The code says that it is not written; no exception of the kind for which hypothesis would seek smaller inputs."""


def same(found: object, expected: object, what: str = "") -> None:
    """Raise Differs unless both are equal; `what` names them in the reader's words."""
    if found != expected:
        raise Differs(what, found, expected)


@dataclass(frozen=True)
class Verdict:
    """What became of a law.

    kind    "holds"; "unwritten", the code raised NotImplementedError; "broken"; "raised", another error; or "untried"
    inputs  the smallest that show it
    """

    kind: str
    law: "Law"
    inputs: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True)
class Law:
    """A sentence about code that can be tried.

    of     the name of the function that it is about
    hints  from a nudge to nearly the answer
    holds  called with the code and drawn inputs; raises Differs
    drawn  the inputs, by name
    """

    sentence: str
    of: str
    hints: Sequence[str]
    holds: Callable[..., None]
    drawn: Mapping[str, SearchStrategy[Any]]

    def check(self, code: ModuleType, *, examples: int = 50) -> Verdict:
        """Try the law, with the same draws every time."""
        latest: dict[str, Any] = {}

        def once(**inputs: Any) -> None:
            latest.clear()
            latest.update(inputs)
            try:
                self.holds(code, **inputs)
            except NotImplementedError:
                raise _Unwritten from None

        how = settings(
            max_examples=examples,
            phases=(Phase.generate, Phase.shrink),  # no explaining: it would trace every line that torch runs
            derandomize=True,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            print_blob=False,
        )
        try:
            how(given(**self.drawn)(once))()
        except _Unwritten:
            return Verdict("unwritten", self)
        except Differs as error:
            return Verdict("broken", self, latest, error)  # hypothesis tries the smallest last
        except Exception as error:
            return Verdict("raised", self, latest, error)
        return Verdict("holds", self)


def law(
    sentence: str, *, of: str, hints: Sequence[str], **drawn: SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Law]:
    """Make a law of a function."""
    return lambda holds: Law(sentence, of, hints, holds, drawn)


def laws_of(module: ModuleType) -> list[Law]:
    """Return the laws that a test_exercise.py states, in its order."""
    return [value for value in vars(module).values() if isinstance(value, Law)]


def describe(verdict: Verdict, file: str) -> str:
    """Say in plain words what became of a law; `file` is where the code is."""
    law, inputs = verdict.law, ", ".join(f"{name} {value}" for name, value in verdict.inputs.items())
    if verdict.kind == "holds":
        return f"  holds        {law.sentence}"
    if verdict.kind == "untried":
        return f"  not tried    {law.sentence}"
    if verdict.kind == "unwritten":
        return f"  not written  {law.sentence}"
    lines = [f"  BROKEN       {law.sentence}", f"    smallest input  {inputs}"]
    if isinstance(verdict.error, Differs):
        differs = verdict.error
        lines += [f"    what            {differs.what}"] if differs.what else []
        lines += [f"    expected        {_spell(differs.expected)}", f"    found           {_spell(differs.found)}"]
    else:
        lines.append(
            f"    raised          {_where(verdict.error, file)}{type(verdict.error).__name__}: {verdict.error}"
        )
    return "\n".join(lines)


def _spell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _where(error: Exception | None, file: str) -> str:
    """Name the last line of the reader's own code that the error passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file] if error else []
    return f"in {frames[-1].name}, line {frames[-1].lineno}: " if frames else ""
