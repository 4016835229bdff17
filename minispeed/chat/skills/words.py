"""The words and names that skills are about: common ones, and made-up ones that can be pronounced.

A word that is drawn often enough becomes one token, and then a model must know its letters by heart. So the
space is large: hundreds of common words, and made-up words without end; none is frequent, and most fall into
short pieces. Each word is on one side for good: drawn in evaluation, it is drawn in no training conversation.
"""

import random

from .draw import draw, sides

_WORDS = """
able acorn actor advice album alley almond amber anchor angle ankle apple april apron arch arrow artist atlas
attic autumn baby bacon badge bakery balloon bamboo banana banjo banner barrel basket beach beacon beaver
bedroom bell bench bicycle bishop biscuit blanket blossom blue board bonfire book bottle bottom boulder
bracelet branch brass bread breakfast breeze brick bridge bright broom brother brush bubble bucket buffalo
bullet button cabbage cabin cactus camel camera candle cannon canvas carpet carriage carrot castle cattle
cavern cellar cello chair chalk channel cherry chess chicken chimney cinema circle city clarinet clay clever
cliff clock cloud clover coast cobbler coconut coffee collar comet compass copper coral corner cottage cotton
country cousin cradle crayon cricket crown crystal cup curtain cushion daisy dancer dawn deer desert diamond
dinner dolphin donkey dragon drawer dream driver drum eagle early earth easel echo eight elbow elephant ember
engine evening fabric falcon family farmer feather fence fern ferry fiddle field finger fire flag flame flower
flute forest fossil fountain fox freezer friend frost fruit funnel gallery garden garlic gate giraffe glacier
glass glove goat goblet granite grape grass gravel green guitar hammer hammock harbour harvest hazel heather
hedge helmet heron hill hollow honey horizon hotel hour hungry hurry island ivory jacket jaguar jelly jewel
jigsaw journey jungle kayak kettle keyboard king kitchen kitten knight ladder lagoon lantern larch lawyer leaf
leather lemon lettuce library light lily lion little lizard llama lobster locket lumber lunch magnet mango
maple marble market marrow meadow melon memory merry middle milk mill mirror mitten monkey moon morning mosaic
moss mountain muffin museum music napkin narrow needle nest night noodle north notebook nutmeg oak oasis ocean
office olive onion orange orchard organ otter oven owl oyster paddle paint palace pancake panda paper parrot
pasture peach peanut pebble pencil penguin pepper piano picnic pillow pilot pine pirate planet plate pocket
poem pond poppy potato powder prairie pretty prince puddle pumpkin puppet purple puzzle quarry queen quiet
quilt rabbit radio raft rail rainbow ranger raven ribbon ripple river robin rocket rope rose ruby saddle
sailor salad salmon sand sandal saturn saucer scarf school scooter sculptor season seed shadow sheep shell
shelter shirt shore shovel silver singer sister skate sledge sleeve slipper smoke snail snow socket soil
sparrow spider spinach spoon spring squirrel stable stairs star station statue steam stone storm stove
straight stream street student summer sunny sunset supper swallow swan sweater swimmer table tailor teacher
teapot temple tennis tent theatre thimble thistle thread throne thunder ticket tiger timber toast tomato topaz
tower tractor train treasure tree tulip tunnel turkey turnip turtle umbrella uncle valley velvet village
violin volcano waffle wagon walnut walrus water waterfall weather whale wheat wheel whistle willow window
winter wizard wolf wonder wood worker worry yarn yellow yogurt zebra zipper
""".split()

NAMES = """
Ada Agnes Alan Alba Alice Amara Amir Anders Anya Arlo Asha Astrid Aziz Basil Beatrix Benno Berit Bilal Bjorn
Bruno Camille Carlos Cedric Celia Chidi Clara Cyrus Dalia Dario Davide Delia Diego Dora Edith Edwin Eero Elif
Eliza Elmar Emeka Enzo Esme Ester Ewan Fadi Farah Felix Fergus Fiona Freya Gemma Gideon Greta Gustav Hana
Hanno Hector Hedda Hugo Ibrahim Ida Igor Imani Ines Ingrid Irma Isaac Ivan Ivy Jalil Jasper Joanna Jonas Juno
Kaito Karim Katya Keiko Klaus Kofi Lara Lars Leila Lena Linus Livia Lorenzo Lucia Ludwig Magnus Malik Marco
Marit Marta Mateo Mei Milan Mina Mira Moira Nadia Naomi Nestor Nico Niko Nils Nora Olga Olive Omar Orla Oskar
Otto Paolo Pedro Petra Philip Pia Priya Quentin Rafael Ramona Ravi Renata Rhea Rosa Rufus Runa Sami Sanna
Saskia Sefa Selma Simon Sofia Stella Sven Tariq Tessa Theo Tilda Timo Tomas Ulrich Una Uri Vera Victor Viola
Walter Wanda Wilma Xenia Yara Yasmin Yusuf Zahra Zane Zoe
""".split()

_ONSETS = "b c d f g h j k l m n p r s t v w y z br cr dr fr gr pr tr st sl pl bl cl fl sw th ch str".split()
_VOWELS = "a a a e e e i i o o u ai ea ee oo ou aw".split()
_CODAS = [""] * 8 + "n n r r l s d ll rr nn rd st x".split()
_ENDINGS = [""] * 6 + "y ry er le ow".split()


def draw_word(rng: random.Random, held_out: bool, longest: int = 9) -> str:
    """Draw a word of 3 to `longest` lower-case letters, common or made up, from one side of the hold-out."""
    if rng.random() < 0.5:
        return rng.choice([word for word in _COMMON[held_out] if len(word) <= longest])
    return draw(rng, held_out, lambda rng: _made_up(rng, longest), "word {}".format)


def _made_up(rng: random.Random, longest: int = 9) -> str:
    while True:
        word = ""
        for _ in range(rng.randint(1, 3)):
            word += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        word += rng.choice(_ENDINGS)
        if 3 <= len(word) <= longest:
            return word


_COMMON = sides("word", _WORDS)
