"""Writes unicode_ranges.h: the letters and numbers of the tokenizers package, which the Python side
cuts words by, and which knows a newer Unicode than Python's unicodedata does.

python src/alignpro/prompter/generate_unicode_ranges.py > src/alignpro/prompter/unicode_ranges.h
"""

from __future__ import annotations

import textwrap

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

_EVERY = [*range(0xD800), *range(0xE000, 0x110000)]  # what UTF-8 can express


def ranges(expression: str) -> list[tuple[int, int]]:
    """[first, last] of the characters that a class of a regular expression has."""
    without = Split(Regex(f"{expression}+"), "removed")
    found, begin = [], 0
    for _, (end, after) in without.pre_tokenize_str("".join(map(chr, _EVERY))):
        if begin < end:
            found.append((_EVERY[begin], _EVERY[end - 1]))
        begin = after
    return found


def array(name: str, expression: str) -> str:
    """A C++ array of its ranges."""
    listed = ", ".join(f"{{0x{first:x},0x{last:x}}}" for first, last in ranges(expression))
    lines = textwrap.fill(listed, 96, initial_indent="    ", subsequent_indent="    ")
    return f"inline constexpr CodeRange {name}[] = {{  // {expression}\n{lines}}};\n"


def header() -> str:
    """The file."""
    return (
        "#pragma once\n\n// Written by generate_unicode_ranges.py.\n\n"
        "namespace alignpro::prompter {\n\n"
        "struct CodeRange {\n  char32_t first, last;\n};\n\n// clang-format off\n"
        + array("kLetters", r"\p{L}")
        + array("kNumbers", r"\p{N}")
        + "// clang-format on\n\n}  // namespace alignpro::prompter\n"
    )


if __name__ == "__main__":
    print(header(), end="")
