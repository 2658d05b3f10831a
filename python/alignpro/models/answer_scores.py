"""What a target says of given answers: their log-probabilities, behind a prompt or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from alignpro.models.language_model import ChatModel, LanguageModel
from alignpro.models.native_model import NativeModel
from alignpro.models.reading import naming, target_tokens
from alignpro.types import Prompt, Texts

_TOKENS = 4096  # scored in one call: beginnings that its answers have in common are read once


class TargetScorer:
    """See `types.AnswerScorer`. Base weights score, whatever adapter the target answers with."""

    def __init__(self, target: LanguageModel | ChatModel) -> None:
        self._target = target
        self.name = target.name
        self.scores_answers = isinstance(target, NativeModel)
        here = isinstance(target, LanguageModel)
        self.tells_logprobs = here or bool(getattr(target, "tells_logprobs", False))

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
        means: list[float] = []
        for part in chunks([len(tokens) for tokens, _ in rows], _TOKENS):
            sequences, starts = zip(*rows[part], strict=True)
            score = model.core_model.score(list(sequences), list(starts))
            counts = [len(tokens) - start for tokens, start in rows[part]]
            parts = np.split(np.asarray(score.logprob, np.float64), np.cumsum(counts)[:-1])
            means += [float(values.mean()) if len(values) else 0.0 for values in parts]
        return means


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


def _read(model: NativeModel, prompt: Prompt | None, answer: str) -> tuple[list[int], int]:
    """Prompt and answer as tokens, and where the answer begins."""
    tokenizer = model.tokenizer
    if prompt is None:
        read = tokenizer.encode_chat([{"role": "user", "content": ""}])
    else:
        read = target_tokens(tokenizer, prompt)
    tokens = [*read, *tokenizer.encode(answer.strip())]
    if len(tokens) > model.context_length:
        raise ValueError(f"{len(tokens)} tokens exceed the context of {model.context_length}")
    return tokens, len(read)
