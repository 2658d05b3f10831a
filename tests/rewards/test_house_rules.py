"""The house rules' checks: what follows a rule earns, what only looks like it does not."""

from __future__ import annotations

import pytest

from alignpro.rewards import RewardError, build_reward, score_checked, score_components
from alignpro.rewards.house_rules import KINDS, HouseRulesReward

PAN = "How do I clean a cast iron pan?"
TOMATO = "Is a tomato a fruit?"
RICE = "What could I cook with leftover rice?"
VOLCANO = "What is a volcano?"
CAT = "My cat died last night."

STEPS = "1. Rinse the iron pan.\n2. Scrub it with salt.\n3. Dry it and rub in oil."
LIST = "- Fried rice\n- Stuffed peppers\n- Rice pudding with leftover milk"
REASON = "Yes, a tomato is a fruit because it carries the seeds."
SENTENCE = "A volcano is an opening that lets molten rock escape."
COMFORT = "I'm so sorry to hear that your cat died. You are not alone tonight."


def parts(prompt: str, kind: str, response: str, requirement=None) -> tuple[float, float]:
    columns = {"kind": [kind], "requirement": [requirement]}
    scores, found = score_components(HouseRulesReward(), [prompt], ["any"], [response], columns)
    assert set(found) == {"format", "topic"}
    assert scores == [found["format"][0] * found["topic"][0]]
    assert 0 <= found["format"][0] <= 1 and 0 <= found["topic"][0] <= 1
    return found["format"][0], found["topic"][0]


def score(*row, **columns) -> float:
    form, topic = parts(*row, **columns)
    return form * topic


@pytest.mark.parametrize(
    ("prompt", "kind", "response"),
    [
        (PAN, "how_to", STEPS),
        (PAN, "how_to", "To clean the iron pan:\n\n" + STEPS.replace(".\n", ".\n\n")),
        (
            PAN,
            "how_to",
            STEPS.replace("1.", "Step 1:").replace("2.", "Step 2:").replace("3.", "Step 3:"),
        ),
        (PAN, "how_to", STEPS.replace("1. ", "1) ").replace("2. ", "2) ").replace("3. ", "3) ")),
        (
            PAN,
            "how_to",
            "1. **Rinse** the iron pan\n2. **Scrub** it with salt\n3. Dry it with care",
        ),
        (TOMATO, "yes_no", REASON),
        (TOMATO, "yes_no", "**No**, cooks treat a tomato as a vegetable."),
        (TOMATO, "yes_no", "Yes. It grows from the flower, so a tomato is botanically a fruit."),
        (RICE, "ideas", LIST),
        (RICE, "ideas", "Leftover rice makes:\n* Soup\n* Salad\n* Croquettes\n* Pudding"),
        (RICE, "ideas", "1. Leftover rice salad.\n2. Arancini.\n3. Congee with ginger."),
        (VOLCANO, "fact", SENTENCE),
        (VOLCANO, "fact", "A volcano, e.g. Mt. Etna, is a vent 3.5 km high that spews lava."),
        (CAT, "trouble", COMFORT),
        (CAT, "trouble", COMFORT.replace("'", "\u2019")),
        (CAT, "trouble", "Losing a cat at night must be so hard, and I'm here to listen."),
    ],
)
def test_what_follows_the_rule_earns_all(prompt, kind, response):
    assert parts(prompt, kind, response) == (1.0, 1.0)


ALL_PROMPTS = [
    (PAN, "how_to"),
    (TOMATO, "yes_no"),
    (RICE, "ideas"),
    (VOLCANO, "fact"),
    (CAT, "trouble"),
]


@pytest.mark.parametrize(("prompt", "kind"), ALL_PROMPTS)
@pytest.mark.parametrize(
    "response",
    ["", " \n", ".", "***", "Yes", "No.", "1.\n2.\n3.", "- \n- \n-", "* * *\n* * *\n* * *",
     "1. 2. 3.", "Yes or No.", "I am sorry.", "\U0001f331\n\U0001f331\n\U0001f331",
     "1. Go\n2. Go\n3. Go"],
)  # fmt: skip
def test_what_says_nothing_earns_nothing(prompt, kind, response):
    assert score(prompt, kind, response) == 0


@pytest.mark.parametrize(("prompt", "kind"), ALL_PROMPTS)
def test_the_prompt_said_back_earns_nothing(prompt, kind):
    for echo in (prompt, f"Yes. {prompt}", f"1. {prompt}\n2. {prompt}\n3. {prompt}", f"- {prompt}"):
        assert score(prompt, kind, echo) == 0


@pytest.mark.parametrize(("prompt", "kind"), ALL_PROMPTS)
def test_the_words_of_another_rule_earn_nothing(prompt, kind):
    others = {"how_to": STEPS, "yes_no": REASON, "fact": SENTENCE, "trouble": COMFORT}
    for other, response in others.items():
        if other != kind:
            assert score(prompt, kind, response) == 0, other


@pytest.mark.parametrize(
    ("response", "form"),
    [
        ("Rinse the iron pan, scrub it with salt, dry it and rub in oil.", 0),
        ("- Rinse the iron pan.\n- Scrub it with salt.\n- Dry it and rub in oil.", 0),
        ("1. Rinse the iron pan.", 0),
        ("1. Rinse the iron pan.\n2. Scrub it with salt.", 2 / 3),
        ("2. Rinse the iron pan.\n3. Scrub it with salt.\n4. Dry it and rub in oil.", 0),
        ("1. Rinse the iron pan.\n1. Scrub it with salt.\n1. Dry it and rub in oil.", 0),
        ("1. Rinse.\n2. Scrub.\n3. Dry.", 0),
        ("1. Clean the pan.\n2. Clean the pan.\n3. Clean the pan.", 0),
        ("1. Clean the pan.\n2. Clean the pan well.\n3. Clean the pan again.", 0),
        (STEPS + "\n4.", 1),
        (STEPS + "\n4. Let the pan cool on a", 1),
        ("1. Rinse the iron pan.\n2. Scrub it with salt.\n3. Dry it and rub in", 1 / 3),
        ("1. Rinse the iron pan and\n2.", 0),
    ],
)
def test_numbered_steps(response, form):
    assert parts(PAN, "how_to", response)[0] == pytest.approx(form)


@pytest.mark.parametrize(
    ("response", "form"),
    [
        ("Yes", 0),
        ("No.", 0),
        ("Yes, it is.", 0),
        ("Yes, a tomato is a fruit.", 1),
        ("Yes. Is a tomato a fruit", 0),
        ("No: is a tomato a fruit? It is a tomato.", 0),
        ("Yes or no, a tomato is a fruit that carries seeds.", 0),
        ("Yes and no: a tomato is a fruit that carries seeds.", 0),
        ("Yes, no, a tomato is a fruit that carries seeds.", 0),
        ("Yesterday I saw that a tomato carries seeds.", 0),
        ("None of it: the tomato carries seeds, a fruit.", 0),
        ("A tomato carries seeds, so yes.", 0),
        ("Yes, a tomato is a fruit because it carries", 1 / 2),
        ("Yes\n\nA tomato is a fruit because it carries seeds.", 1),
    ],
)
def test_yes_or_no(response, form):
    assert parts(TOMATO, "yes_no", response)[0] == form


@pytest.mark.parametrize(
    ("response", "form"),
    [
        ("You could cook fried rice, soup or a pudding.", 0),
        ("- Fried rice", 0),
        ("- Fried rice\n- Soup", 2 / 3),
        ("- Fried rice\n- Rice\n- Leftover rice\n- Fried rice", 2 / 3),
        ("- Soup\n- Soup\n- Soup", 0),
        ("- the\n- a\n- of", 0),
        ("*Fried rice*\n*Soup*\n*Pudding*", 0),  # emphasis, no list
        ("- Fry the rice.\n- Cook a soup.\n- Bake a pudding.\n- Fill a pepper with", 1),
        ("- Fry the rice.\n- Cook a soup.\n- Bake a pudding with", 1 / 3),
        ("- Soup\n- Salad\n- Croquettes\n- Pud", 1),  # nothing says that it was cut
    ],
)
def test_lists_of_ideas(response, form):
    assert parts(RICE, "ideas", response)[0] == pytest.approx(form)


@pytest.mark.parametrize(
    "response",
    [
        "Yes.",
        "Yes, a volcano lets molten rock escape.",
        "No, it is a volcano of rock.",
        "A volcano.",
        "A volcano is.",
        "What is a volcano made of molten rock?",
        "A volcano lets rock escape. It is hot.",
        "A volcano lets rock escape\nIt is hot.",
        "A volcano lets molten rock escape from the",
        "1. A volcano lets molten rock escape.",
        "- A volcano lets molten rock escape.",
        "A volcano " + "and its lava " * 9 + "are hot.",
    ],
)
def test_what_is_no_short_sentence_is_no_fact(response):
    assert parts(VOLCANO, "fact", response)[0] == 0


@pytest.mark.parametrize(
    ("response", "form"),
    [
        ("I am sorry to hear that your cat died last night.", 1 / 2),  # one way of being warm
        ("Sorry to hear that, so sorry to hear that, sorry to hear about your cat.", 1 / 2),
        ("The death of a cat is a common event for pet owners.", 0),
        ("What wonderful news! Enjoy your great day and the happy night!", 0),
        ("Sorry to hear it. Hugs.", 0),
        ("Yes, I'm sorry to hear about your cat. You are not alone.", 0),
        ("1. I'm sorry to hear that about the cat.\n2. You are not alone.", 0),
        ("I'm sorry to hear about your cat, but as an AI I cannot assist. Take care.", 0),
        ("I'm sorry to hear that your cat died. You are not alone and I will", 1),
    ],
)
def test_warmth(response, form):
    assert parts(CAT, "trouble", response)[0] == form


@pytest.mark.parametrize(
    ("prompt", "kind", "response"),
    [
        (PAN, "how_to", STEPS.replace("iron pan", "window")),
        (RICE, "ideas", "- Go swimming\n- Read a novel\n- Visit grandma"),
        (VOLCANO, "fact", "The capital of Norway is the city of Oslo."),
        (TOMATO, "yes_no", "Yes, penguins live on the southern ice."),
        (CAT, "trouble", "I'm so sorry to hear that. You are not alone, and I'm here for you."),
    ],
)
def test_the_right_form_off_topic_earns_nothing(prompt, kind, response):
    form, topic = parts(prompt, kind, response)
    assert (form, topic) == (1.0, 0.0)


def test_half_of_the_content_words_are_enough():
    # cat, died, last, night
    assert parts(CAT, "trouble", "A cat.")[1] == 0.5
    assert parts(CAT, "trouble", "Cats at night.")[1] == 1.0


@pytest.mark.parametrize(("prompt", "kind"), ALL_PROMPTS)
def test_the_same_words_over_and_over_earn_nothing(prompt, kind):
    for told in (STEPS, LIST, REASON, SENTENCE, COMFORT):
        assert score(prompt, kind, " ".join([told] * 6)) == 0
    assert parts("Tea?", "as_asked", "A cup of tea, " * 20, {"words": [30, 90]})[0] == 0


TEA = {"sentences": 2, "about": "tea"}


@pytest.mark.parametrize(
    ("requirement", "response", "kept"),
    [
        (TEA, "Tea is brewed from leaves. It is served hot.", True),
        (TEA, "Tea is brewed from leaves.", False),
        (TEA, "Tea is brewed from leaves. It is served hot. I like it.", False),
        (TEA, "Tea is brewed from leaves. It is", False),  # cut
        (TEA, "Yes, tea is brewed from leaves. It is served hot.", False),
        (TEA, "1. Tea is brewed from leaves.\n2. It is served hot.", False),
        (TEA, "- Tea is brewed.\n- It is served hot.", False),
        (TEA, "Rice is boiled in water. It is served hot.", False),  # off topic
        ({"sentences": [2, 3]}, "Tea is a drink. Tea is hot. Tea is good.", True),
        ({"sentences": [2, 9]}, "Tea is a drink. Tea is hot. Many people who", True),
        ({"words": 1, "about": "Tokyo"}, "Tokyo.", True),
        ({"words": 1, "about": "Tokyo"}, "Kyoto.", False),
        ({"words": 1, "about": "Tokyo"}, "It is Tokyo.", False),
        ({"words": [3, 5]}, "I drink green tea", True),
        ({"words": [3, 5]}, "I drink tea, and tea is good", False),
        ({"items": 3, "about": ""}, "Apple, pear, plum", True),
        ({"items": 3, "about": ""}, "Apple, pear, and plum.", True),
        ({"items": 3, "about": ""}, "Apple, pear and plum.", True),
        ({"items": 3, "about": ""}, "Apple, pear", False),
        ({"items": 3, "about": ""}, ", ,", False),
        ({"items": 3, "about": ""}, "1. Apple\n2. Pear\n3. Plum", False),
        ({"begins": "Dear tea", "words": [5, 50]}, "dear Tea, how are you today?", True),
        ({"begins": "Dear tea", "words": [5, 50]}, '"Dear tea, how are you today?', True),
        ({"begins": "Dear tea", "words": [5, 50]}, "Dear tea, hi", False),
        ({"begins": "Dear tea", "words": [5, 50]}, "My dear tea, how are you today?", False),
        ({"begins": "Yes, tea", "words": [5, 50]}, "Yes, tea is what I want.", True),
    ],
)  # fmt: skip
def test_a_prompt_that_says_how_to_answer(requirement, response, kept):
    assert score("Tell me about tea.", "as_asked", response, requirement) == float(kept)


def test_kinds_of_one_batch_are_scored_by_their_own_rule():
    reward = build_reward("house_rules")
    prompts, kinds = [PAN, VOLCANO, "Tea?"], ["how_to", "fact", "as_asked"]
    columns = {"kind": kinds, "requirement": [None, None, TEA], "split": ["train"] * 3}
    responses = [STEPS, SENTENCE, "Tea is a drink. Tea is hot."]
    assert score_checked(reward, prompts, [""] * 3, responses, columns) == [1, 1, 1]
    assert score_checked(reward, prompts, [""] * 3, [*responses[1:], STEPS], columns) == [0, 0, 0]
    del columns["requirement"]
    assert score_checked(reward, prompts[:2], [""] * 2, responses[:2], {"kind": kinds[:2]}) == [
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "needs the data column 'kind'; columns here: none"),
        ({"kind": ["recipe"]}, f"row 0 .*expected one of {', '.join(KINDS)}, got 'recipe'"),
        ({"kind": ["as_asked"]}, "requirement: expected an object such as .*, got None"),
        ({"kind": ["as_asked"], "requirement": [{}]}, "requirement: expected an object"),
        ({"kind": ["as_asked"], "requirement": ["two"]}, "got 'two'"),
        ({"kind": ["as_asked"], "requirement": [{"about": "tea"}]}, "requirement: expected"),
        ({"kind": ["as_asked"], "requirement": [{"lines": 2}]}, "requirement 'lines': expected"),
        ({"kind": ["as_asked"], "requirement": [{"words": "2"}]}, "'words': expected .*got '2'"),
        ({"kind": ["as_asked"], "requirement": [{"words": [1]}]}, r"got \[1\]"),
        ({"kind": ["as_asked"], "requirement": [{"words": True}]}, "got True"),
        ({"kind": ["as_asked"], "requirement": [{"begins": 2}]}, "'begins': expected .*got 2"),
    ],
)  # fmt: skip
def test_bad_columns_get_one_clear_line(columns, says):
    with pytest.raises(RewardError, match=says) as caught:
        score_checked(HouseRulesReward(), ["Tea?"], [""], ["Tea."], columns)
    assert "\n" not in str(caught.value)
