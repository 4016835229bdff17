"""Skills of more than one exchange: remember what was said turns ago, and change the subject."""

import random

from .draw import Exchange, Texts, word_it
from .language import count_letters, judge_review, spell_backwards, translate
from .memory import name_capital, name_symbol, small_talk
from .numbers import add, compare, convert, count_days, sort, subtract
from .refusals import refuse
from .words import draw_name

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "pink", "brown")

_RULES: tuple[Exchange, ...] = (
    add, subtract, compare, sort, convert, count_days, spell_backwards, count_letters, judge_review, translate,
)  # fmt: skip
_ALL = (*_RULES, name_capital, name_symbol, small_talk, refuse)
_SHORT = (compare, sort, convert, name_capital, name_symbol, count_days, refuse)

_GREETINGS = ("Hi, I am {name}.", "My name is {name}.", "Hello, my name is {name}.", "I am {name}.")
# what is told; how it is asked; the answer
_FACTS = {
    "name": ("", ("What is my name?", "Do you remember my name?", "Who am I?"), "Your name is {name}."),
    "dog": ("My dog is called {dog}.", ("What is my dog called?", "What is the name of my dog?"), "Your dog is called {dog}."),
    "number": ("My lucky number is {number}.", ("What is my lucky number?", "Do you remember my lucky number?"),
               "Your lucky number is {number}."),
    "colour": ("I like {colour} best.", ("Which color do I like best?", "What is my favorite color?"), "You like {colour} best."),
}  # fmt: skip


def remember(rng: random.Random, held_out: bool) -> Texts:
    """Told a name and one thing more, asked for one of them, often after something else was talked about."""
    values = dict(
        name=draw_name(rng, held_out), dog=draw_name(rng, held_out), number=rng.randrange(10, 1000),
        colour=rng.choice(COLOURS),
    )  # fmt: skip
    other = rng.choice(("dog", "number", "colour"))
    _, wordings, answer = _FACTS[rng.choice(("name", other))]
    told = f"{word_it(rng, _GREETINGS, **values)} {_FACTS[other][0].format(**values)}"
    between = [rng.choice(_SHORT)(rng, held_out) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    return (
        told,
        "Nice to meet you, {name}.".format(**values),
        *(text for exchange in between for text in exchange),
        rng.choice(wordings),
        answer.format(**values),
    )


def change_subject(rng: random.Random, held_out: bool) -> Texts:
    """Two or three exchanges of different skills, the last of them a rule."""
    *first, last = rng.sample(_ALL, 2) + [rng.choice(_RULES)]
    exchanges = first[: rng.choice((1, 1, 1, 2))] + [last]
    return tuple(text for exchange in exchanges for text in exchange(rng, held_out))
