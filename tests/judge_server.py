"""A chat-completions endpoint on this machine, with the faults that real ones have."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_QUESTION = re.compile(
    r"Request:\n(?P<prompt>.*?)\n\n"
    r"Response A:\n(?P<A>.*?)\n\nResponse B:\n(?P<B>.*?)\n\nReply with",
    re.DOTALL,
)


@dataclass
class Asked:
    """One request as the server saw it."""

    prompt: str
    a: str
    b: str
    body: dict[str, Any]
    headers: dict[str, str]
    at: float


@dataclass(frozen=True)
class Fault:
    """What is sent instead of a verdict."""

    status: int = 200
    body: str = "{}"
    headers: dict[str, str] = field(default_factory=dict)
    sleep: float = 0.0
    promise: int | None = None  # a Content-Length that is not kept

    @staticmethod
    def reply(text: Any) -> Fault:
        return Fault(body=completion(text))


def completion(text: Any) -> str:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return json.dumps(body)


def read_question(text: str) -> dict[str, str]:
    match = _QUESTION.search(text)
    assert match is not None, text
    return match.groupdict()


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # the client gave up
            super().handle_error(request, client_address)


class JudgeServer:
    """``verdict(asked)`` gives "A" or "B"; ``faults`` are sent first, one a request."""

    def __init__(self, verdict: Callable[[Asked], str]) -> None:
        self.verdict = verdict
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.asked: list[Asked] = []
        self.under_way = 0
        self.most_under_way = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = _Http(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        assert handler.path == "/v1/chat/completions", handler.path
        length = int(handler.headers["Content-Length"])
        text = handler.rfile.read(length)
        if len(text) < length:
            raise ConnectionError("the client gave up")
        body = json.loads(text)
        parts = read_question(body["messages"][0]["content"])
        headers = {name.lower(): value for name, value in handler.headers.items()}
        asked = Asked(parts["prompt"], parts["A"], parts["B"], body, headers, time.monotonic())
        with self._lock:
            self.asked.append(asked)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            fault = self.faults.pop(0) if self.faults else self.always
        try:
            fault = fault if fault is not None else Fault.reply(self.verdict(asked))
            time.sleep(fault.sleep)
            data = fault.body.encode()
            handler.send_response(fault.status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(fault.promise or len(data)))
            for name, value in fault.headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
            if fault.promise is not None:
                handler.close_connection = True
        finally:
            with self._lock:
                self.under_way -= 1
