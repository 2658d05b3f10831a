"""What a model says of given answers: their log-probabilities, behind a prompt or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignpro.models.endpoint import EndpointModel
from alignpro.models.language_model import ChatModel, LanguageModel
from alignpro.models.mixture import score_tokens
from alignpro.models.native_model import NativeModel
from alignpro.models.reading import ChatLengths, naming, target_tokens
from alignpro.models.tokenizer import count_words
from alignpro.types import Prompt, SamplingParams, Texts

_TOKENS = 4096  # scored in one call: beginnings that its answers have in common are read once


class TargetScorer:
    """See `types.AnswerScorer`. Base weights score, whatever adapter the target answers with."""

    def __init__(self, target: LanguageModel | ChatModel) -> None:
        self._target = target
        self.name = target.name
        self.scores_answers = isinstance(target, NativeModel)
        here = isinstance(target, LanguageModel)
        self.tells_logprobs = here or bool(getattr(target, "tells_logprobs", False))

    def unread_by(self, params: SamplingParams) -> Callable[[Prompt | None], str | None]:
        """See `types.AnswerScorer`."""
        if not isinstance(self._target, LanguageModel):
            return lambda prompt: None  # which is never asked
        lengths = ChatLengths(self._target, params)
        return lambda prompt: None if prompt is None else lengths.unread(prompt)

    def __call__(self, prompts: Sequence[Prompt | None], answers: Texts) -> list[float]:
        """Raises ValueError for a row that the context does not hold, or a target that is none of
        this process."""
        model = self._target
        if not isinstance(model, NativeModel):
            raise ValueError(f"{self.name}: scores no given texts, as a model in this process does")
        rows = []
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            with naming(f"answer {index}"):
                rows.append(_read(model, prompt, answer))
        found = token_logprobs(model, [read for read, _ in rows], [own for _, own in rows], 1.0)
        return [float(values.mean()) if len(values) else 0.0 for values in found]


def sequence_logprobs(
    model: NativeModel | EndpointModel,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    temperature: float,
    adapter: Any = None,
) -> list[float]:
    """log p(continuation | prompt) of whole sequences of tokens, in nats. adapter: of a model that
    is here, as its `prepare` takes it; None: the base weights."""
    parts = token_logprobs(model, prompts, continuations, temperature, adapter)
    return [math.fsum(part) for part in parts]


def token_logprobs(
    model: NativeModel | EndpointModel,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    temperature: float,
    adapter: Any = None,
) -> list[NDArray[np.float64]]:
    """As `sequence_logprobs`, token by token. The memory of a pass is bounded."""
    if isinstance(model, EndpointModel):  # the configuration's rule: temperature 1
        return model.token_logprobs(prompts, continuations)
    sequences = [p + c for p, c in zip(prompts, continuations, strict=True)]
    prepared, found = model.prepare(adapter), list[NDArray[np.float64]]()
    for part in chunks([len(tokens) for tokens in sequences], _TOKENS):
        score = score_tokens(
            model,
            sequences[part],
            [len(p) for p in prompts[part]],
            adapter=prepared,
            temperature=temperature,
        )
        ends = np.cumsum([len(c) for c in continuations[part]])
        found += np.split(np.asarray(score.logprob, np.float64), ends[:-1])
    return found


def chunks(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Neighbours of ``most`` tokens together, or of one row that has more."""
    begin = total = 0
    for index, length in enumerate(lengths):
        if index > begin and total + length > most:
            yield slice(begin, index)
            begin, total = index, 0
        total += length
    if begin < len(lengths):
        yield slice(begin, len(lengths))


def _read(model: NativeModel, prompt: Prompt | None, answer: str) -> tuple[list[int], list[int]]:
    """Prompt and answer as tokens."""
    tokenizer, most = model.tokenizer, model.context_length
    if prompt is None:
        read = tokenizer.encode_chat([{"role": "user", "content": ""}])
    else:
        read = target_tokens(tokenizer, prompt, most=most)
    written = tokenizer.encode(answer.strip(), most=most)
    size = len(read) + len(written)
    if size > most:
        raise ValueError(f"{count_words(size, most)} exceed the context of {most}")
    return read, written
