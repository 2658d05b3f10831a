"""A chat-completions endpoint on this machine, with the faults that real ones have."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asked:
    """One request as the server saw it."""

    body: dict[str, Any]
    headers: dict[str, str]
    at: float
    path: str

    @property
    def turn(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass(frozen=True)
class Fault:
    """What is sent instead of an answer."""

    status: int = 200
    body: str = "{}"
    headers: dict[str, str] = field(default_factory=dict)
    sleep: float = 0.0  # before the first byte
    pause: float = 0.0  # in the middle of the body
    promise: int | None = None  # a Content-Length that is not kept
    twice: bool = False  # the whole reply a second time on the same connection

    @staticmethod
    def reply(text: Any, finish_reason: str = "stop", **more: Any) -> Fault:
        return Fault(body=completion(text, finish_reason, **more))

    @staticmethod
    def error(status: int, message: str, headers: dict[str, str] | None = None, **more: Any):
        body = json.dumps({"error": {"message": message, **more}})
        return Fault(status=status, body=body, headers=headers or {})


def completion(
    text: Any, finish_reason: str = "stop", usage: tuple[int, int] | None = None, **more: Any
) -> str:
    message = {"role": "assistant", "content": text, **more}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps(body)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # the client gave up
            super().handle_error(request, client_address)


class ChatServer:
    """``answer(asked)`` gives a text or a `Fault`; ``faults`` are sent first, one a request."""

    def __init__(self, answer: Callable[[Asked], str | Fault]) -> None:
        self.answer = answer
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.asked: list[Asked] = []
        self.under_way = 0
        self.most_under_way = 0
        self._lock = threading.Lock()
        self._connections: set[Any] = set()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Listen; after `kill`, at the same port again."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server._connections.add(self.connection)

            def do_POST(self) -> None:
                server._serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = _Http(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """Stop listening and break every connection."""
        self._http.shutdown()
        self._http.server_close()
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def read(self, body: dict[str, Any], headers: dict[str, str], path: str) -> Asked:
        return Asked(body, headers, time.monotonic(), path)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        assert handler.path in ("/v1/chat/completions", "/v1/completions"), handler.path
        length = int(handler.headers["Content-Length"])
        text = handler.rfile.read(length)
        if len(text) < length:
            raise ConnectionError("the client gave up")
        headers = {name.lower(): value for name, value in handler.headers.items()}
        asked = self.read(json.loads(text), headers, handler.path)
        with self._lock:
            self.asked.append(asked)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            fault = self.faults.pop(0) if self.faults else self.always
        try:
            answer = fault if fault is not None else self.answer(asked)
            fault = answer if isinstance(answer, Fault) else Fault.reply(answer)
            time.sleep(fault.sleep)
        finally:  # before the client can know, and ask for more
            with self._lock:
                self.under_way -= 1
        self._reply(handler, fault)

    def _reply(self, handler: BaseHTTPRequestHandler, fault: Fault) -> None:
        data = fault.body.encode()
        for _ in range(1 + fault.twice):
            handler.send_response(fault.status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(fault.promise or len(data)))
            for name, value in fault.headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            half = len(data) // 2 if fault.pause else len(data)
            handler.wfile.write(data[:half])
            handler.wfile.flush()
            time.sleep(fault.pause)
            handler.wfile.write(data[half:])
        if fault.promise is not None:
            handler.close_connection = True
