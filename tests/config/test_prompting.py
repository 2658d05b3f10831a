"""What the prompter is shown of a prompt, and what the target then reads."""

from __future__ import annotations

import pytest

from alignpro.config import Prompting
from alignpro.types import Conversation


def test_prompting():
    append = Prompting(template="Q: {prompt} {other}", separator=" | ")
    assert list(append.prompter_turns("{prompt} {x}")) == ["Q: {prompt} {x} {other}"]
    assert append.target_prompt("p", "r") == "p | r"
    assert append.target_prompt("p", "") == "p"
    rewrite = Prompting(mode="rewrite")
    assert rewrite.target_prompt("p", "r") == "r"
    assert rewrite.target_prompt("p", "") == "p"


CHAT = Conversation((("system", "Be {kind}."), ("user", "a"), ("assistant", "b")), "last")


@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({"history": "none"}, ["Q: last"]),
        (
            {"history": "turns"},
            ["<User: a\n\nAssistant: b>Q: last", "<Assistant: b>Q: last", "Q: last"],
        ),
        (
            {},  # whole, then the oldest turns are cut first and the system message last
            [
                "<System: Be {kind}.\n\nUser: a\n\nAssistant: b>Q: last",
                "<System: Be {kind}.\n\nAssistant: b>Q: last",
                "<System: Be {kind}.>Q: last",
                "Q: last",
            ],
        ),
        ({"history_cut": "nothing", "history": "turns"}, ["<User: a\n\nAssistant: b>Q: last"]),
        ({"history_cut": "nothing", "history": "none"}, ["Q: last"]),
    ],
)
def test_what_the_prompter_is_shown_of_a_conversation(settings, turns):
    prompting = Prompting(template="Q: {prompt}", history_template="<{history}>", **settings)
    assert list(prompting.prompter_turns(CHAT)) == turns
    assert prompting.prompter_turns(CHAT)[-1:] == turns[-1:]
    assert list(prompting.prompter_turns("last")) == ["Q: last"]


def test_a_long_history_is_cut_without_a_text_for_every_turn():
    history = (("user", "a" * 50),) * 100_000  # 400 GB, all of them
    turns = Prompting(template="{prompt}").prompter_turns(Conversation(history, "last"))
    assert len(turns) == 100_001 and turns[-1] == "last"
    assert turns[99_999].count("User: a") == 1


def test_the_target_reads_the_history_as_it_is():
    read = Prompting(separator=" / ").target_prompt(CHAT, "r")
    assert read == Conversation(CHAT.history, "last / r")
    assert Prompting(mode="rewrite").target_prompt(CHAT, "r").messages == [
        *CHAT.messages[:-1],
        {"role": "user", "content": "r"},
    ]
    assert Prompting().target_prompt(CHAT, "") is CHAT
    with pytest.raises(ValueError, match=r"history_template: expected .* exactly once"):
        Prompting(history_template="before")
