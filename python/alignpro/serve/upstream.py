"""Requests to an endpoint and its answers, as bytes: nothing is decoded, and nothing buffered.

By asyncio and the parser that the server has. httpx2 was measured first: its pool polls every idle
connection for every request, which made most of the time of a request at 32 clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import httptools

from alignpro.serve.messages import (
    Answer,
    Headers,
    Outgoing,
    UpstreamError,
    end_to_end,
    send_at_once,
)

# Seconds; servers close idle connections after 5 and more, and one that they close as it is used
# costs another attempt.
_KEPT_OPEN = 4.0
_IDLE_CONNECTIONS = 256
_MOST_BUFFERED = 2**18  # bytes of an answer that its client has not taken yet


class _Broken(Exception):
    """The connection ended before the answer did."""


class _Connection(asyncio.Protocol):
    """One connection, and the answer that it is at."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.since = 0.0  # when it became idle
        self._idle = True
        self._lost: Exception | None = None
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._news = asyncio.Event()  # of the answer

    def begin(self, method: str) -> None:
        """Before a request is written."""
        self._parser = httptools.HttpResponseParser(self)
        self._method = method
        self.status = 0
        self.headers: Headers = []
        self.has_head = self.has_end = self._to_close = False
        self._chunks: deque[bytes] = deque()
        self._buffered, self._is_paused = 0, False
        self._idle = False
        self._news.clear()

    @property
    def is_usable(self) -> bool:
        return self._lost is None and not self.transport.is_closing()

    @property
    def can_be_kept(self) -> bool:
        keeps = self.has_end and not self._to_close and self._method != "HEAD"
        return keeps and self.is_usable and bool(self._parser.should_keep_alive())

    def keep(self) -> None:
        self._idle, self.since = True, time.monotonic()

    async def write(self, data: bytes) -> None:
        """Raises _Broken."""
        await self._can_write.wait()
        if not self.is_usable:
            raise _Broken(self._said())
        self.transport.write(data)

    async def head(self, seconds: float) -> None:
        """Wait for status and headers. Raises _Broken and asyncio.TimeoutError."""
        while not self.has_head:
            await self._wait(seconds)

    async def body(self, seconds: float) -> AsyncIterator[bytes]:
        """Raises as `head`, where it ends early."""
        while True:
            while self._chunks:
                chunk = self._chunks.popleft()
                self._buffered -= len(chunk)
                if self._is_paused and self._buffered <= _MOST_BUFFERED and self.is_usable:
                    self._is_paused = False
                    self.transport.resume_reading()
                yield chunk
            if self.has_end:
                return
            await self._wait(seconds)

    async def _wait(self, seconds: float) -> None:
        if self._lost is not None:
            raise _Broken(self._said())
        self._news.clear()
        await asyncio.wait_for(self._news.wait(), seconds)

    def _said(self) -> str:
        return str(self._lost or "") or "it was closed"

    # --- of asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        send_at_once(transport)

    def data_received(self, data: bytes) -> None:
        if self._idle or self.has_end:  # what nobody asked for
            self._to_close = True
            self.transport.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(ConnectionError("it changes to another protocol"))
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"no HTTP: {error}"))
        self._news.set()

    def _fail(self, error: Exception) -> None:
        self._lost = self._lost or error
        self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._idle and self.has_head and self._ends_with_connection():
            self.has_end = True
        self._lost = self._lost or error or ConnectionError("it was closed")
        self._can_write.set()
        self._news.set()

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    # --- of the parser ---

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # one that says to go on
            self.headers = []
            return
        self.has_head = True
        if self._method == "HEAD":
            self.has_end = True

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)
        if self._buffered > _MOST_BUFFERED and not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        self.has_end = self.has_head

    def _ends_with_connection(self) -> bool:
        framed = {b"content-length", b"transfer-encoding"}
        return not framed & {name.lower() for name, _ in self.headers}


class EndpointUpstream:
    """An OpenAI-compatible endpoint; ``url`` is its clients' base_url, to which /v1 is added where
    it is a server's address alone."""

    def __init__(self, url: str, *, connect_seconds: float, idle_seconds: float) -> None:
        address = urlsplit(url)
        self._path = (address.path.rstrip("/") or "/v1").encode()
        self._netloc = address.netloc.encode()
        self._host, secure = address.hostname or "", address.scheme == "https"
        self._port = address.port or (443 if secure else 80)
        self._tls = ssl.create_default_context() if secure else None
        self._connect_seconds, self._idle_seconds = connect_seconds, idle_seconds
        self._idle: deque[_Connection] = deque()  # the last one used is used next

    async def send(self, request: Outgoing) -> Answer:
        """See `Upstream.send`."""
        while True:
            connection = self._kept()
            is_new = connection is None
            if connection is None:
                connection = await self._connect()
            try:
                connection.begin(request.method)
                await self._write(connection, request)
                await connection.head(self._idle_seconds)
            except asyncio.TimeoutError:
                connection.transport.abort()
                message = f"the upstream sent nothing for {self._idle_seconds:g} s"
                raise UpstreamError(message, 504) from None
            except _Broken as error:
                connection.transport.abort()
                # It closed a connection that was kept open, before it read the request. There are
                # so many of these at most, and the last attempt makes one.
                if isinstance(request.body, bytes) and not is_new and not connection.status:
                    continue
                raise UpstreamError(f"the upstream broke the connection: {error}") from None
            except BaseException:
                connection.transport.abort()
                raise
            return self._answer(connection)

    def _answer(self, connection: _Connection) -> Answer:
        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in connection.body(self._idle_seconds):
                    yield chunk
            except _Broken as error:
                raise UpstreamError(f"the upstream's answer ended early: {error}") from None
            except asyncio.TimeoutError:
                message = f"the upstream's answer stopped for {self._idle_seconds:g} s"
                raise UpstreamError(message, 504) from None

        async def close() -> None:
            if connection.can_be_kept and len(self._idle) < _IDLE_CONNECTIONS:
                connection.keep()
                self._idle.append(connection)
            else:
                connection.transport.abort()

        return Answer(connection.status, end_to_end(connection.headers), chunks(), close)

    def _kept(self) -> _Connection | None:
        oldest = time.monotonic() - _KEPT_OPEN
        while self._idle and self._idle[0].since < oldest:
            self._idle.popleft().transport.close()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        connecting = loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        try:
            return (await asyncio.wait_for(connecting, self._connect_seconds))[1]
        except asyncio.TimeoutError:
            raise UpstreamError("the upstream could not be reached in time", 504) from None
        except OSError as error:
            raise UpstreamError(f"the upstream cannot be reached: {error}") from error

    async def _write(self, connection: _Connection, request: Outgoing) -> None:
        headers: Headers = [(b"host", self._netloc), *request.headers]
        body = request.body
        without = not body and request.method in ("GET", "HEAD", "OPTIONS", "DELETE")
        if isinstance(body, bytes) and not without:
            headers.append((b"content-length", b"%d" % len(body)))
        lines = [b"%s %s%s HTTP/1.1" % (request.method.encode(), self._path, request.path)]
        lines += [name + b": " + value for name, value in headers]
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        if isinstance(body, bytes):
            await connection.write(head + body)
            return
        is_chunked = (b"transfer-encoding", b"chunked") in headers
        await connection.write(head)
        async for chunk in body:
            if chunk:
                await connection.write(
                    b"%x\r\n%s\r\n" % (len(chunk), chunk) if is_chunked else chunk
                )
        if is_chunked:
            await connection.write(b"0\r\n\r\n")

    async def close(self) -> None:
        for connection in self._idle:
            with contextlib.suppress(RuntimeError):
                connection.transport.close()
        self._idle.clear()
