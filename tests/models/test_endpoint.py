"""A model behind an endpoint, on a real HTTP server with the faults that real ones have.

Long because it is a list of what one server can do wrong.
"""

from __future__ import annotations

import email.utils
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from alignpro.config import ModelConfig, from_mapping
from alignpro.models.calls import CallFile
from alignpro.models.endpoint import EndpointModel
from alignpro.models.http_client import BudgetError, EndpointError
from alignpro.models.language_model import RequestError
from alignpro.models.reply import split_reasoning
from alignpro.types import SamplingParams, Usage
from chat_server import ChatServer, Fault, completion

PARAMS = SamplingParams(max_new_tokens=32, temperature=0.7, seed=5)
MAGISTRAL = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "first"}]},
    {"type": "text", "text": "Yes."},
]


@pytest.fixture
def server(monkeypatch):
    # A first pause of half a second, doubled, is right for real ones and long for a test.
    monkeypatch.setattr("alignpro.models.http_client._FIRST_PAUSE", 0.02)
    with ChatServer(lambda asked: f"heard {asked.turn}") as running:
        yield running


def config(server, **client):
    options = {"timeout_seconds": 5.0, "max_retries": 3, **client}
    key = options.pop("api_key_env", None)
    mapping = {"endpoint": server.url, "model": "big", "api_key_env": key, "client": options}
    return from_mapping(ModelConfig, mapping)


def model(server, path=None, **client):
    return EndpointModel(config(server, **client), path)


def ask(answers, *turns, params=PARAMS, samples=1):
    """Texts, or the errors in their place, in the order of the requests."""
    client = answers.client()
    handles = [
        client.submit([{"role": "user", "content": turn}], params, sample=sample)
        for turn in turns
        for sample in range(samples)
    ]
    while not client.idle():
        client.step()
    return [outcome(handle) for handle in handles]


def outcome(handle):
    try:
        return handle.completion()
    except RuntimeError as error:
        return error


# --- what is asked and what is answered ---


def test_a_conversation_goes_out_and_text_comes_back(server):
    server.answer = lambda asked: Fault.reply("Hello.", usage=(7, 2))
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi ünï 🙂"}]
    client = model(server, input_price=2.0, output_price=10.0).client()
    handle = client.submit(chat, PARAMS, sample=3)
    assert client.step() == [handle] and client.idle()
    done = handle.completion()
    assert (done.text, done.finish_reason, done.num_tokens) == ("Hello.", "stop", 2)
    assert done.tokens == done.logprobs == done.prompt_tokens == done.kept_mass == []
    assert done.usage == Usage(7, 2, pytest.approx(34e-6))
    (asked,) = server.asked
    assert asked.body.pop("seed") < 2**31
    assert asked.body == {
        "model": "big",
        "messages": chat,
        "temperature": 0.7,
        "max_tokens": 32,
        # What changes nothing, for servers whose own defaults truncate.
        **{"top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0},
    }
    assert "authorization" not in asked.headers


def test_parameters_that_are_not_the_defaults_go_out_and_the_users_own_win(server):
    answers = model(server, body={"reasoning_effort": "low", "seed": None, "top_k": 7})
    params = replace(PARAMS, top_k=5, top_p=0.9, min_p=0.1, stop=("\n", "END"), min_new_tokens=2)
    params = replace(params, presence_penalty=0.5)
    ask(answers, "x", params=params)
    body = server.asked[0].body
    assert "seed" not in body and body["reasoning_effort"] == "low" and body["top_k"] == 7
    assert (body["top_p"], body["min_p"], body["stop"]) == (0.9, 0.1, ["\n", "END"])
    assert body["min_tokens"] == 2 and "ignore_eos" not in body
    assert body["presence_penalty"] == 0.5 and body["repetition_penalty"] == 1.0


def test_variables_of_the_chat_template_go_out(server):
    off = {"enable_thinking": False}
    ask(EndpointModel(ModelConfig("big", endpoint=server.url, chat_template_kwargs=off)), "x")
    assert server.asked[0].body["chat_template_kwargs"] == off
    with pytest.raises(ValueError, match="chat_template: expected its default None"):
        ModelConfig("big", endpoint=server.url, chat_template="rag")


def test_draws_have_seeds_of_their_own(server):
    ask(model(server), "x", "y", samples=3)
    ask(model(server), "x", params=replace(PARAMS, seed=6))
    seeds = [asked.body["seed"] for asked in server.asked]
    assert len(set(seeds)) == 4  # three samples of one seed, and another seed


def test_a_stop_text_is_cut_off_where_the_endpoint_does_not(server):
    server.answer = lambda asked: Fault.reply("one two END three", "length")
    (done,) = ask(model(server), "x", params=replace(PARAMS, stop=("END",)))
    assert (done.text, done.finish_reason) == ("one two ", "stop")


@pytest.mark.parametrize(
    ("reply", "text", "reasoning"),
    [
        (Fault.reply("<think>\nfirst\n</think>\n\nYes."), "Yes.", "first"),
        (Fault.reply("first</think>Yes."), "Yes.", "first"),
        (Fault.reply("Yes.", reasoning_content="first"), "Yes.", "first"),
        (Fault.reply("Yes.", reasoning="first"), "Yes.", "first"),
        (Fault.reply([{"type": "text", "text": "Ye"}, {"type": "text", "text": "s."}]), "Yes.", ""),
        (Fault.reply([{"type": "reasoning", "text": "first"}, {"text": "Yes."}]), "Yes.", "first"),
        (Fault.reply(MAGISTRAL), "Yes.", "first"),
        (Fault.reply(["Ye", "s."]), "Yes.", ""),
        (Fault.reply([{"type": "refusal", "refusal": "I cannot."}]), "I cannot.", ""),
        (Fault.reply("", refusal="I cannot."), "I cannot.", ""),
        (Fault.reply("Use <b>, then </thought>"), "Use <b>, then </thought>", ""),
        (Fault.reply(""), "", ""),
        (Fault.reply(None, refusal="I cannot."), "I cannot.", ""),  # OpenAI's
        (Fault.reply("half \ud800 a pair"), "half \ufffd a pair", ""),
    ],
)
def test_reasoning_is_kept_apart_from_the_answer(server, reply, text, reasoning):
    server.answer = lambda asked: reply
    (done,) = ask(model(server), "x")
    assert (done.text, done.reasoning) == (text, reasoning)


def test_an_open_block_of_reasoning_is_no_answer():
    assert split_reasoning("<think>and so on") == (None, "and so on")
    assert split_reasoning("  <thought>a</thought> b") == ("b", "a")
    assert split_reasoning("a <think> b") == ("a <think> b", "")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Fault.reply("<think>and so on", "length"), "cut (finish_reason length) before one began"),
        (Fault.reply(None, "length", reasoning_content="and so"), "before one began"),
        (Fault.reply("", "length"), "before one began"),
        (Fault.reply(None, reasoning_content="and so"), "reasoning alone"),
        (Fault.reply("<think>and so</think>"), "reasoning alone"),
        (Fault.reply("", "MAX_TOKENS"), "before one began"),
        (Fault.reply("", "model_length"), "before one began"),
        (Fault.reply("", None), "the reply is empty (finish_reason None)"),
        (Fault.reply("", "whatever"), "the reply is empty (finish_reason whatever)"),
        (Fault.reply("", "tool_calls", tool_calls=[{"id": "1"}]), "a tool call"),
        (Fault.reply([{"type": "thinking", "thinking": "and so"}]), "reasoning alone"),
        (Fault.reply("Bad w", "content_filter"), "content filter"),
        (Fault.reply("Bad w", "SAFETY"), "content filter"),
        (Fault.reply(None, "tool_calls", tool_calls=[{"id": "1"}]), "a tool call"),
        (Fault.error(400, "maximum context length is 100 tokens"), "HTTP 400: maximum context"),
        (Fault.error(422, "max_tokens is too large: 9"), "HTTP 422: max_tokens is too large"),
    ],
)
def test_a_reply_without_an_answer_fails_alone_and_at_once(server, reply, reason):
    server.answer = lambda asked: reply if asked.turn == "bad" else "fine"
    good, bad, after = ask(model(server), "good", "bad", "after")
    assert good.text == after.text == "fine"
    assert isinstance(bad, RequestError) and reason in str(bad)
    assert len(server.asked) == 3


# --- faults that pass ---


@pytest.mark.parametrize(
    "fault",
    [
        Fault.error(429, "slow down", {"Retry-After": "0"}),
        Fault.error(500, "oops"),
        Fault(status=503, body="<html>busy</html>"),
        Fault.error(408, "late"),
        Fault(body='{"choices": [{"mess', promise=500),
        Fault(body='{"choices": [{"mess'),
        Fault(body="[]"),
        Fault(body='{"choices": []}'),
        Fault(body="null"),
        Fault(body="\xff\xfe"),
        Fault.reply(None),
        Fault.reply(7),
        Fault.reply("half an ans", "error"),
        Fault.reply([]),
        Fault(body="no gzip", headers={"Content-Encoding": "gzip"}),
        Fault(body="[" * 100_000),
        Fault(body='{"error": {"message": "upstream is busy", "code": 502}}'),
        Fault(sleep=3.0),
        Fault(body=" " * 100, pause=3.0),
    ],
)
def test_a_passing_fault_costs_no_answer(server, fault):
    server.faults = [fault]
    done = ask(model(server, timeout_seconds=1.5), "a", "b")
    assert [d.text for d in done] == ["heard a", "heard b"]
    assert len(server.asked) == 3


def test_a_slow_first_byte_is_given_up_before_a_slow_answer(server):
    server.faults = [Fault(sleep=4.0)]
    started = time.monotonic()
    (done,) = ask(model(server, first_byte_seconds=1.0), "a")
    assert done.text == "heard a" and time.monotonic() - started < 3.5
    server.faults = [Fault(body=completion("x"), pause=1.5)]
    (done,) = ask(model(server, first_byte_seconds=1.0), "b")
    assert done.text == "x"


def test_a_fault_that_stays_is_an_error_after_its_retries(server):
    server.always = Fault.error(503, "down for good")
    (error,) = ask(model(server, max_retries=2), "a")
    assert isinstance(error, RequestError)
    assert str(error) == "HTTP 503: down for good (3 attempts)" and len(server.asked) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_every_call_back(server, form):
    def slow_down(asked):
        server.answer = lambda asked: f"heard {asked.turn}"
        date = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds
        return Fault.error(429, "slow", {"Retry-After": {"seconds": "1", "date": date}[form]})

    server.answer = slow_down
    done = ask(model(server, concurrency=1), "a", "b", "c")
    assert [d.text for d in done] == ["heard a", "heard b", "heard c"]
    refused, *others = [asked.at for asked in server.asked]
    assert len(others) == 3 and min(others) - refused > 0.9


@pytest.mark.parametrize(
    "value",
    [
        *("-5", "nan", "soon", "", "1,5", "2026-01-01T00:00:00Z", "Mon, 99 Foo 2024"),
        "Thu, 01 Jan 99999999999 00:00:00 GMT",
        "Mon, 01 Jan 2024 00:00:00 +9999999999999999",
    ],
)
def test_a_retry_after_that_says_nothing_is_passed_over(server, value):
    server.faults = [Fault.error(429, "slow", {"Retry-After": value})]
    (done,) = ask(model(server), "a")
    assert done.text == "heard a"


def test_a_retry_after_of_hours_is_not_waited_for(server):
    server.always = Fault.error(429, "tomorrow", {"Retry-After": "86400"})
    (error,) = ask(model(server), "a")
    assert "asks to wait 86400 s" in str(error)


def test_a_reply_that_comes_twice_is_the_answer_to_one_call(server):
    server.answer = lambda asked: Fault(body=completion(f"heard {asked.turn}"), twice=True)
    done = ask(model(server, concurrency=1), *"abcdef")
    assert [d.text for d in done] == [f"heard {turn}" for turn in "abcdef"]


def test_a_server_that_is_killed_and_started_again(server):
    server.answer = lambda asked: Fault.reply(f"heard {asked.turn}", usage=(1, 1))
    answers = model(server, max_retries=8, concurrency=2)

    def restart():
        server.kill()
        time.sleep(0.5)
        server.start()

    restarting = threading.Thread(target=restart)

    def answer(asked):
        if len(server.asked) == 5:
            restarting.start()
            time.sleep(0.2)
        return f"heard {asked.turn}"

    server.answer = answer
    done = ask(answers, *[str(i) for i in range(20)])
    restarting.join()
    assert [d.text for d in done] == [f"heard {i}" for i in range(20)]


def test_nobody_listening_is_an_error_that_says_so(server):
    answers = model(server, max_retries=1)
    server.kill()
    (error,) = ask(answers, "a")
    assert isinstance(error, RequestError) and "ConnectError" in str(error)
    server.start()


# --- refusals ---


def strict(asked):
    body = asked.body
    if "max_tokens" in body:
        return Fault.error(
            400,
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
            param="max_tokens",
        )
    if body.get("temperature", 1) != 1:
        message = (
            "Unsupported value: 'temperature' does not support 0.7 with this model. "
            "Only the default (1) value is supported."
        )
        return Fault.error(400, message, param="temperature")
    for name in ("top_k", "seed"):
        if name in body:
            detail = [{"msg": "Extra inputs are not permitted", "loc": ["body", name]}]
            return Fault(status=422, body=json.dumps({"detail": detail}))
    return f"heard {asked.turn} {body['max_completion_tokens']}"


def test_what_is_refused_is_learnt_once_said_and_remembered(server, tmp_path, caplog):
    server.answer = strict
    calls = tmp_path / "calls.jsonl"
    params = replace(PARAMS, top_k=5)
    with caplog.at_level(logging.WARNING):
        done = ask(model(server, calls), *"abcdef", params=params)
    assert [d.text for d in done] == [f"heard {turn} 32" for turn in "abcdef"]
    assert len(server.asked) == 4 + 6  # refused by the first call alone
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(" refuses ")[1] for line in said] == [
        "max_tokens; max_completion_tokens is sent instead",
        "temperature; it is left out",
        "top_k; it is left out",
        "seed; it is left out",
    ]
    ask(model(server, calls), "g", params=params)  # another process: nothing is refused any more
    assert len(server.asked) == 4 + 6 + 1


def test_what_one_path_refuses_another_may_take(server, tmp_path, caplog):
    def answer(asked):
        chat = asked.path.endswith("chat/completions")
        refused = "max_tokens" if chat else "temperature"
        if refused in asked.body:
            return Fault.error(400, f"Unsupported parameter: '{refused}'", param=refused)
        if chat:
            return "fine"
        read = len(asked.body["prompt"])
        told = [{"logprobs": {"token_logprobs": [None] + [-0.5] * read}}]
        return Fault(body=json.dumps({"choices": told, "usage": {"prompt_tokens": read}}))

    server.answer = answer
    calls = tmp_path / "calls.jsonl"
    for given in ([1, 2, 3], [1, 2, 4]):  # the second time, by what is in the file
        answers = model(server, calls)
        ask(answers, str(given))
        (scored,) = answers.token_logprobs([given[:1]], [given[1:]])
        assert scored.tolist() == [-0.5, -0.5]
    assert len(server.asked) == 4 + 2
    for asked in server.asked[-2:]:
        chat = asked.path.endswith("chat/completions")
        assert ("temperature" in asked.body) is chat and ("max_tokens" in asked.body) is not chat


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("Unrecognized request argument supplied: top_k", "top_k"),
        ("invalid temperature: only 1 is allowed for this model", "temperature"),
        ("`temperature` and `top_p` cannot be specified together", "temperature"),
        ("seed: Extra inputs are not permitted", "seed"),
        ('Unknown name "min_p": Cannot find field.', "min_p"),
        ("`temperature` may only be set to 1 when thinking is enabled.", "temperature"),
        ("seed is not a valid parameter", "seed"),
    ],
)
@pytest.mark.parametrize("status", [400, 422, 501])  # the last is llama.cpp's
def test_a_refusal_is_read_in_many_words(server, message, name, status):
    def answer(asked):
        return Fault.error(status, message) if name in asked.body else "fine"

    server.answer = answer
    params = replace(PARAMS, top_k=3, top_p=0.9, min_p=0.1)
    (done,) = ask(model(server), "a", params=params)
    assert done.text == "fine" and len(server.asked) == 2


@pytest.mark.parametrize(
    ("message", "left"),
    [
        ("top_k should be at least 1, got -1", "top_k"),  # in words of their own
        ("`temperature` and `top_p` cannot be specified together", "top_p"),
    ],
)
def test_what_changes_nothing_is_left_out_before_anything_that_does(server, message, left):
    def answer(asked):
        return Fault.error(400, message) if left in asked.body else "fine"

    server.answer = answer
    (done,) = ask(model(server), "a")
    assert done.text == "fine" and len(server.asked) == 2
    assert server.asked[0].body.keys() - server.asked[1].body.keys() == {left}
    answers = model(server)
    server.answer = lambda asked: Fault.error(400, "top_k should be at most 50, got 99")
    (done,) = ask(answers, "a", params=replace(PARAMS, top_k=99))
    assert "at most 50" in str(done)  # what was asked for is not given up


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_ends_everything_at_once(server, status):
    server.always = Fault.error(status, "no such thing")
    errors = ask(model(server), "a")
    assert isinstance(errors[0], EndpointError) and len(server.asked) == 1
    assert str(errors[0]) == f"big at {server.url}/chat/completions: HTTP {status}: no such thing"


def test_a_prompt_that_moderation_flags_fails_alone(server):
    flagged = Fault.error(403, "Your input was flagged", metadata={"reasons": ["violence"]})
    server.answer = lambda asked: flagged if asked.turn == "bad" else "fine"
    good, bad = ask(model(server), "good", "bad")
    assert good.text == "fine" and isinstance(bad, RequestError)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://x"])
def test_what_is_on_this_machine_is_asked_without_a_proxy(server, monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    assert ask(model(server), "a")[0].text == "heard a"
    elsewhere = EndpointModel(ModelConfig("big", endpoint="http://big.invalid/v1"))
    if not proxy.startswith("http:"):
        with pytest.raises(EndpointError, match=r"big\.invalid/v1: .*ALL_PROXY"):
            elsewhere.client().submit([{"role": "user", "content": "a"}], PARAMS)


def test_a_redirect_ends_everything_with_the_address(server):
    server.always = Fault(status=307, headers={"Location": "https://elsewhere.test/v1"})
    (error,) = ask(model(server), "a")
    assert isinstance(error, EndpointError) and len(server.asked) == 1
    assert "sends to https://elsewhere.test/v1; name that address" in str(error)


def test_tokens_that_cannot_be_are_counted_as_those_that_nobody_told(server):
    answers = model(server)
    server.answer = lambda asked: Fault.reply("yes", usage=(-3, 1))
    ask(answers, "How do bees fly?")
    assert answers.usage().input_tokens > 0


def test_a_spent_account_is_no_rate_limit(server):
    server.always = Fault.error(429, "You exceeded your quota", code="insufficient_quota")
    (error,) = ask(model(server), "a")
    assert isinstance(error, EndpointError) and len(server.asked) == 1


# --- how much at once ---


def test_no_more_calls_are_under_way_than_allowed(server):
    server.answer = lambda asked: Fault(body=completion("x"), sleep=0.05)
    ask(model(server, concurrency=3), *[str(i) for i in range(12)])
    assert server.most_under_way == 3


def test_calls_a_minute_are_spread(server):
    ask(model(server, requests_per_minute=120), *"abcd")
    times = [asked.at for asked in server.asked]
    assert times[-1] - times[0] > 1.2  # three pauses of half a second


def test_ctrl_c_ends_what_is_under_way(server):
    server.answer = lambda asked: Fault(body=completion("x"), sleep=3.0)
    client = model(server, concurrency=2).client()
    for turn in "abcdefgh":
        client.submit([{"role": "user", "content": turn}], PARAMS)
    client.cancel()
    started = time.monotonic()
    while not client.idle():
        client.step()
    assert time.monotonic() - started < 2.0
    time.sleep(0.5)
    assert len(server.asked) <= 2


def test_a_model_that_is_gone_leaves_no_thread(server):
    before = threading.active_count()
    answers = model(server)
    ask(answers, "a")
    del answers
    gc.collect()
    for _ in range(100):
        named = [thread for thread in threading.enumerate() if thread.name == "endpoint"]
        if not named or threading.active_count() <= before:
            return
        time.sleep(0.05)
    raise AssertionError(named)


# --- keys ---


def test_the_key_is_sent_and_shown_nowhere(server, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("BIG_KEY", " sk-very-secret\n")
    server.answer = lambda asked: Fault.error(400, "bad request, key sk-very-secret was charged")
    calls = tmp_path / "calls.jsonl"
    answers = model(server, calls, api_key_env="BIG_KEY")
    (error,) = ask(answers, "a")
    assert server.asked[0].headers["authorization"] == "Bearer sk-very-secret"
    assert str(error) == "HTTP 400: bad request, key *** was charged"
    error.accept()
    server.always = Fault.error(401, "Incorrect API key provided: sk-very-secret")
    (error,) = ask(answers, "b")
    server.always = Fault.reply("your key is sk-very-secret")
    ask(answers, "c")
    shown = [repr(answers), str(error), repr(error), calls.read_text(), caplog.text]
    shown += [repr(answers.__dict__), answers.spent()]
    assert "very-secret" not in " ".join(shown)


@pytest.mark.parametrize("value", ["", "  ", "a b", "sk-\x00x", "schlüssel"])
def test_a_key_that_is_none_is_refused_without_showing_it(server, monkeypatch, value):
    monkeypatch.delenv("BIG_KEY", raising=False)
    if "\x00" not in value:
        monkeypatch.setenv("BIG_KEY", value)
    with pytest.raises(ValueError, match="environment variable BIG_KEY") as caught:
        model(server, api_key_env="BIG_KEY")
    assert value.strip() == "" or value not in str(caught.value)


# --- the file of calls ---


def random_answers(asked):
    return Fault.reply(os.urandom(4).hex(), usage=(3, 4))


def test_recorded_calls_are_not_made_again(server, tmp_path, monkeypatch):
    server.answer = random_answers
    calls = tmp_path / "calls.jsonl"
    monkeypatch.setenv("BIG_KEY", "k")
    first = ask(model(server, calls, api_key_env="BIG_KEY"), "a", "b", samples=2)
    assert len({d.text for d in first}) == 4 == len(server.asked)
    server.kill()
    monkeypatch.delenv("BIG_KEY")  # a replay needs neither server nor key
    again = model(server, calls, api_key_env="BIG_KEY")
    assert ask(again, "a", "b", samples=2) == first
    assert again.spent() == "big: 4 calls, 12 tokens read, 16 written; 4 answers replayed"
    rows = [json.loads(line) for line in calls.read_text().splitlines()]
    assert rows[0]["request"]["messages"] == [{"role": "user", "content": "a"}]
    assert rows[0]["answer"]["text"] == first[0].text
    server.start()


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.8}, {"max_new_tokens": 33}, {"seed": 6}, {"stop": ("x",)}]
)
def test_a_changed_call_is_made_anew(server, tmp_path, changes):
    calls = tmp_path / "calls.jsonl"
    ask(model(server, calls), "a")
    ask(model(server, calls), "a", params=replace(PARAMS, **changes))
    ask(model(server, calls), "b")
    ask(model(server, calls, body={"reasoning_effort": "low"}), "a")
    assert len(server.asked) == 4
    ask(model(server, calls, concurrency=1, max_retries=0), "a")  # that changes no answer
    assert len(server.asked) == 4


def test_the_same_call_under_way_is_made_once(server, tmp_path):
    server.answer = random_answers
    done = ask(model(server, tmp_path / "calls.jsonl"), "a", "a", "a")
    assert len(server.asked) == 1 and len({d.text for d in done}) == 1


def test_who_cancels_leaves_the_same_call_to_others(server, tmp_path):
    server.answer = lambda asked: Fault(body=completion("x"), sleep=0.5)
    answers = model(server, tmp_path / "calls.jsonl")
    chat = [{"role": "user", "content": "a"}]
    one, other = answers.client(), answers.client()
    handles = [client.submit(chat, PARAMS) for client in (one, other)]
    one.cancel()
    assert one.step() == handles[:1] and other.step() == handles[1:]
    assert handles[1].completion().text == "x" and len(server.asked) == 1
    again = [client.submit([*chat, *chat], PARAMS) for client in (one, other)]
    one.cancel()
    other.cancel()  # the last of them ends the call
    assert all(handle.future.cancelled() for handle in again)
    assert answers.calls.get(answers.call([*chat, *chat], PARAMS, 0)) is None


def test_a_failure_is_replayed_once_it_was_accepted(server, tmp_path):
    calls = tmp_path / "calls.jsonl"
    server.always = Fault.error(400, "no")
    (error,) = ask(model(server, calls), "a")
    server.always = None
    assert ask(model(server, calls), "a")[0].text == "heard a"
    server.always = Fault.error(400, "no")
    (error,) = ask(model(server, calls), "b")
    error.accept()
    server.always = None
    (again,) = ask(model(server, calls), "b")
    assert isinstance(again, RequestError) and str(again) == "HTTP 400: no"
    whole = calls.read_text()
    again.accept()  # by the run that replays it
    assert calls.read_text() == whole
    assert len(server.asked) == 3


def test_a_line_that_was_cut_short_is_dropped_and_another_refused(server, tmp_path):
    calls = tmp_path / "calls.jsonl"
    ask(model(server, calls), "a", "b")
    whole = calls.read_text()
    calls.write_text(whole[:-20])
    ask(model(server, calls), "a", "b")
    assert len(server.asked) == 3 and calls.read_text().count("\n") == 2
    calls.write_text("not a call\n" + whole)
    with pytest.raises(ValueError, match=r"calls.jsonl, line 1: expected a recorded call"):
        model(server, calls)


def test_a_file_that_went_through_other_tools_is_replayed(server, tmp_path):
    calls = tmp_path / "calls.jsonl"
    turns = ["a", "b\u2028c\u0085d"]
    ask(model(server, calls), *turns)
    rows = [json.loads(line) for line in calls.read_text().splitlines()]
    # As jq writes it, behind a byte order mark, in another order, without the last line feed.
    lines = [json.dumps(row, ensure_ascii=False) for row in reversed(rows)]
    calls.write_text("\ufeff" + "\r\n".join(lines), "utf-8", newline="")
    for _ in range(2):
        done = ask(model(server, calls), *turns)
        assert [d.text for d in done] == [f"heard {turn}" for turn in turns]
    assert len(server.asked) == 2


@pytest.mark.parametrize("changes", [{"text": None}, {"text": 5}, {"finish_reason": "weird"}])
def test_an_answer_that_no_reply_was_read_as_is_refused(server, tmp_path, changes):
    calls = tmp_path / "calls.jsonl"
    ask(model(server, calls), "a")
    row = json.loads(calls.read_text())
    row["answer"].update(changes)
    calls.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"calls.jsonl, line 1: expected a recorded call"):
        model(server, calls)
    calls.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"calls.jsonl: expected lines of JSON in UTF-8"):
        model(server, calls)


HOLDER = """
import sys
from pathlib import Path
from alignpro.models.calls import CallFile
calls = CallFile(Path(sys.argv[1]))
calls.hold()
print("held", flush=True)
sys.stdin.readline()
calls.put_changes("chat/completions", {"seed": None})
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that adds to the file of calls, and then adds a line and ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "calls.jsonl")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate("\n", timeout=60)


def test_one_process_adds_to_a_file_and_others_replay_it(server, tmp_path, request):
    calls = tmp_path / "calls.jsonl"
    ask(model(server, calls), "a", "b")
    gc.collect()  # this process lets go with the model
    holder = request.getfixturevalue("holder")
    cut = calls.read_bytes()[:-20]  # a line that is being written
    calls.write_bytes(cut)
    other = model(server, calls)
    assert ask(other, "a")[0].text == "heard a"
    line = rf"calls\.jsonl: process {holder.pid} on .* is writing it; wait for it to end, or name"
    with pytest.raises(FileExistsError, match=line):
        ask(other, "b")
    assert calls.read_bytes() == cut and len(server.asked) == 2  # not made, and nothing repaired


def test_a_file_without_an_answer_is_refused_before_anything_is_loaded(server, tmp_path, holder):
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "calls.jsonl")
    for calls in (tmp_path / "calls.jsonl", link):
        with pytest.raises(FileExistsError, match=r"calls\.jsonl: process \d+ on .* is writing it"):
            model(server, calls=str(calls))


def test_what_another_process_added_meanwhile_is_not_asked_again(server, tmp_path):
    server.answer = random_answers
    calls = tmp_path / "calls.jsonl"
    ask(model(server, calls), "a")
    late, before = model(server, calls), calls.read_bytes()
    # As another process does it.
    calls.write_bytes(b"")
    (known,) = ask(model(server, tmp_path / "other.jsonl"), "b")
    calls.write_bytes(before + (tmp_path / "other.jsonl").read_bytes())
    assert ask(late, "b")[0] == known
    assert late.calls.attempts == 2 == len(server.asked)
    assert (tmp_path / "calls.jsonl.lock").exists()
    del late
    gc.collect()
    assert not (tmp_path / "calls.jsonl.lock").exists()


@pytest.mark.parametrize("changes", [{"seed": 6}, {"sample": 1}, {"request": {"model": "small"}}])
def test_a_request_that_was_edited_is_refused(server, tmp_path, changes):
    calls = tmp_path / "calls.jsonl"
    body = {"logit_bias": {9: 1, 10: 1}}  # numbers, as YAML has them
    ask(model(server, calls, body=body), "a")
    assert ask(model(server, calls, body=body), "a")[0].text == "heard a"
    assert len(server.asked) == 1
    row = json.loads(calls.read_text())
    for key, value in changes.items():
        row[key] = row[key] | value if isinstance(value, dict) else value
    calls.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"calls.jsonl, line 1: expected a recorded call with the"):
        model(server, calls)


def test_a_file_of_ones_own_is_named_in_the_configuration(server, tmp_path):
    ask(model(server, tmp_path / "run/calls.jsonl", calls=str(tmp_path / "own.jsonl")), "a")
    assert (tmp_path / "own.jsonl").read_text().count("\n") == 1
    with pytest.raises(FileNotFoundError, match=r"client\.calls: .*missing: no such folder"):
        model(server, calls=str(tmp_path / "missing/calls.jsonl"))


# --- budgets ---


@pytest.mark.parametrize(
    ("budget", "answered", "words"),
    [
        ({"calls": 3}, 3, "3 calls"),
        ({"tokens": 150}, 6, "150 tokens"),
        ({"cost": 0.0008}, 5, "0.0008"),
    ],
)
def test_a_budget_is_not_passed(server, tmp_path, budget, answered, words):
    server.answer = lambda asked: Fault.reply("x", usage=(10, 10))
    calls = tmp_path / "calls.jsonl"
    options = {"concurrency": 1, "input_price": 0.0, "output_price": 10.0, "budget": budget}
    done = ask(model(server, calls, **options), *"abcdefgh")
    # The next call's most tokens are kept back, so that a budget is never passed.
    assert sum(not isinstance(d, BudgetError) for d in done) == answered
    error = next(d for d in done if isinstance(d, BudgetError))
    assert f"big: the budget of {words} is spent" in str(error)
    made = len(server.asked)
    used = {"calls": made, "tokens": 20 * made, "cost": made * 100e-6}
    assert all(used[name] <= limit for name, limit in budget.items())
    # Another process: what the first one spent is spent.
    assert isinstance(ask(model(server, calls, **options), "new")[0], BudgetError)
    assert len(server.asked) == made


CUT = Fault.reply("", "length", usage=(20, 30))


@pytest.mark.parametrize(
    ("fault", "budget", "made"),
    [
        (CUT, {"tokens": 200}, 4),  # it read and wrote, and has no answer
        (CUT, {"cost": 0.0013}, 4),
        (Fault.reply("", "length"), {"tokens": 200}, 4),  # nobody says how much: the most it may be
        (Fault.reply("half an ans", "error", usage=(20, 30)), {"tokens": 200}, 4),
        (Fault.error(503, "busy", {"Retry-After": "0"}), {"calls": 3}, 3),
        (Fault.error(400, "no"), {"calls": 3}, 3),
    ],
)
def test_requests_without_an_answer_are_part_of_the_budget(server, tmp_path, fault, budget, made):
    server.always = fault
    calls = tmp_path / "calls.jsonl"
    options = {"concurrency": 1, "input_price": 0.0, "output_price": 10.0, "budget": budget}
    for turns in ("abcdefgh", "ijklmnop"):  # the second time in another process
        done = ask(model(server, calls, **options), *turns)
        assert isinstance(done[-1], BudgetError) and len(server.asked) == made
    spent = model(server, calls, **options).spent()
    assert f"big: {made} calls" in spent
    assert (", 120 written, cost 0.0012" in spent) == ("usage" in fault.body)


def test_a_refused_parameter_is_a_request(server, tmp_path):
    def strict(asked):
        return Fault.error(400, "unknown parameter: seed") if "seed" in asked.body else "x"

    server.answer = strict
    ask(model(server, tmp_path / "calls.jsonl"), "a", "b")
    assert "big: 3 calls" in model(server, tmp_path / "calls.jsonl").spent()


def test_a_budget_of_money_needs_prices(server):
    with pytest.raises(ValueError, match=r"client.budget.cost: expected null without both prices"):
        model(server, budget={"cost": 1})


# --- configuration ---


@pytest.mark.parametrize(
    ("mapping", "line"),
    [
        ({"endpoint": "localhost:8000", "model": "m"}, "an http:// or https:// address"),
        ({"endpoint": "http://me:pw@h/v1", "model": "m"}, "without user, password and query"),
        ({"endpoint": "http://h/v1?key=1", "model": "m"}, "without user, password and query"),
        ({"endpoint": "http://h/v1"}, "model: expected the endpoint's name for its model"),
        ({"endpoint": "http://h/v1", "model": "m", "device": "cuda"}, "device: expected its def"),
        ({"endpoint": "http://h/v1", "model": "m", "adapter": "a"}, "adapter: expected its def"),
        ({"model": "m", "api_key_env": "K"}, "api_key_env: expected its default None"),
        ({"model": "m", "client": {"concurrency": 2}}, "client: expected its default"),
        ({"endpoint": "http://h/v1", "model": "m", "client": {"body": {"n": 2}}}, "alignpro sets"),
    ],
)
def test_a_group_that_says_two_things_is_refused(mapping, line):
    with pytest.raises(ValueError, match=r".") as caught:
        from_mapping(ModelConfig, mapping)
    assert line in str(caught.value)


def test_a_replay_loads_no_http_client(server, tmp_path):
    calls = tmp_path / "calls.jsonl"
    ask(model(server, calls), "a")
    code = (
        "import sys; from alignpro.config import ModelConfig\n"
        "from alignpro.models.endpoint import EndpointModel\n"
        "from alignpro.types import SamplingParams\nfrom pathlib import Path\n"
        f"m = EndpointModel(ModelConfig('big', endpoint='{server.url}'), Path('{calls}'))\n"
        "c = m.client()\n"
        "h = c.submit([{'role': 'user', 'content': 'a'}], SamplingParams(max_new_tokens=32, "
        "temperature=0.7, seed=5))\nc.step(); print(h.completion().text)\n"
        "print('httpx2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["heard a", "False"]


def test_a_file_that_is_no_file_of_calls_is_left_as_it_was(tmp_path):
    path = tmp_path / "calls.jsonl"
    path.write_text('{"other": 1}\n{"cut sh')
    with pytest.raises(ValueError, match=r"calls\.jsonl, line 1: expected a recorded call"):
        CallFile(path)
    assert path.read_text() == '{"other": 1}\n{"cut sh'
