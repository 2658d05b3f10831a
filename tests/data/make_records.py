"""Writes the made-up reactions, recipes and meeting notes that ship, with their records.

    python tests/data/make_records.py python/alignpro/data

Everything is drawn from one seed by the lines below, so a record is true by construction: amounts
are computed from masses and molar masses, and rounded as a laboratory does.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignpro.extract.formula import molar_mass

T = TypeVar("T")
Row = dict[str, Any]


class Draws:
    """Draws that every version of Python makes alike."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def one(self, items: Sequence[T]) -> T:
        return items[int(self._random.random() * len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        left, taken = list(items), []
        for _ in range(count):
            taken.append(left.pop(int(self._random.random() * len(left))))
        return taken

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random.random()


def digits3(value: float, *, commas: bool = False) -> str:
    """Three significant digits, written out."""
    places = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    return f"{rounded:{',' if commas else ''}.{max(0, places)}f}"


# --- reactions ---

# Starting material, product, and what else takes part, in excess; one mole gives one.
_REACTIONS = (
    ("benzoic acid", "C7H6O2", "ethyl benzoate", "C9H10O2", None),
    ("salicylic acid", "C7H6O3", "methyl salicylate", "C8H8O3", None),
    ("cyclohexanol", "C6H12O", "cyclohexanone", "C6H10O", None),
    ("benzyl alcohol", "C7H8O", "benzaldehyde", "C7H6O", ("manganese dioxide", "MnO2")),
    ("benzophenone", "C13H10O", "benzhydrol", "C13H12O", ("sodium borohydride", "NaBH4")),
    ("acetophenone", "C8H8O", "1-phenylethanol", "C8H10O", ("sodium borohydride", "NaBH4")),
    ("nitrobenzene", "C6H5NO2", "aniline", "C6H7N", ("iron powder", "Fe")),
    ("aniline", "C6H7N", "acetanilide", "C8H9NO", ("acetic anhydride", "C4H6O3")),
    ("4-aminophenol", "C6H7NO", "paracetamol", "C8H9NO2", ("acetic anhydride", "C4H6O3")),
    ("phenol", "C6H6O", "anisole", "C7H8O", ("dimethyl sulfate", "C2H6O4S")),
    ("cyclohexene", "C6H10", "1,2-dibromocyclohexane", "C6H10Br2", ("bromine", "Br2")),
    ("cinnamic acid", "C9H8O2", "hydrocinnamic acid", "C9H10O2", None),
    ("vanillin", "C8H8O3", "vanillyl alcohol", "C8H10O3", ("sodium borohydride", "NaBH4")),
    ("camphor", "C10H16O", "isoborneol", "C10H18O", ("sodium borohydride", "NaBH4")),
    ("benzonitrile", "C7H5N", "benzamide", "C7H7NO", ("hydrogen peroxide", "H2O2")),
    ("4-nitrotoluene", "C7H7NO2", "4-nitrobenzoic acid", "C7H5NO4", None),
    ("1-bromobutane", "C4H9Br", "1-iodobutane", "C4H9I", ("sodium iodide", "NaI")),
    ("hexanoic acid", "C6H12O2", "methyl hexanoate", "C7H14O2", None),
    ("phthalic anhydride", "C8H4O3", "N-phenylphthalimide", "C14H9NO2", ("aniline", "C6H7N")),
    ("naphthalene", "C10H8", "1-bromonaphthalene", "C10H7Br", ("bromine", "Br2")),
    ("piperidine", "C5H11N", "N-benzoylpiperidine", "C12H15NO", ("benzoyl chloride", "C7H5ClO")),
    ("indole", "C8H7N", "indoline", "C8H9N", ("sodium cyanoborohydride", "NaBH3(CN)")),
    ("quinoline", "C9H7N", "quinoline N-oxide", "C9H7NO", ("hydrogen peroxide", "H2O2")),
    ("triphenylphosphine", "C18H15P", "triphenylphosphine oxide", "C18H15OP", None),
    ("ferrocene", "C10H10Fe", "acetylferrocene", "C12H12FeO", ("acetic anhydride", "C4H6O3")),
    ("geraniol", "C10H18O", "geranyl acetate", "C12H20O2", ("acetic anhydride", "C4H6O3")),
    ("menthol", "C10H20O", "menthone", "C10H18O", None),
    ("cholesterol", "C27H46O", "cholesteryl acetate", "C29H48O2", ("acetyl chloride", "C2H3ClO")),
    ("succinic anhydride", "C4H4O3", "monomethyl succinate", "C5H8O4", ("methanol", "CH4O")),
    ("benzoin", "C14H12O2", "benzil", "C14H10O2", ("copper(II) acetate", "Cu(C2H3O2)2·H2O")),
    ("4-nitrophenol", "C6H5NO3", "4-nitroanisole", "C7H7NO3", ("dimethyl sulfate", "C2H6O4S")),
)
_HELD_OUT_REACTIONS = (
    ("styrene", "C8H8", "styrene oxide", "C8H8O", None),
    ("furfural", "C5H4O2", "furfuryl alcohol", "C5H6O2", ("sodium borohydride", "NaBH4")),
    ("2-naphthol", "C10H8O", "2-methoxynaphthalene", "C11H10O", ("dimethyl sulfate", "C2H6O4S")),
    ("morpholine", "C4H9NO", "N-acetylmorpholine", "C6H11NO2", ("acetyl chloride", "C2H3ClO")),
    ("thioanisole", "C7H8S", "methyl phenyl sulfoxide", "C7H8OS", None),
    ("4-chlorobenzaldehyde", "C7H5ClO", "4-chlorobenzyl alcohol", "C7H7ClO", None),
    ("phenylacetic acid", "C8H8O2", "ethyl phenylacetate", "C10H12O2", None),
    ("phenylhydrazine", "C6H8N2", "tetrahydrocarbazole", "C12H13N", ("cyclohexanone", "C6H10O")),
    ("1,2-phenylenediamine", "C6H8N2", "2,3-diphenylquinoxaline", "C20H14N2",
     ("benzil", "C14H10O2")),
    ("fluorene", "C13H10", "fluorenone", "C13H8O", ("potassium permanganate", "KMnO4")),
)  # fmt: skip
_SOLVENTS = ("ethanol", "toluene", "dichloromethane", "diethyl ether", "acetone", "tetrahydrofuran")
_CHARGED = (
    "{name} ({formula}, {mass}, {amount}) was dissolved in {solvent} ({volume}).",
    "To a solution of {name} ({formula}, {mass}, {amount}) in {volume} of {solvent} was added a "
    "drop of acid.",
    "A flask was charged with {mass} ({amount}) of {name} ({formula}) and {volume} of {solvent}.",
    "In {solvent} ({volume}), {name} ({formula}; {mass}, {amount}) was stirred under nitrogen.",
)
_ADDED = (
    "{name} ({formula}, {mass}, {amount}) was added in portions.",
    "Then {mass} ({amount}) of {name} ({formula}) was added.",
    "After ten minutes {name} ({formula}; {mass}, {amount}) was dropped in.",
)
_GIVEN = (
    "{name} ({formula}) was obtained as {look} ({mass}, {amount}, {percent}).",
    "This gave {mass} ({amount}) of {name} ({formula}) in {percent} yield.",
    "Evaporation left {look}, {name} ({formula}; {mass}, {amount}), a yield of {percent}.",
    "The yield of {name} ({formula}) was {mass} ({amount}, {percent}).",
)
_LOOKS = ("a white solid", "a colourless oil", "pale crystals", "a yellow powder", "needles")
_WORKUPS = (
    "The organic layer was washed with brine ({volume}) and dried over "
    "magnesium sulfate ({dry} g).",
    "The solvent was removed under reduced pressure at {bath} °C.",
    "The residue was stirred with {volume} of hexane for {short} min and filtered.",
    "The mixture was poured onto {ice} g of ice.",
)
_DISTRACTORS = (
    "A first attempt on {part} of {name} had given only {low}%.",
    "At {hot} °C the yield fell to {low}%.",
    "The same batch of {name} had been kept for {days} days at {cold} °C.",
    "Half the amount of solvent lowered the yield by {few}%.",
    "The literature reports {high}% for this step.",
)


def reactions(split: str, count: int, seed: int) -> Iterator[Row]:
    draws = Draws(seed)
    kinds = _REACTIONS if split == "train" else _HELD_OUT_REACTIONS
    for number in range(count):
        yield _reaction(draws, kinds[number % len(kinds)], split)


def _charge(draws: Draws, name: str, formula: str, moles: float) -> tuple[dict[str, str], float]:
    """A compound as it is weighed: what the text says of it, and the moles that this is."""
    grams = float(digits3(moles * molar_mass(formula)))
    if grams < 1 and draws.chance(0.6):
        mass = f"{digits3(1000 * grams)} mg"
    elif grams < 8 and draws.chance(0.08):
        mass = f"{digits3(1000 * grams, commas=True)} mg"
    else:
        mass = f"{digits3(grams)} g"
    exact = grams / molar_mass(formula)
    in_mol = draws.chance(0.1)
    amount = f"{digits3(exact)} mol" if in_mol else f"{digits3(1000 * exact)} mmol"
    said = {"name": name, "formula": formula, "mass": mass, "amount": amount}
    return said, float(digits3(exact))


def _reaction(draws: Draws, kind: tuple[Any, ...], split: str) -> Row:
    name, formula, product, product_formula, other = kind
    moles = math.exp(draws.between(math.log(0.002), math.log(0.06)))
    start, exact = _charge(draws, name, formula, moles)
    reactants, sentences = [start], []
    volumes = [f"{int(draws.between(2, 16)) * 5} mL" for _ in range(2)]
    solvent = draws.one(_SOLVENTS)
    sentences.append(draws.one(_CHARGED).format(**start, solvent=solvent, volume=volumes[0]))
    if other is not None:
        added, _ = _charge(draws, *other, exact * draws.between(1.2, 3.0))
        reactants.append(added)
        sentences.append(draws.one(_ADDED).format(**added))
    record: Row = {"reactants": reactants}
    sentences += _conditions(draws, record)
    sentences.append(
        draws.one(_WORKUPS).format(
            volume=volumes[1],
            dry=int(draws.between(3, 9)),
            bath=int(draws.between(7, 12)) * 5,
            short=int(draws.between(5, 25)),
            ice=int(draws.between(4, 20)) * 10,
        )
    )
    share = draws.between(0.35, 0.97)
    given, out = _charge(draws, product, product_formula, exact * share)
    percent = f"{round(100 * out / exact)}{draws.one(('%', '%', ' %', ' percent'))}"
    said = draws.one(_GIVEN).format(**given, percent=percent, look=draws.one(_LOOKS))
    sentences.append(said)
    record |= {"product": given, "yield": percent}
    if draws.chance(0.4):
        sentences.insert(
            draws.one((1, len(sentences))),
            draws.one(_DISTRACTORS).format(
                name=name,
                part=f"{digits3(draws.between(0.1, 0.9))} g",
                low=int(draws.between(8, 33)),
                hot=int(draws.between(26, 39)) * 5,
                days=int(draws.between(2, 30)),
                cold=int(draws.between(2, 9)),
                few=int(draws.between(2, 8)),
                high=98,
            ),
        )
    flat = {
        "starting_material": name,
        **{key: start[key] for key in ("formula", "mass", "amount")},
        "product": product,
        "product_formula": product_formula,
        "product_mass": given["mass"],
        "yield": percent,
    }
    text = " ".join(s[0].upper() + s[1:] for s in sentences)
    return {"text": text, "record": record, "flat": flat, "split": split}


def _conditions(draws: Draws, record: Row) -> list[str]:
    """Where it is stirred, and how long; a tenth of the texts say nothing of it."""
    if draws.chance(0.1):
        return ["The mixture was stirred at room temperature overnight."]
    degrees = int(draws.between(-4, 26)) * 5
    kelvin = draws.chance(0.1)
    temperature = f"{degrees + 273.15:.2f} K" if kelvin else f"{degrees} °C"
    hours = int(draws.between(1, 24))
    time = f"{60 * hours} min" if hours < 5 and draws.chance(0.4) else f"{hours} h"
    record |= {"temperature": temperature, "time": time}
    how = draws.one(
        (
            "The mixture was kept at {0} for {1}.",
            "After {1} at {0} the reaction was complete.",
            "It was stirred for {1} at {0}.",
        )
    )
    return [how.format(temperature, time)]


# --- recipes ---

_DISHES = {
    "dessert": ("apple crumble", "plum cake", "lemon tart", "rice pudding", "pear pie", "nut cake"),
    "main": (
        "leek quiche",
        "potato bake",
        "bean stew",
        "squash gratin",
        "onion tart",
        "lentil pie",
    ),
    "starter": (
        "carrot soup",
        "beet salad",
        "pea soup",
        "fennel salad",
        "corn soup",
        "tomato tart",
    ),
}
_BY_MASS = ("flour", "sugar", "butter", "potatoes", "cheese", "lentils", "oats", "carrots", "rice")
_BY_VOLUME = ("milk", "cream", "water", "apple juice", "olive oil", "vegetable stock")
_BY_COUNT = ("eggs", "onions", "lemons", "apples", "leeks", "bay leaves")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
_ASIDES = (
    "My aunt leaves it in the oven for {long} minutes, which dries it out.",
    "The old edition asks for {much} g of salt, a misprint.",
    "It keeps for {days} days.",
    "A half batch fits a tin of {tin} cm.",
)


def recipes(split: str, count: int, seed: int) -> Iterator[Row]:
    draws = Draws(seed)
    for _ in range(count):
        yield _recipe(draws, split)


def _recipe(draws: Draws, split: str) -> Row:
    course = draws.one(tuple(_DISHES))
    dishes = _DISHES[course][:4] if split == "train" else _DISHES[course][4:]
    title, servings = draws.one(dishes), int(draws.between(2, 9))
    ingredients: list[Row] = []
    said = []
    for name in draws.some(_BY_MASS, int(draws.between(1, 4))):
        grams = int(draws.between(3, 50)) * 10
        mass = f"0.{grams // 10:02d} kg" if draws.chance(0.1) else f"{grams} g"
        ingredients.append({"name": name, "mass": mass})
        said.append(f"{mass} of {name}")
    for name in draws.some(_BY_VOLUME, int(draws.between(1, 3))):
        volume = f"{int(draws.between(1, 11)) * 5} {draws.one(('mL', 'mL', 'cL'))}"
        ingredients.append({"name": name, "volume": volume})
        said.append(f"{volume} of {name}")
    for name in draws.some(_BY_COUNT, int(draws.between(0, 3))):
        count = int(draws.between(2, 9))
        ingredients.append({"name": name, "count": count})
        said.append(f"{_NUMBERS[count - 1]} {name}")
    preparation, cooking = (int(draws.between(2, 13)) * 5 for _ in range(2))
    total = preparation + cooking
    whole = f"{total // 60} h" if total % 60 == 0 else f"{total} minutes"
    degrees = int(draws.between(16, 23)) * 10
    record: Row = {
        "title": title,
        "course": course,
        "servings": servings,
        "ingredients": ingredients,
        "preparation": f"{preparation} minutes",
        "cooking": f"{cooking} minutes",
        "total": whole,
    }
    sentences = [
        f"{title[0].upper()}{title[1:]} is a {course} for {servings}.",
        f"You need {', '.join(said[:-1])} and {said[-1]}.",
        f"Preparation takes {preparation} minutes and cooking {cooking} minutes, {whole} in all.",
    ]
    if draws.chance(0.7):
        record["oven"] = f"{degrees} °C"
        sentences.append(f"Heat the oven to {degrees} °C.")
    if draws.chance(0.5):
        aside = draws.one(_ASIDES)
        sentences.insert(
            draws.one((1, len(sentences))),
            aside.format(
                long=int(draws.between(130, 170)),
                much=int(draws.between(61, 99)) * 10 + 3,
                days=int(draws.between(2, 6)),
                tin=int(draws.between(18, 26)),
            ),
        )
    return {"text": " ".join(sentences), "record": record, "split": split}


# --- meetings ---

_NAMES = ("Ana", "Ben", "Carla", "Dev", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jonas", "Kim")
_TITLES = (
    *("budget review", "launch meeting", "library committee", "garden committee"),
    *("safety round", "hiring panel", "website meeting", "school council"),
)
_DECISIONS = (
    *("move the opening to May", "buy a second printer", "close the shop on Mondays"),
    *("paint the hall white", "drop the old logo", "keep the current supplier"),
    *("raise the fee by ten euros", "hold the fair indoors"),
)
_TASKS = (
    *("write the draft", "book the room", "call the plumber", "order the paper", "check the bill"),
    *("update the list", "ask for three offers", "print the posters", "send the invitations"),
    *("test the new form",),
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
_MONTHS = ("January", "February", "March", "April", "June", "September", "October", "November")
_REMARKS = (
    "{name} sent apologies.",
    "The last meeting had taken {long} minutes.",
    "{name} may help to paint later on.",
    "Lunch for {many} people was good.",
)


def meetings(split: str, count: int, seed: int) -> Iterator[Row]:
    draws = Draws(seed)
    for _ in range(count):
        yield _meeting(draws, split)


def _meeting(draws: Draws, split: str) -> Row:
    title = draws.one(_TITLES[:6] if split == "train" else _TITLES[4:])
    people = draws.some(_NAMES, int(draws.between(3, 6)))
    attendees, absent = people[:-1], people[-1]
    date = f"{int(draws.between(1, 29))} {draws.one(_MONTHS)} {draws.one((2024, 2025, 2026))}"
    minutes = int(draws.between(4, 19)) * 5
    duration = f"{minutes // 60} h" if minutes % 60 == 0 else f"{minutes} minutes"
    place = draws.one(("online", "in person"))
    sentences = [
        f"Minutes of the {title}, {date}.",
        f"Present: {', '.join(attendees[:-1])} and {attendees[-1]}.",
        f"We met {place} for {duration}.",
    ]
    record: Row = {
        "title": title,
        "date": date,
        "place": place,
        "duration": duration,
        "attendees": attendees,
    }
    decisions = draws.some(_DECISIONS, int(draws.between(0, 3)))
    sentences += [f"It was decided to {decision}." for decision in decisions]
    actions: list[Row] = []
    for task in draws.some(_TASKS, int(draws.between(1, 4))):
        action = {"who": draws.one(attendees), "what": task}
        said = f"{action['who']} will {task}"
        if draws.chance(0.6):
            action["due"] = draws.one(_DAYS)
            said += f" by {action['due']}"
        actions.append(action)
        sentences.append(f"{said}.")
    if draws.chance(0.5):
        remark = draws.one(_REMARKS).format(
            name=absent, long=int(draws.between(21, 30)) * 5, many=int(draws.between(6, 20))
        )
        sentences.insert(draws.one((2, len(sentences))), remark)
    if decisions:
        record["decisions"] = decisions
    return {"text": " ".join(sentences), "record": record | {"actions": actions}, "split": split}


# --- files ---

FILES: dict[str, tuple[Callable[[str, int, int], Iterator[Row]], int, int, int]] = {
    "reactions.jsonl": (reactions, 200, 100, 11),
    "recipes.jsonl": (recipes, 60, 30, 12),
    "meetings.jsonl": (meetings, 60, 30, 13),
}


def lines_of(name: str) -> str:
    """What the file holds."""
    make, train, held_out, seed = FILES[name]
    rows = [*make("train", train, seed), *make("heldout", held_out, seed + 1000)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    for file in FILES:
        (Path(sys.argv[1]) / file).write_text(lines_of(file), "utf-8")
