"""Numbers and quantities as texts and models write them."""

# ruff: noqa: RUF001 (characters that look alike are what is tested)

from __future__ import annotations

import time

import pytest

from alignpro.extract.units import find_unit, normalise, quantities_in, read_quantity


def base(text):
    quantity = read_quantity(text)
    return None if quantity is None else quantity.in_base()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1220 mg", 1.22),
        ("1,220 mg", 1.22),
        ("1.22 g", 1.22),
        ("0.00122 kg", 1.22),
        (".5 g", 0.5),
        ("1.2 x 10^-3 kg", 1.2),
        ("1.2 × 10⁻³ kg", 1.2),
        ("1.2·10^(-3) kg", 1.2),
        ("1.2e-3 kg", 1.2),
        ("12,345,678.5 g", 12345678.5),
        ("−5 °C", 268.15),
        ("–5 degC", 268.15),
        ("٢٥ °C", 298.15),  # Arabic-Indic digits
        ("２５ ℃", 298.15),  # full-width digits, and the sign of one character
        ("77 °F", 298.15),
        ("298.15 K", 298.15),
        ("½ cup", 0.5 * 236.5882365e-6),
        ("1½ h", 5400.0),
        ("1 1/2 h", 5400.0),
        ("3/4 h", 2700.0),
        ("-2 ½", -2.5),
        ("10⁻³ kg", 1.0),
        ("10^3 mg", 1.0),
        ("80%", 80.0),
        ("80 per cent", 80.0),
        ("80", 80.0),
        ("5 µg", 5e-6),
        ("5 μg", 5e-6),
        ("90 minutes", 5400.0),
        ("1.5 h", 5400.0),
        ("2 cups", 2 * 236.5882365e-6),
        ("10 mL", 1e-5),
    ],
)
def test_a_quantity_is_one_value_however_it_is_written(text, value):
    assert base(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "g", "about 5 g", "5 g of salt", "1,22 g", "1,2345", "1.2.3", "5 5", "five"),
        *("NaN", "nan", "inf", "-inf", "1e999", "0x10", "1_000", "C7", "--5", "5 gg", "½ ⁄ ½ g"),
        *("1/2", "3/4/2024 h", "100/50 mg", "5 g/mol", "5 cm^2", "10 °C/min", "1,5 x 10^3"),
        "9" * 500,
    ],
)
def test_what_is_no_quantity_is_none(text):
    assert read_quantity(text) is None


def test_a_range_keeps_both_ends():
    for text in ("20-25 °C", "20–25 degC", "20 to 25 °C", "20 °C to 25 °C"):
        quantity = read_quantity(text)
        assert (quantity.value, quantity.high, quantity.unit.name) == (20.0, 25.0, "degC"), text
    assert read_quantity("20 g").high is None


def test_numbers_of_a_text_have_their_units_and_words_have_none():
    text = "C7H6O2 (1.22 g, 9.99 mmol) in 20-25 mL at −5 °C; 1,2-dibromo, v2, 3rd, pH7, 1.2.3."
    found = [(q.value, q.unit and q.unit.name) for _, q in quantities_in(text)]
    assert found == [(1.22, "g"), (9.99, "mmol"), (20.0, "mL"), (25.0, "mL"), (-5.0, "degC")]
    assert [q.value for _, q in quantities_in("- 5 eggs\n- 6 apples")] == [5.0, 6.0]  # a list
    text = "1½-2 cups and 1/2 to 1 h, 1.22 g/9.99 mmol, 5 g/mol, 3/4/2024, 7 of 2/3"
    found = [(q.value, q.unit and q.unit.name) for _, q in quantities_in(text)]
    assert found[:6] == [
        (1.5, "cup"),
        (2, "cup"),
        (0.5, "h"),
        (1, "h"),
        (1.22, "g"),
        (9.99, "mmol"),
    ]
    assert found[6:] == [(x, None) for x in (5, 3, 4, 2024, 7, 2, 3)]
    text = "On 2024-05-12, or 12-05-2024, 1\u202f234.5 g; 2024-05 to 1-2-3"
    found = [(q.value, q.unit and q.unit.name) for _, q in quantities_in(text)]
    assert found[:6] == [(x, None) for x in (2024, 5, 12, 12, 5, 2024)]
    assert found[6:9] == [(1234.5, "g"), (2024, None), (5, None)]
    (span, _), *_ = quantities_in("it is  5   g")
    assert normalise("it is  5   g")[slice(*span)] == "5 g"


def test_units_are_a_closed_list():
    for name in ("g**2", "M", "parsec", "__class__", "", "kkg", "mg/mL"):
        assert find_unit(name) is None
    assert find_unit(" ml ").name == "mL" and find_unit("mg").dimension == find_unit("kg").dimension


def test_a_hostile_text_is_read_in_linear_time():
    started = time.process_time()
    for piece in (
        "1,",
        "1-",
        "1 x 10^",
        "9",
        "1.",
        "- ",
        "1 to ",
        "⁻",
        "5 degrees ",
        "1/2 ",
        "½",
        "10^",
    ):
        quantities_in(piece * 20_000)
    assert time.process_time() - started < 10
