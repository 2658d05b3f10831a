"""Rendering against transformers' own, and the shield that keeps control text inert."""

from __future__ import annotations

import itertools
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignpro.models.chat_template import (
    check_variables,
    choose,
    control_pattern,
    render,
    shield,
    today,
)

IN_USE = sorted(Path(os.environ.get("ALIGNPRO_VOCABULARIES", "nowhere")).glob("templates/*.jinja"))

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


def written(
    template: str,
    messages: Any = CHAT,
    *,
    prompting: bool = True,
    date: str | None = None,
    **variables: Any,
) -> str:
    return render(
        template,
        messages,
        add_generation_prompt=prompting,
        variables=variables,
        date=date or today(),
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompting", [True, False])
def test_renders_as_transformers_does(template: str, prompting: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [CHAT], chat_template=template, add_generation_prompt=prompting, bos_token="<s>"
    )
    assert written(template, prompting=prompting, bos_token="<s>") == expected[0]


@pytest.mark.skipif(not IN_USE, reason="ALIGNPRO_VOCABULARIES names no folder with templates/")
@pytest.mark.parametrize("template", IN_USE, ids=lambda path: path.stem)
@pytest.mark.parametrize("exchanges", [0, 1, 2])
def test_templates_in_use_render_as_transformers_does(template: Path, exchanges: int) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    text = template.read_text("utf-8")
    turns = ["What?", "<think>\nA thought.\n</think>\n\nThat.", "And <b>?", "So."]
    roles = ["user", "assistant"] * 2
    chat = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    chat = [*chat[: 2 * exchanges], {"role": "user", "content": "Why?"}]
    rendered = 0
    for messages in (chat, [{"role": "system", "content": "Be brief."}, *chat]):
        for variables in ({}, {"enable_thinking": False}, {"thinking": True}):
            given = {"bos_token": "<s>", "eos_token": "</s>", **variables}
            try:
                expected, _ = render_jinja_template(
                    [messages], chat_template=text, add_generation_prompt=True, **given
                )
            except Exception:  # which is the template's own refusal
                with pytest.raises(ValueError, match="chat template: "):
                    written(text, messages, **given)
                continue
            assert written(text, messages, **given) == expected[0]
            rendered += 1
    assert rendered


LLAMA_DATE = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }}"
)


def test_the_date_is_the_one_that_is_given() -> None:
    assert written(LLAMA_DATE, date="2026-11-28") == "28 Nov 2026"
    assert written("{{ strftime_now('%H:%M') }}", date="2026-11-28T07:05") == "07:05"
    assert written(LLAMA_DATE, date="2026-11-28", date_string="today") == "today"
    assert abs(datetime.fromisoformat(today()) - datetime.now()).days <= 1


def test_a_template_is_chosen_by_name_file_or_text(tmp_path: Path) -> None:
    named = {"default": "{{ 1 }}", "rag": "{{ 2 }}"}
    assert choose(named, None) == "{{ 1 }}" and choose(named, "rag") == "{{ 2 }}"
    assert choose({"rag": "{{ 2 }}"}, None) is None
    assert choose(named, "{{ 3 }}") == "{{ 3 }}"
    (tmp_path / "t.jinja").write_text("{{ 4 }}", "utf-8")
    assert choose(named, str(tmp_path / "t.jinja")) == "{{ 4 }}"
    with pytest.raises(ValueError, match=r"a name \(this model has default, rag\), a file, or"):
        choose(named, "tool_use")
    (tmp_path / "t.jinja").write_text("{{ 4 }}", "utf-8-sig")  # as some editors save it
    assert choose(named, str(tmp_path / "t.jinja")) == "{{ 4 }}"
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="expected UTF-8"):
        choose(named, str(tmp_path / "t.jinja"))


def test_a_variable_that_the_template_does_not_read_is_refused() -> None:
    template = "{% if enable_thinking is defined %}x{% endif %}{{ messages }}"
    check_variables(template, ["enable_thinking"])
    check_variables(LLAMA_DATE, ["date_string"])
    with pytest.raises(ValueError, match="reads no thinking; it reads enable_thinking"):
        check_variables(template, ["thinking"])
    with pytest.raises(ValueError, match="alignpro sets messages itself"):
        check_variables(template, ["messages"])


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
        written(template)
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
