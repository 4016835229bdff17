"""A world for a small chat model: conversations of fourteen skills, made on the spot, nothing to download.

Three groups, told apart in every table. *Rules* are scored on new instances (sums never seen, words never
spelled); *memory* on known facts in new wordings; *off topic* on kinds of question never trained on, each to
be declined. A hash of the instance decides what belongs to training and what to evaluation (`draw.py`), so no
draw can mix them.
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
    "put_before",
    "string_together",
    "train_conversations",
    "write_jsonl",
]

GROUPS = ("rules", "memory", "off topic")
LIVE_PROMPTS = (
    "What is 478 + 358?",  # a sum from the evaluation side
    "Do I need a visa for Japan?",  # a kind of question never trained on
    "Sort 85, 36, 31.",  # numbers from the evaluation side
)


@dataclass(frozen=True)
class Skill:
    """One row of the tables: how often it is trained (`weight`), how it is scored (`metric`), what makes it.

    make  (random numbers, held out?) -> a conversation whose last turn is the answer to score
    """

    name: str
    group: str
    metric: str
    weight: float
    make: Callable[[random.Random, bool], Conversation]
    about: str


def _converse(say: Exchange, task: str, metric: str, rng: random.Random, held_out: bool) -> Conversation:
    texts = say(rng, held_out)
    roles = (USER, ASSISTANT) * (len(texts) // 2)
    return Conversation(tuple(map(Turn, roles, texts)), task, metric)


_ROWS: tuple[tuple[str, str, str, float, Exchange, str], ...] = (
    # name, group, metric, weight, what makes it, about
    ("sums", "rules", "exact", 1.2, numbers.add, "add two numbers of two or three digits, digit by digit"),
    ("differences", "rules", "exact", 1.5, numbers.subtract, "take one number from another, with borrows"),
    ("sorting", "rules", "exact", 1.6, numbers.sort, "sort three numbers"),
    ("units", "rules", "exact", 0.6, numbers.convert, "convert km, cm, kg, cents, ... by powers of ten"),
    ("calendar", "rules", "exact", 0.9, numbers.count_days, "the weekday up to 40 days from now"),
    ("backwards", "rules", "exact", 2.1, language.spell_backwards, "spell a word backwards"),
    ("letters", "rules", "exact", 3.2, language.count_letters, "count a letter in a word"),
    ("sentiment", "rules", "label", 0.9, language.judge_review, "is a review positive, negative or mixed"),
    ("translation", "rules", "exact", 0.6, language.translate, "English to Speedish, a made-up language"),
    ("remembering", "rules", "exact", 1.8, turns.remember, "a name, a number, a color, told turns ago"),
    ("capitals", "memory", "exact", 0.6, memory.name_capital, "the capitals of 50 countries"),
    ("symbols", "memory", "exact", 0.5, memory.name_symbol, "the chemical symbols of 40 elements"),
    ("small talk", "memory", "exact", 0.6, memory.small_talk, "who it is, and what ZeRO or a loss scaler is"),
    ("refusals", "off topic", "opening", 0.9, refusals.refuse, "decline whatever else is asked"),
)
SKILLS = {
    name: Skill(name, group, metric, weight, partial(_converse, say, name, metric), about)
    for name, group, metric, weight, say, about in _ROWS
}


def train_conversations(
    count: int, *, seed: int = 0, temperature: float = 1.0, skills: Sequence[str] | None = None
) -> list[Conversation]:
    """Draw conversations for training, in random order.

    A skill is drawn with probability ~ weight ** (1 / temperature): 1 takes the weights as they are, a high
    temperature makes all skills equally frequent, a low one favours the heaviest. The same on every machine.

    Raises  UserError for a negative count, a temperature not above 0, an unknown skill

    Temperature-scaled mixing, Raffel et al. 2020, section 3.5.2.  https://arxiv.org/abs/1910.10683
    """
    if count < 0:
        raise UserError(f"cannot draw {count} conversations", fix="a count of 0 or more")
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}, must be above 0", fix="1.0, the weights as they are")
    chosen = _chosen(skills)
    weights = [skill.weight ** (1 / temperature) for skill in chosen]
    rng = random.Random(f"train {seed}")
    return [skill.make(rng, False) for skill in rng.choices(chosen, weights, k=count)]


def eval_conversations(per_skill: int, *, seed: int = 0) -> list[Conversation]:
    """Draw held-out conversations, all different, skill after skill; the last turn is the answer to score.

    A skill with fewer than `per_skill` different ones gives those that 20 x per_skill draws find: the
    calendar holds out few pairs of weekday and days, memory has facts times wordings.

    Raises  UserError unless per_skill is at least 1
    """
    if per_skill < 1:
        raise UserError(f"cannot evaluate on {per_skill} conversations of each skill", fix="1 or more")
    return [conversation for skill in SKILLS.values() for conversation in _distinct(skill, per_skill, seed)]


def string_together(conversations: Sequence[Conversation], *, seed: int = 0) -> list[Conversation]:
    """Join conversations in order, some of what comes out being two or three of them.

    People ask one thing after another, so a model must learn to answer whatever was said before.
    """
    rng, left, joined = random.Random(f"together {seed}"), list(reversed(conversations)), []
    while left:
        joined.append(_join([left.pop() for _ in range(min(len(left), rng.choices((1, 2, 3), (6, 3, 1))[0]))]))
    return joined


def put_before(conversations: Sequence[Conversation], *, seed: int = 0) -> list[Conversation]:
    """Let every third of held-out conversations follow an exchange of another kind, held out too."""
    rng = random.Random(f"before {seed}")
    before = [skill for skill in SKILLS.values() if skill.name != "remembering"]
    found = list(conversations)
    for index in range(2, len(found), 3):
        other = rng.choice([skill for skill in before if skill.name != found[index].task])
        found[index] = _join([other.make(rng, True), found[index]])
    return found


def _join(conversations: Sequence[Conversation]) -> Conversation:
    """Return one conversation of several; it counts as the last one's skill."""
    turns = tuple(turn for conversation in conversations for turn in conversation.turns)
    return Conversation(turns, conversations[-1].task, conversations[-1].metric)


def write_jsonl(path: str | PathLike[str], conversations: Iterable[Conversation]) -> None:
    """Write a conversation a line: OpenAI's {"messages": [{"role", "content"}]}, with "task" and "metric"."""
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
