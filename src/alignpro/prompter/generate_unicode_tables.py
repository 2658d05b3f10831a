"""Writes unicode_tables.h from the tokenizers package: its classes are of a newer Unicode than
those of Python's unicodedata, its normal forms of an older one, and both decide ids. How case is
folded, which guards ask, is Python's.

python src/alignpro/prompter/generate_unicode_tables.py > src/alignpro/prompter/unicode_tables.h
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

from tokenizers import Regex
from tokenizers.normalizers import NFC, NFD
from tokenizers.pre_tokenizers import Split

_EVERY = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]  # what UTF-8 can express
_HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic


def ranges(expression: str) -> list[tuple[int, int]]:
    """[first, last] of the characters that a class of a regular expression has."""
    without = Split(Regex(f"{expression}+"), "removed")
    found, begin = [], 0
    for _, (end, after) in without.pre_tokenize_str("".join(_EVERY)):
        if begin < end:
            found.append((ord(_EVERY[begin]), ord(_EVERY[end - 1])))
        begin = after
    return found


def normal(form: NFC | NFD, texts: Iterable[str]) -> list[str]:
    """Each text in the form; none holds a line end, which takes no part in any."""
    return str(form.normalize_str("\n".join(texts))).split("\n")


def combining_classes() -> list[tuple[int, int, int]]:
    """(first, last, class) of characters that are put in order behind another. Classes are counted
    from 1 in their order: which of two marks comes first is all that is asked of them."""
    # The first of each class, which every version of Unicode knows.
    one_of = {unicodedata.combining(c): c for c in reversed(_EVERY) if unicodedata.combining(c)}
    marks = [one_of[known] for known in sorted(one_of)]
    chars = [c for c in _EVERY if c != "\n"]
    stable = [c for c, d in zip(chars, normal(NFD(), chars), strict=True) if c == d]
    first = normal(NFD(), (marks[-1] + c for c in stable))
    second = normal(NFD(), (c + marks[0] for c in stable))
    found: list[tuple[int, int, int]] = []
    for char, a, b in zip(stable, first, second, strict=True):
        if a[0] != char and b[0] == char:
            continue  # marks behind it and before it stay where they are
        place = 1 + sum(t[0] != char for t in normal(NFD(), (char + m for m in marks)))
        if found and found[-1][1:] == (ord(char) - 1, place):
            found[-1] = (found[-1][0], ord(char), place)
        else:
            found.append((ord(char), ord(char), place))
    return found


def decompositions() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(composed, first, second) of pairs that NFC joins, and (character, 4 of what it stands for,
    0 where there are fewer) of those that it takes apart for good."""
    chars = [c for c in _EVERY if c != "\n" and ord(c) not in _HANGUL]
    apart, together = normal(NFD(), chars), normal(NFC(), chars)
    changed = [row for row in zip(chars, apart, together, strict=True) if row[0] != row[1]]
    pairs, others = [], []
    for char, parts, joined in changed:
        if joined == char:
            (first,) = NFC().normalize_str(parts[:-1])
            pairs.append((ord(char), ord(first), ord(parts[-1])))
        else:
            others.append((ord(char), *map(ord, parts), *[0] * (4 - len(parts))))
    return pairs, others


def folds() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(first, last, step, shift) of characters for which str.casefold has one other, and
    (character, 3 of what it has, 0 where there are fewer). Of Unicode 3.2, on which every version
    of Python agrees."""
    known = (c for c in _EVERY if unicodedata.ucd_3_2_0.category(c) != "Cn")
    ranges, long = [], []
    for char in known:
        code, folded = ord(char), [ord(c) for c in char.casefold()]
        shift = folded[0] - code
        if len(folded) > 1:
            long.append((code, *folded, *[0] * (3 - len(folded))))
        elif shift != 0:
            first, last, step, same = ranges[-1] if ranges else (0, -9, 0, 0)
            if shift == same and code - last in ((1, 2) if first == last else (step,)):
                ranges[-1] = (first, code, code - last, shift)
            else:
                ranges.append((code, code, 1, shift))
    return ranges, long


def array(kind: str, name: str, rows: Sequence[tuple[int, ...]]) -> str:
    """A C++ array of rows of numbers."""
    listed = ", ".join("{" + ",".join(f"{i:#x}" for i in row) + "}" for row in rows)
    lines = textwrap.fill(listed, 96, initial_indent="    ", subsequent_indent="    ")
    return f"inline constexpr {kind} {name}[] = {{\n{lines}}};\n"


def header() -> str:
    """The file."""
    pairs, others = decompositions()
    ranges_of_folds, long_folds = folds()
    return (
        "#pragma once\n\n"
        "// Written by generate_unicode_tables.py, which says what the rows are.\n"
        "// Long because it is data.\n\n"
        "namespace alignpro::prompter {\n\n"
        "struct CodeRange {\n  char32_t first, last;\n};\n"
        "struct ClassRange {\n  char32_t first, last;\n  int combining_class;\n};\n"
        "struct CodePair {\n  char32_t composed, first, second;\n};\n"
        "struct Decomposition {\n  char32_t code, parts[4];\n};\n"
        "struct FoldRange {\n  char32_t first, last, step;\n  int shift;\n};\n"
        "struct LongFold {\n  char32_t code, parts[3];\n};\n\n// clang-format off\n"
        + array("CodeRange", "kLetters", ranges(r"\p{L}"))
        + array("CodeRange", "kUppercase", ranges(r"[\p{Lu}\p{Lt}]"))
        + array("CodeRange", "kLowercase", ranges(r"\p{Ll}"))
        + array("CodeRange", "kMarks", ranges(r"\p{M}"))
        + array("CodeRange", "kNumbers", ranges(r"\p{N}"))
        + array("CodeRange", "kDigits", ranges(r"\p{Nd}"))
        + array("ClassRange", "kClasses", combining_classes())
        + array("CodePair", "kPairs", pairs)
        + array("Decomposition", "kDecompositions", others)
        + array("FoldRange", "kFolds", ranges_of_folds)
        + array("LongFold", "kLongFolds", long_folds)
        + "// clang-format on\n\n}  // namespace alignpro::prompter\n"
    )


if __name__ == "__main__":
    print(header(), end="")
