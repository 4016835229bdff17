"""Skills about numbers: sums, differences, sorting, units, weekdays.

An answer shows its working, then a colon and the result, so that a small model needs no leap: sums and
differences go digit by digit from the right, with the carry or the borrow written where it is used.
"""

import random
from itertools import zip_longest

from .draw import Texts, draw, word_it

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_SUM = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "What is the sum of {a} and {b}?")
_DIFFERENCE = ("What is {a} - {b}?", "{a} - {b} = ?", "Take {b} from {a}.", "What is {a} minus {b}?")
_SORT = ("Sort {numbers}.", "Sort these numbers: {numbers}.", "Sort from low to high: {numbers}.")
_UNITS = ("How many {unit} are in {amount}?", "What is {amount} in {unit}?", "Convert {amount} to {unit}.")
_DAYS = ("What day is {days} days after {weekday}?", "It is {weekday}. What day is it in {days} days?")

_IN_ONE = {  # (large unit, small unit): how many small ones are in a large one
    ("km", "m"): 1000,
    ("m", "cm"): 100,
    ("cm", "mm"): 10,
    ("kg", "grams"): 1000,
    ("tons", "kg"): 1000,
    ("liters", "ml"): 1000,
    ("dollars", "cents"): 100,
}


def add(rng: random.Random, held_out: bool) -> Texts:
    """347 + 285: "7+5=12, 4+8+1=13, 3+2+1=6: 632"."""
    pair = draw(rng, held_out, _two_numbers, lambda pair: f"sum {min(pair)} {max(pair)}")
    steps, carry = [], ""
    for a, b in _columns(*pair):
        total = a + b + len(carry) // 2
        steps.append(f"{a}+{b}{carry}={total}")
        carry = "+1" if total > 9 else ""
    return word_it(rng, _SUM, a=pair[0], b=pair[1]), f"{', '.join(steps)}: {sum(pair)}"


def subtract(rng: random.Random, held_out: bool) -> Texts:
    """632 - 285: "12-5=7, 13-8-1=4, 6-2-1=3: 347"; a digit too small borrows ten, the next pays it back."""
    pair = draw(rng, held_out, lambda rng: sorted(_two_numbers(rng)), "difference {0[1]} {0[0]}".format)
    small, large = pair
    steps, borrow = [], ""
    for a, b in _columns(large, small):
        rest = a - b - len(borrow) // 2
        ten = 10 if rest < 0 else 0
        steps.append(f"{a + ten}-{b}{borrow}={rest + ten}")
        borrow = "-1" if ten else ""
    return word_it(rng, _DIFFERENCE, a=large, b=small), f"{', '.join(steps)}: {large - small}"


def sort(rng: random.Random, held_out: bool) -> Texts:
    """Three different numbers of two digits."""
    numbers = draw(rng, held_out, _some_numbers, lambda numbers: f"sort {sorted(numbers)}")
    return word_it(rng, _SORT, numbers=_listed(numbers)), _listed(sorted(numbers))


def convert(rng: random.Random, held_out: bool) -> Texts:
    """37 m in cm: "37 x 100: 3700 cm", and back: "3700 / 100: 37 m"."""
    count, (large, small) = draw(
        rng,
        held_out,
        lambda rng: (rng.randint(2, rng.choice((20, 99, 99, 200))), rng.choice(tuple(_IN_ONE))),
        "units {0[0]} {0[1]}".format,
    )
    factor = _IN_ONE[large, small]
    if rng.random() < 0.5:
        prompt = word_it(rng, _UNITS, unit=small, amount=f"{count} {large}")
        return prompt, f"{count} x {factor}: {count * factor} {small}"
    prompt = word_it(rng, _UNITS, unit=large, amount=f"{count * factor} {small}")
    return prompt, f"{count * factor} / {factor}: {count} {large}"


def count_days(rng: random.Random, held_out: bool) -> Texts:
    """17 days after Tuesday: "14 + 3, Wednesday 1, Thursday 2, Friday 3: Friday"; whole weeks change nothing."""
    start, days = draw(
        rng, held_out, lambda rng: (rng.randrange(7), rng.randint(1, 40)), "calendar {0[0]} + {0[1]}".format
    )
    prompt = word_it(rng, _DAYS, days=days, weekday=WEEKDAYS[start])
    rest = days % 7
    steps = (f", {WEEKDAYS[(start + day) % 7]} {day}" for day in range(1, rest + 1))
    return prompt, f"{days - rest} + {rest}{''.join(steps)}: {WEEKDAYS[(start + days) % 7]}"


def _two_numbers(rng: random.Random) -> tuple[int, int]:
    low = rng.choice((10, 100, 100))  # of two or of three digits, both
    return rng.randrange(low, 10 * low), rng.randrange(low, 10 * low)


def _some_numbers(rng: random.Random) -> list[int]:
    return rng.sample(range(10, 100), 3)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """Pair the digits of two numbers from the right, the shorter one filled up with zeros."""
    return [(int(x), int(y)) for x, y in zip_longest(str(a)[::-1], str(b)[::-1], fillvalue="0")]
