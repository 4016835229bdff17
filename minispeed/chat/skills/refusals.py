"""Off topic: say that it cannot, and name two things that it can do.

A small model that answers everything is wrong most of the time. It is trained to decline some kinds of
question (recipes, poems, weather, ...) and scored on kinds that it never saw (illness, law, travel, ...).
Near misses are trained: products beside sums, what a word means beside what ZeRO is, a country's language beside
its capital.
"""

import random

from .draw import Texts
from .memory import CAPITALS
from .words import NAMES, draw_word

REFUSAL = "Sorry, I cannot do that"

_ABILITIES = (
    "add numbers",
    "count letters",
    "sort numbers",
    "spell words backwards",
    "name capitals",
    "convert units",
    "count days",
    "translate to Speedish",
    "judge a review",
    "take numbers away",
)

# kind: (questions, things to put into them)
_TRAINED = {
    "cooking": (
        "How do I cook {thing}?|Give me a recipe for {thing}.|How long do I bake {thing}?|"
        "What goes well with {thing}?|Is {thing} healthy?|Can I eat {thing} with {word}?",
        "rice|pasta|bread|pancakes|a chicken|beans|a cake|noodles|potatoes|pizza|eggs|an omelet|tofu",
    ),
    "poems": (
        "Write a poem about {thing}.|Write me a {word} song.|Tell me a story about {thing}.|"
        "Make up a rhyme about {name}.|Tell me a joke about {thing}.|Draw me {thing}.|"
        "Write a letter to {name}.",
        "love|the sea|a dragon|autumn|my friend|the moon|rain|home|a {word}|two cats|the {word}",
    ),
    "weather": (
        "Will it {thing} tomorrow?|What will the weather be in {country}?|How cold is it in {country}?|"
        "Is it going to {thing} today?|What is the temperature outside?",
        "rain|snow|be sunny|be windy|freeze|storm|be hot",
    ),
    "sport": (
        "Who won the {thing}?|Who is the best {thing} player?|When is the next {thing} game?|"
        "What are the rules of {thing}?|How many people are in a {thing} team?",
        "football|tennis|hockey|chess|world cup|marathon|golf|rugby|race|{word} cup",
    ),
    "code": (
        "Write a program that {thing}.|How do I fix a bug in {word}?|Write a function that {thing}.|"
        "How do I install {word}?|Why does my code not work?|Which programming language should I learn?",
        "prints {word}|finds primes|reads a file|draws a {word}|plays music|sends a mail|sorts a list",
    ),
    "culture": (
        "Who wrote {thing}?|Who painted {thing}?|What is the plot of {thing}?|Recommend {thing}.|"
        "Who sings {thing}?|What should I read about {word}?|Is {thing} worth watching?",
        "Hamlet|the {word}|a good film|a book|Don Quixote|a series|the Mona Lisa|{name} and the {word}",
    ),
    "history": (
        "When did {thing} end?|Who was {name} the First?|Why did {thing} begin?|What happened in 1{number}?|"
        "When was {thing} built?|Who discovered {country}?|When was {name} born?",
        "the war|the empire|the great wall|the middle ages|the revolution|the tower|the {word} war",
    ),
    "countries": (
        "How many people live in {country}?|Who is the president of {country}?|"
        "What language do they speak in {country}?|How big is {country}?|What is the currency of {country}?|"
        "What is the highest mountain in {country}?|What is {country} famous for?|Where is {country}?",
        "",
    ),
    "meanings": (
        "What is a {word}?|Explain the word {word}.|What does {word} mean?|Tell me about {word}.|"
        "What do you know about {word}?|What color is a {word}?|Translate {word} to French.|"
        "How do I say {word} in German?|In a sentence, what is a {word}?|Who is {name}?|"
        "Tell me about {name}.|What is the opposite of {word}?|What rhymes with {word}?",
        "",
    ),
    "products": (
        "What is {number} times {small}?|Multiply {number} and {small}.|{number} * {small} = ?|"
        "Divide {number} by {small}.|What is the root of {number}?|Is {number} a prime number?|"
        "Solve x + {small} = {number}.|What is {small} percent of {number}?",
        "",
    ),
    "shopping": (
        "Where can I buy {thing}?|How much does {thing} cost?|Which {word} should I buy?|"
        "Order {thing} for me.|Find me {thing}.",
        "shoes|a phone|a laptop|a {word}|a bike|a gift for {name}|tickets|new glasses|a sofa|flowers",
    ),
    "home": (
        "How do I grow {thing}?|How do I clean {thing}?|How do I repair {thing}?|Why is my {word} broken?|"
        "How often should I wash {thing}?|Turn on the {word}.|Play some {word} music.|"
        "Set an alarm for {small} o'clock.|What time is it?|Remind me to call {name}.",
        "roses|tomatoes|the window|a carpet|my car|a lamp|a {word}|the roof|my bike|the oven",
    ),
    "advice": (
        "Should I {thing}?|How can I {thing}?|Help me to {thing}.|What is the best way to {thing}?|"
        "I want to {thing}.|Why do people {thing}?|Can you {thing}?",
        "learn to swim|find a job|make friends|sleep better|write an essay|study {word}|call {name}|dance",
    ),
}
_EVALUATED = {
    "illness": (
        "Why does my {thing} hurt?|Which pills help against a sore {thing}?|Is a swollen {thing} dangerous?|"
        "My {thing} aches, do I need a doctor?|How is a broken {thing} treated?",
        "head|knee|back|stomach|tooth|throat|ankle|wrist|shoulder|ear",
    ),
    "law": (
        "Can I sue {thing}?|Is it legal to record {thing}?|Do I need a lawyer against {thing}?|"
        "How do I end a contract with {thing}?|What happens if I lie to {thing}?",
        "my landlord|my boss|a neighbour|the police|my bank|a judge|an employer|{name}",
    ),
    "travel": (
        "Book a flight to {country}.|Do I need a visa for {country}?|"
        "When is the best season to visit {country}?|Plan a week in {country} for me.|"
        "Which train goes to {country}?",
        "",
    ),
    "money": (
        "Which {thing} pay the most interest?|Are {thing} a safe investment?|How are {thing} taxed?|"
        "Will {thing} rise this year?|Lend me {number} euros for {thing}.",
        "shares|bonds|savings|pensions|coins|funds|houses",
    ),
    "animals": (
        "How long do {thing} live?|What do {thing} eat in winter?|Why do {thing} bite?|"
        "Are {thing} smarter than dogs?|How fast can {thing} run?",
        "hamsters|parrots|snakes|bears|spiders|whales|ponies|rats|bees",
    ),
    "people": (
        "{name} is angry with me, how do I apologise?|How do I ask {name} out?|My boss {name} ignores me.|"
        "Does {name} love me?|Give {name} a birthday toast.",
        "",
    ),
}
_KINDS = tuple(
    [(questions.split("|"), things.split("|")) for questions, things in kinds.values()]
    for kinds in (_TRAINED, _EVALUATED)
)


def refuse(rng: random.Random, held_out: bool) -> Texts:
    """A recipe for rice: "Sorry, I cannot do that. I can add numbers or spell words backwards."

    The kind of question decides which two abilities are named: deterministic, so that it can be learnt.
    """
    kinds = _KINDS[held_out]
    index = rng.randrange(len(kinds))
    questions, things = kinds[index]
    question = rng.choice(questions).replace("{thing}", rng.choice(things)).format(
        word=draw_word(rng, held_out), name=rng.choice(NAMES), country=rng.choice(list(CAPITALS)),
        number=rng.randrange(100, 1000), small=rng.randrange(2, 13),
    )  # fmt: skip
    one, other = (_ABILITIES[place % len(_ABILITIES)] for place in (index, index + 3))
    return question, f"{REFUSAL}. I can {one} or {other}."
