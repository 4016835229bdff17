"""Laws of packing: every supervised token is in a row or counted as cut off, once; documents never touch."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minispeed.chat.documents import Documents, cut_to_fit
from minispeed.chat.pack import IGNORED, Packing, best_fit
from minispeed.errors import UserError

PAD = 9999
EMPTY = -1


@st.composite
def documents(draw, max_size=12):
    """Documents whose every token is another number, so that a multiset tells where each one went."""
    lengths = draw(st.lists(st.integers(2, 40), min_size=1, max_size=max_size))
    cuts = [sorted(draw(st.sets(st.integers(2, length), max_size=3))) for length in lengths]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    learnt = rng.random(sum(lengths)) < draw(st.sampled_from([0.2, 0.5, 1.0]))
    offsets = np.cumsum([0, *lengths])
    learnt[offsets[:-1]] = False  # bos is nobody's target
    return Documents(
        tokens=np.arange(sum(lengths), dtype=np.uint16),
        learnt=learnt,
        offsets=offsets,
        cuts=np.array([cut for each in cuts for cut in each], np.int32),
        cut_offsets=np.cumsum([0, *map(len, cuts)]),
        task=rng.integers(0, 3, len(lengths)),
        source=np.sort(rng.integers(0, 3, len(lengths))),
        tasks=["a", "b", "c"],
        pad=PAD,
    )


def packing(drawn, seq, **options):
    """Pack what can be packed; the rest is another test's."""
    try:
        return Packing(drawn, seq=seq, **options)
    except UserError:
        assert not len(cut_to_fit(drawn, seq).document)
        return None


def epoch_rows(packed, epoch=0):
    """All rows of an epoch, one under the other: five arrays of (rows, T)."""
    steps = [packed.batch(epoch, step) for step in range(packed.steps_per_epoch(epoch))]
    return type(steps[0])(*map(np.concatenate, zip(*steps)))


seqs, batches, seeds = st.integers(1, 50), st.integers(1, 5), st.integers(0, 2**31)


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 64))
def test_best_fit_holds_all_once_and_never_overfills(lengths, capacity):
    rows = best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= capacity for total in filled)
    assert sum(total <= capacity / 2 for total in filled) <= 1  # two half-empty rows would have been one


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 64))
def test_best_fit_is_what_the_plain_loop_finds(lengths, capacity):
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else capacity) - length)
    found = [capacity - sum(lengths[index] for index in row) for row in best_fit(lengths, capacity)]
    assert sorted(found) == sorted(spaces)


@settings(deadline=None)
@given(documents(), seqs, batches, seeds, st.integers(0, 3))
def test_supervised_tokens_are_conserved(drawn, seq, batch, seed, epoch):
    if not (packed := packing(drawn, seq, batch=batch, seed=seed)):
        return
    labels = epoch_rows(packed, epoch).labels
    learnt = Counter(labels[labels != IGNORED].tolist())
    given_tokens = Counter(drawn.tokens[drawn.learnt].tolist())
    assert learnt <= given_tokens
    assert (given_tokens - learnt).total() == packed.truncated.tokens


@settings(deadline=None)
@given(documents(), seqs, batches, seeds)
def test_each_pair_stands_in_its_place(drawn, seq, batch, seed):
    if not (packed := packing(drawn, seq, batch=batch, seed=seed)):
        return
    rows = epoch_rows(packed)
    owner = np.repeat(np.arange(len(drawn)), drawn.lengths)  # of each token, which is its own number
    for inputs, labels, positions, numbers, tasks in zip(*rows):
        used = numbers != EMPTY
        assert (inputs[~used] == PAD).all() and (labels[~used] == IGNORED).all() and (tasks[~used] == EMPTY).all()
        assert used[: used.sum()].all()  # padding is at the end
        for number in range(numbers.max() + 1):
            mine = numbers == number
            ids = inputs[mine]
            assert (np.diff(np.flatnonzero(mine)) == 1).all() and (np.diff(ids) == 1).all()
            assert (positions[mine] == np.arange(len(ids))).all()
            assert (owner[ids] == owner[ids[0]]).all() and owner[ids[-1] + 1] == owner[ids[0]]
            assert (tasks[mine] == drawn.task[owner[ids[0]]]).all()
            assert (labels[mine] == np.where(drawn.learnt[ids + 1], ids + 1, IGNORED)).all()
    real = rows.documents[rows.documents[:, 0] != EMPTY]
    assert packed.waste == pytest.approx((real == EMPTY).mean())


@settings(deadline=None)
@given(documents(), seqs)
def test_cuts_fall_after_answers_or_lose_nothing(drawn, seq):
    document, start, stop, truncated = cut_to_fit(drawn, seq)
    turns = dropped = cut = 0
    for index in range(len(drawn)):
        cuts = drawn.cuts[drawn.cut_offsets[index] : drawn.cut_offsets[index + 1]]
        spans = [(int(a), int(b)) for a, b in zip(start[document == index], stop[document == index])]
        assert all(0 < b - a <= seq for a, b in spans)
        pairs = drawn.lengths[index] - 1
        if pairs <= seq:
            assert spans == [(0, pairs)]
        elif not len(cuts):  # plain text: pieces that meet
            assert [a for a, _ in spans] == [0, *[b for _, b in spans[:-1]]] and spans[-1][1] == pairs
        elif fitting := [c for c in cuts if c - 1 <= seq]:
            assert spans == [(0, max(fitting) - 1)]
            cut, turns = cut + 1, turns + len(cuts) - len(fitting)
        else:
            assert spans == []
            dropped, turns = dropped + 1, turns + len(cuts)
    assert (truncated.turns, truncated.conversations, truncated.dropped) == (turns, cut, dropped)


@settings(deadline=None)
@given(documents(), seqs, batches, seeds)
def test_a_step_is_a_pure_function(drawn, seq, batch, seed):
    if not (packed := packing(drawn, seq, batch=batch, seed=seed, weights=None)):
        return
    steps = [(epoch, step) for epoch in (2, 0, 1) for step in range(packed.steps_per_epoch(epoch))]
    forth = [packed.batch(*step) for step in steps]
    again = Packing(replace(drawn), seq=seq, batch=batch, seed=seed)
    for step, expected in reversed(list(zip(steps, forth))):  # another order, another object
        for got, want in zip(again.batch(*step), expected, strict=True):
            assert (got == want).all() and got.dtype == np.int64 and got.shape == (batch, seq)


def uniform(sizes, length=5):
    """Documents of one length from sources of given sizes."""
    count = sum(sizes)
    return Documents(
        tokens=np.arange(count * length, dtype=np.uint32),
        learnt=np.ones(count * length, bool),
        offsets=np.arange(count + 1) * length,
        cuts=np.arange(1, count + 1).astype(np.int32) * 0 + length,
        cut_offsets=np.arange(count + 1),
        task=np.zeros(count, np.int32),
        source=np.repeat(np.arange(len(sizes)), sizes),
        tasks=["a"],
        pad=PAD,
    )


def first_tokens(packed, epoch):
    """Which documents an epoch holds: each by its first token, over its length."""
    rows = epoch_rows(packed, epoch)
    starts = (rows.documents != EMPTY) & (rows.positions == 0)
    return Counter((rows.inputs[starts] // 5).tolist())


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data(), batches, seeds)
def test_a_mixture_follows_its_weights_in_whole_permutations(sizes, data, batch, seed):
    weights = data.draw(st.lists(st.sampled_from([0, 1, 2, 5]), min_size=len(sizes), max_size=len(sizes)).filter(any))
    drawn = uniform(sizes)
    packed = Packing(drawn, seq=16, batch=batch, seed=seed, weights=weights)
    total = Counter()
    for epoch in range(3):
        seen = first_tokens(packed, epoch)
        assert seen.total() == sum(sizes)  # an epoch is as long as the data
        total += seen
        for source, weight in enumerate(weights):
            mine = np.flatnonzero(drawn.source == source).tolist()
            share = sum(seen[index] for index in mine)
            assert abs(share - sum(sizes) * weight / sum(weights)) < 1 and (weight or not share)
            assert max(total[index] for index in mine) - min(total[index] for index in mine) <= 1


def test_an_epoch_without_weights_is_every_document_once_in_another_order():
    packed = Packing(uniform([40]), seq=12, batch=2, seed=1)
    orders = [epoch_rows(packed, epoch).inputs for epoch in range(2)]
    assert first_tokens(packed, 0) == first_tokens(packed, 1) == Counter(range(40))
    assert (orders[0] != orders[1]).mean() > 0.5
    assert (epoch_rows(Packing(uniform([40]), seq=12, batch=2, seed=2)).inputs != orders[0]).mean() > 0.5


def test_neighbours_change_between_epochs():
    packed = Packing(uniform([60]), seq=12, batch=1)

    def neighbours(epoch):
        return {frozenset((row[row != PAD] // 5).tolist()) for row in epoch_rows(packed, epoch).inputs}

    assert len(neighbours(0) & neighbours(1)) < 5


def test_long_and_short_documents_come_mixed():
    lengths = np.array([12] * 50 + [3] * 100) + 1
    total, count = lengths.sum(), len(lengths)
    mixed = replace(
        uniform([count]),
        tokens=np.arange(total, dtype=np.uint16),
        learnt=np.ones(total, bool),
        offsets=np.cumsum([0, *lengths]),
        cuts=lengths,
    )
    several = epoch_rows(Packing(mixed, seq=12, batch=1)).documents.max(axis=1) > 0
    assert several.mean() == 1 / 3 and 5 < several[: len(several) // 2].sum() < 20  # 12.5 expected of 25


def test_what_cannot_be_packed_is_one_sentence():
    with pytest.raises(UserError, match="context of 3 .* shortest .* first exchange: 4; try: a context of 4 or more"):
        Packing(uniform([2]), seq=3, batch=1)
    assert Packing(uniform([2]), seq=4, batch=1).steps_per_epoch() == 2
    with pytest.raises(UserError, match="there is no document"):
        Packing(uniform([]), seq=3, batch=1)
    with pytest.raises(UserError, match="at least 1 token, is 0"):
        Packing(uniform([2]), seq=0, batch=1)
    with pytest.raises(UserError, match="got 0 rows and seed 0"):
        Packing(uniform([2]), seq=8, batch=0)
    with pytest.raises(UserError, match="got 1 rows and seed -1"):
        Packing(uniform([2]), seq=8, batch=1, seed=-1)
    with pytest.raises(IndexError, match="epoch 0 has 1 steps, asked for step 1"):
        Packing(uniform([2]), seq=8, batch=1).batch(0, 1)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1], "1 weights for 2 data files"),
        ([1, -1], "weights must be numbers of 0 or more"),
        ([0, 0], "not all 0"),
        ([1, float("nan")], "weights must be numbers"),
        ([1, 1, 1], "data file 3 has weight 1 but nothing that fits"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, sentence):
    with pytest.raises(UserError, match=sentence):
        Packing(uniform([2, 2]), seq=8, batch=1, weights=weights)


@settings(deadline=None, max_examples=20)
@given(documents())
def test_saved_documents_open_as_they_were(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("saved") / "train"
    drawn.save(folder)
    opened = Documents.open(folder, drawn.tasks, PAD)
    assert len(opened) == len(drawn) and not opened.tokens.flags.owndata  # a view of the file
    for index in range(len(drawn)):
        assert (opened.ids(index) == drawn.ids(index)).all()
        assert (opened.supervised(index) == drawn.supervised(index)).all()
    for name in ("cuts", "cut_offsets", "task", "source"):
        assert (getattr(opened, name) == getattr(drawn, name)).all()


def test_many_lengths_pack_tightly():
    lengths = np.random.default_rng(0).integers(20, 500, 100_000)
    rows = best_fit(lengths.tolist(), 512)
    assert 1 - lengths.sum() / (512 * len(rows)) < 0.05
