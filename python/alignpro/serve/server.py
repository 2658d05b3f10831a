"""The listening: sockets, limits on connections and headers, signals."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import math
import resource
import signal
import socket
import termios
from array import array
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
_TOO_LONG = "the headers are too long; serve's max_header allows more"


class _BadRequest(ValueError):
    """Raised out of the parser, and answered with status 400."""


class _Protocol(HttpToolsProtocol):
    """HTTP/1 as a relay needs it.

    * Headers that are too long or too slow end the connection; uvicorn limits those of h11 alone,
      which is several times slower.
    * A connection beyond the most there may be is told apart, and those before it go on; uvicorn
      would refuse requests on all of them.
    * What is no HTTP behind a request ends the connection after the answer, not in its middle.
    * Trailers are dropped, and may be as long as headers: they are none (RFC 9110, 6.5.1).
    * An offer of another protocol is declined (RFC 9110, 7.8): the parser would leave out such a
      request's body.
    * Of requests in a pipeline the one under way learns that the client has left, not the last.
    * A client that takes nothing of its answer is left. The rest of a request that is answered
      before its end is read and dropped: on a connection that is closed with it unread the client
      would lose the answer (RFC 9112, 9.6).
    """

    max_header: int
    max_connections: int
    receive_seconds: float
    send_seconds: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        send_at_once(transport)
        self._is_one_more = len(self.connections) > self.max_connections
        self._in_headers, self._has_advanced, self._size, self._pending = True, False, 0, 0
        self._is_deaf = False
        self._open: list[RequestResponseCycle] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_there()
        self._is_taken()
        super().connection_lost(exc)
        for cycle in self._open:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        self._has_advanced = False
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            ours = isinstance(error.__context__, _BadRequest)
            self._refuse(str(error.__context__) if ours else "Invalid HTTP request received.")
            return
        # Of headers or trailers that are not at their end.
        self._pending = 0 if self._has_advanced else self._pending + len(data)
        if self._pending > self.max_header and not self.transport.is_closing():
            self._refuse(_TOO_LONG)
        if not self.transport.is_closing() and self._is_idle:  # the rest of a request, or nothing
            self._wait_for_headers()

    def _refuse(self, message: str) -> None:
        """The bytes that came now, behind what is due for those before."""
        due = [cycle for cycle in self._open if not cycle.response_complete]
        whole = [cycle for cycle in due if not cycle.more_body]
        if whole:
            whole[-1].keep_alive = False
            self._is_deaf = True
        elif any(cycle.response_started for cycle in due) or self._has_said_all:
            self._close()
        else:
            self.send_400_response(message)

    @property
    def _has_said_all(self) -> bool:
        """Whether the last answer of this connection was given."""
        last = self.cycle
        return last is not None and last.response_complete and not last.keep_alive

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_progress()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._is_taken()

    def _is_taken(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _close(self) -> None:
        self.transport.close()
        self._expect_progress()

    def _expect_progress(self) -> None:
        """From a client for whom data wait, while nothing new is written."""
        self._is_taken()
        before = _unsent(self.transport)

        def look() -> None:
            if _unsent(self.transport) < before:
                self._expect_progress()
            else:
                self.transport.abort()

        self._stuck = self.loop.call_later(self.send_seconds, look)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = self._declined() + data[offer.args[0] :]
                # With "connection: close" the old one takes that for what comes behind the end.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn

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
        if not self._in_headers:
            return
        super().on_header(name, value)
        self._size += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        self._in_headers, self._has_advanced = False, True
        self._headers_are_there()
        if self._size > self.max_header:
            raise _BadRequest(_TOO_LONG)
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _BadRequest("no tunnels: CONNECT is not supported")
            return
        self.scope["extensions"] = {ONE_MORE: {}} if self._is_one_more else {}
        super().on_headers_complete()
        _frame_as_it_is(self.cycle)
        self._end_gently(self.cycle)
        self._open = [cycle for cycle in self._open if not cycle.response_complete]
        self._open.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._has_advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_advanced = True
        if not self.parser.should_upgrade():
            if self._has_said_all:
                self._close()
            super().on_message_complete()

    def _end_gently(self, cycle: RequestResponseCycle) -> None:
        """Close behind the last answer once its request was read and the answer is taken."""
        send = cycle.send

        async def sent(message: Any) -> None:
            is_end = message["type"] == "http.response.body" and not message.get("more_body")
            lingers = is_end and cycle.more_body and not cycle.keep_alive
            cycle.keep_alive = cycle.keep_alive or lingers  # uvicorn closes at once without it
            await send(message)
            if lingers and not self.transport.is_closing():
                cycle.keep_alive = False
                self.transport.write_eof()
                self._wait_for_headers()
            elif is_end and self.transport.is_closing():
                self._expect_progress()

        cycle.send = sent  # type: ignore[method-assign]

    def _wait_for_headers(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.receive_seconds, self._are_late)

    def _are_late(self) -> None:
        self._timer = None
        if self._is_idle:
            self._close()
        else:  # nothing is read while an answer is under way
            self._wait_for_headers()

    @property
    def _is_idle(self) -> bool:
        return all(cycle.response_complete for cycle in self._open)

    def _headers_are_there(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _unsent(transport: asyncio.WriteTransport) -> int:
    """Bytes that the client's system has not taken, here and, where it can be asked, in ours."""
    held = array("i", [0])
    with contextlib.suppress(OSError, ValueError):
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, held)
    return transport.get_write_buffer_size() + held[0]


def _frame_as_it_is(cycle: RequestResponseCycle) -> None:
    """A 204 or 304 may say the length of a body that it does not have, and an answer of no length
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
            has_no_frame = has_no_frame or message["status"] in (204, 304)
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
    limited = ("max_header", "max_connections", "receive_seconds", "send_seconds")
    limits = {name: getattr(config, name) for name in limited}
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
    reloads: set[asyncio.Task[Any]] = set()  # the loop's own reference is a weak one

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def reload() -> None:
            task = loop.create_task(proxy.reload())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, reload)
        on_ready()
        try:
            await server.serve([place])
        finally:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await proxy.close()

    gc.collect()
    gc.freeze()  # what is there stays: looking through it held up every request for 20 to 60 ms
    with event_loop() as loop:
        loop.run_until_complete(main())


def _allow_open_files() -> None:
    """As many as the system lets this process have: the customary 1024 are half as many requests,
    each with a connection to either side."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop for the block, uvloop's where it is installed. What is under way at its end, as
    after Ctrl-C, is cancelled, and ends."""
    loop = _new_loop()
    try:
        yield loop
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    if not is_installed("uvloop"):
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
