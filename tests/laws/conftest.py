"""After many draws of layouts, say what they covered: how often each value of each axis, and which pairs never met."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest

ENOUGH = 200  # draws; of fewer, a table of pairs says little
COVERED: list[dict[str, Any]] = []  # of every case that was checked, its value on each axis


@pytest.fixture
def covered() -> list[dict[str, Any]]:
    """Return where a test of layouts writes what it has checked."""
    return COVERED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if len(COVERED) >= ENOUGH:
        terminalreporter.write_line("\n".join(table(COVERED)))


def table(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Lay out how often each value was drawn, and the pairs of values, of any two axes, that never were."""
    counts = {axis: Counter(case[axis] for case in cases) for axis in cases[0]}
    lines = [f"\n{len(cases)} layouts were the same training run as one device:"]
    for axis, values in counts.items():
        lines.append(f"  {axis:10} " + ", ".join(f"{value} {values[value]}" for value in sorted(values, key=str)))
    met: set[tuple[str, Any, str, Any]] = set()
    for case in cases:
        met |= {(a, case[a], b, case[b]) for a, b in combinations(counts, 2)}
    possible = [(a, x, b, y) for a, b in combinations(counts, 2) for x in counts[a] for y in counts[b]]
    missing = [f"{a} {x} with {b} {y}" for a, x, b, y in possible if (a, x, b, y) not in met]
    few = "; ".join(missing[:: max(1, len(missing) // 8)])
    lines.append(
        f"  {len(met)} of {len(possible)} pairs of values met; of those that did not, or cannot: {few or 'none'}"
    )
    return lines
