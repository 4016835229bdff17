"""Skills of memory: capitals, chemical symbols, and what the model says of itself and of training.

There is nothing to work out here: the facts asked in evaluation are those of training. What is new is the wording;
each list of wordings is a pair, (training, evaluation).
"""

import random

from .draw import Texts, word_it

_CAPITALS = """
Argentina=Buenos Aires|Australia=Canberra|Austria=Vienna|Belgium=Brussels|Brazil=Brasilia|Bulgaria=Sofia|Canada=Ottawa
Chile=Santiago|China=Beijing|Colombia=Bogota|Croatia=Zagreb|Cuba=Havana|Denmark=Copenhagen|Egypt=Cairo|Estonia=Tallinn
Ethiopia=Addis Ababa|Finland=Helsinki|France=Paris|Germany=Berlin|Ghana=Accra|Greece=Athens|Hungary=Budapest
Iceland=Reykjavik|India=New Delhi|Iran=Tehran|Iraq=Baghdad|Ireland=Dublin|Italy=Rome|Japan=Tokyo|Kenya=Nairobi
Latvia=Riga|Lebanon=Beirut|Libya=Tripoli|Mexico=Mexico City|Mongolia=Ulaanbaatar|Morocco=Rabat|Nepal=Kathmandu
Nigeria=Abuja|Norway=Oslo|Peru=Lima|Poland=Warsaw|Portugal=Lisbon|Romania=Bucharest|Russia=Moscow|Senegal=Dakar
Serbia=Belgrade|Spain=Madrid|Sweden=Stockholm|Thailand=Bangkok|Turkey=Ankara|Ukraine=Kyiv|Vietnam=Hanoi
"""
_SYMBOLS = """
hydrogen=H|helium=He|lithium=Li|carbon=C|nitrogen=N|oxygen=O|fluorine=F|neon=Ne|sodium=Na|magnesium=Mg|aluminium=Al
silicon=Si|phosphorus=P|sulfur=S|chlorine=Cl|argon=Ar|potassium=K|calcium=Ca|titanium=Ti|chromium=Cr|iron=Fe|cobalt=Co
nickel=Ni|copper=Cu|zinc=Zn|arsenic=As|bromine=Br|krypton=Kr|silver=Ag|tin=Sn|iodine=I|xenon=Xe|barium=Ba|tungsten=W
platinum=Pt|gold=Au|mercury=Hg|lead=Pb|radium=Ra|uranium=U
"""
CAPITALS = dict(pair.split("=") for line in _CAPITALS.split("\n") if line for pair in line.split("|"))
SYMBOLS = dict(pair.split("=") for line in _SYMBOLS.split("\n") if line for pair in line.split("|"))

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
    "a micro-batch": "A micro-batch is the part of a batch that is computed at once.",
    "an all-reduce": "An all-reduce gives every rank the sum over all ranks.",
    "master weights": "Master weights are an fp32 copy of the parameters, so that small updates are not lost.",
}

_CAPITAL_WORDINGS = (
    ("What is the capital of {country}?", "Name the capital of {country}.", "Which city is the capital of {country}?",
     "Tell me the capital of {country}.", "What is {country}'s capital?"),
    ("Which city is {country}'s capital?", "What is the capital city of {country}?", "Do you know the capital of {country}?"),
)  # fmt: skip
_SYMBOL_WORDINGS = (
    ("What is the chemical symbol for {element}?", "What is the symbol of {element}?", "Name the symbol for {element}.",
     "Which symbol does {element} have?", "Tell me the symbol of {element}."),
    ("Which chemical symbol does {element} have?", "What symbol stands for {element}?", "Do you know the symbol for {element}?"),
)  # fmt: skip
_CONCEPT_WORDINGS = (
    ("What is {concept}?", "Explain {concept}.", "What does {concept} mean?", "Tell me about {concept}.",
     "In a sentence, what is {concept}?", "What do you know about {concept}?", "Please explain {concept}."),
    ("Can you explain {concept}?", "Explain {concept} in a sentence.", "Tell me what {concept} is.",
     "Please explain {concept} to me.", "Do you know what {concept} is?"),
)  # fmt: skip
_ITSELF = {
    "I am a small GPT, trained in a few minutes with minispeed.": (
        ("Who are you?", "What are you?", "Tell me who you are.", "Tell me about yourself.", "Are you a robot?",
         "Who am I talking to?", "What is your name?", "Are you a person?"),
        ("Tell me what you are.", "Who are you, please?", "So what are you?", "Are you a robot or a person?"),
    ),
    "I can add, sort, spell, count letters and days, convert units and name capitals.": (
        ("What can you do?", "What can I ask you?", "How can you help me?", "What are you good at?",
         "Tell me what you can do.", "What do you know?"),
        ("What can you help me with?", "So what can you do?", "What can you do for me?", "What are your skills? What can you do?"),
    ),
    "Hello! What can I do for you?": (
        ("Hello!", "Hi!", "Hello.", "Hi there!", "Good morning!", "Hey!", "Good evening!", "Hello, how are you?"),
        ("Hello there!", "Hi.", "Hey there!", "Hi, how are you?"),
    ),
    "You are welcome.": (
        ("Thanks!", "Thank you!", "Thank you very much.", "Thanks, that is all.", "Great, thank you!"),
        ("Thank you.", "Thanks a lot!", "Great, thanks!"),
    ),
    "Goodbye!": (
        ("Bye!", "Goodbye!", "See you!", "Bye for now.", "See you later!"),
        ("Goodbye.", "Bye, see you!", "Goodbye for now!"),
    ),
}  # fmt: skip


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
