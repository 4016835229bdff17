"""Laws of the bundled skills: every answer is right, and nothing of evaluation is seen in training.

An oracle that shares no code with the generator reads the prompt alone and works the answer out again; it is
asked about every exchange, first or third, of conversations drawn from both sides of the hold-out.
"""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from functools import cache

import pytest
from hypothesis import given, strategies as st

from minispeed.chat.conversation import Conversation
from minispeed.chat.skills import (
    GROUPS,
    LIVE_PROMPTS,
    REFUSAL,
    SKILLS,
    eval_conversations,
    numbers,
    put_before,
    string_together,
    train_conversations,
    words as words_module,
    write_jsonl,
)
from minispeed.chat.skills.draw import LIVE_WORD, is_held_out
from minispeed.chat.skills.memory import CAPITALS, CONCEPTS, SYMBOLS
from minispeed.chat.skills.words import draw_word
from minispeed.errors import UserError

ASKS_BACK = re.compile(r"\b(my|I)\b")
ONE_EXCHANGE = [name for name in SKILLS if name != "remembering"]
seeds = st.integers(0, 2**32)


@cache
def trained(count: int = 20_000) -> list[Conversation]:
    return train_conversations(count, seed=1)


@cache
def evaluated() -> list[Conversation]:
    return eval_conversations(40, seed=1)


def exchanges(conversation: Conversation) -> Iterator[tuple[str, str]]:
    texts = [turn.text for turn in conversation.turns]
    return zip(texts[::2], texts[1::2], strict=True)


# The oracle: which questions are whose, and what is right.


def right_sum(a: int, b: int, answer: str) -> bool:
    return right_columns(answer, "+", a + b)


def right_difference(a: int, b: int, answer: str) -> bool:
    return right_columns(answer, "-", a - b)


def right_columns(answer: str, sign: str, result: int) -> bool:
    """Each step is true, the last digits of the steps spell the result, and the result follows the colon."""
    working, said = answer.split(": ")
    digits = ""
    for step in working.split(", "):
        terms, value = step.split("=")
        first, *others = map(int, terms.split(sign))
        if first + sum(others) * (1 if sign == "+" else -1) != int(value):
            return False
        digits = value[-1] + digits
    carried = value[:-1]  # a carry out of the last column leads the result
    return int(said) == result == int(carried + digits)


def right_sorting(prompt: str, answer: str) -> bool:
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    return [int(n) for n in answer.split(", ")] == sorted(numbers)


SIZES = dict(
    km=1_000_000,
    m=1000,
    cm=10,
    mm=1,
    tons=1_000_000,
    kg=1000,
    grams=1,
    liters=1000,
    ml=1,
    dollars=100,
    cents=1,
)


def right_units(unit: str, count: str, given_unit: str, answer: str) -> bool:
    steps, result = answer.split(": ")
    number, operation, factor = steps.split()
    value = int(number) * int(factor) if operation == "x" else int(number) / int(factor)
    if number != count or result != f"{value:.0f} {unit}":
        return False
    return value * SIZES[unit] == int(count) * SIZES[given_unit]


def right_weekday(weekday: str, days: str, answer: str) -> bool:
    start = next(day for day in (date(2024, 2, d) for d in range(1, 8)) if f"{day:%A}" == weekday)
    weeks, rest, steps, end = re.fullmatch(r"(\d+) \+ (\d)((?:, \w+ \d)*): (\w+)", answer).groups()
    counted = "".join(f", {start + timedelta(days=day):%A} {day}" for day in range(1, int(rest) + 1))
    if int(weeks) % 7 or int(weeks) + int(rest) != int(days) or steps != counted:
        return False
    return f"{start + timedelta(days=int(days)):%A}" == end


def right_letters(letter: str, word: str, answer: str) -> bool:
    spelled, count = answer.split(": ")
    numbered = [str(n + 1) for n in range(word.count(letter))]
    return (
        re.sub(r"[ \d]", "", spelled) == word
        and re.findall(r"\d", spelled) == numbered
        and re.findall(rf"{letter}\d", spelled) == [letter + n for n in numbered]
        and int(count) == word.count(letter)
    )


def right_mood(review: str, answer: str) -> bool:
    adjectives = re.findall(r"was (\w+)", review)
    good = {"great", "lovely", "perfect", "good", "nice", "superb"}
    likes = {adjective in good for adjective in adjectives}
    return answer == ("mixed" if len(likes) == 2 else "positive" if likes == {True} else "negative")


SPEEDISH = dict(
    wau="dog", mio="cat", piu="bird", toko="horse", lup="fish", rego="king", nina="girl", nino="boy",
    aru="wolf", muma="cow", gra="big", pik="small", vek="old", jo="happy", bel="quiet", ros="brave",
    vid="sees", ama="likes", oto="hears", tuk="finds", sal="helps", sek="follows",
)  # fmt: skip


def right_translation(english: str, answer: str) -> bool:
    """Translate back: verb first, each adjective after its noun."""
    verb, *rest = (SPEEDISH[word] for word in answer.split())
    phrases = re.findall(r"(\w+)((?: (?:big|small|old|happy|quiet|brave))?)", " ".join(rest))
    subject, object_ = (f"the{adjective} {noun}" for noun, adjective in phrases)
    return f"{subject} {verb} {object_}" == english


RULES: list[tuple[str, str, Callable[..., bool]]] = [  # whose, its look, is it right?
    ("sums", r"(?:What is |)(\d+) \+ (\d+)(?: =|) ?\?|Add (\d+) and (\d+)\.|What is the sum of (\d+) and (\d+)\?",
     lambda a, b, answer: right_sum(int(a), int(b), answer)),
    ("differences", r"What is (\d+) - (\d+)\?|(\d+) - (\d+) = \?|What is (\d+) minus (\d+)\?",
     lambda a, b, answer: right_difference(int(a), int(b), answer)),
    ("differences", r"Take (\d+) from (\d+)\.", lambda b, a, answer: right_difference(int(a), int(b), answer)),
    ("sorting", r"(Sort(?: these numbers| from low to high| from high to low|)[: ][ \d,]+)\.", right_sorting),
    ("units", r"How many (\w+) are in (\d+) (\w+)\?", right_units),
    ("units", r"What is (\d+) (\w+) in (\w+)\?|Convert (\d+) (\w+) to (\w+)\.",
     lambda count, given_unit, unit, answer: right_units(unit, count, given_unit, answer)),
    ("calendar", r"What day is (\d+) days after (\w+)\?", lambda n, day, answer: right_weekday(day, n, answer)),
    ("calendar", r"It is (\w+)\. What day is it in (\d+) days\?", right_weekday),
    ("backwards", r"(?:Spell|How do you spell|Write) (\w+) backwards[.?]",
     lambda word, answer: answer == f"{' '.join(word)}: {' '.join(word[::-1])}"),
    ("letters", r"(?:How many|Count the) (\w)'s (?:are )?in (?:the word )?(\w+)[.?]", right_letters),
    ("sentiment", r"(?:Judge this review:|Is this positive.+mixed\?|What is the mood\?) (.+)", right_mood),
    ("translation", r"(?:Translate to|How do you say in|Say in) Speedish: (.+)[.?]", right_translation),
]  # fmt: skip


def judge(prompt: str, answer: str) -> str:
    """Return the rule whose question this is, "" if none's; fail if its answer is wrong."""
    for name, pattern, is_right in RULES:
        if match := re.fullmatch(pattern, prompt):
            assert is_right(*filter(None, match.groups()), answer), (prompt, answer)
            return name
    return ""


@pytest.mark.parametrize("name", SKILLS)
@given(seed=seeds, held_out=st.booleans())
def test_every_answer_is_right(name, seed, held_out):
    conversation = SKILLS[name].make(random.Random(seed), held_out)
    judged = [judge(*exchange) for exchange in exchanges(conversation)]
    if SKILLS[name].group != "rules":
        assert judged == [""]
    elif name in ONE_EXCHANGE:
        assert judged == [name]
    else:
        assert judged[0] == judged[-1] == ""


@given(seed=seeds, held_out=st.booleans())
def test_what_was_told_is_what_is_remembered(seed, held_out):
    conversation = SKILLS["remembering"].make(random.Random(seed), held_out)
    told, *_, question, answer = (turn.text for turn in conversation.turns)
    patterns = dict(
        name=r"am (\w+)\.|name is (\w+)\.",
        number=r"number is (\d+)",
        dog=r"dog is called (\w+)",
        color=r"I like (\w+)",
    )
    topic = next((word for word in ("dog", "number", "color") if word in question), "name")
    asked = [turn.text for turn in conversation.turns[2::2] if ASKS_BACK.search(turn.text)]
    assert len(asked) in (1, 2) and len(set(asked)) == len(asked)
    said = next(filter(None, re.search(patterns[topic], told).groups()))
    assert said in re.findall(r"\w+", answer)


@pytest.mark.parametrize("name", [name for name in SKILLS if SKILLS[name].group == "memory"])
def test_a_fact_has_one_answer_whatever_the_wording(name):
    answers = defaultdict(set)
    for held_out in (False, True):
        for seed in range(1500):
            ((prompt, answer),) = exchanges(SKILLS[name].make(random.Random(seed), held_out))
            answers[prompt].add(answer)
            for fact, expected in {**CAPITALS, **SYMBOLS, **CONCEPTS}.items():
                if re.search(rf"\b{fact}\b", prompt):
                    assert answer == expected
    assert all(len(found) == 1 for found in answers.values())


def test_symbols_are_letters_of_the_name_in_order():
    latin = dict(
        sodium="natrium",
        potassium="kalium",
        iron="ferrum",
        copper="cuprum",
        silver="argentum",
        tin="stannum",
        tungsten="wolfram",
        gold="aurum",
        mercury="hydrargyrum",
        lead="plumbum",
    )
    for name, symbol in SYMBOLS.items():
        first, *second = symbol.lower()
        letters = latin.get(name, name)
        assert letters[0] == first and all(letter in letters[1:] for letter in second), (name, symbol)
    assert len(set(SYMBOLS.values())) == len(SYMBOLS) == 40


def test_capitals_that_are_not_the_largest_city_are_not_confused_with_it():
    known = "Australia=Canberra Brazil=Brasilia Canada=Ottawa Morocco=Rabat Nigeria=Abuja Turkey=Ankara"
    for country, city in (pair.split("=") for pair in known.split()):
        assert CAPITALS[country] == city
    assert len(set(CAPITALS.values())) == len(CAPITALS) == 50


def instance(prompt: str, answer: str) -> object:
    """What a rule's question is about, without its wording and order: what must not be on both sides."""
    name = judge(prompt, answer)
    if name in ("backwards", "letters"):
        return "word", re.sub(r"[ \d]", "", answer.split(": ")[0])
    if name == "sentiment":
        return name, *sorted(re.findall(r"\w+ was \w+", prompt))
    if name == "units":
        return name, *sorted(re.findall(r"\d+ \w+", f"{prompt} {answer.split(': ')[1]}"))
    return name, *sorted(re.findall(r"\d+|[A-Z]\w+day", prompt)), answer if name == "translation" else ""


def test_no_instance_of_evaluation_is_in_training():
    seen, held = (
        {instance(*pair) for conversation in side for pair in exchanges(conversation) if judge(*pair)}
        for side in (trained(), evaluated())
    )
    assert len(seen) > 8_000 and len(held) > 250
    assert not seen & held


@pytest.mark.parametrize("skill", [numbers.add, numbers.sort])
@given(seed=seeds)
def test_the_order_of_numbers_does_not_decide_the_side(skill, seed):
    def draw(rng, held_out, sample, canonical):
        drawn = sample(rng)
        assert canonical(drawn) == canonical(type(drawn)(reversed(drawn)))
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "draw", draw)
        skill(random.Random(seed), False)


def test_no_prompt_of_evaluation_is_in_training():
    seen = {prompt for conversation in trained() for prompt, _ in exchanges(conversation)}
    for conversation in evaluated():
        prompts = [prompt for prompt, _ in exchanges(conversation)]
        if conversation.task == "remembering":
            told, *later = prompts
            prompts = [told, *(p for p in later if not ASKS_BACK.search(p))]  # of those, what is new is the answer
        assert not seen & set(prompts)


def test_what_is_told_in_evaluation_is_new():
    def told(conversations: list[Conversation]) -> set[tuple[str, ...]]:
        texts = (c.turns[0].text for c in conversations if c.task == "remembering")
        return {tuple(re.findall(r"(?:I am|name is|called|number is|like) (\w+)", text)) for text in texts}

    assert len(told(trained())) > 500 and len(told(evaluated())) > 20
    assert not told(trained()) & told(evaluated())


def test_the_live_word_is_in_no_training_conversation(monkeypatch):
    assert is_held_out(f"word {LIVE_WORD}")
    for conversation in trained():
        assert LIVE_WORD not in " ".join(turn.text for turn in conversation.turns).lower()
    monkeypatch.setattr(words_module, "_made_up", lambda rng, longest=10: rng.choice((LIVE_WORD, "lemon")))
    drawn = {draw_word(random.Random(seed), False) for seed in range(2000)}
    assert "lemon" in drawn and LIVE_WORD not in drawn  # even where the generator offers it
    a, b = sorted(map(int, re.findall(r"\d+", LIVE_PROMPTS[0])))
    assert is_held_out(f"sum {a} {b}")
    assert is_held_out(f"sort {sorted(map(int, re.findall(r'[0-9]+', LIVE_PROMPTS[-1])))}")


@given(seed=st.integers(0, 10**6))
def test_the_same_seed_gives_the_same_conversations_and_fewer_are_a_prefix(seed):
    assert train_conversations(40, seed=seed) == train_conversations(40, seed=seed)
    assert train_conversations(40, seed=seed) != train_conversations(40, seed=seed + 1)


def test_every_process_draws_the_same_and_needs_no_torch():
    program = (
        "import sys, hashlib; from minispeed.chat.skills import *;"
        "text = repr(train_conversations(300) + eval_conversations(5));"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules;"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": salt},
            check=True, capture_output=True, text=True,
        ).stdout
        for salt in "12"
    }  # fmt: skip
    assert len(digests) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1000.0])
def test_skills_are_drawn_by_weight_and_temperature(temperature):
    drawn = Counter(c.task for c in train_conversations(20_000, temperature=temperature))
    powers = {name: skill.weight ** (1 / temperature) for name, skill in SKILLS.items()}
    for name, power in powers.items():
        share = power / sum(powers.values())
        assert abs(drawn[name] - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5, name


def test_only_the_skills_asked_for_are_drawn():
    assert {c.task for c in train_conversations(200, skills=["sums", "letters"])} == {"sums", "letters"}


def test_every_skill_is_evaluated_on_different_conversations():
    counts = Counter(c.task for c in evaluated())
    assert counts == dict.fromkeys(SKILLS, 40)
    assert len({c.turns for c in evaluated()}) == len(evaluated())
    assert {skill.group for skill in SKILLS.values()} == set(GROUPS)


@given(seed=seeds, name=st.sampled_from(sorted(SKILLS)), held_out=st.booleans())
def test_conversations_are_short_plain_and_alternate(seed, name, held_out):
    conversation = SKILLS[name].make(random.Random(seed), held_out)
    assert conversation.task == name and conversation.metric == SKILLS[name].metric in (
        "exact",
        "label",
        "opening",
    )
    roles = [turn.role for turn in conversation.turns]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    for turn in conversation.turns:
        assert turn.text.isascii() and turn.text == " ".join(turn.text.split()) and 1 <= len(turn.text) < 150


@given(seed=seeds, held_out=st.booleans())
def test_a_refusal_names_two_different_things_it_can_do(seed, held_out):
    ((_, answer),) = exchanges(SKILLS["refusals"].make(random.Random(seed), held_out))
    opening, one, other = re.fullmatch(r"(.+?)\. I can (.+) or (.+)\.", answer).groups()
    assert opening == REFUSAL and one != other


def test_nothing_in_scope_is_refused():
    for c in trained():
        if SKILLS[c.task].group != "off topic":
            assert REFUSAL not in c.turns[-1].text


def test_the_answer_of_the_most_similar_training_prompt_does_not_do():
    """A baseline that is even told the skill: what cannot be looked up must be worked out."""

    def grams(conversation: Conversation) -> set[str]:
        text = "  ".join(turn.text for turn in conversation.turns[:-1])
        return {text[i : i + 3] for i in range(len(text) - 2)}

    library = defaultdict(list)
    for conversation in trained()[:10_000]:
        library[conversation.task].append((grams(conversation), conversation.turns[-1].text))
    hits: dict[str, list[bool]] = defaultdict(list)
    for c in evaluated()[::2]:
        mine = grams(c)
        _, answer = max(library[c.task], key=lambda known: len(known[0] & mine) / len(known[0] | mine))
        hits[c.task].append(answer == c.turns[-1].text)
    rules = [sum(hits[name]) / len(hits[name]) for name, skill in SKILLS.items() if skill.group == "rules"]
    assert sum(rules) / len(rules) < 0.4


def test_jsonl_keeps_turns_task_and_metric(tmp_path):
    write_jsonl(tmp_path / "skills.jsonl", evaluated())
    lines = [json.loads(line) for line in (tmp_path / "skills.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == [c.task for c in evaluated()]
    assert [line["metric"] for line in lines] == [c.metric for c in evaluated()]
    for line, conversation in zip(lines, evaluated(), strict=True):
        assert [(m["role"], m["content"]) for m in line["messages"]] == list(conversation.turns)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: train_conversations(5, skills=["sum"]), "no skill is called 'sum'; try: sums"),
        (lambda: train_conversations(5, skills=[]), "no skill to draw from"),
        (lambda: train_conversations(-1), "cannot draw -1 conversations"),
        (lambda: train_conversations(5, temperature=0), "temperature is 0, must be above 0"),
        (lambda: eval_conversations(0), "cannot evaluate on 0 conversations"),
    ],
)
def test_a_mistake_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_strung_together_nothing_is_lost_and_much_is_joined():
    parts = list(trained(3_000))
    whole = string_together(parts, seed=1)
    assert [turn for one in whole for turn in one.turns] == [turn for one in parts for turn in one.turns]
    assert 0.6 < len(whole) / len(parts) < 0.75
    assert {one.task for one in whole} == set(SKILLS)


def test_what_stands_before_a_held_out_question_is_held_out_and_of_another_kind():
    plain, put = evaluated(), put_before(evaluated(), seed=1)
    seen = {prompt for conversation in trained() for prompt, _ in exchanges(conversation)}
    for index, (one, other) in enumerate(zip(plain, put, strict=True)):
        assert other.turns[-len(one.turns) :] == one.turns and (one.task, one.metric) == (other.task, other.metric)
        before = other.turns[: -len(one.turns)]
        assert len(before) == (2 if index % 3 == 2 else 0)
        assert not before or before[0].text not in seen
