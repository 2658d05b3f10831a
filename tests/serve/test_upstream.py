"""The proxy and its upstream: TLS, back-pressure, connections that are kept, odd bytes."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time

import pytest

from alignpro.config.serve import ServeConfig
from serve.raw_upstream import STREAM_HEAD, RawUpstream, answer, chunk, until
from serve.running import running

CHAT = b"POST /v1/chat/completions"
OPENSSL = shutil.which("openssl")


def request(line: bytes, *headers: bytes, body: bytes | None = None) -> bytes:
    length = [] if body is None else [b"Content-Length: %d" % len(body)]
    lines = [line + b" HTTP/1.1", b"Host: h", b"Connection: close", *headers, *length, b""]
    return b"\r\n".join([*lines, body or b""])


def said(raw: bytes) -> tuple[int, str]:
    """Status and message of an error of ours."""
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.fixture
def echo():
    with RawUpstream(lambda got, send: send(answer(got.body))) as upstream:
        yield upstream


@pytest.fixture
def proxy(echo):
    with running(ServeConfig(upstream=echo.url, port=0)) as made:
        yield made


@pytest.mark.skipif(OPENSSL is None, reason="openssl makes the certificate")
def test_an_upstream_with_a_certificate_of_a_ca_that_is_named(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(made, check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)

    def reply(got, send):
        send(STREAM_HEAD + chunk(got.body[:5]) + chunk(got.body[5:]) + b"0\r\n\r\n")

    with RawUpstream(reply, tls) as upstream:
        config = ServeConfig(upstream=upstream.url, port=0)
        asked = request(CHAT, body=b'{"messages": 1}')
        with running(config) as proxy:
            status, message = said(proxy.raw(asked))
            assert status == 502 and "certificate" in message.lower() and not upstream.got
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with running(config) as proxy:
            for _ in range(2):
                raw = proxy.raw(asked)
                assert raw.startswith(b"HTTP/1.1 200") and b'ages": 1}' in raw


def test_an_upstream_waits_for_a_client_that_does_not_read():
    sent, piece = [], chunk(b"x" * 2**16)

    def reply(got, send):
        send(STREAM_HEAD)
        for _ in range(1600):  # 100 MiB
            send(piece)
            sent.append(len(piece))
        send(b"0\r\n\r\n")

    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client,
    ):
        client.sendall(request(CHAT, body=b"{}"))
        until(lambda: len(sent) > 0)
        before = -1
        while len(sent) != before:
            before = len(sent)
            time.sleep(0.5)
        assert sum(sent) < 30 * 2**20  # what sockets hold, and little more
        got = 0
        while data := client.recv(2**20):
            got += len(data)
        assert got > 1600 * 2**16 and len(sent) == 1600


def test_bodies_of_any_size_arrive_and_headers_as_they_are(echo, proxy):
    body = b"x" * (3 * 2**20 + 1)
    assert proxy.raw(request(CHAT, body=body)).endswith(body)
    header = "X-Name: Zo\u00eb \U0001f40d, a\tb".encode()
    proxy.raw(request(b"DELETE /v1/files/a//b/./c%7E?q=%FF&q=a+b&%71=", header))
    got = echo.got[1]
    assert got.line == b"DELETE /v1/files/a//b/./c%7E?q=%FF&q=a+b&%71= HTTP/1.1"
    assert dict(got.headers) == {
        b"host": b"127.0.0.1:%d" % echo.port,
        b"x-name": header.partition(b": ")[2],
        b"content-length": b"0",
    }
    status, message = said(proxy.raw(request(b"GET /v1/models", b"X-Name: Zo\xeb")))
    assert (status, message) == (400, "expected UTF-8 in the header x-name")
    assert len(echo.got) == 2


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/chat/completions/",
        b"/v1//chat//completions",
        b"/v1/./chat/completions",
        b"/v1/chat%2Fcompletions",
        b"/%76%31/%63hat/completions",
        b"/v1/chat/completions?api-version=1",
    ],
)
def test_a_chat_is_known_by_what_its_path_names_and_goes_on_as_it_came(echo, proxy, path):
    raw = proxy.raw(request(b"POST " + path, body=b"{}"))
    assert b"\r\nx-alignpro-reason: off\r\n" in raw
    assert echo.got[0].line == b"POST %s HTTP/1.1" % path.replace(b"%76%31", b"v1")


@pytest.mark.parametrize("base", ["/v1", "/api/openai"])
def test_a_redirect_does_not_lead_past_the_proxy(base):
    """Such as FastAPI's from a path with a slash at its end."""

    def reply(got, send):
        send(answer(b"", b"307 Temporary Redirect", b"location: " + got.body + b"\r\n"))

    with RawUpstream(reply) as upstream:
        origin, there = f"http://127.0.0.1:{upstream.port}", f"{base}/chat/completions?a"
        with running(ServeConfig(upstream=origin + base, port=0)) as proxy:
            for said, told in (
                (origin + there, "/v1/chat/completions?a"),
                (there, "/v1/chat/completions?a"),
                ("https://elsewhere" + there, "https://elsewhere" + there),
                (base + "x/chat", base + "x/chat"),
            ):
                raw = proxy.raw(request(CHAT + b"/", body=said.encode()))
                assert b"\r\nlocation: %s\r\n" % told.encode() in raw


def test_the_bytes_of_an_answers_headers_pass():
    extra = b"x-name: Zo\xeb\r\nlocation: /elsewhere\r\nx-long: " + b"y" * 20_000 + b"\r\n"
    extra += b"".join(b"x-%d: 1\r\n" % number for number in range(300))

    def reply(got, send):
        send(answer(b"" if got.line.startswith(b"HEAD") else b"moved", b"302 Found", extra))

    with RawUpstream(reply) as upstream:
        with running(ServeConfig(upstream=upstream.url, port=0)) as proxy:
            raw = proxy.raw(request(b"GET /v1/models"))
            assert raw.startswith(b"HTTP/1.1 302") and raw.endswith(b"\r\n\r\nmoved")
            assert extra.strip() in raw
            raw = proxy.raw(request(b"HEAD /v1/models"))
            assert raw.startswith(b"HTTP/1.1 302") and raw.endswith(b"\r\n\r\n")
        assert len(upstream.got) == 2


def test_what_an_upstream_says_unasked_is_nobodys_answer():
    def reply(got, send):
        send(answer(got.body))
        if got.body == b"one":
            threading.Timer(0.2, send, [answer(b"for nobody")]).start()

    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):
        assert proxy.raw(request(CHAT, body=b"one")).endswith(b"\r\n\r\none")
        time.sleep(0.6)
        assert proxy.raw(request(CHAT, body=b"two")).endswith(b"\r\n\r\ntwo")


@pytest.mark.parametrize(
    ("line", "sends", "status", "body"),
    [
        (CHAT, b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\n{}", b"204", b""),
        (
            CHAT,
            b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"204",
            b"",
        ),
        (b"HEAD /v1/models", answer(b"a body"), b"200", b""),
        (CHAT, answer(b"one") + b"more", b"200", b"one"),
        (CHAT, STREAM_HEAD + chunk(b"one") + b"0\r\n\r\nmore", b"200", b"3\r\none\r\n0\r\n\r\n"),
    ],
)
def test_what_stands_behind_an_answer_does_not_cost_it(line, sends, status, body, caplog):
    with (
        RawUpstream(lambda got, send: send(sends)) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):
        for _ in range(2):
            head, _, came = proxy.raw(request(line, body=b"{}")).partition(b"\r\n\r\n")
            assert head.split()[1] == status and came == body
    assert not caplog.records


def test_a_stream_that_is_no_http_in_its_middle_ends_and_holds_up_nobody():
    def reply(got, send):
        send(STREAM_HEAD + chunk(b"data: one\n\n"))
        if got.body == b"later":
            time.sleep(0.2)
        send(b"what?\r\n")
        with contextlib.suppress(OSError):
            for _ in range(2000):
                send(b"x" * 10**6)

    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):
        for body in (b"later", b"now"):  # of which nobody heard until the client left
            raw = proxy.raw(request(CHAT, body=body))
            assert raw.startswith(b"HTTP/1.1 200") and raw.endswith(b"data: one\n\n\r\n")
        assert proxy.metric("alignpro_answers_cut_total", by="upstream") == 2
        until(lambda: proxy.metric("alignpro_requests_in_progress") == 0)


def test_an_answer_whose_coding_would_be_lost_is_502():
    sends = STREAM_HEAD.replace(b"chunked", b"gzip, chunked") + chunk(b"packed") + b"0\r\n\r\n"
    with (
        RawUpstream(lambda got, send: send(sends)) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):
        status, message = said(proxy.raw(request(CHAT, body=b"{}")))
        assert status == 502 and "transfer-encoding" in message


def test_an_answer_may_come_before_the_end_of_its_request_which_may_never_come():
    begun = request(b"POST /v1/files", b"Content-Length: 1000") + b"half"

    def serve():
        with listening.accept()[0] as connection:
            got = b""
            while not got.endswith(b"half"):
                got += connection.recv(65536)
            connection.sendall(STREAM_HEAD + chunk(b"one"))
            while connection.recv(65536):
                pass
        ended.set()

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with running(ServeConfig(upstream=url, port=0)) as proxy:
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
                client.sendall(begun)
                got = b""
                while b"one" not in got:
                    got += client.recv(65536)
            assert ended.wait(20)
            until(lambda: proxy.metric("alignpro_requests_in_progress") == 0)


@contextlib.contextmanager
def accepting(handle):
    """The address of an upstream that gives each connection to ``handle`` and closes it."""

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                handle(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        listening.shutdown(socket.SHUT_RDWR)


def test_an_upload_that_is_refused_in_its_middle_gets_the_refusal():
    refused = answer(b"no " * 1000, b"413 Too Large", b"connection: close\r\n")

    def refuse(connection):
        while b"\r\n\r\n" not in connection.recv(65536):
            pass
        connection.sendall(refused)  # and it is closed with the rest unread

    body = b"x" * (4 * 2**20)
    with accepting(refuse) as url, running(ServeConfig(upstream=url, port=0)) as proxy:
        for number in range(40):  # of 60 uploads 21 got 502 when the rest was not read
            line = CHAT if number % 4 == 0 else b"POST /v1/files"
            raw = proxy.raw(request(line, body=body))
            assert raw.startswith(b"HTTP/1.1 413 ") and raw.endswith(b"no " * 1000)


def test_what_is_said_of_a_broken_upload_has_no_address_which_may_hold_a_key(caplog):
    def break_off(connection):
        connection.recv(100)
        # Closed with a reset.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with accepting(break_off) as url, running(ServeConfig(upstream=url, port=0)) as proxy:
        for _ in range(20):  # one in five of them named the address
            raw = proxy.raw(request(b"POST /v1/files?key=sk-secret", body=b"x" * 4 * 10**6))
            status, message = said(raw)
            assert status == 502 and message.startswith("the upstream broke the connection")
            assert "sk-secret" not in message and "None" not in message
    assert "broke the connection" in caplog.text and "sk-secret" not in caplog.text


def test_a_protocol_that_nobody_asked_for_is_502():
    def reply(got, send):
        send(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nhi")

    with (
        RawUpstream(reply) as upstream,
        running(ServeConfig(upstream=upstream.url, port=0)) as proxy,
    ):
        assert said(proxy.raw(request(CHAT, body=b"{}")))[0] == 502
        upstream.reply = lambda got, send: send(b"SSH-2.0 hello\r\n\r\n")
        expected = 502, "the upstream's answer is no HTTP: Bad status line"
        status, message = said(proxy.raw(request(CHAT, body=b"{}")))
        assert (status, message[: len(expected[1])]) == expected and upstream.url not in message
        no_http = {
            b"x-a: b\x01c\r\ncontent-length: 2\r\n\r\n{}": "a control character in a header",
            b"x-a: " + b"b" * 70_000: "Got more than 65536 bytes when reading",
        }
        for rest, reason in no_http.items():
            upstream.reply = lambda got, send, rest=rest: send(b"HTTP/1.1 200 OK\r\n" + rest)
            expected = 502, f"the upstream's answer is no HTTP: {reason}"
            assert said(proxy.raw(request(CHAT, body=b"{}"))) == expected
        upstream.reply = lambda got, send: send(b"HTTP/1.1 200 OK\r\ncontent-le") or False
        expected = 502, "the upstream closed the connection before it answered"
        assert said(proxy.raw(request(CHAT, body=b"{}"))) == expected
