"""Numbers and quantities as texts write them, and the units that they may have.

The units are a closed list, each spelling of which means one thing. A general library (pint) reads
expressions, thousands of prefixed units and "C" as coulomb: what a model writes is no place for
that, and it would be three packages more in every installation.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

# Powers of mass (g), amount (mol), length (m), time (s), temperature (K).
Dimension = tuple[int, int, int, int, int]
PLAIN: Dimension = (0, 0, 0, 0, 0)
_MASS, _AMOUNT, _VOLUME = (1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 3, 0, 0)
_LENGTH, _TIME, TEMPERATURE = (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)
_KELVIN_OF_CELSIUS = 273.15


class Unit(NamedTuple):
    """A value of ``x`` in this unit is ``x * scale + zero`` in the base units of the dimension."""

    name: str
    dimension: Dimension
    scale: float
    zero: float = 0.0

    def to_base(self, value: float) -> float:
        return value * self.scale + self.zero

    def of_base(self, value: float) -> float:
        return (value - self.zero) / self.scale


# The first spelling is the unit's name. Volumes of the kitchen are those of the United States.
_TABLE: tuple[tuple[str, Dimension, float, float], ...] = (
    ("g gram grams gramme grammes gr", _MASS, 1.0, 0.0),
    ("kg kilogram kilograms kilo kilos", _MASS, 1e3, 0.0),
    ("mg milligram milligrams", _MASS, 1e-3, 0.0),
    ("ug µg microgram micrograms mcg", _MASS, 1e-6, 0.0),
    ("t tonne tonnes", _MASS, 1e6, 0.0),
    ("oz ounce ounces", _MASS, 28.349523125, 0.0),
    ("lb lbs pound pounds", _MASS, 453.59237, 0.0),
    ("mol mole moles mols", _AMOUNT, 1.0, 0.0),
    ("mmol millimole millimoles mmols", _AMOUNT, 1e-3, 0.0),
    ("umol µmol micromole micromoles", _AMOUNT, 1e-6, 0.0),
    ("kmol kilomole kilomoles", _AMOUNT, 1e3, 0.0),
    ("L l liter liters litre litres", _VOLUME, 1e-3, 0.0),
    ("dL dl deciliter deciliters decilitre decilitres", _VOLUME, 1e-4, 0.0),
    ("cL cl centiliter centiliters centilitre centilitres", _VOLUME, 1e-5, 0.0),
    ("mL ml milliliter milliliters millilitre millilitres cc cm3", _VOLUME, 1e-6, 0.0),
    ("uL µL ul µl microliter microliters microlitre microlitres", _VOLUME, 1e-9, 0.0),
    ("m3", _VOLUME, 1.0, 0.0),
    ("tsp teaspoon teaspoons", _VOLUME, 4.92892159375e-6, 0.0),
    ("tbsp tablespoon tablespoons", _VOLUME, 14.78676478125e-6, 0.0),
    ("cup cups", _VOLUME, 236.5882365e-6, 0.0),
    ("m meter meters metre metres", _LENGTH, 1.0, 0.0),
    ("km kilometer kilometers kilometre kilometres", _LENGTH, 1e3, 0.0),
    ("cm centimeter centimeters centimetre centimetres", _LENGTH, 1e-2, 0.0),
    ("mm millimeter millimeters millimetre millimetres", _LENGTH, 1e-3, 0.0),
    ("um µm micrometer micrometers micrometre micrometres", _LENGTH, 1e-6, 0.0),
    ("nm nanometer nanometers nanometre nanometres", _LENGTH, 1e-9, 0.0),
    ("in inch inches", _LENGTH, 0.0254, 0.0),
    ("ft foot feet", _LENGTH, 0.3048, 0.0),
    ("s sec secs second seconds", _TIME, 1.0, 0.0),
    ("ms millisecond milliseconds", _TIME, 1e-3, 0.0),
    ("min mins minute minutes", _TIME, 60.0, 0.0),
    ("h hr hrs hour hours", _TIME, 3600.0, 0.0),
    ("d day days", _TIME, 86400.0, 0.0),
    ("week weeks", _TIME, 604800.0, 0.0),
    ("K kelvin kelvins", TEMPERATURE, 1.0, 0.0),
    ("degC °C ºC C celsius Celsius", TEMPERATURE, 1.0, _KELVIN_OF_CELSIUS),
    ("degF °F ºF F fahrenheit Fahrenheit", TEMPERATURE, 5 / 9, _KELVIN_OF_CELSIUS - 160 / 9),
    ("% percent pct", PLAIN, 1.0, 0.0),  # in points: 80% is 80
)
# NFKC is what texts are read by, so the spellings are, too (the micro sign becomes a Greek mu).
_UNITS = {
    unicodedata.normalize("NFKC", spelling): Unit(spellings.split()[0], dimension, scale, zero)
    for spellings, dimension, scale, zero in _TABLE
    for spelling in spellings.split()
}
_UNITS |= {
    "degrees Celsius": _UNITS["degC"],
    "degrees Fahrenheit": _UNITS["degF"],
    "per cent": _UNITS["%"],
}
UNIT_NAMES = tuple(spellings.split()[0] for spellings, *_ in _TABLE)
PERCENT = "%"
_DIMENSION_NAMES = {
    PLAIN: "a plain number",
    _MASS: "a mass",
    _AMOUNT: "an amount of substance",
    _VOLUME: "a volume",
    _LENGTH: "a length",
    _TIME: "a time",
    TEMPERATURE: "a temperature",
}

_LONGEST = 400  # characters of what is read as one value; no float is longer
# "1,220", "1.5", ".5", "1e-3", "1.2 x 10^-3", "10^3"; commas part groups of three digits alone.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_POWER = r"10\s?\^\s?\(?(?P<power>[+-]?\d+)\)?"
_TIMES_POWER = rf"(?:(?P<mantissa>{_DIGITS})\s?[x*·]\s?|(?<![x*·])(?<![x*·]\s)){_POWER}"
_NUMBER = rf"{_TIMES_POWER}|(?:{_DIGITS})(?:[eE][+-]?\d+)?"
_UNIT = (
    rf"\s?(?P<unit>{'|'.join(re.escape(u) for u in sorted(_UNITS, key=len, reverse=True))})"
    r"(?![^\W_]|\^|[/·][^\W\d_])"  # "g/mol" is another
)
_UNIT_AT = re.compile(_UNIT)
_RANGE = r"\s?(?:-|to|\.\.)\s?(?=[\d.])"
_RANGE_SIGN = re.compile(_RANGE)
# "½", "1 1/2" and "1/2 cup"; not 1/2, which may be one of two, nor a date.
_FRACTION = (
    r"(?<![\d.,/])(?:(?P<whole>\d{1,3})\s)?(?P<top>\d)(?:\u2044|(?P<slash>/))"
    rf"(?P<bottom>[2-9]|1[06])(?![.,]?\d|[/\u2044])(?(whole)|(?(slash)(?={_UNIT}|{_RANGE})))"
).replace("?P<unit>", "?:")
_SIGNED = re.compile(rf"(?P<sign>[+-]?)(?:{_FRACTION}|(?P<number>{_NUMBER}))")
_GOES_ON = re.compile(r"[.,]?\d|[^\W\d_]")  # behind a number: it is none, or has a unit
_WORD = re.compile(r"[\w.,]*")
_DATE = re.compile(r"(?:\d{4}-\d{2}-\d{2}|\d{2}-\d{2}-\d{4})(?![\d-])")  # three numbers, no range
# As SI and many languages part thousands; a plain space may be any.
_THIN_SPACE = re.compile(r"(?<=\d)(?<!\d{4})[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_RAISED = re.compile(r"(?<=\d)[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_FRACTION_BEGINS = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"))
_TIMES = str.maketrans({"\u00d7": "x", "\u22c5": "·", "\u2219": "·", "X": "x"})


@dataclass(frozen=True)
class Quantity:
    """A number as it is written, with its unit; ``high``: of a range, its other end."""

    value: float
    unit: Unit | None = None
    high: float | None = None

    def in_base(self, default: Unit | None = None) -> float:
        """In the base units of its dimension; ``default`` is the unit of a bare number."""
        unit = self.unit or default
        return self.value if unit is None else unit.to_base(self.value)


def normalise(text: str) -> str:
    """Text by which texts are compared and numbers are read: NFKC, every dash a hyphen, every digit
    an ASCII one, white space single, thin spaces between thousands a comma; powers and fractions
    are kept apart (10⁻³ becomes 10^-3, and 1½ two words)."""
    text = _RAISED.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = _THIN_SPACE.sub(",", _FRACTION_BEGINS.sub(" ", text))
    text = unicodedata.normalize("NFKC", text.translate(_DASHES)).translate(_DASHES)
    text = "".join(
        str(unicodedata.decimal(c)) if not c.isascii() and c.isdecimal() else c for c in text
    )
    return " ".join(text.split())


def comparable(value: Any) -> Any:
    """Texts without case and spelling of their characters; numbers as they are."""
    return normalise(value).casefold() if isinstance(value, str) else value


def find_unit(spelling: str) -> Unit | None:
    """The unit of a spelling, or None."""
    return _UNITS.get(unicodedata.normalize("NFKC", spelling.strip()))


def dimension_name(dimension: Dimension) -> str:
    """ "a mass", or the powers of the base units."""
    if dimension in _DIMENSION_NAMES:
        return _DIMENSION_NAMES[dimension]
    bases = zip(("g", "mol", "m", "s", "K"), dimension, strict=True)
    return " ".join(base if power == 1 else f"{base}^{power}" for base, power in bases if power)


def read_quantity(text: str) -> Quantity | None:
    """A whole text as a number, with its unit where it has one; None where it is no such thing.

    "1,220 mg", "1.2 x 10^-3", "-5 °C" and "20-25 degC" (a range) are; "1,22" (whose comma could
    mean either), "about 5" and what no float holds are not.
    """
    if len(text) > _LONGEST:
        return None
    line = normalise(text)
    found = next(_quantities(line), None)
    return found[1] if found is not None and found[0] == (0, len(line)) else None


def quantities_in(source: str) -> list[tuple[tuple[int, int], Quantity]]:
    """Every number of a text with its unit, in order, and its span in what `normalise` makes of it.
    The ends of a range are two."""
    found = []
    for span, quantity in _quantities(normalise(source)):
        found.append((span, Quantity(quantity.value, quantity.unit)))
        if quantity.high is not None:
            found.append((span, Quantity(quantity.high, quantity.unit)))
    return found


def _quantities(line: str) -> Iterator[tuple[tuple[int, int], Quantity]]:
    """Spans and quantities of a normalised line."""
    line = line.translate(_TIMES)
    at = 0
    while (match := _SIGNED.search(line, at)) is not None:
        begin, at = match.start(), match.end()
        # The digits of a word ("C7", "v2", "A-12") are no number, and neither is "1,22" or "1.2.3".
        # They are left whole, so that their second half is not taken for one.
        before = line[begin - 1 : begin]
        word = _GOES_ON.match(line, at)
        if before.isalnum() or before == "_":
            at = _end_of_word(line, at)
            continue
        date = _DATE.match(line, begin)
        if date is not None:
            for part in re.finditer(r"\d+", date[0]):
                yield (begin + part.start(), begin + part.end()), Quantity(float(part[0]))
            at = date.end()
            continue
        value = _value(match)
        unit = _UNIT_AT.match(line, at)
        if word is not None and unit is None:
            at = _end_of_word(line, at)
            continue
        high = None
        dash = _RANGE_SIGN.match(line, unit.end() if unit else at)
        other = _SIGNED.match(line, dash.end()) if dash else None
        if other is not None and not other["sign"]:
            second = _UNIT_AT.match(line, other.end())
            ended = _GOES_ON.match(line, other.end()) is None
            if second is not None or (unit is None and ended):
                high, at = _value(other), other.end()
                unit = second
        if unit is not None:
            at = unit.end()
        if math.isfinite(value) and (high is None or math.isfinite(high)):
            name = None if unit is None else _UNITS[unit["unit"]]
            yield (begin, at), Quantity(value, name, high)


def _end_of_word(line: str, at: int) -> int:
    match = _WORD.match(line, at)
    return at if match is None else match.end()


def _value(match: re.Match[str]) -> float:
    if match["top"] is not None:
        value = int(match["whole"] or 0) + int(match["top"]) / int(match["bottom"])
    elif match["power"] is not None:
        value = float(f"{(match['mantissa'] or '1').replace(',', '')}e{match['power']}")
    else:  # an exponent that no float holds gives inf
        value = float(match["number"].replace(",", ""))
    return -value if match["sign"] == "-" else value
