"""The judges there are: a local model, and a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignpro.config import JudgeConfig
from alignpro.evaluate.judge import JudgeError, Reply, Verdict
from alignpro.models.native_model import NativeModel

if TYPE_CHECKING:
    import openai

_EXTRA = "pip install 'alignpro[judge]'"
_REMINDER = "That is no verdict. Reply with one letter and nothing else: A or B."
# One letter, perhaps marked up or introduced ("**B**", "Answer: A", "[[A]]", "Response B."). Prose
# is none: "A good answer, but B ..." would be read either way.
_LETTER = re.compile(
    r"[\W_]*(?:(?:the )?(?:better )?(?:answer|response|verdict|choice)(?: is)?[\W_]*)?([AB])[\W_]*",
    re.IGNORECASE,
)
_SCORED_AT_ONCE = 8  # questions; bounds the memory of a scoring pass


def read_verdict(reply: str) -> Verdict | None:
    """The letter that a reply consists of; None for anything else."""
    match = _LETTER.fullmatch(reply)
    letter = "" if match is None else match[1]
    return "A" if letter == "A" else "B" if letter == "B" else None


def check_judge(config: JudgeConfig) -> None:
    """That what the judge needs is there, before anything expensive is done for it.

    Raises:
        ImportError: a package. ValueError: the environment variable with the key.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ImportError(f"judge: the length-controlled win rate needs scipy: {_EXTRA}")
    if config.base_url is None:
        return
    if importlib.util.find_spec("openai") is None:
        raise ImportError(f"judge.base_url: an endpoint needs the package openai: {_EXTRA}")
    if config.api_key_env is not None and not os.environ.get(config.api_key_env):
        raise ValueError(
            f"judge.api_key_env: the environment variable {config.api_key_env} is not set; set it, "
            "or judge.api_key_env=null for an endpoint without keys"
        )


class LocalJudge:
    """A model in this process: the likelier of the two letters, with nothing sampled."""

    def __init__(self, model: NativeModel) -> None:
        self.name = model.name
        self.identity = f"local {fingerprint(model.path)}"
        self._model = model
        self._letters = [model.tokenizer.encode(letter) for letter in ("A", "B")]
        if any(len(tokens) != 1 for tokens in self._letters) or (
            self._letters[0] == self._letters[1]
        ):
            raise ValueError(f"judge {model.name}: expected a token for each of A and B, got none")

    def replies(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """In order. A question over the model's context gets no verdict."""
        fitting: list[tuple[int, list[int]]] = []
        for index, question in enumerate(questions):
            tokens = self._model.tokenizer.encode_chat([{"role": "user", "content": question}])
            if len(tokens) < self._model.context_length:
                fitting.append((index, tokens))
            else:
                limit = self._model.context_length
                yield index, Reply(None, f"{len(tokens)} tokens exceed the context of {limit}")
        for begin in range(0, len(fitting), _SCORED_AT_ONCE):
            chunk = fitting[begin : begin + _SCORED_AT_ONCE]
            score = self._model.core_model.score(
                [tokens + letter for _, tokens in chunk for letter in self._letters],
                [len(tokens) for _, tokens in chunk for _ in self._letters],
            )
            pairs = score.logprob.reshape(len(chunk), 2)
            for (index, _), (a, b) in zip(chunk, pairs.tolist(), strict=True):
                verdict: Verdict = "A" if a > b else "B" if b > a else "tie"
                yield index, Reply(verdict, f"log p(A) {a:.4f}, log p(B) {b:.4f}")


def fingerprint(model: Path) -> str:
    """A hash of a model's weights, configuration and tokenizer, wherever they lie.

    Of a file over `_HASHED_WHOLE` it reads that much, in blocks all over the file: models that
    differ in every tensor differ in every block.
    """
    files = [model]
    if model.is_dir():
        files = sorted(f for f in model.iterdir() if f.suffix in _MODEL_FILES and f.is_file())
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        name = path.name if model.is_dir() else ""
        digest.update(f"{name} {size}\n".encode())
        blocks = -(-min(size, _HASHED_WHOLE) // _BLOCK)
        with path.open("rb") as file:
            for block in range(blocks):
                file.seek(block * _BLOCK if size <= _HASHED_WHOLE else size * block // blocks)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


_MODEL_FILES = {".safetensors", ".json", ".jinja", ".model"}
_BLOCK, _HASHED_WHOLE = 1 << 20, 1 << 30  # bytes


class EndpointJudge:
    """A model behind /chat/completions. Retries are the client's: 429 (after what Retry-After
    says), 5xx, timeouts, broken connections."""

    def __init__(self, config: JudgeConfig) -> None:
        self.name = config.model.name
        sampling = f"{config.temperature} {config.max_tokens}"
        self.identity = f"endpoint {config.base_url} {self.name} {sampling}"
        self._config = config

    def replies(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """As they come, ``concurrency`` at a time.

        Raises:
            JudgeError: the endpoint refuses the key or does not know the model.
        """
        with self._client() as client:
            pool = ThreadPoolExecutor(self._config.concurrency)
            try:
                indices = {
                    pool.submit(self._reply, client, question): index
                    for index, question in enumerate(questions)
                }
                for future in as_completed(indices):
                    yield indices[future], future.result()
            finally:
                # What is under way is waited for: nothing is asked once this has ended.
                pool.shutdown(wait=True, cancel_futures=True)

    def _client(self) -> openai.OpenAI:
        import openai

        config = self._config
        named = config.api_key_env
        return openai.OpenAI(
            base_url=config.base_url,
            api_key=os.environ[named] if named is not None else "none",
            timeout=config.timeout_seconds,
            max_retries=config.max_retries,
        )

    def _reply(self, client: openai.OpenAI, question: str) -> Reply:
        """A reply that is no verdict, or no chat completion at all, is asked for once more."""
        import openai

        messages = [{"role": "user", "content": question}]
        problem = ""
        for _ in range(2):
            try:
                text = _content(self._complete(client, messages))
            except (
                openai.AuthenticationError,
                openai.PermissionDeniedError,
                openai.NotFoundError,
            ) as error:
                raise JudgeError(f"judge {self.name}: {_line(error)}") from error
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                return Reply(None, _line(error))  # retried by the client already
            except (openai.OpenAIError, ValueError) as error:  # ValueError: malformed JSON
                problem = f"no chat completion: {_line(error)}"
                continue
            verdict = read_verdict(text)
            if verdict is not None:
                return Reply(verdict, text)
            problem = f"no verdict: {_line(text)}"
            messages = [
                messages[0],
                {"role": "assistant", "content": text},
                {"role": "user", "content": _REMINDER},
            ]
        return Reply(None, problem)

    def _complete(self, client: openai.OpenAI, messages: list[dict[str, str]]) -> Any:
        import openai

        request: dict[str, Any] = {"model": self.name, "messages": messages}
        for name in ("temperature", "max_tokens"):
            if getattr(self._config, name) is not None:
                request[name] = getattr(self._config, name)
        if self._config.api_key_env is None:
            request["extra_headers"] = {"Authorization": openai.omit}
        return client.chat.completions.create(**request)


def _content(completion: Any) -> str:
    """The reply's text; the client checks nothing of what a server sends."""
    try:
        content = completion.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        raise ValueError(f"expected choices with a message, got {_line(completion)}") from None
    if not isinstance(content, str):
        raise ValueError(f"expected text in the message, got {_line(content)}")
    return content


def _line(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:197] + "..."
