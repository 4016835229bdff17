"""Draw an instance from the right side of the hold-out: training and evaluation are disjoint by construction.

An instance is what a question is about, in one canonical form ("sum 285 347", "word lemon"), whatever the
wording. Its hash decides its side, once and on every machine: one in ten belongs to evaluation. Instances
that give each other away (285 + 347 and 347 + 285) share one form, hence one side.
"""

import random
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TypeVar

Instance = TypeVar("Instance")
Texts = tuple[str, ...]  # what is said in turn: user, assistant, user, assistant, ...
Exchange = Callable[[random.Random, bool], Texts]  # (random numbers, held out?) -> what is said

LIVE_WORD = "strawberry"  # everybody asks how many r's it has: never in training, whatever its hash


def is_held_out(instance: str) -> bool:
    """Tell whether an instance, in canonical form, belongs to evaluation."""
    if LIVE_WORD in instance:
        return True
    return blake2b(instance.encode(), digest_size=1).digest()[0] < 26  # 26 of 256: one in ten


def draw(
    rng: random.Random,
    held_out: bool,
    sample: Callable[[random.Random], Instance],
    canonical: Callable[[Instance], str],
) -> Instance:
    """Sample until an instance falls on the wanted side of the hold-out."""
    while True:
        instance = sample(rng)
        if is_held_out(canonical(instance)) == held_out:
            return instance


def word_it(rng: random.Random, wordings: Sequence[str], **values: object) -> str:
    """Put the values into one of the wordings."""
    return rng.choice(wordings).format(**values)


def sides(kind: str, members: list[str]) -> tuple[list[str], list[str]]:
    """Split a list in two: (training, evaluation), so that a bool picks the side."""
    held = [member for member in members if is_held_out(f"{kind} {member}")]
    return [member for member in members if member not in held], held
