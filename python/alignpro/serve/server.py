"""The listening: sockets, limits on connections and headers, signals."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from alignpro.config.serve import ServeConfig
from alignpro.optional import is_installed
from alignpro.serve.app import Proxy, make_app
from alignpro.serve.messages import send_at_once

_IDLE_CLIENT = 75  # seconds for which a client's connection is kept open between requests


class _Limited(HttpToolsProtocol):
    """Headers that are too long or too slow end the connection; uvicorn limits those of h11 alone,
    which is several times slower."""

    max_header: int
    receive_seconds: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        send_at_once(transport)
        self._in_headers, self._size, self._pending = True, 0, 0
        self._timer: asyncio.TimerHandle | None = None
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._pending = self._pending + len(data) if self._in_headers else 0
        if self._pending > self.max_header and not self.transport.is_closing():
            self.send_400_response("the headers are too long")

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
        super().on_headers_complete()

    def _wait_for_headers(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.receive_seconds, self.transport.close)

    def _headers_are_there(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


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
    limits = {"max_header": config.max_header, "receive_seconds": config.receive_seconds}
    settings: dict[str, Any] = {
        "http": type("Limited", (_Limited,), limits),
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "log_level": "warning",
        "access_log": False,
        # Answers are the upstream's.
        "server_header": False,
        "date_header": False,
        "proxy_headers": False,
        "limit_concurrency": config.max_connections,
        "timeout_keep_alive": _IDLE_CLIENT,
        "timeout_graceful_shutdown": math.ceil(config.shutdown_seconds),
    }
    return _Server(uvicorn.Config(make_app(proxy), **settings))


def run_server(
    proxy: Proxy, config: ServeConfig, place: socket.socket, on_ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT; requests under way may end, a second SIGINT does not wait.
    SIGHUP reads the adapters again."""
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


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed."""
    if not is_installed("uvloop"):
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
