"""A world for a small chat model: conversations of sixteen skills, made on the spot, nothing to download.

Three groups, told apart in every table. *Rules* are scored on new instances (sums never seen, words never spelled);
*memory* on known facts in new wordings; *off topic* on kinds of question never trained on, each to be declined. What
belongs to training and what to evaluation is decided by a hash of the instance (`draw.py`), so no draw can mix them.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike

from minispeed.chat.conversation import ASSISTANT, USER, Conversation, Turn
from minispeed.errors import UserError, nearest

from . import language, memory, numbers, refusals, turns
from .draw import Exchange
from .refusals import REFUSAL

__all__ = [
    "GROUPS",
    "LIVE_PROMPTS",
    "REFUSAL",
    "SKILLS",
    "Skill",
    "eval_conversations",
    "train_conversations",
    "write_jsonl",
]

GROUPS = ("rules", "memory", "off topic")
LIVE_PROMPTS = (
    "What is 478 + 356?",  # a sum from the evaluation side
    "Do I need a visa for Japan?",  # a kind of question never trained on
    "How many r's are in strawberry?",  # a word in no training conversation
)


@dataclass(frozen=True)
class Skill:
    """One row of the tables: how often it is trained (`weight`), how it is scored (`metric`), and what makes it.

    make  (random numbers, held out?) -> a conversation whose last turn is the answer to score
    """

    name: str
    group: str
    metric: str
    weight: float
    make: Callable[[random.Random, bool], Conversation]
    about: str


def _skill(name: str, group: str, metric: str, weight: float, say: Exchange, about: str) -> Skill:
    return Skill(name, group, metric, weight, partial(_converse, say, name, metric), about)


def _converse(say: Exchange, task: str, metric: str, rng: random.Random, held_out: bool) -> Conversation:
    texts = say(rng, held_out)
    roles = (USER, ASSISTANT) * (len(texts) // 2)
    return Conversation(tuple(map(Turn, roles, texts)), task, metric)


SKILLS = {
    skill.name: skill
    for skill in (
        _skill("sums", "rules", "exact", 1.0, numbers.add, "add two numbers below 1000, digit by digit"),
        _skill("differences", "rules", "exact", 1.0, numbers.subtract, "take one away from another, with borrows"),
        _skill("comparison", "rules", "exact", 1.0, numbers.compare, "the larger or smaller of two or three numbers"),
        _skill("sorting", "rules", "exact", 1.5, numbers.sort, "sort three or four numbers, up or down"),
        _skill("units", "rules", "exact", 0.7, numbers.convert, "convert km, cm, kg, cents, ... by powers of ten"),
        _skill("calendar", "rules", "exact", 1.0, numbers.count_days, "the weekday up to 30 days away"),
        _skill("backwards", "rules", "exact", 1.4, language.spell_backwards, "spell a word backwards"),
        _skill("letters", "rules", "exact", 1.6, language.count_letters, "count a letter in a word"),
        _skill("sentiment", "rules", "label", 1.0, language.judge_review, "is a review positive, negative or mixed"),
        _skill("translation", "rules", "exact", 0.8, language.translate, "English to Speedish, a made-up language"),
        _skill("remembering", "rules", "exact", 1.0, turns.remember, "recall a name, a number, a color told turns ago"),
        _skill("several turns", "rules", "exact", 0.6, turns.change_subject, "two or three skills in one conversation"),
        _skill("capitals", "memory", "exact", 1.0, memory.name_capital, "the capitals of 52 countries"),
        _skill("symbols", "memory", "exact", 0.8, memory.name_symbol, "the chemical symbols of 40 elements"),
        _skill("small talk", "memory", "exact", 0.9, memory.small_talk, "who it is, and what ZeRO or a loss scaler is"),
        _skill("refusals", "off topic", "opening", 1.0, refusals.refuse, "decline whatever else is asked"),
    )
}


def train_conversations(
    count: int, *, seed: int = 0, temperature: float = 1.0, skills: Sequence[str] | None = None
) -> list[Conversation]:
    """Draw conversations for training, in random order: skill by skill with probability ~ weight ** (1 / temperature).

    Deterministic on every machine, and fewer are a prefix of more. Temperature 1 takes the weights as they are, a high
    one makes all skills equally frequent, a low one favours the heaviest.

    Raises  UserError for a negative count, a temperature not above 0, an unknown skill

    Temperature-scaled mixing, Raffel et al. 2020, section 3.5.2.  https://arxiv.org/abs/1910.10683
    """
    if count < 0:
        raise UserError(f"cannot draw {count} conversations", fix="a count of 0 or more")
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}, must be above 0", fix="1.0 takes the weights as they are")
    chosen = _chosen(skills)
    weights = [skill.weight ** (1 / temperature) for skill in chosen]
    rng = random.Random(f"train {seed}")
    return [skill.make(rng, False) for skill in rng.choices(chosen, weights, k=count)]


def eval_conversations(per_skill: int, *, seed: int = 0) -> list[Conversation]:
    """Draw held-out conversations, all different, skill after skill; the last assistant turn is the one scored.

    A skill with fewer than `per_skill` different ones (facts times wordings) gives those that twenty draws for each find.

    Raises  UserError unless per_skill is at least 1
    """
    if per_skill < 1:
        raise UserError(f"cannot evaluate on {per_skill} conversations of each skill", fix="1 or more")
    return [conversation for skill in SKILLS.values() for conversation in _distinct(skill, per_skill, seed)]


def write_jsonl(path: str | PathLike[str], conversations: Iterable[Conversation]) -> None:
    """Write one conversation a line: OpenAI's {"messages": [{"role", "content"}]}, with "task" and "metric" beside."""
    with open(path, "w", encoding="utf-8") as file:
        for conversation in conversations:
            messages = [{"role": role, "content": text} for role, text in conversation.turns]
            line = {"messages": messages, "task": conversation.task, "metric": conversation.metric}
            file.write(json.dumps(line) + "\n")


def _chosen(names: Sequence[str] | None) -> list[Skill]:
    for name in names or ():
        if name not in SKILLS:
            raise UserError(f"no skill is called {name!r}", fix=nearest(name, SKILLS) or ", ".join(SKILLS))
    if names is not None and not names:
        raise UserError("no skill to draw from: got an empty list", fix=", ".join(SKILLS))
    return [SKILLS[name] for name in (SKILLS if names is None else names)]


def _distinct(skill: Skill, count: int, seed: int) -> list[Conversation]:
    rng = random.Random(f"eval {seed} {skill.name}")
    found: dict[Conversation, None] = {}
    for _ in range(20 * count):
        found.setdefault(skill.make(rng, True))
        if len(found) == count:
            break
    return list(found)
