"""The house rules' prompts, warm start and texts: balance, and no leak across the splits."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from importlib.resources import files

import pytest

from alignpro.config import QUICKSTART, QuickstartConfig, load_yaml
from alignpro.data import load_pairs, load_prompts
from alignpro.rewards.house_rules import KINDS, HouseRulesReward
from data.test_package_data import CONTROL_TEXT, TOO_ALIKE, content_words

# Words by which a prompt says how to answer: two that share only these are not alike.
FORM_WORDS = {
    "two", "three", "thirty", "sentence", "word", "least", "more", "fewer", "paragraph", "list",
    "bullet", "prose", "story", "tale", "letter", "start", "starting", "open", "opening",
    "begin", "beginning", "first", "dear", "say", "talk", "tell", "give", "complete",
    "finish", "long", "email", "end", "text", "please", "few", "use", "using",
}  # fmt: skip

ARMS = load_yaml(QuickstartConfig, QUICKSTART).evaluate
RULES = ARMS.labelled.instructions


@pytest.fixture(scope="module")
def prompts():
    return load_prompts("house_rules")


@pytest.fixture(scope="module")
def pairs():
    return load_pairs("house_rules_warm_start")


def topic(prompt: str) -> frozenset[str]:
    """Content words, without how to answer: quoted is what a response is to begin with."""
    return content_words(re.sub('"[^"]*"', "", prompt)) - FORM_WORDS


def test_equal_shares_of_the_kinds_in_every_split(prompts):
    shares = Counter((row.columns["split"], row.columns["kind"]) for row in prompts)
    sizes = {"train": 40, "validation": 8, "heldout": 16, "unseen": 10}
    assert shares == {(split, kind): n for split, n in sizes.items() for kind in KINDS}


def test_a_requirement_is_there_exactly_where_a_prompt_says_how_to_answer(prompts):
    for row in prompts:
        assert ("requirement" in row.columns) == (row.columns["kind"] == "as_asked"), row
        assert row.columns.keys() <= {"kind", "split", "requirement"}
    # The reward accepts all of them.
    columns = {n: [row.columns.get(n) for row in prompts] for n in ("kind", "requirement")}
    blank = [""] * len(prompts)
    assert HouseRulesReward()([row.prompt for row in prompts], blank, blank, **columns) == (
        [0.0] * len(prompts)
    )


def test_no_two_prompts_are_alike(prompts):
    for one, other in itertools.combinations([row.prompt for row in prompts], 2):
        a, b = topic(one), topic(other)
        assert one.casefold() != other.casefold()
        assert len(a & b) / max(1, len(a | b)) < TOO_ALIKE, (one, other)


def test_no_topic_returns_in_the_same_form(prompts):
    """Prompts of a kind may share one word ("garden"), never all that one of them is about."""
    by_kind = defaultdict(list)
    for row in prompts:
        by_kind[row.columns["kind"]].append(row)
    for rows in by_kind.values():
        for one, other in itertools.combinations(rows, 2):
            a, b = topic(one.prompt), topic(other.prompt)
            assert a and b and not (a <= b or b <= a), (one.prompt, other.prompt)
    about = [row.columns["requirement"]["about"].casefold() for row in by_kind["as_asked"]]
    assert len(set(about)) == len(about)


def test_no_wording_gives_a_kind_away(prompts):
    """A kind has no opening of its own that most of its prompts share."""
    for kind in KINDS:
        openings = Counter(
            tuple(row.prompt.split()[:2]) for row in prompts if row.columns["kind"] == kind
        )
        assert openings.most_common(1)[0][1] <= 32, (kind, openings.most_common(1))
        assert len(openings) >= 15, kind


def test_prompts_are_one_line(prompts):
    for row in prompts:
        text = row.prompt
        assert 3 <= len(text.split()) <= 25, text
        assert text == text.strip() and text[0].isupper(), text
        assert text.isprintable() and text.isascii() and not CONTROL_TEXT.search(text), text


def test_the_warm_start_says_nothing_of_the_kinds(prompts, pairs):
    """Every kind's prompts meet every rule equally often: no information."""
    kind_of = {r.prompt: r.columns["kind"] for r in prompts if r.columns["split"] == "train"}
    tables = {kind: Counter() for kind in KINDS}
    for pair in pairs:
        tables[kind_of[pair.prompt]][pair.instruction] += 1
    first, *others = tables.values()
    assert all(table == first for table in others)
    assert first == dict.fromkeys(RULES.values(), 20)


def test_every_training_prompt_is_warmed_up_three_times_and_no_other(prompts, pairs):
    train = {row.prompt for row in prompts if row.columns["split"] == "train"}
    assert Counter(pair.prompt for pair in pairs) == dict.fromkeys(train, 3)
    assert len({pair for pair in pairs if pair.instruction}) == 600


def test_the_rules_name_every_kind_and_one_is_to_leave_alone():
    assert RULES.keys() == KINDS.keys()
    assert RULES["as_asked"] == ""
    for text in (*RULES.values(), ARMS.policy_text):
        assert text.isascii() and text == text.strip() and not re.search(r"\s\s|\n", text)


def test_the_module_is_in_the_package():
    for name in ("house_rules.jsonl", "house_rules_warm_start.jsonl", "quickstart.yaml"):
        assert (files("alignpro") / "data" / name).is_file()
