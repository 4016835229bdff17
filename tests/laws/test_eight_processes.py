"""The law of the whole lattice once more, on eight processes that speak over gloo."""

import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings, strategies as st
from test_layouts import Case, cases, check_run, cut

import minispeed
from minispeed.collective.world import World
from minispeed.engine import Report

RANKS = 8


@st.composite
def wide_cases(draw: st.DrawFn) -> Case:
    """Draw a case for all ranks: what the layout leaves over holds replicas, or ZeRO's shards of them."""
    case = draw(cases().filter(lambda case: RANKS % case.layout.ranks == 0))
    return replace(case, dp=RANKS // case.layout.ranks)


def cut_each(world: World, drawn: list[Case], folder: Path) -> list[list[Report]]:
    return [cut(case, world.group, folder / str(index)) for index, case in enumerate(drawn)]


@given(st.lists(wide_cases(), min_size=4, max_size=4))
@settings(max_examples=1, print_blob=True)
def test_every_cut_is_the_same_training_run(drawn):
    with tempfile.TemporaryDirectory() as name:
        ran = minispeed.launch(cut_each, drawn, Path(name), ranks=RANKS, backend="gloo")
        for index, case in enumerate(drawn):
            check_run(case, [reports[index] for reports in ran], Path(name) / str(index))
