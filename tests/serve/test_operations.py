"""Routes, a second run, shadow mode, the audit log, and an adapter that changes under load."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import pytest

import alignpro
from alignpro.config import REWRITE
from alignpro.config.serve import AuditConfig, RouteConfig, ServeConfig
from alignpro.models.adapter import save_peft
from alignpro.models.chat_template import today
from alignpro.models.native_model import load_model
from alignpro.serve.audit import AuditLog
from alignpro.serve.build import build_proxy
from alignpro.serve.rewriter import Rewriter
from alignpro.serve.routes import Route, Routes
from alignpro.types import Conversation
from native_runs import assert_settles, lora, save_run
from serve.raw_upstream import RawUpstream, answer, request, split, until
from serve.running import running

PROMPTING = alignpro.Prompting(template="{prompt}", separator=" | ")
PARAMS = replace(REWRITE, max_new_tokens=6, ignore_eos=True, temperature=0.0)
TURN = [{"role": "user", "content": "the heron"}]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir("llama"), threads=1)


@pytest.fixture
def upstream():
    """Answers with the last turn that it read."""

    def reply(got, send):
        turn = json.loads(got.body)["messages"][-1]["content"]
        message = {"role": "assistant", "content": turn}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        send(
            answer(
                json.dumps({"choices": choices}).encode(),
                headers=b"content-type: application/json\r\n",
            )
        )

    with RawUpstream(reply) as made:
        yield made


class Named:
    """A prompter that appends a word."""

    def __init__(self, word):
        self.word = word

    async def arewrite(self, conversation, *, deadline):
        turn = f"{conversation.last_turn} {self.word}"
        messages = conversation.with_last_turn(turn).messages
        return alignpro.Rewritten(messages, self.word, True, "rewritten", 1.0)

    def reload(self):
        raise FileNotFoundError("no adapter")

    def close(self):
        pass


def config_of(upstream, **fields):
    return ServeConfig(upstream=upstream.url, port=0, deadline_seconds=20.0, **fields)


def ask(proxy, model="m", turn="the heron", mode=None):
    client = openai.OpenAI(base_url=proxy.url, api_key="sk-secret", max_retries=0)
    headers = {} if mode is None else {"x-alignpro": mode}
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": turn}], extra_headers=headers
    )
    return raw.parse().choices[0].message.content, raw.headers


def test_requests_go_by_the_name_of_their_model(upstream):
    config = config_of(upstream)
    one, two = (Rewriter(word, Named(word), config) for word in ("one", "two"))
    routes = Routes(Route("off"), {"a": Route("on", [one]), "b": Route("shadow", [two])})
    with running(config, routes=routes) as proxy:
        assert ask(proxy, "a")[0] == "the heron one"
        assert ask(proxy, "b")[0] == ask(proxy, "c")[0] == "the heron"
        assert ask(proxy, "b", mode="on")[0] == "the heron two"
        assert ask(proxy, "c", mode="on")[1]["x-alignpro-reason"] == "no_run"
        assert ask(proxy, "a", mode="off")[0] == "the heron"
        labels = {"run": "two", "mode": "shadow", "applied": "false", "reason": "rewritten"}
        until(lambda: proxy.metric("alignpro_chat_requests_total", **labels) == 1)


def test_a_second_run_has_its_share_and_keeps_its_conversations(upstream):
    config = config_of(upstream)
    one, two = (Rewriter(word, Named(word), config) for word in ("one", "two"))
    route = Route("on", [one, two], 0.25)
    begun = [Conversation((), f"question {number}") for number in range(2000)]
    of_second = [route.rewriter(conversation) is two for conversation in begun]
    assert 400 < sum(of_second) < 600
    for conversation, second in zip(begun[:50], of_second, strict=False):
        history = (("user", conversation.last_turn), ("assistant", "yes"))
        later = Conversation(history, "and then?")
        assert (route.rewriter(later) is two) == second
    assert Route("on", [one, two], 0.0).rewriter(begun[0]) is one
    assert Route("on", [one, two], 1.0).rewriter(begun[0]) is two
    with running(config, routes=Routes(route)) as proxy:
        number = of_second.index(True)
        content, headers = ask(proxy, turn=f"question {number}")
        assert content.endswith(" two") and headers["x-alignpro-run"] == "two"


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"share": 0.5, "run": "a"}, "share: expected 0 without second_run"),
        ({"share": 1.5}, "share: expected between 0 and 1"),
        ({"second_run": "a", "rewrite": False}, "second_run: expected null without run"),
        ({"sampling": {"n": 1}, "rewrite": False}, "sampling: expected null without run"),
        ({}, "rewrite: expected false without run"),
    ],
)
def test_routes_are_checked(fields, part):
    with pytest.raises(ValueError, match=part):
        RouteConfig(**fields)


def test_a_configuration_of_routes_is_read():
    config = alignpro.config.from_mapping(
        ServeConfig,
        {"upstream": "http://a", "routes": {"m": {"run": "r", "rewrite": "shadow"}, "n": "s"}},
    )
    assert config.routes["m"].rewrite == "shadow" and config.routes["n"].run == "s"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_on_one_engine_every_model_is_told_its_own_date(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    dates = ("2026-03-01", "2026-04-02")
    first, second = (save_run(tmp_path / day, base, 6, date=day) for day in dates)
    config = ServeConfig(run=str(first), second_run=str(second), model=str(base), threads=1)
    proxy = build_proxy(config)
    models = [rewriter._prompter.model for rewriter in proxy._routes.rewriters]
    models.append(proxy._upstream._model)
    assert [one.tokenizer.date for one in models] == [*dates, today()]
    assert len({id(one.core_model) for one in models}) == 1
    asyncio.run(proxy.close())


def test_rewrites_are_drawn_as_a_route_says(tiny_model_dir, tmp_path):
    run = str(save_run(tmp_path / "run", tiny_model_dir("llama"), 6))
    greedy = {"run": run, "sampling": {"temperature": 0}}
    routes = {"a": greedy, "b": greedy, "c": run}
    made = alignpro.config.from_mapping(ServeConfig, {"upstream": "http://a", "routes": routes})
    proxy = build_proxy(made)
    drawn = [r._prompter._pipeline.rewrite_params.temperature for r in proxy._routes.rewriters]
    assert drawn == [0.0, 1.0]
    asyncio.run(proxy.close())


def test_a_runs_name_is_shown_as_headers_may_have_it(upstream, tiny_model_dir, tmp_path):
    run = save_run(tmp_path / "ein h\u00fcbscher\nName", tiny_model_dir("llama"), 6)
    config = config_of(upstream, run=str(run), rewrite=True, threads=1)
    with running(config, routes=build_proxy(config)._routes) as proxy:
        shown = ask(proxy)[1]["x-alignpro-run"]
    assert shown == "ein h\u00fcbscher?Name"


@pytest.mark.parametrize("texts", [False, True])
def test_the_audit_log(upstream, tmp_path, texts):
    path = tmp_path / "audit.jsonl"
    config = config_of(upstream, audit=AuditConfig(str(path), texts=texts))
    routes = Routes(Route("on", [Rewriter("one", Named("word"), config)]))
    with running(config, routes=routes) as proxy:
        for mode in (None, "off", "shadow"):
            ask(proxy, mode=mode)
        until(lambda: len(rows(path)) == 3)
    by_mode = {row["mode"]: row for row in rows(path)}
    assert set(by_mode) == {"on", "off", "shadow"}
    on, shadow = by_mode["on"], by_mode["shadow"]
    assert on["applied"] and on["reason"] == "rewritten" and on["run"] == "one"
    assert not shadow["applied"] and shadow["reason"] == "rewritten"
    assert on["time"].endswith("+00:00") and on["model"] == "m"
    assert ("prompt" in on) == texts and "sk-secret" not in path.read_text()
    if texts:
        assert (shadow["prompt"], shadow["rewrite"]) == ("the heron", "word")
    assert path.stat().st_mode & 0o077 == 0


def test_the_audit_log_is_put_aside(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(AuditConfig(str(path), max_bytes=1000, files=2, texts=True))
    for number in range(100):
        log.write({"number": number}, prompt="\ud800", rewrite="")
    log.close()
    kept = sorted(file.name for file in tmp_path.iterdir())
    assert kept == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(file.stat().st_size <= 1000 for file in tmp_path.iterdir())
    assert rows(path)[-1]["number"] == 99
    for nowhere in (tmp_path / "missing" / "audit.jsonl", tmp_path):
        with pytest.raises(OSError, match=rf"^audit\.path: expected .*{re.escape(str(nowhere))}"):
            AuditLog(AuditConfig(str(nowhere)))


def test_a_guard_that_is_broken_lets_the_original_out_and_is_counted(upstream, model):
    config = config_of(upstream, rewrite=True, run="x")
    options = {"prompting": alignpro.Prompting(mode="rewrite", template="{prompt}")}
    guards = alignpro.GuardConfig(cut=False)
    prompter = alignpro.Prompter(model, params=PARAMS, guards=guards, **options)
    with running(config, Rewriter("r", prompter, config)) as proxy:
        turn = "Ask [protected]Dr. Oe[/protected] for 12 birds"
        content, headers = ask(proxy, turn=turn)
        assert content == turn and headers["x-alignpro-reason"] == "guard_spans"
        labels = {"run": "r", "mode": "on", "applied": "false", "reason": "guard_spans"}
        assert proxy.metric("alignpro_chat_requests_total", **labels) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full is /dev/full")
def test_a_full_disk_costs_lines_of_the_audit_log_alone(upstream, caplog, capfd):
    with running(config_of(upstream, audit=AuditConfig("/dev/full"))) as proxy:
        for _ in range(2):
            assert ask(proxy)[0] == "the heron"
    line = "audit.path: /dev/full: a line is lost: No space left on device"
    assert caplog.messages == [line] * 2 and "Traceback" not in capfd.readouterr().err


def test_an_adapter_changes_under_load_and_no_request_is_lost(upstream, model, tmp_path):
    folder = tmp_path / "adapter"
    save_peft(folder, lora(model, 1))
    options = {"prompting": PROMPTING, "params": PARAMS}
    expected = []
    for seed in (1, 2):
        with alignpro.Prompter(model, lora(model, seed), **options) as prompter:
            expected.append(prompter.rewrite(TURN).messages[-1]["content"])
    assert expected[0] != expected[1]
    config = config_of(upstream, rewrite=True, run="x")
    rewriter = Rewriter("r", alignpro.Prompter(model, folder, **options), config)
    stop = threading.Event()
    with running(config, rewriter) as proxy, ThreadPoolExecutor(8) as pool:

        def load():
            seen = []
            while not stop.is_set():
                content, headers = ask(proxy)
                assert headers["x-alignpro-reason"] == "rewritten"
                seen.append(content)
            return seen

        loads = [pool.submit(load) for _ in range(8)]
        until(lambda: len(upstream.got) > 20)
        save_peft(folder, lora(model, 2))
        address = proxy.url.removesuffix("/v1") + "/admin/reload"
        with urllib.request.urlopen(urllib.request.Request(address, method="POST")) as response:
            assert json.load(response) == {"r": "reloaded"}
        after = ask(proxy)[0]
        before = len(upstream.got)
        until(lambda: len(upstream.got) > before + 20)
        stop.set()
        seen = [content for one in loads for content in one.result()]
    assert set(seen) == set(expected) and after == expected[1]
    assert_settles(model)


def test_a_reload_that_fails_is_said_and_changes_nothing(upstream):
    config = config_of(upstream, rewrite=True, run="x")
    with running(config, Rewriter("r", Named("word"), config)) as proxy:
        address = proxy.url.removesuffix("/v1") + "/admin/reload"
        with urllib.request.urlopen(urllib.request.Request(address, method="POST")) as response:
            assert json.load(response) == {"r": "no adapter"}
        assert ask(proxy)[0] == "the heron word"


def test_an_error_of_ours_is_said_as_openai_writes_errors():
    class Broken:
        async def send(self, request):
            raise TypeError("a defect")

        async def close(self):
            pass

    with running(ServeConfig(model="m", port=0), upstream=Broken()) as proxy:
        line, headers, body = split(proxy.raw(request()))
    assert b"500" in line and headers[b"content-type"] == b"application/json"
    assert json.loads(body)["error"]["type"] == "server_error" and b"defect" not in body
