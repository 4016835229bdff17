"""What stays on the device and what crosses is the closed form, whatever the number of ranks, padding included."""

from math import isclose

import torch
import zero_memory
from hypothesis import given, strategies as st
from offload import count, entry
from zero import sizes

from minispeed.ledger import Widths, held, shard_size

UNITS = sizes(zero_memory.CONFIG)
M = sum(UNITS)


def test_every_counted_row_is_its_closed_form_exactly():
    rows = entry(quick=True).rows
    counted = [row for row in rows if row.measured != "not built"]
    assert len(counted) == len(rows) - 1 and all(row.difference == 0 for row in counted)


def test_the_paper_and_the_count_differ_only_where_the_notes_say_so():
    rows = [row for row in entry(quick=True).rows if row.paper is not None and row.measured != row.paper]
    assert [(row.paper, row.measured) for row in rows] == [(2, "not built"), (2, 3.0)]


@given(st.integers(1, 3), st.integers(1, 2), st.sampled_from([torch.bfloat16, torch.float32]))
def test_gradients_go_and_parameters_come_back_once_a_step_whatever_the_ranks(ranks, micro, gradient):
    padded = ranks * sum(shard_size(unit, ranks) for unit in UNITS)
    crossed = count(ranks=ranks, micro=micro, gradient=gradient).crossed
    assert isclose(crossed * M, padded * (gradient.itemsize + 2), rel_tol=1e-12)


@given(st.integers(1, 3), st.sampled_from(["bf16", "fp32"]))
def test_the_device_holds_parameters_and_gradients_and_the_host_the_rest(ranks, gradient):
    found = count(ranks=ranks, gradient={"bf16": torch.bfloat16, "fp32": torch.float32}[gradient])
    law = held(UNITS, ranks=ranks, stage=2, widths=Widths.named("bf16", zero=2, accumulate=gradient))
    assert isclose(found.device * M, law.parameters + law.gradients, rel_tol=1e-12)
    assert isclose(found.host * M, law.optimizer, rel_tol=1e-12)


def test_nothing_crosses_without_offloading():
    assert (count(offload=False).crossed, count(offload=False).host) == (0, 0)
