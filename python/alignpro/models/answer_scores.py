"""What a model says of given answers: their log-probabilities, behind a prompt or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignpro.models.endpoint import EndpointModel
from alignpro.models.language_model import ChatModel, LanguageModel
from alignpro.models.mixture import score_tokens
from alignpro.models.native_model import NativeModel
from alignpro.models.reading import ChatLengths, naming, target_tokens
from alignpro.models.tokenizer import count_words
from alignpro.types import Prompt, SamplingParams, Texts

if TYPE_CHECKING:
    from alignpro.native import core

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
    found = list[NDArray[np.float64]]()
    for score, ends in _passes(model, prompts, continuations, temperature, adapter=adapter):
        found += _split(score.logprob, ends)
    return found


class Divergence(NamedTuple):
    """Of a text under a policy, and a reference that it is compared with."""

    kl: float  # sum_t KL(policy || reference) in nats, exact at every token
    entropy: float  # of the policy, nats a token


def divergences(
    model: NativeModel,
    prompts: Sequence[list[int]],
    written: Sequence[list[int]],
    temperature: float,
    *,
    policy: Any,
    reference: Any,
) -> list[Divergence]:
    """policy, reference: adapters, as of `sequence_logprobs`. For the KL of the policy's texts
    (MATH: KL) they must be its own."""
    found = []
    for score, ends in _passes(
        *(model, prompts, written, temperature),
        adapter=policy,
        reference=model.prepare(reference),
        with_reference=True,
    ):
        for kl, entropy in zip(_split(score.kl, ends), _split(score.entropy, ends), strict=True):
            mean = float(entropy.mean()) if len(entropy) else 0.0
            found.append(Divergence(float(kl.sum()), mean))
    return found


def _passes(
    model: NativeModel,
    prompts: Sequence[list[int]],
    written: Sequence[list[int]],
    temperature: float,
    *,
    adapter: Any,
    **more: Any,
) -> Iterator[tuple[core.Score, NDArray[np.int_]]]:
    """`score_tokens` pass by pass, each with where its sequences part."""
    sequences = [p + w for p, w in zip(prompts, written, strict=True)]
    prepared = model.prepare(adapter)
    for part in chunks([len(tokens) for tokens in sequences]):
        starts = [len(p) for p in prompts[part]]
        score = score_tokens(
            model, sequences[part], starts, adapter=prepared, temperature=temperature, **more
        )
        yield score, np.cumsum([len(w) for w in written[part]])[:-1]


def _split(values: Any, ends: NDArray[np.int_]) -> list[NDArray[np.float64]]:
    return np.split(np.asarray(values, np.float64), ends)


def chunks(lengths: Sequence[int], most: int = _TOKENS) -> Iterator[slice]:
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
