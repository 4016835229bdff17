"""Skills of memory: capitals, chemical symbols, and what the model says of itself and of training.

There is nothing to work out here: the facts asked in evaluation are those of training. What is new is the
wording: an opening, a middle and an end that never stood together in training. Each set of wordings is a pair,
(training, evaluation).
"""

import random
from itertools import product

from .draw import Texts, sides, word_it


def _pairs(table: str) -> dict[str, str]:
    return dict(pair.split("=") for line in table.split("\n") if line for pair in line.split("|"))


CAPITALS = _pairs("""
Argentina=Buenos Aires|Australia=Canberra|Austria=Vienna|Belgium=Brussels|Brazil=Brasilia|Bulgaria=Sofia
Canada=Ottawa|Chile=Santiago|China=Beijing|Colombia=Bogota|Croatia=Zagreb|Cuba=Havana|Denmark=Copenhagen
Egypt=Cairo|Estonia=Tallinn|Finland=Helsinki|France=Paris|Germany=Berlin|Ghana=Accra|Greece=Athens
Hungary=Budapest|Iceland=Reykjavik|India=New Delhi|Iran=Tehran|Iraq=Baghdad|Ireland=Dublin|Italy=Rome
Japan=Tokyo|Kenya=Nairobi|Latvia=Riga|Lebanon=Beirut|Libya=Tripoli|Mexico=Mexico City|Morocco=Rabat
Nepal=Kathmandu|Nigeria=Abuja|Norway=Oslo|Peru=Lima|Poland=Warsaw|Portugal=Lisbon|Romania=Bucharest
Russia=Moscow|Senegal=Dakar|Serbia=Belgrade|Spain=Madrid|Sweden=Stockholm|Thailand=Bangkok|Turkey=Ankara|Ukraine=Kyiv
Vietnam=Hanoi
""")
SYMBOLS = _pairs("""
hydrogen=H|helium=He|lithium=Li|carbon=C|nitrogen=N|oxygen=O|fluorine=F|neon=Ne|sodium=Na|magnesium=Mg
aluminium=Al|silicon=Si|phosphorus=P|sulfur=S|chlorine=Cl|argon=Ar|potassium=K|calcium=Ca|titanium=Ti
chromium=Cr|iron=Fe|cobalt=Co|nickel=Ni|copper=Cu|zinc=Zn|arsenic=As|bromine=Br|krypton=Kr|silver=Ag|tin=Sn
iodine=I|xenon=Xe|barium=Ba|tungsten=W|platinum=Pt|gold=Au|mercury=Hg|lead=Pb|radium=Ra|uranium=U
""")
CONCEPTS = {
    "ZeRO": "ZeRO lets each device keep only its shard of optimizer states, gradients and parameters.",
    "a loss scaler": "A loss scaler multiplies the loss, so that small fp16 gradients do not become zero.",
    "data parallelism": "Each device trains on its own part of the batch, and the gradients are summed.",
    "tensor parallelism": "Each matrix is cut, and every device multiplies its own part.",
    "pipeline parallelism": "Each device holds some of the layers, and micro-batches flow through them.",
    "sequence parallelism": "Each device holds some of the tokens of every sequence.",
    "recomputation": "Activations are thrown away and computed again in the backward pass, to save memory.",
    "offload": "Optimizer states move to CPU memory, so that the GPU holds less.",
    "LoRA": "LoRA freezes the weights and trains two thin matrices beside each of them.",
    "attention": "Attention lets each token read from the tokens before it.",
    "a gradient": "A gradient says how the loss changes when a parameter moves.",
    "a token": "A token is a piece of text that the model reads as one number.",
    "master weights": "Master weights are an fp32 copy of the parameters, so small updates are not lost.",
}


def _said(*parts: str) -> list[str]:
    """Return every sentence that takes one of each part, "a|b|c"."""
    texts = map("".join, product(*(part.split("|") for part in parts)))
    return [text[0].upper() + text[1:] for text in texts]


_ASKING, _BEGGING = "|So, |Hey, |Tell me, |Now, ", "|Please |Now |Just |So, please "
_CAPITAL_WORDINGS = sides(
    "wording",
    _said(_ASKING, "what|which city", " is the capital of {country}| is {country}'s capital", "?|, please?")
    + _said(_BEGGING, "name|tell me|give me", " the capital of {country}| {country}'s capital", "."),
)
_SYMBOL_WORDINGS = sides(
    "wording",
    _said(
        _ASKING, "what|which", " is the symbol| is the chemical symbol", " of {element}| for {element}", "?|, please?"
    )
    + _said(_BEGGING, "name|tell me|give me", " the symbol| the chemical symbol", " of {element}| for {element}", "."),
)
_CONCEPT_WORDINGS = sides(
    "wording",
    _said(_ASKING + "|In a sentence, ", "what is {concept}|what does {concept} mean", "?|, please?|, in short?")
    + _said(_BEGGING, "explain|describe|tell me about", " {concept}", ".| to me.| in a sentence.| in short.| again.")
    + _said(
        "Can you |Could you ", "explain|describe|tell me about", " {concept}", "?| to me?| in a sentence?| in short?"
    ),
)
_ITSELF = {
    answer: sides("wording", wordings)
    for answer, wordings in {
        "I am a small GPT, trained in a few minutes with minispeed.": (
            _said(
                _ASKING, "who are you|what are you|who am I talking to|are you a robot|what is your name", "?|, please?"
            )
        ),
        "I can add, sort, spell, count letters and days, convert units and name capitals.": (
            _said(_ASKING, "what can you do|what can I ask you|how can you help me|what are you good at", "?|, please?")
        ),
        "Hello! What can I do for you?": _said(
            "hello|hi|hey|good morning|good evening", "| there| again| to you", "!|."
        ),
        "You are welcome.": _said("thanks|thank you|many thanks", "| a lot| for that| for your help| again", "!|."),
        "Goodbye!": _said("bye|goodbye|see you|see you later|bye for now", "|, then| again|, and thanks", "!|."),
    }.items()
}


def name_capital(rng: random.Random, held_out: bool) -> Texts:
    """France: "Paris"."""
    country = rng.choice(list(CAPITALS))
    return word_it(rng, _CAPITAL_WORDINGS[held_out], country=country), CAPITALS[country]


def name_symbol(rng: random.Random, held_out: bool) -> Texts:
    """gold: "Au"."""
    element = rng.choice(list(SYMBOLS))
    return word_it(rng, _SYMBOL_WORDINGS[held_out], element=element), SYMBOLS[element]


def small_talk(rng: random.Random, held_out: bool) -> Texts:
    """A sentence on what ZeRO is, or a loss scaler; or on who it is itself."""
    if rng.random() < 0.7:
        concept = rng.choice(list(CONCEPTS))
        return word_it(rng, _CONCEPT_WORDINGS[held_out], concept=concept), CONCEPTS[concept]
    answer = rng.choice(list(_ITSELF))
    return rng.choice(_ITSELF[answer][held_out]), answer
