"""Molar masses of chemical formulas."""

from __future__ import annotations

import re
import unicodedata

# g/mol, the abridged standard atomic weights (IUPAC 2021).
ATOMIC_MASSES = {
    "H": 1.008, "He": 4.0026, "Li": 6.94, "Be": 9.0122, "B": 10.81, "C": 12.011, "N": 14.007,
    "O": 15.999, "F": 18.998, "Ne": 20.180, "Na": 22.990, "Mg": 24.305, "Al": 26.982, "Si": 28.085,
    "P": 30.974, "S": 32.06, "Cl": 35.45, "Ar": 39.95, "K": 39.098, "Ca": 40.078, "Ti": 47.867,
    "V": 50.942, "Cr": 51.996, "Mn": 54.938, "Fe": 55.845, "Co": 58.933, "Ni": 58.693, "Cu": 63.546,
    "Zn": 65.38, "Ga": 69.723, "Ge": 72.630, "As": 74.922, "Se": 78.971, "Br": 79.904, "Rb": 85.468,
    "Sr": 87.62, "Y": 88.906, "Zr": 91.224, "Mo": 95.95, "Ru": 101.07, "Rh": 102.91, "Pd": 106.42,
    "Ag": 107.87, "Cd": 112.41, "In": 114.82, "Sn": 118.71, "Sb": 121.76, "Te": 127.60, "I": 126.90,
    "Cs": 132.91, "Ba": 137.33, "La": 138.91, "Ce": 140.12, "W": 183.84, "Os": 190.23, "Ir": 192.22,
    "Pt": 195.08, "Au": 196.97, "Hg": 200.59, "Pb": 207.2, "Bi": 208.98,
}  # fmt: skip
_PIECE = re.compile(r"([A-Z][a-z]?)(\d{0,4})|([(\[])|([)\]])(\d{0,4})", re.ASCII)
_PAIRS = {")": "(", "]": "["}
_LONGEST = 200


def plain_formula(text: str) -> str:
    """A formula with its subscripts as digits and its dots as "·", by which formulas compare."""
    text = unicodedata.normalize("NFKC", text).strip()
    return re.sub(r"\s*[.*\u2219\u22c5\u2022]\s*", "\u00b7", text)


def molar_mass(formula: str) -> float:
    """g/mol of a formula such as "C7H6O2", "Ca(OH)2" or "CuSO4·5H2O".

    Raises ValueError, one line that says what is no formula: an unknown element, brackets that do
    not match, a count of 0, charges and isotopes.
    """
    if len(formula) > _LONGEST:
        raise ValueError(f"expected a formula, got {len(formula)} characters")
    total = 0.0
    for part in plain_formula(formula).split("\u00b7"):
        match = re.fullmatch(r"(\d{0,3})(.*)", part, re.S | re.ASCII)
        assert match is not None
        total += _count(match[1], formula) * _mass(match[2], formula)
    return total


def _mass(part: str, formula: str) -> float:
    open_groups: list[tuple[str, float]] = []  # the bracket, and the mass before it
    mass, at = 0.0, 0
    while at < len(part):
        piece = _PIECE.match(part, at)
        if piece is None:
            raise ValueError(f"{formula!r} is no formula: {part[at]!r} is not expected there")
        at = piece.end()
        element, count, opening, closing, group_count = piece.groups()
        if element is not None:
            if element not in ATOMIC_MASSES:
                raise ValueError(f"{formula!r} is no formula: there is no element {element!r}")
            mass += ATOMIC_MASSES[element] * _count(count, formula)
        elif opening is not None:
            open_groups.append((opening, mass))
            mass = 0.0
        else:
            if not open_groups or open_groups[-1][0] != _PAIRS[closing] or mass == 0:
                raise ValueError(f"{formula!r} is no formula: {closing!r} closes nothing")
            mass = open_groups.pop()[1] + mass * _count(group_count, formula)
    if open_groups or mass == 0:
        what = "a bracket is not closed" if open_groups else "a part is empty"
        raise ValueError(f"{formula!r} is no formula: {what}")
    return mass


def _count(digits: str, formula: str) -> int:
    if digits and int(digits) == 0:
        raise ValueError(f"{formula!r} is no formula: a count is 0")
    return int(digits) if digits else 1
