"""A prompter in the path: what it changes, what it must not cost, and what is said of it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest

import alignpro
from alignpro import rewriting
from alignpro.config import REWRITE
from alignpro.config.serve import ServeConfig
from alignpro.models.native_model import load_model
from alignpro.rewriting import Rewritten
from alignpro.serve.app import _Body
from alignpro.serve.chat_body import ChatBody
from alignpro.serve.local import LocalUpstream
from alignpro.serve.rewriter import Circuit, Rewriter
from serve.raw_upstream import RawUpstream, answer, request, split, until
from serve.running import running

PROMPTING = alignpro.Prompting(template="{prompt}", separator=" | ")
PARAMS = replace(REWRITE, max_new_tokens=6, ignore_eos=True, temperature=0.0)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "the heron"},
]
REPLY = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
    ],
}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    loaded = load_model(tiny_model_dir("llama"), threads=1)
    loaded.name = "tiny"
    return loaded


@pytest.fixture
def prompter(model):
    with alignpro.Prompter(model, prompting=PROMPTING, params=PARAMS) as made:
        yield made


@pytest.fixture
def upstream():
    def reply(got, send):
        send(answer(json.dumps(REPLY).encode(), headers=b"content-type: application/json\r\n"))

    with RawUpstream(reply) as made:
        yield made


def config_of(upstream, **fields):
    defaults = {"run": "x", "rewrite": True, "deadline_seconds": 20.0}
    return ServeConfig(upstream=upstream.url, port=0, **(defaults | fields))


def ask(proxy, mode=None, messages=MESSAGES, **fields):
    """(answer, what its headers say of the rewrite)"""
    client = openai.OpenAI(base_url=proxy.url, api_key="sk-secret", max_retries=0)
    headers = {} if mode is None else {"x-alignpro": mode}
    raw = client.chat.completions.with_raw_response.create(
        model="m", messages=messages, extra_headers=headers, **fields
    )
    said = {k[len("x-alignpro-") :]: v for k, v in raw.headers.items() if "x-alignpro-" in k}
    return raw.parse(), said


def sent(upstream):
    return json.loads(upstream.got[-1].body)


def test_only_the_last_user_turn_is_another(upstream, prompter):
    config = config_of(upstream)
    with running(config, Rewriter("my-run", prompter, config)) as proxy:
        reply, said = ask(proxy, messages=MESSAGES, tools=TOOLS, extra_body={"x_unknown": 1.5})
        assert reply.choices[0].message.content == "ok"
        expected = prompter.rewrite(MESSAGES).messages[-1]["content"]
        body = sent(upstream)
        assert body["messages"][-1]["content"] == expected != "the heron"
        assert body["messages"][:-1] == MESSAGES[:-1]
        assert body["tools"] == TOOLS and body["x_unknown"] == 1.5
        assert (b"authorization", b"Bearer sk-secret") in upstream.got[-1].headers
        assert said["applied"] == "true" and said["reason"] == "rewritten"
        assert said["run"] == "my-run" and float(said["rewrite-ms"]) > 0
        labels = {"run": "my-run", "mode": "on", "applied": "true", "reason": "rewritten"}
        assert proxy.metric("alignpro_chat_requests_total", **labels) == 1
        assert proxy.metric("alignpro_rewrite_seconds_count", run="my-run") == 1


def test_the_header_says_whether(upstream, prompter):
    config = config_of(upstream, rewrite=False)
    with running(config, Rewriter("my-run", prompter, config)) as proxy:
        for mode, reason in (
            *((None, "off"), ("off", "off"), ("OFF ,off", "off")),
            *(("nonsense", "bad_header"), ("on, off", "bad_header"), ("on,", "bad_header")),
        ):
            assert ask(proxy, mode)[1]["reason"] == reason
            assert sent(upstream)["messages"] == MESSAGES
        assert ask(proxy, "on")[1]["applied"] == "true"
        assert sent(upstream)["messages"] != MESSAGES
        assert ask(proxy, "shadow")[1] | {"run": ""} == {
            **{"applied": "false", "reason": "shadow", "rewrite-ms": "0.0", "run": ""}
        }
        assert sent(upstream)["messages"] == MESSAGES
        until(lambda: proxy.metric("alignpro_rewrite_seconds_count", run="my-run") == 2)
        body = json.dumps({"model": "m", "messages": MESSAGES}).encode()
        twice = (b"x-alignpro: off", b"x-alignpro: on")  # whatever their order
        for headers in (twice, twice[::-1]):
            assert b"x-alignpro-reason: bad_header" in proxy.raw(request(body, *headers))
    with running(replace(config, run=None)) as proxy:
        assert ask(proxy, "on")[1]["reason"] == "no_run"


class Slow:
    """A prompter whose rewrites take as long as they are let."""

    def __init__(self, error=None):
        self.asked, self.error = 0, error

    def close(self):
        pass

    async def arewrite(self, conversation, *, deadline):
        import asyncio

        self.asked += 1
        if self.error is not None:
            raise self.error
        await asyncio.sleep(deadline)
        return alignpro.Rewritten(conversation.messages, "", False, "deadline", deadline * 1e3)


def test_a_late_rewrite_and_an_open_circuit_let_the_original_out(upstream):
    config = config_of(upstream, deadline_seconds=0.05, circuit_failures=3, circuit_seconds=2.0)
    slow = Slow()
    with running(config, Rewriter("r", slow, config)) as proxy:
        body = b'{"messages" : [{"role":"user","content":"the heron"}]}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"

        def check(reason):
            raw = proxy.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert b"x-alignpro-reason: " + reason in raw
            assert upstream.got[-1].body == body

        for reason in [b"deadline"] * 3 + [b"circuit_open"] * 2:
            check(reason)
        assert slow.asked == 3
        time.sleep(2.1)
        check(b"deadline")
        check(b"circuit_open")
        assert slow.asked == 4


def test_a_full_queue_lets_the_original_out(upstream):
    config = config_of(upstream, deadline_seconds=0.5, max_queue=2)
    with running(config, Rewriter("r", Slow(), config)) as proxy, ThreadPoolExecutor(6) as pool:
        reasons = [f.result()[1]["reason"] for f in [pool.submit(ask, proxy) for _ in range(6)]]
        assert sorted(reasons)[:2] == ["deadline"] * 2 and reasons.count("queue_full") >= 1


def test_a_prompter_that_fails_costs_nothing_and_is_logged(upstream, caplog):
    config = config_of(upstream)
    with running(config, Rewriter("r", Slow(KeyError("a defect")), config)) as proxy:
        assert ask(proxy)[1]["reason"] == "error"
        assert "a defect" in caplog.text and "sk-secret" not in caplog.text


def test_a_conversation_that_does_not_fit_goes_out_as_it_is(upstream, prompter):
    config = config_of(upstream, circuit_failures=1)
    with running(config, Rewriter("r", prompter, config)) as proxy:
        long = [{"role": "user", "content": "heron " * 1000}]
        assert ask(proxy, messages=long)[1]["reason"] == "unfit"
        assert sent(upstream)["messages"] == long
        assert ask(proxy)[1]["reason"] == "rewritten"  # and it is no failure of the prompter


def test_a_client_that_leaves_ends_its_rewrite(upstream, model, monkeypatch):
    config = config_of(upstream)
    ended = threading.Event()

    class Endless(Slow):
        async def arewrite(self, conversation, *, deadline):
            try:
                return await super().arewrite(conversation, deadline=deadline)
            finally:
                ended.set()

    slow = Endless()
    rewriter = Rewriter("r", slow, config)
    with running(config, rewriter) as proxy:
        import socket

        body = json.dumps({"messages": MESSAGES}).encode()
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n"
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: slow.asked == 1)
        assert ended.wait(10)
        until(lambda: rewriter.under_way == 0)
        assert upstream.got == []


class Echoing:
    """Rewrites every turn to itself and one word more."""

    def __init__(self):
        self.guards = None

    async def arewrite(self, conversation, *, deadline):
        turn = conversation.last_turn + " more"
        return Rewritten(conversation.with_last_turn(turn).messages, "more", True, "rewritten", 1.0)

    def close(self):
        pass


@pytest.mark.parametrize("size", [100, 10**6])
def test_a_large_body_is_read_and_written_beside_the_event_loop(upstream, monkeypatch, size):
    threads = []

    def noting(method):
        def noted(*arguments):
            threads.append(threading.get_ident())
            return method(*arguments)

        return noted

    config = config_of(upstream)
    with running(config, Rewriter("r", Echoing(), config)) as proxy:
        loop = []
        monkeypatch.setattr(ChatBody, "read", noting(ChatBody.read))
        monkeypatch.setattr(ChatBody, "with_last_turn", noting(ChatBody.with_last_turn))
        whole = _Body.whole

        async def noted(*arguments):
            loop.append(threading.get_ident())
            return await whole(*arguments)

        monkeypatch.setattr(_Body, "whole", noted)
        turn = "a" * size
        assert ask(proxy, messages=[{"role": "user", "content": turn}])[1]["applied"] == "true"
        assert sent(upstream)["messages"][-1]["content"] == turn + " more"
    assert len(threads) == 2
    assert all((thread in loop) == (size == 100) for thread in threads)


@pytest.mark.parametrize("words", [10, 1000])
def test_guards_read_long_texts_beside_the_event_loop(tiny_model_dir, monkeypatch, words):
    threads = []

    def judge(*arguments):
        threads.append(threading.get_ident())

    monkeypatch.setattr(rewriting, "broken_by", judge)
    model = load_model(tiny_model_dir("llama"), threads=1)
    short = alignpro.Prompting(template="{prompt}", separator=" | ", mode="append")
    with alignpro.Prompter(
        model, prompting=short, params=PARAMS, guards=alignpro.GuardConfig()
    ) as prompter:
        # What the tiny model reads is cut; what the guards read is not.
        monkeypatch.setattr(type(prompter._pipeline), "prompter_tokens", lambda *_: [1, 2, 3])

        async def both():
            prompt = "word " * words
            assert (await prompter.arewrite(prompt)).applied
            pieces = [piece async for piece in await prompter.astream(prompt)]
            assert "".join(pieces).startswith(prompt)
            return threading.get_ident()

        loop = asyncio.run(both())
    assert len(threads) == 2
    assert all((thread == loop) == (words == 10) for thread in threads)


def test_the_circuit_by_its_clock():
    now = [0.0]
    circuit = Circuit(2, 10.0, lambda: now[0])
    for _ in range(2):
        assert circuit.allows()
        circuit.tell(True)
    assert not circuit.allows()
    now[0] = 10.0
    assert circuit.allows() and not circuit.allows()  # one attempt
    circuit.tell(False)
    assert circuit.allows() and circuit.allows()


# --- a model in this process ---


@pytest.fixture(scope="module")
def local(model):
    config = ServeConfig(model="tiny", port=0)
    with running(config, upstream=LocalUpstream(model)) as made:
        yield made


@pytest.fixture(scope="module")
def client(local):
    return openai.OpenAI(base_url=local.url, api_key="none", max_retries=0)


TURN = [{"role": "user", "content": "the heron"}]


def test_it_answers_as_the_model_does(model, client):
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="model 'a/b': expected 'tiny'"):
        client.models.retrieve("a/b")
    reply = client.chat.completions.create(
        model="tiny", messages=TURN, max_tokens=8, seed=3, n=2, temperature=0.7
    )
    params = alignpro.SamplingParams(max_new_tokens=8, seed=3, n=2, temperature=0.7)
    expected = model.generate([TURN], params)
    assert [choice.message.content for choice in reply.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in reply.choices] == [
        one.finish_reason for one in expected
    ]
    assert reply.usage.completion_tokens == sum(len(one.tokens) for one in expected)
    assert reply.usage.prompt_tokens == len(expected[0].prompt_tokens)


def test_a_stream_is_the_same_text_in_pieces(client):
    asked = {"model": "tiny", "messages": TURN, "max_tokens": 12, "seed": 5, "temperature": 0.7}
    whole = client.chat.completions.create(**asked, n=2)
    texts, ends, usage = ["", ""], {}, None
    for event in client.chat.completions.create(
        **asked, n=2, stream=True, stream_options={"include_usage": True}
    ):
        assert usage is None and "usage" in event.model_fields_set  # null in all but the last
        usage = event.usage
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == {0: whole.choices[0].finish_reason, 1: whole.choices[1].finish_reason}
    assert usage == whole.usage


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"max_tokens": 10_000}, 400, "messages"),
        ({"tools": TOOLS}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -1}, 400, None),
        ({"temperature": -1, "stream": True}, 400, None),
        ({"stop": [3]}, 400, "stop"),
        ({"n": 1000}, 400, "n"),
        ({"seed": 1.5}, 400, "seed"),
        ({"temperature": 10**400}, 400, None),
        ({"extra_body": {"stream": "false"}}, 400, "stream"),
        ({"stream": True, "extra_body": {"stream_options": "x"}}, 400, "stream_options"),
        ({"stream_options": {"include_usage": "no"}}, 400, "include_usage"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"modalities": ["text", "audio"]}, 400, "modalities"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(client, fields, status, param):
    body = {"model": "tiny", "messages": TURN} | fields
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**body)
    assert refused.value.status_code == status and refused.value.body["param"] == param


def test_what_asks_for_nothing_else_is_answered(local, client):
    client.chat.completions.create(
        **{"model": "tiny", "messages": TURN, "max_tokens": 1, "tool_choice": "none", "tools": []},
        **{"response_format": {"type": "text"}, "modalities": ["text"], "logit_bias": {}},
    )
    chat = json.dumps({"model": "tiny", "messages": TURN, "max_tokens": 1}).encode()
    for path in (b"/v1/chat/completions/", b"/v1/chat%2Fcompletions"):
        assert split(local.raw(request(chat, line=b"POST " + path)))[0] == b"HTTP/1.1 200 OK"
    head = split(local.raw(request(b"", line=b"HEAD /v1/models/tiny")))
    assert head[0] == b"HTTP/1.1 200 OK" and head[2] == b""


def test_a_stream_that_nobody_reads_on_ends_in_the_engine(model, client):
    stream = client.chat.completions.create(
        model="tiny", messages=TURN, max_tokens=200, stream=True, extra_body={"min_p": 0.0}
    )
    next(iter(stream))
    stream.close()
    until(lambda: model.stats()["kv_blocks_in_use"] == 0)


def test_prompter_and_model_of_one_process(model, prompter):
    config = ServeConfig(model="tiny", run="x", rewrite=True, port=0, deadline_seconds=20.0)
    with running(config, Rewriter("r", prompter, config), LocalUpstream(model)) as proxy:
        client = openai.OpenAI(base_url=proxy.url, api_key="none", max_retries=0)
        fields = {"model": "tiny", "max_tokens": 8, "seed": 3}
        reply = client.chat.completions.create(messages=TURN, **fields)
        asked = prompter.rewrite(TURN).messages
        off = {"x-alignpro": "off"}
        same = client.chat.completions.create(messages=asked, extra_headers=off, **fields)
        assert reply.choices[0].message.content == same.choices[0].message.content
