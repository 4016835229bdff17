"""The end of the demo: its numbers are those of the runs, and a mistake in any way of sharing shows in them."""

import math
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from minispeed import ledger
from minispeed.chat import proof as proving
from minispeed.chat.documents import Documents
from minispeed.chat.evaluate import micro_batches
from minispeed.chat.pack import Batch, Packing
from minispeed.chat.proof import (
    ARRANGEMENTS,
    FEWEST_DIGITS,
    ROWS,
    STEPS,
    Arrangement,
    Outcome,
    Proof,
    Seen,
    difference,
    prove,
    rows_of,
    small,
    train,
    train_step_counted,
)
from minispeed.collective import threads
from minispeed.collective.threads import ThreadGroup, run_threads
from minispeed.engine import Engine
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.presets import PRESETS
from minispeed.precision import Precision
from minispeed.spans import Row
from minispeed.testing.measure import measure_held
from minispeed.ties import Ties

SEQ, VOCAB, FEW = 8, 23, 4  # FEW steps show what ten would
SHAPE = dict(num_layers=2, model_dim=8, num_heads=4, num_kv_heads=4, head_dim=2, hidden_dim=6)
TINY = GPTConfig(vocab_size=VOCAB, max_positions=SEQ, norm="layernorm", **SHAPE)
ONE, ZERO_3, PIPELINE, SEQUENCE = ARRANGEMENTS


def drawn_rows(num_steps: int = FEW) -> list[Batch]:
    """Draw the rows of all steps, in two documents each; the second begins before the middle, where sp cuts."""
    rng = np.random.default_rng(0)
    places = np.tile([0, 1, 2, 0, 1, 2, 3, 4], (ROWS, 1))
    documents = np.tile([0, 0, 0, 1, 1, 1, 1, 1], (ROWS, 1))
    tokens = [rng.integers(0, VOCAB, (2, ROWS, SEQ)) for _ in range(num_steps)]
    return [Batch(inputs, labels, places, documents, np.zeros_like(places)) for inputs, labels in tokens]


@pytest.fixture(scope="module")
def proof() -> Proof:
    return prove(TINY, drawn_rows())


def built(arrangement: Arrangement, group: ThreadGroup, config: GPTConfig = TINY) -> Engine:
    model = GPT(config).to(torch.float64)
    return Engine(
        model, group, layout=arrangement.layout, precision=Precision(torch.float64), zero=arrangement.zero, clip=1.0
    )


def outcome(off: float, arrangement: Arrangement = PIPELINE) -> Outcome:
    seen = Seen(reports=[], held=1, messages=2, sent=3, row=Row(0, []))
    return Outcome(arrangement=arrangement, ranks=[seen], difference=off)


# ---- the law, and its breaking


def test_every_layout_ends_with_the_same_model(proof):
    assert [outcome.arrangement for outcome in proof.outcomes] == list(ARRANGEMENTS)
    assert proof.outcomes[0].difference == 0 and all(outcome.digits >= 12 for outcome in proof.outcomes)
    assert proof.holds and proof.sentence == f"8 ranks, one process, the same model to {proof.worst.digits} digits"
    losses = [[report.loss for report in seen.reports] for outcome in proof.outcomes for seen in outcome.ranks]
    assert all(len(run) == FEW and run == pytest.approx(losses[0], abs=1e-10) for run in losses)


def one_ranks_part(calls: list) -> None:
    """A reduce-scatter that forgets to add the other ranks' parts."""
    for call, part in zip(calls, calls[0].x.view(len(calls), -1)):
        call.out.view(-1).copy_(part)


def unsent(calls: list) -> None:
    """An all-to-all that leaves everything where it is."""
    for call in calls:
        call.out.copy_(call.x)


@pytest.mark.parametrize(
    "home, name, wrong, hurt",
    [
        (Ties, "sum", lambda ties: None, {PIPELINE}),
        (threads, "_reduce_scatter", one_ranks_part, {ZERO_3, PIPELINE}),
        (threads, "_all_to_all", unsent, {SEQUENCE}),
    ],
    ids=["tied gradients not added", "shards not summed", "heads not sent"],
)
def test_a_mistake_costs_digits_where_it_is_made(monkeypatch, home, name, wrong, hurt):
    monkeypatch.setattr(home, name, wrong)
    proof = prove(TINY, drawn_rows())
    assert {o.arrangement for o in proof.outcomes if o.digits < FEWEST_DIGITS} == hurt
    assert not proof.holds and proof.worst.digits < 6 and proof.worst.arrangement.name in proof.sentence
    assert "another model" in proof.sentence and f"{proof.worst.difference:.1e}" in proof.sentence


def test_a_number_that_is_none_is_no_digit():
    ones = {name: torch.ones(2) for name in "uvw"}
    assert math.isnan(difference(ones | {"v": torch.tensor([1.0, math.nan])}, ones))
    assert outcome(math.nan).digits == outcome(math.inf).digits == 0
    assert not Proof([outcome(0.0), outcome(math.nan)]).holds


@given(st.floats(1e-300, 1e300))
def test_digits_bound_the_difference(off):
    digits = outcome(off).digits
    assert digits == 0 if off >= 1 else 10.0 ** -(digits + 1) <= off * (1 + 1e-9) and off <= 10.0**-digits * (1 + 1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), st.floats(-1, 1))
def test_the_difference_is_of_the_largest_element_or_of_one(values, off):
    b = torch.tensor(values, dtype=torch.float64)
    found = difference({"w": b + off, "v": b}, {"w": b, "v": b})
    assert found == pytest.approx(abs(off) / max(1, *map(abs, values)), abs=1e-12)


# ---- bytes and messages


@pytest.mark.parametrize("micro", [None, ROWS], ids=["several micro-batches", "one"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=lambda arrangement: arrangement.name)
def test_bytes_are_those_that_are_measured_and_in_closed_form(arrangement, micro, proof):
    steps = drawn_rows()

    def rank(group: ThreadGroup) -> tuple[int, int, int]:
        engine = built(arrangement, group)
        first, second, third = (
            micro_batches(batch, micro or arrangement.micro, engine.lines.dp) for batch in steps[:3]
        )
        engine.train_step(first)
        _, held = train_step_counted(engine, second)
        units = [unit for part in engine.parts for unit in part.units]
        closed = ledger.held(
            [unit.num_elements for unit in units],
            ranks=engine.lines.shards.size,
            stage=arrangement.zero,
            widths=ledger.Widths.of(units[0].dtypes),
        )
        return held, measure_held(engine, lambda: engine.train_step(third)).total, closed.total

    ranks = run_threads(rank, arrangement.ranks)
    assert all(held == measured for held, measured, _ in ranks)
    (of_proof,) = (o for o in proof.outcomes if o.arrangement == arrangement)
    assert [seen.held for seen in of_proof.ranks] == [held for held, _, _ in ranks]
    assert all(held <= closed for held, _, closed in ranks)  # padding has no moments
    assert ranks[0][0] == ranks[0][2]  # and rank 0 no padding


def test_messages_are_those_of_one_step(proof, tmp_path):
    assert [(seen.messages, seen.sent) for seen in proof.outcomes[0].ranks] == [(0, 0)]
    untied = replace(TINY, tied=False)  # a tied matrix is gathered twice in a forward
    units = run_threads(lambda group: [unit.num_elements for unit in built(ZERO_3, group, untied).sharded.units], 4)[0]
    for seen in run_threads(partial(train, untied, drawn_rows(2), ZERO_3, tmp_path / "c", 0), 4):
        numbers = seen.messages - 3 * 2 * len(units)  # counts and sums, each an all-reduce of one or two
        assert 0 < numbers < 10
        assert 0 < seen.sent - 8 * ledger.sent(units, ranks=4, stage=3, micro=2) <= numbers * 2 * 2 * 8


def test_the_table_shows_the_rank_that_has_most(proof):
    lines = proof.table().splitlines()
    for outcome, line in zip(proof.outcomes, lines[1:]):
        name = outcome.arrangement.name
        ranks, off, held, messages, sent = line.removeprefix(name).split()
        assert line.startswith(name) and int(ranks) == outcome.arrangement.ranks == len(outcome.ranks)
        assert off == (f"{outcome.difference:.1e}" if outcome is not proof.outcomes[0] else "-")
        assert int(held.replace(",", "")) == max(seen.held for seen in outcome.ranks)
        assert int(messages.replace(",", "")) == max(seen.messages for seen in outcome.ranks)
        assert float(sent) == round(max(seen.sent for seen in outcome.ranks) / 1e6, 2)


def test_equal_bits_are_exact():
    same = Proof([outcome(0.0, ONE), outcome(0.0)])
    assert same.holds and same.sentence == "8 ranks, one process, the same model bit for bit"
    assert " exact " in same.table()


# ---- rows, shapes, threads, picture


def test_the_rows_are_the_demos_in_its_order():
    lengths = np.arange(60) % 7 + 2
    documents = Documents(
        tokens=np.arange(lengths.sum(), dtype=np.uint16),
        learnt=np.ones(lengths.sum(), bool),
        offsets=np.cumsum([0, *lengths]),
        cuts=np.array([], np.int32),
        cut_offsets=np.zeros(61, np.int64),
        task=np.zeros(60, np.int64),
        source=np.zeros(60, np.int64),
        tasks=["a"],
        pad=0,
    )
    mine, demos = (Packing(documents, seq=SEQ, batch=batch, seed=3) for batch in (ROWS, 5))
    steps = [demos.batch(epoch, step) for epoch in range(3) for step in range(demos.steps_per_epoch(epoch))]
    found, expected = (np.concatenate([filled(batch) for batch in batches]) for batches in (rows_of(mine), steps))
    assert len(rows_of(mine)) == STEPS and demos.steps_per_epoch() * 5 < len(found) < len(
        expected
    )  # more than an epoch
    np.testing.assert_array_equal(found, expected[: len(found)])


def filled(batch: Batch) -> np.ndarray:
    """Return the rows that hold anything."""
    return batch.inputs[(batch.documents >= 0).any(1)]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_small_sibling(name):
    config = small(PRESETS[name], seq=16)
    kept = ("vocab_size", "norm", "positions", "mlp", "qkv_bias", "bias", "attention", "tied")
    assert all(getattr(config, field) == getattr(PRESETS[name], field) for field in kept)
    for arrangement in ARRANGEMENTS:
        layout = arrangement.layout
        assert config.num_kv_heads % (layout.tp * layout.sp) == config.hidden_dim % layout.tp == 0
        assert config.num_layers % layout.pp == 0


def test_torch_gets_its_threads_back(monkeypatch):
    monkeypatch.setattr(proving, "ARRANGEMENTS", ())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        prove(TINY, [])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_picture_is_of_the_pipelines_last_step(proof, tmp_path, monkeypatch):
    path = tmp_path / "timeline.svg"
    (piped,) = (outcome for outcome in proof.outcomes if outcome.arrangement is PIPELINE)
    for seen in piped.ranks:
        done = sorted((span.kind, span.args["micro"]) for span in seen.row.spans if "micro" in span.args)
        assert [pair for pair in done if pair[0] in ("forward", "backward")] == [
            (kind, micro) for kind in ("backward", "forward") for micro in range(4)
        ]
        said = [span for span in seen.row.spans if span.kind in ("send", "receive")]
        assert len([span for span in said if "micro" in span.args]) == 8  # one each way for each micro-batch, and
        assert {span.kind for span in said if "bytes" in span.args} == {"send", "receive"}  # the tied gradient, once
        assert len([span for span in said if "bytes" in span.args]) == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = proof.draw(path)
    assert not path.exists() and "not drawn" in line and "pip install" in line
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert proof.draw(path) == f"drawn: {path}" and path.stat().st_size > 1000
