"""Which updates fp16 ignores is the rule, bit for bit; what is counted of gradients is what there is to count."""

from collections import Counter

import pytest
import torch
from hypothesis import assume, given, strategies as st
from mixed_precision import WAYS, entry, exponents_of, is_ignored, largest_scale, ratios, share_below, share_ignored

from minispeed.testing.strategies import seeds

bits = st.integers(-(2**15), 2**15 - 1)


def number(pattern: int) -> torch.Tensor:
    return torch.tensor([pattern], dtype=torch.int16).view(torch.float16)


@given(bits, bits)
def test_an_update_is_ignored_where_the_rule_says_so(a, b):
    w, u = number(a), number(b)
    assume(w.isfinite().all() and u.isfinite().all() and u != 0 and w.abs() >= 2.0**-14 and w.abs() < 2.0**15)
    assert torch.equal((w + u) == w, is_ignored(w, u))


@given(
    st.integers(-14, 14), st.integers(0, 1023), st.sampled_from([-1, 1]), st.sampled_from([1, 2]), st.integers(-2, 2)
)
def test_it_is_decided_at_half_the_distance_to_the_next_number(exponent, mantissa, sign, half, beside):
    """A half of the distance above, or of the one below a power of two, and its neighbours among fp16 numbers."""
    w = torch.tensor([(1 + mantissa / 1024) * 2.0**exponent], dtype=torch.float16)
    u = torch.tensor([2.0 ** (exponent - 11) / half], dtype=torch.float16)
    u = sign * (u.view(torch.int16) + beside).view(torch.float16)
    assume(u != 0)
    assert torch.equal((w + u) == w, is_ignored(w, u))
    ratio = (w.double() / u.double().abs()).item()
    assert (w + u == w) if ratio > 4094 else True
    assert (w + u != w) if ratio < 2048 else True


def test_2048_is_where_it_begins_and_4094_where_it_ends():
    assert ratios() == (2048.0, 4094.0)
    one = torch.ones(1, dtype=torch.float16)
    assert one + one / 2048 == one and one - one / 2048 != one


@given(st.lists(st.integers(-40, 15), max_size=30), seeds)
def test_exponents_are_counted_one_by_one(exponents, seed):
    within = 1 + torch.rand(len(exponents), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.99
    x = torch.cat([within * torch.tensor([2.0**e for e in exponents], dtype=torch.float64), torch.zeros(3)])
    found = exponents_of(-x)
    assert found == Counter(exponents)
    below = sum(e < -24 for e in exponents) / max(1, len(exponents))
    assert share_below(found) == below
    assert not exponents or x.max() * 2.0 ** largest_scale(found) < 65536 <= x.max() * 2.0 ** (largest_scale(found) + 1)


def test_an_ignored_update_moves_a_master_and_no_half():
    before = [torch.tensor([1.0, 1.0, 1.0, 1.0])]
    after = [torch.tensor([1.0, 1.0001, 1.01, 0.9999])]
    assert share_ignored(before, after) == pytest.approx(2 / 3)


def test_a_quick_run_has_every_row_and_leaves_none_open():
    made = entry(quick=True)
    assert [row.difference for row in made.rows[:2]] == [0, 0]
    assert all(row.measured is not None for row in made.rows) and set(made.series["curves"]) <= {w.name for w in WAYS}
