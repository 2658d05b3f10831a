"""A proxy that listens on loopback, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn

from alignpro.config.serve import ServeConfig
from alignpro.serve.app import Proxy
from alignpro.serve.audit import AuditLog
from alignpro.serve.build import upstream_of
from alignpro.serve.messages import Upstream
from alignpro.serve.rewriter import Rewriter
from alignpro.serve.routes import Route, Routes, mode_of
from alignpro.serve.server import event_loop, listen, make_server
from serve.raw_upstream import until


@dataclass
class Running:
    port: int
    proxy: Proxy
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def raw(self, sent: bytes, *, to_end: bool = True) -> bytes:
        """What comes back for these bytes on a connection of their own."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(sent)
            got = b""
            while to_end and (data := connection.recv(65536)):
                got += data
            return got

    def metric(self, name: str, **labels: str) -> float:
        return self.proxy.metrics._registry.get_sample_value(name, labels) or 0.0


@contextlib.contextmanager
def running(
    config: ServeConfig,
    rewriter: Rewriter | None = None,
    upstream: Upstream | None = None,
    routes: Routes | None = None,
) -> Iterator[Running]:
    upstream = upstream or upstream_of(config)
    if routes is None:
        mode = mode_of(config.rewrite)
        routes = Routes(Route(mode, [] if rewriter is None else [rewriter]))
    audit = None if config.audit.path is None else AuditLog(config.audit)
    proxy = Proxy(config, upstream, routes, audit)
    server = make_server(proxy, config)
    place = listen(config)
    port = place.getsockname()[1]

    def work() -> None:
        with event_loop() as loop:
            loop.run_until_complete(server.serve([place]))
            loop.run_until_complete(proxy.close())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(port, proxy, server)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()
