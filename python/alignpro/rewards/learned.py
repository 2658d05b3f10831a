"""A reward that was fitted to preferences: a linear head on how a frozen model reads an answer.

`alignpro reward fit` writes its folder, which holds one file, reward.json.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignpro.models.answer_scores import chunks
from alignpro.models.native_model import NativeModel, load_model
from alignpro.models.reading import ChatLengths
from alignpro.models.tokenizer import count_words
from alignpro.rewards.check import CONVERSATIONS, Unread
from alignpro.types import Conversation, Message, Prompt, PromptLike, SamplingParams, Texts

RECORD = "reward.json"
State = Literal["mean", "end"]


class LearnedReward:
    """The reward of an answer, on the scale of Bradley and Terry's model: of two answers to a
    prompt, one is preferred with probability sigmoid of the difference. 0 is the mean of the
    answers that it was fitted to.

    path: the folder of the reward. model: the model that it reads with, loaded already; None loads
        the one that it was fitted with.

    Raises:
        FileNotFoundError: no such folder, or no such model. ValueError: a damaged record, or a
        model with other weights than it was fitted with.
    """

    def __init__(self, path: str | Path, *, model: NativeModel | None = None) -> None:
        self.name = f"learned:{path}"
        file = Path(path) / RECORD
        if not file.is_file():
            raise FileNotFoundError(
                f"{path}: expected the folder of a learned reward, with {RECORD}; "
                f"`alignpro reward fit PAIRS --output {path}` writes one"
            )
        try:
            record: Mapping[str, Any] = json.loads(file.read_text("utf-8"))
            made = record["model"]
            self._weights = np.asarray(record["weights"], np.float64)
            self._bias = float(record["bias"])
            self._state: State = record["state"]
            name, options = made["name"], dict(made["options"])
            date, known = made["date"], made["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{file}: damaged or of another version ({said[:200]})") from None
        self.model = model or load_model(name, date=date, **options)
        if self.model.fingerprint != known:
            raise ValueError(f"{file}: fitted to {name} with other weights than {self.model.name}")

    def unread_by(self, params: SamplingParams) -> Unread:
        """Tokens of a response are counted as if they were this model's."""
        lengths = ChatLengths(self.model, params)

        def unread(prompt: Prompt, columns: Mapping[str, Any]) -> str | None:
            reason = lengths.unread(prompt, more=2)  # the end, and `answer_features` adds one
            return None if reason is None else f"for reward {self.name!r}: {reason}"

        return unread

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        """Raises ValueError for an answer that the model's context does not hold."""
        asked = columns.get(CONVERSATIONS, prompts)
        chats = [
            read_answer(self.model, prompt, response, self._state)
            for prompt, response in zip(asked, responses, strict=True)
        ]
        features = answer_features(self.model, chats).astype(np.float64)
        rewards: list[float] = (features @ self._weights + self._bias).tolist()
        return rewards


class AnswerTokens(NamedTuple):
    """A chat up to the token that ends its last answer; the states at ``start`` and later count."""

    tokens: list[int]
    start: int


def read_answer(model: NativeModel, prompt: PromptLike, answer: str, state: State) -> AnswerTokens:
    """state: "mean" counts the answer's tokens, its end included; "end" counts that alone.

    Raises ValueError for a chat over the context, or that the chat template refuses.
    """
    tokenizer, asked = model.tokenizer, Conversation.of(prompt).messages
    most = model.context_length
    said: Message = {"role": "assistant", "content": answer}
    tokens = tokenizer.encode_chat([*asked, said], add_generation_prompt=False, most=most)
    begin = zip(tokens, tokenizer.encode_chat(asked, most=most), strict=False)
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], begin))
    ends = [at for at, token in enumerate(tokens) if at >= start and token in tokenizer.eos_ids]
    tokens = tokens[: ends[-1] + 1 if ends else None]
    if len(tokens) >= most:
        raise ValueError(
            f"{count_words(len(tokens), most)} of prompt and answer exceed the context of "
            f"{model.name} ({most} tokens)"
        )
    last = len(tokens) - 1
    return AnswerTokens(tokens, last if state == "end" else min(start, last))


def answer_features(
    model: NativeModel,
    chats: Sequence[AnswerTokens],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float32]:
    """[n, D]: the mean of the base model's final, normalised states that count. A row's bits depend
    on no other row."""
    features = np.empty((len(chats), int(model.config["hidden_size"])), np.float32)
    for rows in chunks([len(chat.tokens) for chat in chats]):
        part = chats[rows]
        # States are those that a token was predicted from: of one more, whichever it is.
        score = model.core_model.score(
            [[*chat.tokens, chat.tokens[-1]] for chat in part],
            [chat.start + 1 for chat in part],
            with_hidden=True,
        )
        assert score.hidden is not None
        counts = [len(chat.tokens) - chat.start for chat in part]
        states = np.split(score.hidden, np.cumsum(counts)[:-1])
        features[rows] = [of_answer.mean(axis=0) for of_answer in states]
        on_progress(rows.stop, len(chats))
    return features
