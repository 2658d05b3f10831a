"""This engine as a chat-completions server on loopback, in a process of its own: what is left of a
server's cost where its arithmetic is the same as in process.

As a program, ``python engine_server.py MODEL THREADS COMPUTE``, it prints its address and serves.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from chat_server import Asked, ChatServer, Fault


@contextlib.contextmanager
def engine_server(model: Path, threads: int, compute: str) -> Iterator[str]:
    """The address of a server that has loaded ``model``."""
    command = [sys.executable, __file__, str(model), str(threads), compute]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def _serve(path: str, threads: int, compute: str) -> None:
    from alignpro.config import ModelConfig
    from alignpro.models.native_model import load_model
    from alignpro.types import SamplingParams

    model = load_model(ModelConfig(path, compute=compute), threads)

    def answer(asked: Asked) -> Fault:
        body = asked.body
        params = SamplingParams(
            temperature=body["temperature"], max_new_tokens=body["max_tokens"], seed=body["seed"]
        )
        (done,) = model.generate([body["messages"]], params)
        written = (len(done.prompt_tokens), len(done.tokens))
        return Fault.reply(done.text, done.finish_reason, usage=written)

    with ChatServer(answer) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
