"""What an answer is worth: pure functions from texts to figures.

exact match, accuracy, precision, recall and F1 over classes (macro-averaged), BLEU (Papineni et al. 2002, through
sacrebleu, Post 2018, https://arxiv.org/abs/1804.08771), the share of answers that stopped by themselves, and two
baselines that a model must beat: the answer of the most similar training prompt, and word frequencies alone.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minispeed.chat.conversation import Conversation
from minispeed.errors import UserError

NUM_BUCKETS = 4096  # of hashed character trigrams


@dataclass(frozen=True)
class Answered:
    """One held-out prompt with the answer that was wanted and the one that came."""

    task: str
    metric: str
    prompt: str
    wanted: str
    answer: str
    stopped: bool

    @property
    def is_right(self) -> bool:
        """Whether it counts, by the task's metric."""
        return key_of(self.metric, self.answer) == key_of(self.metric, self.wanted)


def key_of(metric: str, text: str) -> str:
    """Return the part of an answer that the metric compares: all of it, or up to the first full stop."""
    return text.split(".", 1)[0] if metric == "opening" else text.strip()


class Classes(NamedTuple):
    """Macro-averages over the classes that were wanted, each 0 where it is undefined."""

    precision: float
    recall: float
    f1: float


def classify(pairs: Iterable[tuple[str, str]]) -> Classes:
    """Return precision, recall and F1 of (wanted, given) labels, averaged over the wanted classes.

    Of a class: precision = right / given, recall = right / wanted, F1 their harmonic mean = 2 right / (given + wanted).
    """
    pairs = list(pairs)
    wanted, given = Counter(want for want, _ in pairs), Counter(got for _, got in pairs)
    right = Counter(want for want, got in pairs if want == got)
    if not wanted:
        return Classes(0.0, 0.0, 0.0)
    each = [
        (right[c] / given[c] if given[c] else 0.0, right[c] / wanted[c], 2 * right[c] / (given[c] + wanted[c]))
        for c in wanted
    ]
    return Classes(*(sum(column) / len(each) for column in zip(*each)))


def bleu(answered: Sequence[Answered]) -> float | None:
    """Return the corpus BLEU of the answers, 0 to 100, or None where sacrebleu is not installed (extra `eval`)."""
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        return None
    if not answered:
        return None
    # a full answer is one "sentence" here, and short ones are common: exp smoothing is sacrebleu's own default
    return float(corpus_bleu([a.answer for a in answered], [[a.wanted for a in answered]]).score)


def summarise(answered: Sequence[Answered]) -> dict[str, Any]:
    """Return the figures of one task's answers: count, exact (or by metric), stop rate, BLEU, classes for labels."""
    count = len(answered)
    figures: dict[str, Any] = {
        "metric": answered[0].metric if count else "exact",
        "count": count,
        "right": sum(a.is_right for a in answered) / max(1, count),
        "stopped": sum(a.stopped for a in answered) / max(1, count),
        "bleu": bleu(answered),
    }
    if figures["metric"] == "label":
        classes = classify((key_of("label", a.wanted), key_of("label", a.answer)) for a in answered)
        figures |= classes._asdict()
    return figures


def summarise_tasks(answered: Iterable[Answered]) -> dict[str, dict[str, Any]]:
    """Return `summarise` of each task, in order of first appearance."""
    by_task: dict[str, list[Answered]] = {}
    for one in answered:
        by_task.setdefault(one.task, []).append(one)
    return {task: summarise(of_task) for task, of_task in by_task.items()}


def found_by(pattern: str, answered: Sequence[Answered]) -> float:
    """Return the share of answers in which the regular expression is found.  Raises UserError if it is none"""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--pattern {pattern!r} is no regular expression: {error}", fix=repr(re.escape(pattern))
        ) from error
    return sum(bool(expression.search(a.answer)) for a in answered) / max(1, len(answered))


def split_last(conversation: Conversation) -> tuple[tuple[Any, ...], str]:
    """Return the turns before the last answer of the assistant, and that answer."""
    turns = conversation.turns
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    return turns[:last], turns[last].text


def has_answer(conversation: Conversation) -> bool:
    """Whether there is a turn of the assistant after something was said."""
    return any(turn.role == "assistant" for turn in conversation.turns[1:])


def nearest_answers(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> list[Answered]:
    """Answer each held-out prompt with the answer of the training prompt that shares most character trigrams.

    Cosine of trigram counts hashed into 4096 buckets; the first of equals. It is what looking up can do: a task that
    it solves asks for no learning.
    """
    pairs = [split_last(c) for c in train if has_answer(c)]
    asked = [split_last(c) for c in held_out]
    queries = _trigrams([_text(turns) for turns, _ in asked])  # (queries, buckets)
    best, chosen = np.full(len(asked), -1.0), np.zeros(len(asked), dtype=np.int64)
    for start in range(0, len(pairs), 4096):
        block = _trigrams([_text(turns) for turns, _ in pairs[start : start + 4096]])
        likeness = queries @ block.T
        top = likeness.argmax(1)
        better = likeness[np.arange(len(asked)), top] > best
        best = np.where(better, likeness[np.arange(len(asked)), top], best)
        chosen = np.where(better, top + start, chosen)
    return [
        Answered(c.task, c.metric, turns[-1].text, wanted, pairs[index][1] if pairs else "", True)
        for c, (turns, wanted), index in zip(held_out, asked, chosen)
    ]


def _text(turns: Iterable[Any]) -> str:
    return "\n".join(turn.text for turn in turns)


def _trigrams(texts: Sequence[str]) -> NDArray[np.float32]:
    """Return unit vectors of hashed trigram counts.  (texts, buckets)"""
    counts = np.zeros((len(texts), NUM_BUCKETS), dtype=np.float32)
    for row, text in enumerate(texts):
        codes = np.frombuffer(f"  {text.lower()} ".encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
        mixed = (codes[:-2] * 961 + codes[1:-1] * 31 + codes[2:]) * 2654435761 >> 7
        np.add.at(counts[row], mixed % NUM_BUCKETS, 1)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def unigram_loss(train_counts: NDArray[np.int64], targets: NDArray[np.integer[Any]]) -> float:
    """Return nats per token of a model that knows only how frequent each token is, with one added to each count.

    Reads  train_counts (V,), how often each token is to be predicted in training; targets, held-out tokens
    """
    log_probability = np.log(train_counts + 1.0) - math.log(train_counts.sum() + len(train_counts))
    return float(-log_probability[targets].mean())
