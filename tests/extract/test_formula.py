"""Molar masses."""

# ruff: noqa: RUF001 (characters that look alike are what is tested)

from __future__ import annotations

import pytest

from alignpro.extract.formula import ATOMIC_MASSES, molar_mass


@pytest.mark.parametrize(
    ("formula", "mass"),
    [
        ("C7H6O2", 122.123),  # benzoic acid
        ("C9H10O2", 150.177),  # ethyl benzoate
        ("H2O", 18.015),
        ("Ca(OH)2", 74.092),
        ("CuSO4·5H2O", 249.677),
        ("CuSO4.5H2O", 249.677),
        ("CuSO4 • 5 H2O".replace(" H", "H"), 249.677),
        ("[Fe(C5H5)2]", 186.035),
        ("C₇H₆O₂", 122.123),
        ("NaCl", 58.44),
        ("Co", 58.933),
        ("CO", 28.010),
        ("Al2(SO4)3", 342.132),
    ],
)
def test_masses_are_sums_of_atomic_masses(formula, mass):
    assert molar_mass(formula) == pytest.approx(mass, abs=1e-3)


def test_the_oracle_of_a_weighed_amount():
    assert 1.22 / molar_mass("C7H6O2") * 1000 == pytest.approx(9.98993, abs=1e-5)
    assert 1.20 / molar_mass("C9H10O2") * 1000 == pytest.approx(7.99057, abs=1e-5)
    assert pytest.approx(79.986, abs=1e-3) == 100 * (1.20 / 150.177) / (1.22 / 122.123)
    assert len(ATOMIC_MASSES) >= 25


@pytest.mark.parametrize(
    "formula",
    [
        *("", "x", "Xx", "C7H6O2x", "(", ")", "()", "(CH3", "CH3)", "(CH3]", "C0", "Na+", "2", "·"),
        *("H2O·", "c7h6o2", "C 7", "C" * 300, "(" * 150, "C" + "9" * 9, "benzoic acid", "C٧"),
    ],
)
def test_what_is_no_formula_is_said_in_one_line(formula):
    with pytest.raises(ValueError, match="formula") as raised:
        molar_mass(formula)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
