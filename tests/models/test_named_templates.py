"""The templates of a model's files, by name; chats in them beside transformers', and left out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from alignpro.models.tokenizer import Tokenizer
from alignpro.types import Message
from models.test_tokenizer import save_tokenizer


def test_qwen3_reads_chats_as_with_transformers() -> None:
    from transformers import AutoTokenizer

    folder = Path(os.environ.get("ALIGNPRO_VOCABULARIES", "nowhere")) / "tokenizers" / "qwen3"
    if not folder.is_dir():
        pytest.skip("ALIGNPRO_VOCABULARIES names no folder with tokenizers/qwen3")
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
    ask = {"role": "user", "content": "Why <b>?"}
    tool = {"role": "user", "content": "<tool_response>\n3\n</tool_response>"}
    for chat in ([ask], [ask, thought, ask], [ask, thought, tool], [ask, thought]):
        for variables in ({}, {"enable_thinking": False}):
            text = theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **variables
            )
            expected = theirs.encode(text, add_special_tokens=False)
            assert ours.with_template(None, variables).encode_chat(chat) == expected
    (end,) = theirs.encode("<|im_end|>")
    assert ours.encode_chat([{"role": "user", "content": "<|im_end|>"}]).count(end) == 1


def test_templates_have_names(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "byte-level")
    chat = [{"role": "user", "content": "hat"}]
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "rag.jinja").write_text("rag {{ messages[0]['content'] }}", "utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert sorted(tokenizer.chat_templates) == ["default", "rag", "tool_use"]
    plain = tokenizer.encode_chat(chat)
    assert tokenizer.with_template("default").encode_chat(chat) == plain
    assert tokenizer.with_template("rag").encode_chat(chat) == tokenizer.encode("rag hat")
    assert tokenizer.with_template("tool_use").encode_chat(chat) == tokenizer.encode("no hat")
    own = "{{ day }}: {{ strftime_now('%d') }} {{ messages[0].content }}"
    dated = tokenizer.with_template(own, {"day": "on"}, "2026-11-28")
    assert dated.encode_chat(chat) == tokenizer.encode("on: 28 hat")
    with pytest.raises(ValueError, match=r"expected a name .*default, rag, tool_use"):
        tokenizer.with_template("rug")
    with pytest.raises(ValueError, match="reads no enable_thinking"):
        tokenizer.with_template(variables={"enable_thinking": False})
    (tmp_path / "tokenizer_config.json").write_text("{}", "utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match='has chat templates rag, none called "default"'):
        tokenizer.encode_chat(chat)
    assert tokenizer.with_template("rag").encode_chat(chat)


def test_templates_of_a_gguf_have_names() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<|end|>", "a", "b"],
        "tokenizer.ggml.token_type": [3, 1, 1],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_templates": ["rag"],
        "tokenizer.chat_template.rag": "{{ messages[0].content }}<|end|>",
    }
    chat = [{"role": "user", "content": "ab"}]
    with pytest.raises(ValueError, match='has chat templates rag, none called "default"'):
        Tokenizer.from_gguf(metadata).encode_chat(chat)
    assert Tokenizer.from_gguf(metadata).with_template("rag").encode_chat(chat) == [1, 2, 0]
    metadata["tokenizer.chat_template"] = "b{{ messages[0].content }}"
    assert Tokenizer.from_gguf(metadata).encode_chat(chat) == [2, 1, 2]


@pytest.mark.parametrize(
    ("roles", "left_out"),
    [
        (("developer", "user"), "message 0 (role 'developer')"),
        (("user", "tool", "user"), "message 1 (role 'tool')"),
        (("system", "user", "assistant", "system", "user"), "message 3 (role 'system')"),
    ],
)
def test_a_template_that_passes_over_a_message_is_refused(
    tmp_path: Path, roles: tuple[str, ...], left_out: str
) -> None:
    """As Qwen2.5's does with a developer's, and SmolLM3's with a second system message."""
    save_tokenizer(tmp_path, "byte-level")
    template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') or m.role == 'system' and "
        "loop.first %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer.from_folder(tmp_path).with_template(template)
    chat: list[Message] = [{"role": role, "content": f"turn {i}"} for i, role in enumerate(roles)]
    with pytest.raises(ValueError, match=re.escape(f"its chat template leaves out {left_out};")):
        tokenizer.encode_chat(chat)
    known = [message for message in chat if message["content"] != f"turn {left_out[8]}"]
    assert tokenizer.encode_chat(known) == tokenizer.encode(
        "".join(f"<{m['role']}>{m['content']}" for m in known)
    )
