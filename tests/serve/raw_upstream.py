"""What stands behind a proxy in tests: it keeps the bytes that came and sends those it is told."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Got:
    """One request, as it was on the wire."""

    head: bytes  # without the empty line
    body: bytes

    @property
    def line(self) -> bytes:
        return self.head.split(b"\r\n")[0]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        pairs = [line.partition(b":") for line in self.head.split(b"\r\n")[1:]]
        return [(name.lower(), value.strip()) for name, _, value in pairs]


def answer(body: bytes, status: bytes = b"200 OK", headers: bytes = b"") -> bytes:
    length = b"content-length: %d\r\n" % len(body)
    return b"HTTP/1.1 " + status + b"\r\n" + headers + length + b"\r\n" + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


class RawUpstream:
    """``reply`` gets the request and ``send``; it sends bytes when it likes, and the connection is
    closed where it returns False. ``left``: the other side closed a connection in the middle."""

    def __init__(
        self,
        reply: Callable[[Got, Callable[[bytes], None]], bool | None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.reply, self._tls = reply, tls
        self.got: list[Got] = []
        self.left = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listening.getsockname()[1]
        self.url = f"http{'' if tls is None else 's'}://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> RawUpstream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        if self._tls is not None:
            try:
                connection = self._tls.wrap_socket(connection, server_side=True)
            except OSError:  # the other side does not trust it
                return
        with connection, connection.makefile("rb") as file:
            try:
                while got := self._read(file):
                    self.got.append(got)
                    if self.reply(got, connection.sendall) is False:
                        return
            except OSError:
                self.left.set()

    @staticmethod
    def _read(file) -> Got | None:
        lines = []
        while (line := file.readline().rstrip(b"\r\n")) or not lines:
            if not line:
                return None
            lines.append(line)
        got = Got(b"\r\n".join(lines), b"")
        headers = dict(got.headers)
        body = file.read(int(headers.get(b"content-length", 0)))
        if headers.get(b"transfer-encoding") == b"chunked":
            while size := int(file.readline(), 16):
                body += file.read(size)
                file.readline()
            file.readline()
        return Got(got.head, body)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


BODY = b'{"model": "m",  "messages":[{"role":"user","content":"h\\u00e9llo"}], "x": 1.50}'


def request(
    body: bytes = BODY, *headers: bytes, line: bytes = b"POST /v1/chat/completions"
) -> bytes:
    lines = [line + b" HTTP/1.1", b"Host: here", b"Connection: close, X-Hop", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


def split(raw: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    head, _, body = raw.partition(b"\r\n\r\n")
    line, *lines = head.split(b"\r\n")
    return line, dict(part.lower().split(b": ", 1) for part in lines), body
