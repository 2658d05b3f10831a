"""The instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911) that a program can check.

Rewards for `alignpro`, by the columns of IFEval's own file: ``instruction_id_list`` names a row's
instructions and ``kwargs`` has the arguments of each. A check is strict: the response is judged as
it is, and an empty one follows nothing.

The original splits sentences and words with NLTK's models; here they are told apart by punctuation.
Languages are told by the package langdetect, as there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# A full stop behind these ends no sentence, nor does one between digits or behind an initial.
_ABBREVIATIONS = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|inc|ltd|co|no|e\.g|i\.e|a\.m|p\.m|ph\.d|u\.s|[a-z])\.$",
    re.IGNORECASE,
)


def all_followed(
    responses: Sequence[str],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any]]],
) -> list[float]:
    """1 for a response that follows every instruction of its prompt, else 0: "prompt-level"."""
    rows = zip(responses, instruction_id_list, kwargs, strict=True)
    return [float(all(_followed(*row))) for row in rows]


def share_followed(
    responses: Sequence[str],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any]]],
) -> list[float]:
    """The share of its prompt's instructions that a response follows."""
    rows = zip(responses, instruction_id_list, kwargs, strict=True)
    return [sum(followed) / len(followed) for followed in (_followed(*row) for row in rows)]


def follows(response: str, instruction: str, **arguments: Any) -> bool:
    """Whether a response follows one instruction, "group:name". Raises ValueError for no such."""
    if instruction not in CHECKS:
        raise ValueError(f"expected one of {', '.join(CHECKS)}, got {instruction!r}")
    return bool(response.strip()) and CHECKS[instruction](response, **arguments)


def _followed(
    response: str, instructions: Sequence[str], kwargs: Sequence[Mapping[str, Any]]
) -> list[bool]:
    # Readers that give every row the same keys fill up with null.
    given = [{k: v for k, v in own.items() if v is not None} for own in kwargs]
    return [
        follows(response, instruction, **own)
        for instruction, own in zip(instructions, given, strict=True)
    ]


def _holds(count: int, relation: str, number: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"expected at least or less than, got {relation!r}")
    return count >= number if relation == "at least" else count < number


# Keywords


def keywords(text: str, keywords: Sequence[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


# Language and case


def language(text: str, language: str) -> bool:
    try:
        import langdetect
    except ImportError as error:
        raise ImportError("IFEval's languages need langdetect: pip install langdetect") from error
    langdetect.DetectorFactory.seed = 0  # it draws
    try:
        return bool(langdetect.detect(text) == language)
    except langdetect.LangDetectException:  # nothing to tell it by: the original lets it pass
        return True


def capital(text: str) -> bool:
    return text.isupper() and language(text, "en")


def lowercase(text: str) -> bool:
    return text.islower() and language(text, "en")


def capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"\w+(?:-\w+)*", text)
    return _holds(sum(word.isupper() for word in words), capital_relation, capital_frequency)


# Length


def words(text: str, num_words: int, relation: str) -> bool:
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


def sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(count_sentences(text), relation, num_sentences)


def count_sentences(text: str) -> int:
    """Runs of text that end in . ! or ?, a blank line, or the end."""
    count = 0
    for block in re.split(r"\n\s*\n", text):
        begin = 0
        for end in re.finditer(r"[.!?]+[\"')\]]*(?=\s|$)", block):
            ended = block[begin : end.end()].strip()
            if end[0] == "." and _ABBREVIATIONS.search(ended) and end.end() < len(block):
                continue
            count += bool(re.search(r"\w", ended))
            begin = end.end()
        count += bool(re.search(r"\w", block[begin:]))
    return count


def paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are divided by ***."""
    parts = _divided(re.split(r"\s?\*\*\*\s?", text))
    return parts is not None and len(parts) == num_paragraphs


def paragraph_first_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Paragraphs are divided by blank lines."""
    parts = text.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs:
        return False
    if nth_paragraph > num_paragraphs or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _divided(parts: list[str]) -> list[str] | None:
    """The parts between dividers; the first and the last may be empty, others may not."""
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part for part in parts if part.strip()]


# Content and form


def placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    forms = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    form = forms.get(postscript_marker, postscript_marker.lower())
    return re.search(rf"\s*{form}.*$", text.lower(), re.MULTILINE) is not None


def bullets(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(text: str) -> bool:
    return any(answer in text for answer in ANSWERS)


def highlights(text: str, num_highlights: int) -> bool:
    single = [part.strip("*") for part in re.findall(r"\*[^\n*]*\*", text)]
    double = [part[2:-2] for part in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(part.strip()) for part in single + double) >= num_highlights


def sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{section_spliter}\s?\d+\s?", text)) >= num_sections


def json_format(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def title(text: str) -> bool:
    found = re.findall(r"<<[^\n]+>>", text)
    return any(one.lstrip("<").rstrip(">").strip() for one in found)


def two_responses(text: str) -> bool:
    parts = _divided(text.split("******"))
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_phrase(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def no_comma(text: str) -> bool:
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords,
    "keywords:forbidden_words": forbidden_words,
    "keywords:frequency": keyword_frequency,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": language,
    "length_constraints:number_sentences": sentences,
    "length_constraints:number_paragraphs": paragraphs,
    "length_constraints:number_words": words,
    "length_constraints:nth_paragraph_first_word": paragraph_first_word,
    "detectable_content:number_placeholders": placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": highlights,
    "detectable_format:multiple_sections": sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_phrase,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": capital,
    "change_case:english_lowercase": lowercase,
    "punctuation:no_comma": no_comma,
}
