"""A judge behind a chat-completions endpoint: a `ChatServer` that reads questions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from chat_server import Asked, ChatServer

_QUESTION = re.compile(
    r"Request:\n(?P<prompt>.*?)\n\n"
    r"Response A:\n(?P<A>.*?)\n\nResponse B:\n(?P<B>.*?)\n\nReply with",
    re.DOTALL,
)


@dataclass
class Question(Asked):
    prompt: str
    a: str
    b: str


def read_question(text: str) -> dict[str, str]:
    match = _QUESTION.search(text)
    assert match is not None, text
    return match.groupdict()


class JudgeServer(ChatServer):
    """``verdict(question)`` gives "A" or "B"."""

    def __init__(self, verdict: Any) -> None:
        self.verdict = verdict
        super().__init__(lambda asked: self.verdict(asked))

    def read(self, body: dict[str, Any], headers: dict[str, str], path: str) -> Question:
        parts = read_question(body["messages"][0]["content"])
        asked = super().read(body, headers, path)
        return Question(
            *(asked.body, asked.headers, asked.at, asked.path),
            *(parts["prompt"], parts["A"], parts["B"]),
        )
