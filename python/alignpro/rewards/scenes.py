"""Objects that a description names and its scene has not: CHAIR, counted exactly.

CHAIR_I is the share of object mentions that are of no object of the scene, CHAIR_S the share of
descriptions with one or more such mentions (Rohrbach et al. 2018, arXiv 1809.02156). There the
objects are the 80 of COCO in an image; here they are 80 nouns, and the scene is a line of text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from alignpro.rewards.check import no_column, read_rows
from alignpro.types import Texts

# An object, then the other words that name it. Plurals of each follow by rule, or stand after "/".
_OBJECTS = """
dog: puppy/puppies, hound, doggy/doggies
cat: kitten, kitty/kitties
horse: pony/ponies, foal, stallion
cow: calf/calves, bull, cattle/cattle
sheep/sheep: lamb, ewe
goat
pig: piglet, hog
rabbit: bunny/bunnies, hare
duck: duckling
chicken: hen, rooster
elephant
lion: lioness/lionesses
tiger: tigress/tigresses
bear: bear cub
monkey: chimpanzee, ape
zebra
giraffe
fox/foxes: vixen
frog: toad
turtle: tortoise
snake: serpent
butterfly/butterflies
owl
parrot: macaw
penguin
child/children: kid, boy, girl, toddler, baby/babies
woman/women: lady/ladies
man/men: gentleman/gentlemen
bicycle: bike, cycle
car: automobile, sedan
bus/buses: minibus/minibuses
truck: lorry/lorries, pickup truck
boat: ship, sailboat, rowboat, canoe
airplane: plane, aeroplane, aircraft/aircraft, jet
motorcycle: motorbike, moped
helicopter: chopper
tractor
table: tabletop, dining table, coffee table
chair: armchair, stool, rocking chair
sofa: couch/couches, settee
bed: bunk bed
lamp: lampshade, floor lamp
desk: writing desk
bookshelf/bookshelves: bookcase, book shelf/book shelves
mirror: looking glass/looking glasses
clock: alarm clock, wristwatch/wristwatches
television: tv, tv set, television set
ball: football, basketball, soccer ball, beach ball
book: notebook, novel
bottle: wine bottle, water bottle
cup: mug, teacup
vase: flower vase
umbrella: parasol
hat: cap, straw hat
shoe: sneaker, boot, sandal
bag: backpack, handbag, suitcase
basket: picnic basket, hamper
kite
guitar: ukulele
piano: grand piano
drum: drum set
camera: camcorder
phone: telephone, smartphone, cell phone, cellphone
laptop: computer, laptop computer
candle: candlestick
ladder: stepladder
bucket: pail
apple
banana
cake: cupcake, birthday cake
bread/breads: loaf/loaves, loaf of bread/loaves of bread
pizza
sandwich/sandwiches: burger, hamburger
tree: palm tree, oak tree, pine tree
flower: rose, daisy/daisies, tulip, sunflower
bench/benches: park bench/park benches
fence: picket fence
tent
bridge: footbridge
fountain: water fountain
"""


class SceneCounts(NamedTuple):
    """Of one description."""

    mentions: int  # of any object, repetitions included
    hallucinated: int  # of them, of objects that the scene has not
    true_objects: int  # different objects of the scene that are named


class Chair(NamedTuple):
    """Of several descriptions; NaN where there is nothing to divide by."""

    per_mention: float  # CHAIR_I
    per_description: float  # CHAIR_S
    true_objects: float  # mean number, of a description


def mentioned_objects(text: str) -> list[str]:
    """The objects that a text names, in order, by their first name in the table.

    Of names that overlap the longest counts ("a park bench" is one mention). Case does not matter,
    and a part of a word is not the word.
    """
    names, pattern = _names()
    return [names[" ".join(found.split())] for found in pattern.findall(text.lower())]


def scene_counts(description: str, objects: Collection[str]) -> SceneCounts:
    """objects: those of the scene, as `listed_objects` has them."""
    named = mentioned_objects(description)
    true = [name for name in named if name in objects]
    return SceneCounts(len(named), len(named) - len(true), len(set(true)))


def chair(counts: Iterable[SceneCounts]) -> Chair:
    """Over all of them: sums of mentions, not a mean of shares."""
    listed = list(counts)
    mentions, count = sum(c.mentions for c in listed), len(listed)
    nothing = float("nan")
    return Chair(
        sum(c.hallucinated for c in listed) / mentions if mentions else nothing,
        sum(c.hallucinated > 0 for c in listed) / count if count else nothing,
        sum(c.true_objects for c in listed) / count if count else nothing,
    )


class ChairReward:
    """The share of the response's object mentions that the scene has: 1 - CHAIR_I of the response,
    and 0 where it names no object at all, so that saying nothing wins nothing.

    Column "objects": a list of the scene's objects, by their first names.
    """

    name = "chair"

    def check_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._listed(columns)

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        counts = [
            scene_counts(response, objects)
            for response, objects in zip(responses, self._listed(columns), strict=True)
        ]
        return [(c.mentions - c.hallucinated) / c.mentions if c.mentions else 0.0 for c in counts]

    @staticmethod
    def _listed(columns: Mapping[str, Sequence[Any]]) -> list[list[str]]:
        if "objects" not in columns:
            raise ValueError(f"reward 'chair' {no_column('objects', columns)}")
        return read_rows("column 'objects'", map(listed_objects, columns["objects"]))


def listed_objects(value: Any) -> list[str]:
    """A row's column "objects". Raises ValueError for what is no list of texts, or has one that is
    not among `scene_objects`."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"expected a list of texts, got {value!r}")
    unknown = sorted(set(value) - set(scene_objects()))
    if unknown:
        raise ValueError(f"expected objects of scenes, got {unknown[0]!r}")
    return list(value)


def scene_objects() -> list[str]:
    """The first names of all objects."""
    return list(dict.fromkeys(_names()[0].values()))


@functools.cache
def _names() -> tuple[dict[str, str], re.Pattern[str]]:
    """The object of every name, and what finds names in a lower-case text."""
    names: dict[str, str] = {}
    for line in _OBJECTS.strip().splitlines():
        first, _, others = line.partition(":")
        known = first.partition("/")[0].strip()
        for name in (first, *others.split(",")):
            singular, _, plural = (part.strip() for part in name.partition("/"))
            if singular:
                names |= {singular: known, plural or f"{singular}s": known}
    longest_first = sorted(names, key=len, reverse=True)
    spaced = "|".join(r"\s+".join(map(re.escape, name.split())) for name in longest_first)
    return names, re.compile(rf"(?<![\w-])(?:{spaced})(?![\w-])")
