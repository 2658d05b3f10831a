"""The listening: sockets, limits on connections and headers, signals."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from alignpro.config.serve import ServeConfig
from alignpro.optional import is_installed
from alignpro.serve.app import ONE_MORE, Proxy, make_app
from alignpro.serve.messages import send_at_once

_IDLE_CLIENT = 75  # seconds for which a client's connection is kept open between requests


class _Protocol(HttpToolsProtocol):
    """HTTP/1 as a relay needs it.

    * Headers that are too long or too slow end the connection; uvicorn limits those of h11 alone,
      which is several times slower.
    * A connection beyond the most there may be is told apart, and those before it go on; uvicorn
      would refuse requests on all of them.
    * An offer of another protocol is declined (RFC 9110, 7.8): the parser would leave out such a
      request's body.
    * Of requests in a pipeline the one under way learns that the client has left, not the last.
    """

    max_header: int
    max_connections: int
    receive_seconds: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        send_at_once(transport)
        self._is_one_more = len(self.connections) > self.max_connections
        self._in_headers, self._has_ended, self._size, self._pending = True, False, 0, 0
        self._open: list[RequestResponseCycle] = []
        self._timer: asyncio.TimerHandle | None = None
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_there()
        super().connection_lost(exc)
        for cycle in self._open:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._has_ended = False
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        # What stands before the end of a message is none of the next one's headers.
        is_counted = self._in_headers and not self._has_ended
        self._pending = self._pending + len(data) if is_counted else 0
        if self._pending > self.max_header and not self.transport.is_closing():
            self.send_400_response("the headers are too long")

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = self._declined() + data[offer.args[0] :]

    def _declined(self) -> bytes:
        """The head of the request once more, without its offer."""
        version = self.parser.get_http_version().encode()
        head = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        head += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*head, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._size = True, 0
        self._wait_for_headers()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._size += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._size += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._headers_are_there()
        if self._size > self.max_header:
            raise ValueError("the headers are too long")  # which is answered with status 400
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("no tunnels")
            return
        self.scope["extensions"] = {ONE_MORE: {}} if self._is_one_more else {}
        super().on_headers_complete()
        _frame_as_it_is(self.cycle)
        self._open = [cycle for cycle in self._open if not cycle.response_complete]
        self._open.append(self.cycle)

    def on_message_complete(self) -> None:
        self._has_ended = True
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _wait_for_headers(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.receive_seconds, self._are_late)

    def _are_late(self) -> None:
        self._timer = None
        if all(cycle.response_complete for cycle in self._open):
            self.transport.close()
        else:  # nothing is read while an answer is under way
            self._wait_for_headers()

    def _headers_are_there(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _frame_as_it_is(cycle: RequestResponseCycle) -> None:
    """A 304 may say the length of the body that it does not have, and an answer without a length
    to a client of HTTP/1.0, which knows no chunks, ends with the connection (RFC 9112, 6)."""
    send = cycle.send
    has_no_frame = False

    async def sent(message: Any) -> None:
        nonlocal has_no_frame
        if message["type"] == "http.response.start":
            is_1_0 = cycle.scope["http_version"] == "1.0"
            if is_1_0 and all(name != b"content-length" for name, _ in message["headers"]):
                cycle.chunked_encoding = False
                has_no_frame = True
            has_no_frame = has_no_frame or message["status"] == 304
        elif has_no_frame:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = sent  # type: ignore[method-assign]


# uvicorn knows statuses below 600; upstreams have others, such as 999.
STATUS_LINE.update({status: b"HTTP/1.1 %d \r\n" % status for status in range(600, 1000)})


class _Server(uvicorn.Server):
    """Signals are this module's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(config: ServeConfig) -> socket.socket:
    """Raises OSError: the address is taken, or is none of this machine's."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        remedy = "port names another, and 0 a free one" if taken else "host and port name another"
        reason = str(error.strerror).partition(" (while")[0]
        raise OSError(f"{config.host}, port {config.port}: {reason}; {remedy}") from error


def make_server(proxy: Proxy, config: ServeConfig) -> uvicorn.Server:
    """A server that is not started; its ``serve(sockets)`` does it."""
    limits = {
        name: getattr(config, name) for name in ("max_header", "max_connections", "receive_seconds")
    }
    settings: dict[str, Any] = {
        "http": type("Protocol", (_Protocol,), limits),
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "log_level": "warning",
        "access_log": False,
        # Answers are the upstream's.
        "server_header": False,
        "date_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": _IDLE_CLIENT,
        "timeout_graceful_shutdown": math.ceil(config.shutdown_seconds),
    }
    return _Server(uvicorn.Config(make_app(proxy), **settings))


def run_server(
    proxy: Proxy, config: ServeConfig, place: socket.socket, on_ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT; requests under way may end, a second SIGINT does not wait.
    SIGHUP reads the adapters again."""
    _allow_open_files()
    server = make_server(proxy, config)
    reloads: set[asyncio.Task[None]] = set()  # the loop's own reference is a weak one

    async def reload() -> None:
        await proxy.reload()
        reloads.clear()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, lambda: reloads.add(loop.create_task(reload())))
        on_ready()
        try:
            await server.serve([place])
        finally:
            await proxy.close()

    loop = new_event_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _allow_open_files() -> None:
    """As many as the system lets this process have: the customary 1024 are half as many requests,
    each with a connection to either side."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed."""
    if not is_installed("uvloop"):
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
