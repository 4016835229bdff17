"""ZeRO's bytes and elements are the paper's, to the last digit that it prints, and the ledger's with its padding."""

import json
from dataclasses import asdict
from functools import cache

import pytest
import zero_memory
from zero import FIGURE_1, HALF, PARAMETERS, RANKS, TABLE_1, draw, entry, largest, sizes

from minispeed.ledger import Held, Widths, held, paper_bytes
from minispeed.sharding import dtypes_for

made = cache(lambda: entry(quick=True))
STAGES = range(4)


def test_every_measured_row_is_its_closed_form_exactly():
    rows = [row for row in made().rows if row.measured is not None]
    assert len(rows) == 19
    assert all(row.difference == 0 for row in rows)


def test_the_paper_prints_what_the_closed_form_gives():
    figure = [paper_bytes(int(PARAMETERS), ranks=RANKS, stage=stage) / 1e9 for stage in STAGES]
    table = [paper_bytes(10**12, ranks=1024, stage=stage) / 1e9 for stage in (1, 2, 3)]
    assert [round(value, 1) for value in figure] == list(FIGURE_1)
    assert [int(value * 10) / 10 if value < 100 else int(value) for value in table] == list(TABLE_1)


def test_rows_that_the_paper_prints_have_its_figure():
    printed = [row.paper for row in made().rows if row.paper is not None]
    assert printed == [*TABLE_1, 2, 2, 2, 3]  # figure 1 is of 64 ranks


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", (3, 4, 5))
def test_padding_is_in_the_closed_form_and_not_in_the_papers_law(ranks, stage):
    units, widths = sizes(zero_memory.CONFIG), Widths.of(dtypes_for(HALF, stage))
    assert largest(ranks, stage) == held(units, ranks=ranks, stage=stage, widths=widths)
    law = paper_bytes(sum(units), ranks=ranks, stage=stage)
    is_padded = stage > 0 and any(unit % ranks for unit in units)
    assert largest(ranks, stage).total > law if is_padded else largest(ranks, stage).total == law


def test_the_figure_adds_up_to_the_rows_and_can_be_drawn(tmp_path):
    bars = made().series["GB"]
    assert set(bars) == set(Held.__dataclass_fields__)
    for stage, row in enumerate(made().rows[:4]):
        assert sum(bars[kind][stage] for kind in bars) == pytest.approx(row.measured, rel=1e-12)
    draw(json.loads(json.dumps(asdict(made()))), tmp_path / "it.svg")
    assert "stage 3" in (tmp_path / "it.svg").read_text()
