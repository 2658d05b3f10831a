"""A client's connection: its limits, offers, trailers, pipelines, and what is no HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable

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
