"""What callers of the native model pass, checked and brought into the engine's form."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from alignpro import native
from alignpro.config import ModelConfig
from alignpro.models.soft_prompt import SoftRows, chat_tokens
from alignpro.models.tokenizer import count_words
from alignpro.types import (
    Chat,
    Conversation,
    PromptLike,
    SamplingParams,
    not_unicode,
    text_messages,
)

if TYPE_CHECKING:
    from alignpro.models.tokenizer import Tokenizer
    from alignpro.native import core

Prompt = Sequence[int] | PromptLike  # a text is one user turn of a chat


def is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def refuse_rows(prompts: Sequence[Any]) -> None:
    """Refuse what is iterated over as prompts and is one chat, or rows with a column of them.
    Raises ValueError."""
    if not len(prompts) or not isinstance(prompts[0], Mapping):
        return
    got = "one chat; put it into a list"
    if "role" not in prompts[0]:
        got = f"rows with {sorted(map(str, prompts[0]))}; give the column that holds the prompts"
    raise ValueError(f"prompts: expected a list of texts or chats, got {got}")


def check_prompts(prompts: Any) -> Sequence[Prompt]:
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts: expected a list of prompts, got {type(prompts).__name__}")
    refuse_rows(prompts)
    if prompts and is_int(prompts[0]):
        raise ValueError("prompts: expected a list of token lists, got one; put it into a list")
    return prompts


def params_for(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    each = list(params)
    if len(each) != count:
        raise ValueError(f"params: expected one, or {count} (one per prompt), got {len(each)}")
    return each


def samples_of(params: Any) -> int:
    """How many completions the parameters ask for; 1 where they do not say it rightly."""
    n = getattr(params, "n", 1)
    return int(n) if is_int(n) and n >= 1 else 1


def with_seed(params: SamplingParams) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params: expected SamplingParams, got {type(params).__name__}")
    if samples_of(params) != params.n:
        raise ValueError(f"n: expected an integer of 1 or more, got {params.n!r}")
    if params.seed is not None:
        return params
    return replace(params, seed=int.from_bytes(os.urandom(8), "little"))


def core_params(params: SamplingParams, sample: int) -> core.SamplingParams:
    """The engine's parameters. Types are checked here; ranges in the engine, which uses them."""
    for name, least, most in (
        ("top_k", -(2**31), 2**31 - 1),
        ("max_new_tokens", -(2**63), 2**63 - 1),
        ("min_new_tokens", -(2**63), 2**63 - 1),
        ("seed", 0, 2**64 - 1),
    ):
        value = getattr(params, name)
        if not (is_int(value) and least <= value <= most):
            raise ValueError(f"{name}: expected an integer in [{least}, {most}], got {value!r}")
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    for name in ("temperature", "top_p", "min_p", *penalties):
        value = getattr(params, name)
        if not (is_int(value) or isinstance(value, (float, np.floating))):
            raise ValueError(f"{name}: expected a number, got {value!r}")
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"{name}: expected a number that a float holds") from None
    if isinstance(params.stop, str) or not all(isinstance(s, str) for s in params.stop):
        raise ValueError(f"stop: expected a tuple of strings, got {params.stop!r}")
    for stop in params.stop:
        if reason := not_unicode(stop):
            raise ValueError(f"stop: {reason}")
    if not isinstance(params.ignore_eos, bool):
        raise ValueError(f"ignore_eos: expected True or False, got {params.ignore_eos!r}")
    deadline = params.deadline_seconds
    if deadline is not None and not (
        (is_int(deadline) or isinstance(deadline, float)) and 0 < deadline < math.inf
    ):
        raise ValueError(f"deadline_seconds: expected more than 0, or None, got {deadline!r}")
    given = {name: value for name, value in vars(params).items() if name != "n"}
    given["stop"] = list(params.stop)
    given["stop_token_ids"] = token_list(params.stop_token_ids, "stop_token_ids")
    given["deadline_seconds"] = 0.0 if deadline is None else float(deadline)
    return native.core.SamplingParams(**given, sample=sample)


def check_params(name: str, params: SamplingParams) -> None:
    """Refuse what the engine would refuse when it is asked. name: for messages."""
    try:
        core_params(with_seed(params), sample=0)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def token_list(tokens: Any, what: str) -> list[int]:
    """Ids as a list of int; arrays are taken too."""
    if isinstance(tokens, np.ndarray):
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{what}: expected 1-D integer ids, got {tokens.dtype} {tokens.shape}")
        tokens = tokens.tolist()
    if isinstance(tokens, (str, bytes, Mapping)) or not isinstance(tokens, Sequence):
        raise ValueError(f"{what}: expected a list of token ids, got {type(tokens).__name__}")
    for index, token in enumerate(tokens):
        if not is_int(token) or not -(2**31) <= token < 2**31:
            raise ValueError(f"{what}: expected token ids, got {token!r} at index {index}")
    return [int(token) for token in tokens]


def prompt_tokens(
    tokenizer: Tokenizer, prompt: Prompt, context: int, rows: SoftRows | None = None
) -> list[int]:
    """context: of the model, in tokens; a prompt that is far longer is refused by its beginning.
    rows: of the adapter that reads the prompt (`soft_rows`). Token ids hold theirs already."""
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("expected text, got none")
    if isinstance(prompt, Conversation):
        chat: Chat = prompt.messages
    elif isinstance(prompt, str):
        chat = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        chat = text_messages(prompt)
    else:
        tokens = token_list(prompt, "expected token ids, a chat or a text")
        _check_rows(tokens, rows, "; a text or a chat is given them")
        return tokens
    tokens = chat_tokens(tokenizer, chat, rows, context)
    if len(tokens) > 2 * context:  # there may be more, which the engine would not count
        raise ValueError(
            f"prompt: expected fewer tokens than the context of {context}, got "
            f"{count_words(len(tokens), context)}; shorten it"
        )
    return tokens


def token_lists(sequences: Any, rows: SoftRows | None) -> list[list[int]]:
    """As `token_list`, of several that are not empty. rows: of the adapter that reads them."""
    lists = [token_list(s, f"sequence {i}") for i, s in enumerate(sequences)]
    for index, tokens in enumerate(lists):
        if not tokens:
            raise ValueError(f"sequence {index}: expected at least one token, got none")
        try:
            _check_rows(tokens, rows)
        except ValueError as error:
            raise ValueError(f"sequence {index}: {error}") from None
    return lists


def _check_rows(tokens: Sequence[int], rows: SoftRows | None, advice: str = "") -> None:
    """Refuse token ids that are read with a soft prompt and do not hold it."""
    if rows is not None and tokens and min(tokens) >= 0:
        raise ValueError(
            f"token ids read with a soft prompt: expected -1 to {-rows.count} among them, where "
            f"its rows stand, got none{advice}"
        )


def check_models(prompter: Any, target: Any, reward: Any) -> None:
    """Refuse what stands for a model or a reward and is none, with what would make one of it."""
    for name, model in (("prompter", prompter), ("target", target)):
        if isinstance(model, (str, os.PathLike, ModelConfig)):
            raise ValueError(
                f"{name}: expected a model, got {type(model).__name__}; alignpro.load_model loads "
                "one from a path, a name or a ModelConfig; EndpointModel stands for one elsewhere"
            )
    if reward is not None and not callable(reward):
        raise ValueError(
            f"reward: expected a reward, got {type(reward).__name__}; alignpro.build_reward makes "
            'one from a line such as "vader+0.2*topic"'
        )


def check_texts(texts: Sequence[Sequence[str]], count: int) -> None:
    if isinstance(texts, str) or len(texts) != count:
        got = "text" if isinstance(texts, str) else str(len(texts))
        raise ValueError(f"texts: expected {count} lists, got {got}")
    for index, group in enumerate(texts):
        if isinstance(group, str):
            raise ValueError(f"texts: expected a list of rewrites of prompt {index}, got text")
        if not group:
            raise ValueError(f"texts: expected a rewrite of prompt {index}, got none")


def check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
