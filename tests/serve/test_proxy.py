"""Requests and answers pass byte for byte; what breaks upstream breaks for the client alike."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from alignpro.config.serve import ServeConfig
from serve.raw_upstream import (
    BODY,
    STREAM_HEAD,
    RawUpstream,
    answer,
    chunk,
    request,
    split,
    until,
)
from serve.running import running


def test_a_request_passes_byte_for_byte(echo, proxy):
    sent = request(
        BODY,
        b"Authorization: Bearer sk-secret",
        b"X-Twice: a",
        b"X-Twice: b",
        b"X-Hop: mine",
        b"TE: trailers",
        b"X-Alignpro: off",
        b"Content-Type: application/json; charset=utf-8",
    )
    line, headers, body = split(proxy.raw(sent))
    assert line == b"HTTP/1.1 200 OK" and body == b'{"ok": true}'
    assert headers[b"x-alignpro-applied"] == b"false" and headers[b"x-alignpro-reason"] == b"off"
    assert b"date" not in headers and b"server" not in headers
    (got,) = echo.got
    assert got.body == BODY and got.line == b"POST /v1/chat/completions HTTP/1.1"
    assert sorted(got.headers) == sorted(
        [
            (b"host", b"127.0.0.1:%d" % echo.port),
            (b"authorization", b"Bearer sk-secret"),
            (b"x-twice", b"a"),
            (b"x-twice", b"b"),
            (b"content-type", b"application/json; charset=utf-8"),
            (b"content-length", b"%d" % len(BODY)),
        ]
    )


def test_an_answer_passes_byte_for_byte_encoded_as_it_is(echo, proxy):
    packed = gzip.compress(b'{"choices": []}', mtime=0)
    extra = b"content-encoding: gzip\r\nset-cookie: a=1\r\nset-cookie: b=2\r\nx-request-id: 7\r\n"
    echo.says = answer(packed, b"429 Too Many Requests", extra + b"retry-after: 3\r\n")
    raw = proxy.raw(request(BODY, b"Accept-Encoding: gzip"))
    line, headers, body = split(raw)
    assert line.startswith(b"HTTP/1.1 429") and body == packed
    assert headers[b"retry-after"] == b"3" and headers[b"x-request-id"] == b"7"
    assert raw.count(b"set-cookie") == 2
    assert len(echo.got) == 1  # no retry of ours


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/files"])
def test_a_transfer_coding_that_would_be_lost_is_refused(echo, proxy, path):
    head = b"POST " + path + b" HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    line, _, body = split(proxy.raw(head + chunk(gzip.compress(BODY)) + b"0\r\n\r\n"))
    assert b"501" in line and b"expected chunked alone" in body and not echo.got


def test_anything_else_under_v1_is_relayed(echo, proxy):
    assert split(proxy.raw(request(b"", line=b"GET /v1/models/a%2Fb?limit=2&x=%20")))[0].endswith(
        b"OK"
    )
    assert echo.got[0].line == b"GET /v1/models/a%2Fb?limit=2&x=%20 HTTP/1.1"
    upload = b"x" * 300_000
    _, headers, _ = split(proxy.raw(request(upload, line=b"POST /v1/files")))
    assert echo.got[1].body == upload and b"x-alignpro-applied" not in headers
    chunked = (
        b"PUT /v1/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    proxy.raw(chunked + chunk(b"abc") + chunk(b"defg") + b"0\r\n\r\n")
    assert echo.got[2].body == b"abcdefg"
    line, _, _ = split(proxy.raw(request(b"", line=b"GET /v1/../admin")))
    assert b"404" in line and len(echo.got) == 3
    assert b"404" in split(proxy.raw(request(b"", line=b"GET /other")))[0]


def test_a_stream_is_relayed_as_it_comes():
    go_on = threading.Event()

    def reply(got, send):
        send(STREAM_HEAD + chunk(b"data: one\n\n"))
        assert go_on.wait(20)
        send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client,
    ):
        client.sendall(request())
        got = b""
        while b"data: one\n\n" not in got:
            got += client.recv(65536)
        assert b"[DONE]" not in got
        go_on.set()
        while data := client.recv(65536):
            got += data
        assert got.endswith(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def test_half_a_stream_is_half_a_stream_here_too():
    def reply(got, send):
        send(STREAM_HEAD + chunk(b"data: one\n\n"))
        return False

    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):
        raw = proxy.raw(request())
        assert raw.endswith(chunk(b"data: one\n\n"))  # and no last chunk
        assert proxy.metric("alignpro_answers_cut_total", by="upstream") == 1

    def short(got, send):
        send(answer(b"x" * 100)[:-50])
        return False

    with (
        RawUpstream(short) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):
        _, headers, body = split(proxy.raw(request()))
        assert headers[b"content-length"] == b"100" and body == b"x" * 50


def test_a_client_that_leaves_ends_the_upstreams_work():
    def reply(got, send):
        send(STREAM_HEAD)
        while True:
            send(chunk(b"data: x\n\n"))
            time.sleep(0.01)

    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(request())
            assert client.recv(10)
        assert upstream.left.wait(20)
        until(lambda: proxy.metric("alignpro_answers_cut_total", by="client") == 1)
        assert proxy.metric("alignpro_requests_in_progress") == 0


def test_no_upstream_is_502_and_a_silent_one_504_as_openai_says_errors():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with running(ServeConfig(upstream=nobody, port=0)) as proxy:
        line, _, body = split(proxy.raw(request()))
        error = json.loads(body)["error"]
        assert b"502" in line and error["type"] == "upstream_error" and error["param"] is None

    with RawUpstream(lambda got, send: time.sleep(3)) as upstream:
        config = ServeConfig(upstream=upstream.url, port=0, idle_seconds=0.3)
        with running(config) as proxy:
            line, _, body = split(proxy.raw(request()))
            assert b"504" in line and "0.3 s" in json.loads(body)["error"]["message"]


def test_a_connection_that_the_upstream_closed_meanwhile_costs_no_request():
    def reply(got, send):
        send(answer(b"{}"))
        if len(upstream.got) < 40:
            return False  # closed without having said so
        return None

    upstream = RawUpstream(reply)
    with upstream, running(ServeConfig(upstream=upstream.url, port=0)) as proxy:
        for _ in range(40):
            assert b"200" in split(proxy.raw(request()))[0]


def test_limits():
    def reply(got, send):
        send(answer(b"{}"))

    limits = {"max_body": 1000, "max_header": 2000, "receive_seconds": 0.5}
    with RawUpstream(reply) as upstream:
        config = ServeConfig(upstream=upstream.url, port=0, **limits)
        with running(config) as proxy:
            line, _, body = split(proxy.raw(request(b"x" * 1001)))
            assert b"413" in line and json.loads(body)["error"]["code"] == "request_too_large"
            assert b"200" in split(proxy.raw(request(b"x" * 1000)))[0]
            assert b"400" in split(proxy.raw(request(BODY, b"X-Long: " + b"x" * 3000)))[0]
            begun = b"GET /v1/models HTTP/1.1\r\nX-Endless: "
            assert b"400" in split(proxy.raw(begun + b"x" * 9000))[0]
            assert proxy.raw(begun) == b""  # closed, when its headers did not come
            missing = (
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nab"
            )
            assert b"408" in split(proxy.raw(missing))[0]
            assert len(upstream.got) == 1
            line, _, body = split(proxy.raw(missing.replace(b"chat/completions", b"files")))
            assert b"408" in line and b"nothing of the body arrived for 0.5 s" in body
            until(lambda: len(upstream.got) == 2)
            assert upstream.got[1].body == b"ab"  # and no more came
        with running(ServeConfig(upstream=upstream.url, port=0, max_connections=2)) as proxy:
            held = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(4)]
            time.sleep(0.2)
            assert b"503" in split(proxy.raw(request()))[0]
            for connection in held:
                connection.close()


def test_what_is_not_under_v1_says_so(proxy):
    for line in (b"POST /chat/completions", b"GET /v1"):
        status, _, body = split(proxy.raw(request(b"{}", line=line)))
        assert b"404" in status
        assert "base_url ends in /v1" in json.loads(body)["error"]["message"]


def test_its_own_pages(echo, proxy):
    for page in (b"/health", b"/ready"):
        assert b"200" in split(proxy.raw(request(b"", line=b"GET " + page)))[0]
    proxy.raw(request(BODY, b"Authorization: Bearer sk-secret"))
    _, headers, body = split(proxy.raw(request(b"", line=b"GET /metrics")))
    assert b"text/plain" in headers[b"content-type"]
    assert (
        b'alignpro_chat_requests_total{applied="false",mode="off",reason="off",run=""} 1.0' in body
    )
    assert b"sk-secret" not in body


def test_many_clients_get_their_own_answers():
    def reply(got, send):
        send(STREAM_HEAD + chunk(got.body[:10]) + chunk(got.body[10:]) + b"0\r\n\r\n")

    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):

        def ask(number: int) -> bool:
            body = b"a request of its own, number %d" % number
            return body[:10] in (raw := proxy.raw(request(body))) and body[10:] in raw

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(200)))
