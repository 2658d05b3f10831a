"""What passes between a client, this server and what answers: requests, answers, errors."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote_to_bytes

Headers = list[tuple[bytes, bytes]]  # names in lower case

# Of a connection and not of a message (RFC 9110, 7.6.1); what "connection" names is as well.
_HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
    *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
}
PREFIX = b"x-alignpro"
CHAT = ["chat", "completions"]


@dataclass(frozen=True)
class Outgoing:
    """A request on its way to what answers. ``path`` is behind /v1, with its query, as it came."""

    method: str
    path: bytes
    headers: Headers
    body: bytes | AsyncIterator[bytes]


@dataclass(frozen=True)
class Answer:
    """``close`` ends it, read to its end or not."""

    status: int
    headers: Headers
    body: AsyncIterator[bytes]
    close: Callable[[], Awaitable[None]]


class UpstreamError(Exception):
    """There is no answer; ``status`` is what the client is told."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


class Upstream(Protocol):
    """What answers: an endpoint, or a model in this process."""

    async def send(self, request: Outgoing) -> Answer:
        """Raises UpstreamError. Cancelling it ends the request."""

    async def close(self) -> None: ...


def segments(path: bytes) -> list[str]:
    """What a path names, as servers read it: decoded, without its query, its empty segments (the
    slash at its end, two in a row) and '.'."""
    decoded = unquote_to_bytes(path.partition(b"?")[0]).decode(errors="replace")
    return [name for name in decoded.split("/") if name not in ("", ".")]


def send_at_once(transport: asyncio.BaseTransport) -> None:
    """Small pieces do not wait for the other side to say that it has those before."""
    socket_ = transport.get_extra_info("socket")
    if socket_ is not None:
        socket_.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def end_to_end(headers: Iterable[tuple[bytes, bytes]], *drop: bytes) -> Headers:
    """The headers that a proxy passes on, in their order; ours are not."""
    kept = [(name.lower(), value) for name, value in headers]
    named = {
        token.strip().lower()
        for name, value in kept
        if name == b"connection"
        for token in value.split(b",")
    }
    out = _HOP_BY_HOP | named | set(drop)
    return [(n, v) for n, v in kept if n not in out and not n.startswith(PREFIX)]


def json_headers(body: bytes) -> Headers:
    """Of an answer that is this JSON."""
    return [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> bytes:
    """An error as OpenAI writes it."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()
