"""Requests to an endpoint and its answers by aiohttp's client, as bytes: nothing is decoded, nor
followed, nor added.

What it cannot keep: a request's header that is not UTF-8 is refused, for aiohttp would leave out
its bytes; and a request without a body says ``content-length: 0`` where its method may have one.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakSet

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError
from aiohttp.tracing import Trace
from yarl import URL

from alignpro.serve.messages import Answer, Outgoing, UpstreamError, end_to_end

# Seconds; servers close idle connections after 5 and more, and one that they close as it is used
# costs another attempt.
_KEPT_OPEN = 4.0
_BUFFER = 2**17  # aiohttp reads on until twice as many bytes wait for the client to take them
_MOST_HEADER = 2**16  # bytes of one of an answer's headers
_MOST_HEADERS = 1024
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # which the server here would not write
_END_OF_HEAD = b"\r\n\r\n"
_REST = 2**24  # bytes, more than the system holds of a connection
_WHOLE = 2**20  # bytes of a body above which aiohttp warns of one that it gets in one piece


class _Attempt:
    """One request on the wire: on which connection, and why its body ended early."""

    def __init__(self, body: bytes | AsyncIterator[bytes]) -> None:
        self._body = body
        self.is_kept = False  # it goes out on a connection that was kept open
        self.response: aiohttp.ClientResponse | None = None
        self.failed: Exception | None = None

    @property
    def data(self) -> bytes | io.BytesIO | AsyncIterator[bytes] | None:
        if not isinstance(self._body, bytes):
            return self._streamed(self._body)
        return io.BytesIO(self._body) if len(self._body) > _WHOLE else self._body or None

    async def _streamed(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            self.failed = error
            if self.response is not None:  # the upstream would wait for the rest
                self.response.close()
            raise


_attempt: ContextVar[_Attempt] = ContextVar("_attempt")


class _Protocol(ResponseHandler):
    """Reads what the upstream said before it broke the connection off, such as 413 in the middle of
    an upload: a write that fails ends the transport, which reads nothing more (21 of 60 uploads).
    Not under TLS, for nobody can decrypt it then.

    And an answer is there once its head is: what stands behind its end, such as the body of a 204
    or of an answer to HEAD, ends the connection and not the answer that came with it."""

    def data_received(self, data: bytes) -> None:
        while self._exception is None and self._unended is None:
            head, end, behind = data.partition(_END_OF_HEAD)
            if not behind:
                break
            super().data_received(head + end)
            data = behind
        super().data_received(data)
        error, body = self._exception, self._unended
        if isinstance(error, HttpProcessingError) and body is not None:
            # aiohttp's parser forgets a body that it cannot read on, and nobody would hear of it.
            body.set_exception(aiohttp.ClientPayloadError(_reason(error.message)), error)

    @property
    def _unended(self) -> aiohttp.StreamReader | None:
        """The body that is under way; None before the head of an answer."""
        return None if self._payload is None or self._payload.is_eof() else self._payload

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        if not isinstance(exc, HttpProcessingError):  # of which there is nothing more to read
            self._take_rest()
        super().set_exception(exc, *cause)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._take_rest()
        super().connection_lost(exc)

    def _take_rest(self) -> None:
        transport = self.transport
        if transport is None or not transport.is_closing():
            return
        if transport.get_extra_info("sslcontext") is None:
            number = transport.get_extra_info("socket").fileno()
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as left:
                if data := left.recv(_REST):
                    self.data_received(data)


class _Connector(aiohttp.TCPConnector):
    """Says whether a connection is a kept one, and closes those on which something came that nobody
    had asked for: aiohttp would take it for the answer to the next request."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._factory = partial(_Protocol, loop=self._loop)  # type: ignore[assignment]
        self._used: WeakSet[object] = WeakSet()

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol = connection.protocol
            assert protocol is not None
            is_kept = protocol in self._used
            if not (is_kept and protocol.should_close):
                self._used.add(protocol)
                _attempt.get().is_kept = is_kept
                return connection
            connection.close()


class EndpointUpstream:
    """An OpenAI-compatible endpoint; ``url`` is its clients' base_url, to which /v1 is added where
    it is a server's address alone."""

    def __init__(self, url: str, *, connect_seconds: float, idle_seconds: float) -> None:
        address = URL(url)
        self._url = str(address.origin()) + (address.raw_path.rstrip("/") or "/v1")
        self._tls = ssl.create_default_context() if address.scheme == "https" else True
        self._timeout = aiohttp.ClientTimeout(connect=connect_seconds, sock_read=idle_seconds)
        self._idle_seconds = idle_seconds
        self._opened: aiohttp.ClientSession | None = None

    @property
    def _session(self) -> aiohttp.ClientSession:
        """Made when it is first used, for it belongs to the loop that runs then."""
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                connector=_Connector(limit=0, keepalive_timeout=_KEPT_OPEN, ssl=self._tls),
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
                auto_decompress=False,
                trust_env=False,
                read_bufsize=_BUFFER,
                max_line_size=_MOST_HEADER,
                max_field_size=_MOST_HEADER,
                max_headers=_MOST_HEADERS,
            )
        return self._opened

    async def send(self, request: Outgoing) -> Answer:
        """See `Upstream.send`."""
        url = URL(self._url + _text(request.path, "the path"), encoded=True)
        headers = [
            (name.decode(), _text(value, f"the header {name.decode()}"))
            for name, value in request.headers
            if name != b"transfer-encoding"  # aiohttp's own, where there is no length
        ]
        while True:
            attempt = _Attempt(request.body)
            _attempt.set(attempt)
            try:
                response = await self._session.request(
                    request.method,
                    url,
                    headers=headers,
                    data=attempt.data,
                    allow_redirects=False,
                )
            except aiohttp.ConnectionTimeoutError:
                raise UpstreamError("the upstream could not be reached in time", 504) from None
            except aiohttp.ServerTimeoutError:
                message = f"the upstream sent nothing for {self._idle_seconds:g} s"
                raise UpstreamError(message, 504) from None
            except aiohttp.ClientConnectorError as error:
                raise UpstreamError(f"the upstream cannot be reached: {error}") from error
            except aiohttp.ClientError as error:
                if attempt.failed is not None:
                    raise attempt.failed from None
                # It closed a connection that was kept open, before it read the request. There are
                # so many of these at most, and the last attempt makes one.
                is_closed = isinstance(error, aiohttp.ClientConnectionError)
                if isinstance(request.body, bytes) and attempt.is_kept and is_closed:
                    continue
                raise UpstreamError(_broken(error)) from error
            attempt.response = response
            return self._answer(attempt, response)

    def _answer(self, attempt: _Attempt, response: aiohttp.ClientResponse) -> Answer:
        async def chunks() -> AsyncIterator[bytes]:
            content = response.content
            try:
                async for chunk in content.iter_any():
                    yield chunk
            except aiohttp.ClientError as error:
                # aiohttp says so at once, before what it has of the answer.
                content.set_exception(None)  # type: ignore[arg-type]
                if rest := content.read_nowait():
                    yield rest
                if isinstance(error, aiohttp.ServerTimeoutError):
                    message = f"the upstream's answer stopped for {self._idle_seconds:g} s"
                    raise UpstreamError(message, 504) from None
                cause = error if attempt.failed is None else "so did the request"
                raise UpstreamError(f"the upstream's answer ended early: {cause}") from None

        async def close() -> None:
            response.close()  # one that was read to its end has given its connection back

        codings = [v for name, v in response.raw_headers if name.lower() == b"transfer-encoding"]
        if any(coding.strip().lower() != b"chunked" for coding in codings):
            response.close()
            message = "the upstream's answer has a transfer-encoding beside chunked"
            raise UpstreamError(message)
        if response.status == 101:
            response.close()
            raise UpstreamError("the upstream changes to another protocol")
        if any(_CONTROL.search(value) for _, value in response.raw_headers):
            response.close()
            raise UpstreamError("the upstream's answer is no HTTP: a control character in a header")
        headers = [
            (name, self._here(value) if name == b"location" else value)
            for name, value in end_to_end(response.raw_headers)
        ]
        return Answer(response.status, headers, chunks(), close)

    def _here(self, location: bytes) -> bytes:
        """A place of the upstream's as one of this server's, which clients would go past."""
        for base in (self._url, URL(self._url).raw_path):
            if location.startswith(base.encode() + b"/"):
                return b"/v1" + location[len(base) :]
        return location

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()


def _broken(error: aiohttp.ClientError) -> str:
    """In a line, without aiohttp's view of what it got, or the address, which may hold a key."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"the upstream's answer is no HTTP: {_reason(error.message)}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the upstream closed the connection before it answered"
    number = error.errno if isinstance(error, OSError) else None
    reason = f": {os.strerror(number)}" if number else ""
    return f"the upstream broke the connection{reason}"


def _reason(message: str) -> str:
    """What the parser says is wrong, without what it got."""
    return message.partition("\n")[0].partition(": b")[0].rstrip(":")


def _text(value: bytes, what: str) -> str:
    """As aiohttp wants it, which writes UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise UpstreamError(f"expected UTF-8 in {what}", 400) from None
