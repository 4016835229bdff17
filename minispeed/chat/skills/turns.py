"""A skill of more than one exchange: remember what was said turns ago, whatever was talked about since."""

import random
from typing import NamedTuple

from . import memory
from .draw import Texts, draw, word_it
from .words import NAMES

_BETWEEN = (memory.name_capital, memory.name_symbol, memory.small_talk)

_DOGS = "Bandit Biscuit Buddy Cookie Daisy Fluffy Ginger Lucky Max Patch Pepper Rex Rusty Shadow Spot Toby".split()
_COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "pink", "brown")
_GREETINGS = ("Hi, I am {name}.", "My name is {name}.", "Hello, my name is {name}.", "I am {name}.")


class _Told(NamedTuple):
    """Something told about oneself, the ways to ask for it later, and the answer."""

    said: str
    asked: tuple[str, ...]
    answer: str


_NAME = _Told("", ("What is my name?", "Do you remember my name?", "Who am I?"), "Your name is {name}.")
_MORE = (
    _Told(
        "My dog is called {dog}.",
        ("What is my dog called?", "What is the name of my dog?"),
        "Your dog is called {dog}.",
    ),
    _Told(
        "My lucky number is {number}.",
        ("What is my lucky number?", "Do you remember my lucky number?"),
        "Your lucky number is {number}.",
    ),
    _Told(
        "I like {color} best.",
        ("Which color do I like best?", "What is my favorite color?"),
        "You like {color} best.",
    ),
)


def remember(rng: random.Random, held_out: bool) -> Texts:
    """Told a name and one thing more, asked for one or for both, sometimes after something else was talked about."""
    values, more = draw(rng, held_out, _told, lambda told: f"told {sorted(told[0].items())} {told[1].said}")
    asked = rng.sample((_NAME, more), rng.choice((1, 2)))
    told = f"{word_it(rng, _GREETINGS, **values)} {more.said.format(**values)}"
    between = rng.choice(_BETWEEN)(rng, held_out) if rng.random() < 0.3 else ()
    return (
        told,
        "Nice to meet you, {name}.".format(**values),
        *between,
        *(text for each in asked for text in (rng.choice(each.asked), each.answer.format(**values))),
    )


def _told(rng: random.Random) -> tuple[dict[str, str], _Told]:
    """Draw what somebody tells: a name and one thing more."""
    name = rng.choice(NAMES)
    more = rng.choice(_MORE)
    offered = dict(dog=rng.choice(_DOGS), number=str(rng.randrange(10, 100)), color=rng.choice(_COLORS))
    return {"name": name, **{key: value for key, value in offered.items() if f"{{{key}}}" in more.said}}, more
