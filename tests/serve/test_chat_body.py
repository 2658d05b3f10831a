"""Only the last user turn's own bytes change, whatever stands around them."""

from __future__ import annotations

import json

import pytest

from alignpro.serve.chat_body import ChatBody

# Spaces, order, an unknown field, escapes, a number that a float cannot hold, a key given twice.
BODY = (
    '{ "x_unknown" : {"deep":[1.10, 2e5, 123456789012345678901234567890]},\n'
    '  "model":"m", "messages":[ {"role":"system","content":"s\\u00e9 \\/"},'
    '{"content":"first","role":"user","content":"caf\u00e9 \\n\\"quoted\\" \U0001f426"} ],'
    '"tools":[{"type":"function","function":{"name":"messages"}}], "stream":false}'
)


def read(body: str) -> ChatBody:
    return ChatBody.read(body.encode())


def test_what_is_appended_goes_behind_the_bytes_that_came():
    chat = read(BODY)
    turn = chat.conversation.last_turn
    assert turn == 'caf\u00e9 \n"quoted" \U0001f426' and chat.model == "m"
    new = chat.with_last_turn(turn + '\n\n"Short", please \u00fc').decode()
    before, after = BODY.split('\U0001f426"}')
    assert new.startswith(before + "\U0001f426") and new.endswith('"}' + after)
    assert json.loads(new)["messages"][1]["content"] == turn + '\n\n"Short", please \u00fc'


def test_another_text_takes_the_place_of_the_old_one():
    chat = read(BODY)
    new = chat.with_last_turn("another \ud800").decode()
    assert new == BODY.replace(
        '"caf\u00e9 \\n\\"quoted\\" \U0001f426"', json.dumps("another \ud800")
    )


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def chat_of(*messages: object) -> ChatBody:
    return read(json.dumps({"model": "m", "messages": list(messages)}))


def test_images_stay_and_the_text_beside_them_is_the_turn():
    content = [{"type": "text", "text": "What is it?"}, IMAGE]
    chat = chat_of({"role": "user", "content": content})
    assert chat.conversation.last_turn == "What is it?"
    new = json.loads(chat.with_last_turn("Name the bird."))
    assert new["messages"][0]["content"] == [{"type": "text", "text": "Name the bird."}, IMAGE]


def test_of_several_texts_the_last_is_appended_to_and_none_replaced():
    content = [{"type": "text", "text": "one"}, IMAGE, {"type": "text", "text": "two"}]
    chat = chat_of({"role": "user", "content": content})
    assert chat.conversation.last_turn == "one\ntwo"
    new = json.loads(chat.with_last_turn("one\ntwo, briefly"))["messages"][0]["content"]
    assert [part.get("text") for part in new] == ["one", None, "two, briefly"]
    assert chat.with_last_turn("three") is None


def test_calls_of_tools_and_images_are_no_history():
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "12 C"}
    said = {"role": "assistant", "content": "It is cold."}
    chat = chat_of(
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "Weather?"}]},
        call,
        result,
        said,
        {"role": "user", "content": "And now?"},
    )
    assert chat.conversation.history == (("user", "Weather?"), ("assistant", "It is cold."))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "not_json"),
        ("{", "not_json"),
        ("[" * 100_000, "not_json"),
        ("[]", "no_messages"),
        ("3", "no_messages"),
        ('{"messages": []}', "no_messages"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "tool"}]}', "no_user_turn"),
        ('{"messages": ["a"]}', "no_user_turn"),
        ('{"messages": [{"role": "user", "content": " \\n"}]}', "no_text"),
        ('{"messages": [{"role": "user", "content": null}]}', "no_text"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "no_text"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}', "no_text"),
    ],
)
def test_what_holds_no_turn_says_why(body, reason):
    chat = read(body)
    assert chat.conversation is None and chat.reason == reason


def test_bytes_that_are_no_utf8_are_not_read():
    assert ChatBody.read(b'{"messages": "\xff"}').reason == "not_json"
