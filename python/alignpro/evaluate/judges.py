"""The judges there are: a local model, and a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignpro.config import JudgeConfig
from alignpro.evaluate.judge import JudgeError, Reply, Verdict
from alignpro.models.endpoint import EndpointHandle, EndpointModel
from alignpro.models.http_client import BudgetError, EndpointError
from alignpro.models.language_model import RequestError
from alignpro.models.native_client import prompt_end
from alignpro.models.native_model import NativeModel
from alignpro.models.reasoning import open_block, split_reasoning
from alignpro.models.reply import one_line
from alignpro.models.tokenizer import count_words
from alignpro.types import Message, SamplingParams, Usage

_EXTRA = "pip install 'alignpro[judge]'"
_REMINDER = "That is no verdict. Reply with one letter and nothing else: A or B."
# One letter or a word for a tie, perhaps marked up or introduced ("**B**", "Answer: A", "[[C]]",
# "Response B.", "It's a tie"). Prose is none: "A good answer, but B ..." would be read either way.
_VERDICT = re.compile(
    r"[\W_]*(?:(?:the )?(?:better )?(?:answer|response|verdict|choice|winner)(?: is)?[\W_]*)?"
    r"(?:(?P<letter>[ab])|(?P<tie>(?:(?:it is|it's|they are|both(?: responses| answers)? are) )?"
    r"(?:an? )?(?:tie|tied|draw|C|equal|equally good|(?:the )?same|either|neither|both"
    r"|no preference)))[\W_]*",
    re.IGNORECASE,
)
_KEYS = ("verdict", "winner", "better", "answer", "choice", "preferred")  # of a reply in JSON
_SCORED_AT_ONCE = 8  # questions; bounds the memory of a scoring pass


def read_verdict(reply: str) -> Verdict | None:
    """The letter that a reply consists of, or a tie where it says so; None for anything else.

    Reasoning before the answer is passed over; an answer in JSON is read by its key.
    """
    answer, _ = split_reasoning(reply)
    answer = _in_json(answer or "")
    match = _VERDICT.fullmatch(answer)
    if match is None:
        return None
    if match["letter"] is None:
        return "tie"
    return "A" if match["letter"] in "Aa" else "B"


def _in_json(answer: str) -> str:
    text = re.sub(r"^```\w*\s*|\s*```$", "", answer.strip())
    try:
        value = json.loads(text)
    except ValueError:
        return answer
    found = [value[k] for k in _KEYS if k in value] if isinstance(value, dict) else []
    return str(found[0]) if len(found) == 1 else answer


def check_judge(config: JudgeConfig, calls: Path | None = None) -> None:
    """That what the judge needs is there, before anything expensive is done for it. calls: as of
    `EndpointJudge`.

    Raises:
        ImportError: a package. ValueError: the environment variable with the key.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ImportError(f"judge: the length-controlled win rate needs scipy: {_EXTRA}")
    if config.base_url is None:
        return
    try:
        EndpointModel(config.asked, calls)
    except ValueError as error:
        raise ValueError(f"judge.{error}") from None


class LocalJudge:
    """A model in this process: the likelier of the two letters, with nothing sampled."""

    usage: Usage | None = None

    def __init__(self, model: NativeModel) -> None:
        self.name = model.name
        self._model = model
        self._letters = [model.tokenizer.encode(letter) for letter in ("A", "B")]
        if any(len(tokens) != 1 for tokens in self._letters) or (
            self._letters[0] == self._letters[1]
        ):
            raise ValueError(f"judge {model.name}: expected a token for each of A and B, got none")
        asked = model.tokenizer.encode_chat([{"role": "user", "content": "A or B?"}])
        if open_block(prompt_end(model.tokenizer, asked)) is not None:
            raise ValueError(
                f"judge {model.name}: its chat template opens a block of reasoning, in which no "
                "letter can be scored; judge.model.chat_template_kwargs may close it, "
                "judge.model.chat_template takes another, or ask an endpoint (judge.base_url)"
            )
        # A question in tokens shows all that the template, its variables and its date do to it.
        self.identity = f"local {model.fingerprint} {asked}"

    def replies(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """In order. A question over the model's context gets no verdict."""
        fitting: list[tuple[int, list[int]]] = []
        encode, limit = self._model.tokenizer.encode_chat, self._model.context_length
        for index, question in enumerate(questions):
            tokens = encode([{"role": "user", "content": question}], most=limit)
            if len(tokens) < limit:
                fitting.append((index, tokens))
            else:
                size = count_words(len(tokens), limit)
                yield index, Reply(None, f"{size} exceed the context of {limit}")
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


class EndpointJudge:
    """A model behind /chat/completions, asked by the client that a target behind one has.

    Args:
        calls: the file of its calls, as of an `EndpointModel`.
    """

    def __init__(self, config: JudgeConfig, calls: Path | None = None) -> None:
        self.name = config.model.name
        sampling = f"{config.temperature} {config.max_tokens}"
        self.identity = f"endpoint {config.base_url} {self.name} {sampling}"
        if config.model.chat_template_kwargs:
            self.identity += f" {json.dumps(config.model.chat_template_kwargs, sort_keys=True)}"
        self._model = EndpointModel(config.asked, calls)
        self._max_tokens, self._concurrency = config.max_tokens, config.concurrency

    @property
    def usage(self) -> Usage:
        return self._model.usage()

    def replies(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """As they come. A reply that is no verdict is asked for once more.

        Raises:
            JudgeError: the endpoint refuses the key or does not know the model, or its budget is
                spent.
        """
        client = self._model.client()
        asked: dict[EndpointHandle, tuple[int, list[Message], bool]] = {}
        failed: list[RequestError] = []

        def ask(index: int, conversation: list[Message], again: bool) -> None:
            handle = client.submit(conversation, SamplingParams(seed=0))
            asked[handle] = index, conversation, again

        try:
            left = enumerate(questions)
            while True:
                for index, question in itertools.islice(left, self._concurrency - len(asked)):
                    ask(index, [{"role": "user", "content": question}], False)
                if client.idle():
                    for error in failed:  # the evaluation goes on without them
                        error.accept()
                    return
                for handle in client.step():
                    index, conversation, again = asked.pop(handle)
                    text, problem = self._answer(handle, failed)
                    verdict = read_verdict(text)
                    if verdict is not None or problem or again:
                        said = text if verdict is not None else f"no verdict: {one_line(text)}"
                        yield index, Reply(verdict, problem or said)
                        continue
                    more: list[Message] = [
                        {"role": "assistant", "content": text},
                        {"role": "user", "content": _REMINDER},
                    ]
                    ask(index, conversation + more, True)
        finally:
            client.cancel()

    def _answer(self, handle: EndpointHandle, failed: list[RequestError]) -> tuple[str, str]:
        """The answer, or why there is none, which is put to those that failed."""
        try:
            return handle.completion().text, ""
        except RequestError as error:
            failed.append(error)
            problem = str(error)
            if "length" in problem and self._max_tokens is not None:
                problem += f"; judge.max_tokens is {self._max_tokens}, null is no limit"
            return "", problem
        except (EndpointError, BudgetError) as error:
            raise JudgeError(f"judge {error}") from error
