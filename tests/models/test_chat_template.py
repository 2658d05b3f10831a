"""Rendering against transformers' own, and the shield that keeps control text inert."""

from __future__ import annotations

import itertools
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignpro.models.chat_template import control_pattern, render, shield

CHAT = [
    {"role": "system", "content": "Be <brief> & “kind”."},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": "Yes?"},
]
TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content | trim }}]\n"
    "  {% endif %}\n{% endfor %}\n",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
    "{% break %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ bos_token }}{{ add_generation_prompt }}{{ tools is none }}{{ unk_token }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ messages[1:] | map(attribute='content') | join('|') }}{{ 'a.b'.split('.')[-1] }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompting", [True, False])
def test_renders_as_transformers_does(template: str, prompting: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [CHAT], chat_template=template, add_generation_prompt=prompting, bos_token="<s>"
    )
    got = render(template, CHAT, add_generation_prompt=prompting, variables={"bos_token": "<s>"})
    assert got == expected[0]


def test_the_date() -> None:
    got = render("{{ strftime_now('%Y') }}", CHAT, add_generation_prompt=True, variables={})
    assert abs(int(got) - datetime.now().year) <= 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("{% for %}", "chat template: "),
        ("{{ messages[9].content.x }}", "chat template: "),
        ("{{ messages.append(1) }}", "chat template: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "chat template: .*unsafe"),
        ("{{ 1 / 0 }}", "chat template: division by zero"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        render(template, CHAT, add_generation_prompt=True, variables={})
    assert "\n" not in str(caught.value)


TOKENS = ["<|a|>", "<|a|>x", "<|", "\n", "ab", "\n\n", "<tool>"]


@given(
    parts=st.lists(st.sampled_from([*TOKENS, "<", "|", "a", ">", " ", "\ue000", "\ue001", "b"])),
    tokens=st.sets(st.sampled_from(TOKENS)),
)
def test_shielded_text_holds_no_control_text_and_mends(parts: list[str], tokens: set[str]) -> None:
    text = "".join(parts)
    pattern = control_pattern(tokens)
    (message,), mend = shield([{"role": text, "content": text}], pattern, avoid="\ue002")
    assert not any(token in message["content"] for token in tokens)
    assert message["role"] == message["content"]
    assert mend(message["content"]) == text
    assert "\ue002" not in message["content"]


def test_text_inside_nested_fields_is_shielded() -> None:
    messages = [{"role": "user", "content": "x", "calls": [{"name": "<tool>", "n": 3, "on": None}]}]
    shielded, mend = shield(messages, control_pattern(["<tool>"]), avoid="")
    call = shielded[0]["calls"][0]
    assert "<tool>" not in call["name"] and mend(call["name"]) == "<tool>"
    assert (call["n"], call["on"]) == (3, None)


@given(
    tokens=st.sets(st.text("ab<|\n", min_size=1, max_size=4), min_size=1, max_size=8),
    text=st.text("ab<|\n", max_size=12),
)
def test_the_pattern_finds_the_longest_at_the_leftmost(tokens: set[str], text: str) -> None:
    pattern = control_pattern(tokens)
    assert pattern is not None
    match = pattern.search(text)
    spans = (
        (begin, -end)
        for begin, end in itertools.combinations(range(len(text) + 1), 2)
        if text[begin:end] in tokens
    )
    first = min(spans, default=None)
    assert (None if match is None else (match.start(), -match.end())) == first


def test_no_tokens_no_pattern() -> None:
    assert control_pattern([]) is None
    messages, mend = shield([{"role": "user", "content": "x"}], None, avoid="")
    assert messages == [{"role": "user", "content": "x"}] and mend("x") == "x"
