"""Laws of scoring: figures from counts, baselines that only look things up."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minispeed.chat.conversation import Conversation, Turn
from minispeed.chat.score import (
    Answered,
    bleu,
    classify,
    found_by,
    nearest_answers,
    split_last,
    summarise_tasks,
    unigram_loss,
)

labels = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), max_size=20)


def ask(prompt: str, answer: str, task: str = "t", metric: str = "exact") -> Conversation:
    return Conversation((Turn("user", prompt), Turn("assistant", answer)), task, metric)


def answered(wanted: str, answer: str, metric: str = "exact", stopped: bool = True) -> Answered:
    return Answered("t", metric, "?", wanted, answer, stopped)


@given(labels)
def test_precision_recall_and_f1_are_counted(pairs):
    classes = sorted({want for want, _ in pairs})
    got = classify(pairs)
    f1s = []
    for c in classes:
        right = sum(want == given == c for want, given in pairs)
        precision = right / max(1, sum(given == c for _, given in pairs))
        recall = right / sum(want == c for want, _ in pairs)
        f1s.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert got.f1 == pytest.approx(sum(f1s) / max(1, len(f1s)))
    if pairs and all(want == given for want, given in pairs):
        assert got == (1.0, 1.0, 1.0)


def test_a_metric_compares_what_it_should():
    assert answered("12", " 12 ").is_right and not answered("12", "12.").is_right
    assert answered("Sorry, no. I can add.", "Sorry, no. I can sort.", "opening").is_right
    assert not answered("Sorry, no. I can add.", "I can sort.", "opening").is_right


def test_a_task_is_summarised_from_its_answers():
    rows = summarise_tasks([
        Answered("mood", "label", "?", "good", "good", True),
        Answered("mood", "label", "?", "bad", "good", False),
        Answered("sum", "exact", "?", "3", "3", True),
    ])  # fmt: skip
    assert rows["mood"]["right"] == 0.5 and rows["mood"]["stopped"] == 0.5 and rows["mood"]["recall"] == 0.5
    assert rows["mood"]["precision"] == pytest.approx(0.25) and rows["sum"]["count"] == 1
    assert "f1" not in rows["sum"]


def test_bleu_is_sacrebleus_corpus_score():
    sacrebleu = pytest.importorskip("sacrebleu")
    pair = ("the cat sat on the mat today", "the cat sat on a mat today")
    expected = sacrebleu.corpus_bleu([pair[1]], [[pair[0]]]).score
    assert bleu([answered(*pair)]) == pytest.approx(expected) and 0 < expected < 100
    assert bleu([answered(pair[0], pair[0])]) == pytest.approx(100)
    assert bleu([]) is None


def test_the_nearest_prompt_lends_its_answer():
    train = [
        ask("What is 3 + 4?", "7"),
        ask("Spell cat backwards.", "t a c"),
        ask("What is the capital of Peru?", "Lima"),
    ]
    looked = nearest_answers(train, [ask("What is 3 + 5?", "8"), ask("Tell me the capital of Peru.", "Lima")])
    assert [one.answer for one in looked] == ["7", "Lima"]
    assert [one.is_right for one in looked] == [False, True]
    assert nearest_answers(train, train)[1].answer == "t a c"


def test_the_last_answer_is_the_one_that_is_scored():
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"), Turn("user", "e"))
    assert split_last(Conversation(turns)) == (turns[:3], "d")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_unigram_loss_is_the_formula(seen, targets):
    counts = Counter(seen)
    expected = [-math.log((counts[t] + 1) / (len(seen) + 6)) for t in targets]
    got = unigram_loss(np.bincount(seen, minlength=6), np.array(targets))
    assert got == pytest.approx(sum(expected) / len(expected))


def test_a_pattern_is_found_or_not():
    assert found_by(r"#### -?\d+$", [answered("", "so\n#### 12"), answered("", "12")]) == 0.5
