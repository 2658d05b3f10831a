"""Requests and answers pass byte for byte; what breaks upstream breaks for the client alike."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable
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


@pytest.fixture
def echo():
    """Answers what it is told in ``echo.says``."""

    def reply(got, send):
        send(upstream.says)

    upstream = RawUpstream(reply)
    upstream.says = answer(b'{"ok": true}', headers=b"content-type: application/json\r\n")
    with upstream:
        yield upstream


@pytest.fixture
def proxy(echo):
    with running(ServeConfig(upstream=echo.url, port=0)) as made:
        yield made


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


def test_a_body_that_is_too_long_is_not_asked_for(echo):
    with running(ServeConfig(upstream=echo.url, port=0, max_body=1000)) as proxy:
        expects = b"Expect: 100-continue"
        assert proxy.raw(head_of(1001, expects)[:-2] + b"\r\n").startswith(b"HTTP/1.1 413 ")
        with connected(proxy) as client:
            client.sendall(head_of(2, expects))
            assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(b"{}")
            assert received(client)().startswith(b"HTTP/1.1 200 ")
        assert len(echo.got) == 1


def test_a_refusal_in_the_middle_of_a_body_arrives_and_ends_the_connection(echo):
    limits = {"max_body": 1000, "receive_seconds": 0.5}
    with running(ServeConfig(upstream=echo.url, port=0, **limits)) as proxy:
        for rest in (10**7, 0):  # all of it, and a client that does not go on
            with connected(proxy) as client:
                client.sendall(head_of(10**7 + 1) + b"x")
                time.sleep(0.1)
                for _ in range(rest // 10**6):
                    client.sendall(b"x" * 10**6)  # a reset would be an error here
                got = b""
                while data := client.recv(65536):
                    got += data
                assert got.startswith(b"HTTP/1.1 413 ") and b"request_too_large" in got
                until(lambda: not proxy.connections)


def test_a_client_that_takes_nothing_is_left_and_a_slow_one_is_not():
    large = b"x" * (8 * 2**20)
    sent = []

    def reply(got, send):
        if got.body == b"stream":
            send(STREAM_HEAD)
            while True:
                send(chunk(b"x" * 2**16))
        send(answer(large))
        sent.append(got.body)

    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0, send_seconds=0.5)) as proxy,
        contextlib.ExitStack() as open_,
    ):

        def asked(body: bytes, *headers: bytes) -> socket.socket:
            client = open_.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(20)
            client.connect(("127.0.0.1", proxy.port))
            client.sendall(head_of(len(body), *headers) + body)
            return client

        asked(b"stream")
        asked(b"whole")
        asked(b"whole", b"Connection: close")
        until(lambda: proxy.connections == 3)
        until(lambda: not proxy.connections)
        assert upstream.left.wait(20)
        slow, got = asked(b"slow", b"Connection: close"), b""
        begun = time.monotonic()
        while data := slow.recv(2**15):
            got += data
            if time.monotonic() < begun + 3.0:
                time.sleep(0.1)
        assert got.endswith(b"\r\n\r\n" + large)


def test_a_connection_on_which_nothing_is_asked_is_ended(echo):
    config = ServeConfig(upstream=echo.url, port=0, receive_seconds=0.5)
    with running(config) as proxy, connected(proxy) as client:
        client.sendall(head_of(2) + b"{}")
        received(client)()
        client.sendall(b"\r\n")  # which may stand before a request
        assert client.recv(1) == b""


def received(client: socket.socket) -> Callable[[], bytes]:
    """Reads one answer with a length after the other."""
    file = client.makefile("rb")

    def read() -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = file.readline()
            assert line, "the connection ended"
            head += line
        lengths = [h for h in head.lower().split(b"\r\n") if h.startswith(b"content-length: ")]
        has_body = b" 304 " not in head
        return head + (file.read(int(lengths[0][16:])) if lengths and has_body else b"")

    return read


def connected(proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=20)


def head_of(length: int, *headers: bytes, line: bytes = b"POST /v1/chat/completions") -> bytes:
    length_of = [b"Content-Length: %d" % length]
    return b"\r\n".join([line + b" HTTP/1.1", b"Host: h", *headers, *length_of, b"", b""])


# Java's client and `curl --http2` offer it with every first request.
OFFER = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA")


@pytest.mark.parametrize("line", [b"POST /v1/chat/completions", b"POST /v1/files"])
def test_an_offer_of_http2_is_declined_and_costs_no_body(line):
    with (
        RawUpstream(lambda got, send: send(answer(got.body))) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
        connected(proxy) as client,
    ):
        read = received(client)
        asked = [head_of(9, *OFFER, line=line) + b"number %02d" % i for i in range(4)]
        client.sendall(asked[0])
        assert read().endswith(b"number 00")
        client.sendall(asked[1] + asked[2] + asked[3][:20])
        assert read().endswith(b"number 01") and read().endswith(b"number 02")
        client.sendall(asked[3][20:])
        assert read().endswith(b"number 03")
        last = request(b"number 04", b"Connection: Upgrade, HTTP2-Settings", *OFFER[1:], line=line)
        assert proxy.raw(last).endswith(b"number 04")
        assert all(b"upgrade" not in dict(got.headers) for got in upstream.got)
        client.sendall(b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n")
        assert read().startswith(b"HTTP/1.1 400")


def test_headers_that_are_too_long_are_said_to_be(proxy):
    for headers in ([b"X-Long: " + b"a" * 70_000], [b"X-Some: " + b"a" * 100] * 700):
        raw = proxy.raw(head_of(0, *headers, line=b"GET /v1/models"))
        assert raw.startswith(b"HTTP/1.1 400") and b"max_header allows more" in raw


def test_trailers_are_no_headers_and_have_an_end(echo, proxy):
    for path in (b"/v1/chat/completions", b"/v1/files"):
        head = b"POST " + path + b" HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n"
        begun = head + b"Connection: close\r\n\r\n" + chunk(BODY) + b"0\r\n"
        raw = proxy.raw(begun + b"x-alignpro: shadow\r\nx-trailer: 1\r\n\r\n")
        assert raw.startswith(b"HTTP/1.1 200") and b"shadow" not in raw
        names = [name for name, _ in echo.got[-1].headers]
        assert echo.got[-1].body == BODY and b"x-trailer" not in names
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
            client.sendall(begun + b"x-trailer: ")
            with pytest.raises(ConnectionError):  # 200 MB were held
                for _ in range(200):
                    client.sendall(b"x" * 10**6)


def test_what_is_no_http_behind_a_request_does_not_cut_its_answer():
    sent = threading.Event()

    def reply(got, send):
        send(STREAM_HEAD + chunk(b"one"))
        assert sent.wait(20)
        send(chunk(b"two") + b"0\r\n\r\n")

    two = b"POST /v1/files HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nwhat?\r\n"
    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):
        for behind in (b"}\r\n\r\n", two, b"x" * 10**6):
            sent.clear()
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
                client.sendall(request().replace(b"Connection: close", b"Connection: x"))
                got = b""
                while b"one" not in got:
                    got += client.recv(65536)
                client.sendall(behind)
                time.sleep(0.2)
                sent.set()
                while data := client.recv(65536):
                    got += data
            assert got.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n") and b"HTTP/1.1 400" not in got


def test_a_client_of_http_1_0_gets_no_chunks():
    def reply(got, send):
        send(STREAM_HEAD + chunk(b"data: one\n\n") + chunk(b"data: two\n\n") + b"0\r\n\r\n")

    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):
        _, headers, body = split(proxy.raw(request().replace(b"HTTP/1.1", b"HTTP/1.0")))
        assert body == b"data: one\n\ndata: two\n\n"
        assert b"transfer-encoding" not in headers and headers[b"connection"] == b"close"


def test_odd_statuses_pass_and_the_connection_goes_on(echo, proxy):
    with connected(proxy) as client:
        read = received(client)
        echo.says = b"HTTP/1.1 304 Not Modified\r\netag: x\r\ncontent-length: 1234\r\n\r\n"
        client.sendall(head_of(0, line=b"GET /v1/models"))
        assert (got := read()).startswith(b"HTTP/1.1 304 ") and b"content-length: 1234" in got
        for status in (b"529 Overloaded", b"720 Odd", b"999 Denied"):
            echo.says = answer(b"no", status)
            client.sendall(head_of(2) + b"{}")
            assert (got := read()).startswith(b"HTTP/1.1 " + status[:4]) and got.endswith(b"no")


def test_requests_of_one_connection_do_not_wait_for_each_other():
    slow = threading.Event()

    def reply(got, send):
        if got.body == b"slow":
            assert slow.wait(20)
        send(answer(got.body))

    limits = {"max_header": 2000, "receive_seconds": 0.4}
    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0, **limits)) as proxy,
    ):
        with connected(proxy) as client:  # headers behind the end of a long body
            read = received(client)
            client.sendall(head_of(9000) + b"x" * 9000 + head_of(2)[:30])
            assert read().endswith(b"x" * 9000)
            client.sendall(head_of(2)[30:] + b"{}")
            assert read().endswith(b"{}")
        with connected(proxy) as client:  # headers that wait behind a slow answer are not late
            client.sendall(head_of(4) + b"slow" + head_of(2)[:30])
            time.sleep(1.0)
            slow.set()
            assert received(client)().endswith(b"slow")
            assert client.recv(1) == b""  # now they are


def test_a_client_that_leaves_behind_two_requests_ends_the_first():
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        running(
            ServeConfig(upstream=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", port=0)
        ) as proxy,
    ):
        listening.settimeout(20)
        with connected(proxy) as client:
            client.sendall((head_of(2) + b"{}") * 2)
            upstream, _ = listening.accept()
            upstream.settimeout(20)
            assert upstream.recv(65536)
        with upstream:
            while upstream.recv(65536):
                pass  # it ends, though it says nothing itself


def test_one_connection_too_many_ends_no_other(echo):
    config = ServeConfig(upstream=echo.url, port=0, max_connections=2)
    with running(config) as proxy, contextlib.ExitStack() as open_:
        clients = [open_.enter_context(connected(proxy)) for _ in range(3)]
        time.sleep(0.2)
        for client in reversed(clients):
            client.sendall(head_of(2) + b"{}")
        *answered, refused = (received(client)() for client in clients)
        assert all(got.startswith(b"HTTP/1.1 200") for got in answered)
        assert refused.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in refused
        assert json.loads(split(refused)[2])["error"]["code"] == "too_many_connections"
        health = b"GET /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
        assert b"200" in split(proxy.raw(health))[0]


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
