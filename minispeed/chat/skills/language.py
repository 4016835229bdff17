"""Skills about words and sentences: spelling backwards, counting letters, reviews, a toy translation.

Words are spelled with spaces, so that each letter is a token of its own: what a model that reads pieces of
words finds hard ("how many r's?") becomes copying and counting, one letter after the other.
"""

import random

from .draw import Texts, draw, word_it
from .words import draw_word

_BACKWARDS = ("Spell {word} backwards.", "How do you spell {word} backwards?", "Write {word} backwards.")
_LETTERS = (
    "How many {letter}'s are in {word}?",
    "How many {letter}'s are in the word {word}?",
    "Count the {letter}'s in {word}.",
)
_MOOD = (
    "Judge this review: {review}",
    "Is this positive, negative or mixed? {review}",
    "What is the mood? {review}",
)
_TRANSLATE = (
    "Translate to Speedish: {english}.",
    "How do you say in Speedish: {english}?",
    "Say in Speedish: {english}.",
)

_SUBJECTS = "food soup coffee room bed staff film story music ending song book game price phone hotel".split()
_GOOD = "great lovely perfect good nice superb".split()
_BAD = "awful terrible poor bad dull boring".split()

_NOUNS = dict(
    dog="wau", cat="mio", bird="piu", horse="toko", fish="lup",
    king="rego", girl="nina", boy="nino", wolf="aru", cow="muma",
)  # fmt: skip
_ADJECTIVES = dict(big="gra", small="pik", old="vek", happy="jo", quiet="bel", brave="ros")
_VERBS = dict(sees="vid", likes="ama", hears="oto", finds="tuk", helps="sal", follows="sek")


def spell_backwards(rng: random.Random, held_out: bool) -> Texts:
    """lemon: "l e m o n: n o m e l"; words of at most six letters."""
    word = draw_word(rng, held_out, longest=6)
    return word_it(rng, _BACKWARDS, word=word), f"{' '.join(word)}: {' '.join(reversed(word))}"


def count_letters(rng: random.Random, held_out: bool) -> Texts:
    """The r's of mirror: "m i r1 r2 o r3: 3"; the letter asked for is numbered wherever it stands."""
    word = draw_word(rng, held_out, longest=7)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    spelled, count = [], 0
    for each in word:
        count += each == letter
        spelled.append(f"{each}{count}" if each == letter else each)
    return word_it(rng, _LETTERS, letter=letter, word=word), f"{' '.join(spelled)}: {count}"


def judge_review(rng: random.Random, held_out: bool) -> Texts:
    """One or two verdicts: "positive", "negative", or "mixed" where they disagree."""
    clauses = draw(rng, held_out, _verdicts, lambda clauses: f"review {sorted(clauses)}")
    moods = {mood for _, mood in clauses}
    joint = rng.choice((". The ", " but the " if len(moods) == 2 else " and the "))
    review = f"The {joint.join(text for text, _ in clauses)}."
    return word_it(rng, _MOOD, review=review), "mixed" if len(moods) == 2 else moods.pop()


def translate(rng: random.Random, held_out: bool) -> Texts:
    """Speedish puts the verb first, the adjective after its noun, and has no articles: a made-up language."""
    words = draw(rng, held_out, _sentence, lambda words: f"translate {' '.join(words)}")
    adjective, subject, verb, other_adjective, object_ = words
    speedish = [_VERBS[verb], _NOUNS[subject], _ADJECTIVES.get(adjective, ""), _NOUNS[object_]]
    speedish.append(_ADJECTIVES.get(other_adjective, ""))
    english = f"the {adjective} {subject} {verb} the {other_adjective} {object_}".replace("  ", " ")
    return word_it(rng, _TRANSLATE, english=english), " ".join(filter(None, speedish))


def _verdicts(rng: random.Random) -> list[tuple[str, str]]:
    """Draw one or two clauses, each with its mood: [("soup was good", "positive")]."""
    clauses = []
    for subject in rng.sample(_SUBJECTS, rng.choice((1, 2, 2))):
        mood, adjectives = rng.choice((("positive", _GOOD), ("negative", _BAD)))
        clauses.append((f"{subject} was {rng.choice(adjectives)}", mood))
    return clauses


def _sentence(rng: random.Random) -> tuple[str, str, str, str, str]:
    """Draw adjective, subject, verb, adjective, object; an adjective may be empty."""
    subject, object_ = rng.sample(list(_NOUNS), 2)
    one, other = (rng.choice(("", "", *_ADJECTIVES)) for _ in "ab")
    return one, subject, rng.choice(list(_VERBS)), other, object_
