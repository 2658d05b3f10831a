"""A deterministic stand-in for a LanguageModel: what a pipeline needs to know of one, and no more.

It reads and writes bytes (token = byte + 3), says words chosen by a hash of (prompt tokens, seed,
sample), and takes a different number of steps for each, so that requests finish out of order.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any

from alignpro.types import Completion, SamplingParams

EOS = 2
WORDS = ("warmly", "formally", "in short", "in verse", "with care", "as a list", "", "  slowly ")


class FakeTokenizer:
    bos_id = None
    eos_ids = (EOS,)

    def encode(self, text: str, *, add_bos: bool = False, most: int | None = None) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, tokens: list[int], *, skip_special: bool = True) -> str:
        return bytes(token - 3 for token in tokens if token >= 3).decode(errors="replace")

    def encode_chat(
        self, messages: Any, *, add_generation_prompt: bool = True, most: int | None = None
    ) -> list[int]:
        tokens = []
        for message in messages:
            if message is messages[-1] and message["role"] == "user":
                return [*tokens, 0, *self.encode(message["content"]), 1]
            tokens += [1, *self.encode(message["role"] + message["content"]), EOS]
        return tokens


@dataclass(eq=False)
class FakeHandle:
    model: FakeModel
    prompt_tokens: list[int]
    params: SamplingParams
    adapter: Any
    sample: int
    number: int  # of the submission
    text: str
    steps_left: int
    submitted_at: int
    finished: bool = False
    cancelled: bool = False

    def completion(self) -> Completion:
        assert self.finished
        self.model.completions += 1
        if self.number in self.model.fails:
            raise self.model.fails[self.number]
        tokens = [*self.model.tokenizer.encode(self.text), EOS][: self.params.max_new_tokens]
        ended = tokens[-1] == EOS
        return Completion(
            tokens=tokens,
            text=self.model.tokenizer.decode(tokens),
            logprobs=[-0.5] * len(tokens),
            kept_mass=[1.0] * len(tokens),
            finish_reason="cancelled" if self.cancelled else "stop" if ended else "length",
            prompt_tokens=self.prompt_tokens,
        )


@dataclass(eq=False)
class FakeModel:
    name: str = "fake"
    context_length: int = 4096
    rows: int = 1_000_000  # advanced in one step
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    handles: list[FakeHandle] = field(default_factory=list)
    steps: int = 0
    questions: int = 0  # of ready() before a launched step has ended
    asked: int = 0
    launched: bool = False
    fail_at_step: int | None = None
    fails: dict[int, Exception] = field(default_factory=dict)  # by number of the submission
    completions: int = 0  # asked for
    failure: BaseException = field(default_factory=lambda: RuntimeError("broken"))

    def client(self) -> FakeModel:
        return self  # which has one caller here

    def cancel(self) -> None:
        for handle in self.under_way():
            handle.cancelled = True

    def submit(
        self, tokens: list[int], params: SamplingParams, *, adapter: Any = None, sample: int = 0
    ) -> FakeHandle:
        assert params.seed is not None
        key = repr((tokens, params.seed, sample, adapter)).encode()
        digest = hashlib.sha256(key).digest()
        handle = FakeHandle(
            model=self,
            prompt_tokens=tokens,
            params=params,
            adapter=adapter,
            sample=sample,
            number=len(self.handles),
            text=WORDS[digest[0] % len(WORDS)],
            steps_left=1 + digest[1] % 7,
            submitted_at=self.steps,
        )
        self.handles.append(handle)
        return handle

    def under_way(self) -> list[FakeHandle]:
        return [handle for handle in self.handles if not handle.finished]

    def launch(self) -> None:
        if not self.launched:
            self.launched, self.asked = True, 0

    def ready(self) -> bool:
        self.asked += 1
        return self.asked > self.questions

    def step(self) -> list[FakeHandle]:
        self.steps += 1
        self.launched = False
        if self.steps == self.fail_at_step:
            raise self.failure
        finished = []
        for handle in itertools.islice(self.under_way(), self.rows):
            handle.steps_left -= 1
            if handle.steps_left <= 0 or handle.cancelled:
                handle.finished = True
                finished.append(handle)
        return finished

    def idle(self) -> bool:
        return not self.under_way()
