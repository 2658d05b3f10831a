"""A reward function for TRL's GRPOTrainer: what a target answers to a rewrite, scored.

For who trains the prompter elsewhere. The completions of the policy are rewrites; each is answered
by a target, here or behind an endpoint, and the answer is scored against the original prompt, which
is a column of the data set (`prompter_rows`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignpro.config import Prompting
from alignpro.models.language_model import ChatModel, LanguageModel
from alignpro.models.reading import read_prompts
from alignpro.models.reasoning import split_reasoning
from alignpro.models.seeds import derive_seed
from alignpro.pipeline import Pipeline
from alignpro.types import (
    Conversation,
    Message,
    PromptLike,
    Reward,
    SamplingParams,
    text_messages,
)

COLUMN = "original_prompt"


def prompter_rows(
    prompts: Sequence[PromptLike], prompting: Prompting | None = None
) -> list[dict[str, Any]]:
    """Rows of a data set to train on: what the prompter reads as ``prompt``, and the user's own,
    all as messages where one of them is a conversation. Nothing of a history is cut."""
    prompting = prompting or Prompting()
    rows: list[dict[str, Any]] = []
    given = read_prompts(prompts)
    short = all(isinstance(prompt, str) for prompt in given)  # a column of a table has one type
    for prompt in given:
        turn: Message = {"role": "user", "content": prompting.prompter_turns(prompt)[0]}
        original = prompt if short else Conversation.of(prompt).messages
        rows.append({"prompt": [turn], COLUMN: original})
    return rows


def rewrite_reward(
    target: LanguageModel | ChatModel,
    reward: Reward,
    *,
    prompting: Prompting | None = None,
    params: SamplingParams | None = None,
    num_responses: int = 1,
    max_failed: float = 0.1,
    seed: int = 0,
) -> Callable[..., list[float | None]]:
    """For ``GRPOTrainer(reward_funcs=...)``.

    Args:
        target: a loaded model, or an `EndpointModel`. reward: scores its answers.
        params: how the target is sampled; None is the default of a response.
        num_responses: answers to a rewrite, whose mean is its reward.
        max_failed: share of the answers that may fail; the reward of a rewrite without any is None,
            which TRL leaves out. More of them raise FailedRowsError.
        seed: of the target's draws, which are others in every call. They are keyed by the step of
            TRL's trainer and the call in it: one that resumes draws what it would have.

    The function raises ValueError where the data set has no column ``original_prompt``.
    """
    pipeline = Pipeline(
        None,
        target,
        reward,
        prompting=prompting,
        response_params=params,
        max_failed=max_failed,
    )
    step, calls = 0, itertools.count()  # of the trainer; in the step

    def alignpro_reward(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        nonlocal step, calls
        now = getattr(columns.get("trainer_state"), "global_step", 0)
        if now != step:
            step, calls = now, itertools.count()
        originals = columns.get(COLUMN)
        if originals is None:
            raise ValueError(
                f"the data set has no column {COLUMN}, which the answers are scored against; "
                "`prompter_rows` makes such rows"
            )
        # The columns of the data are lists with a value for each row; TRL passes more than those.
        own = {
            name: list(values)
            for name, values in columns.items()
            if name not in (COLUMN, *_OF_TRL)
            and isinstance(values, (list, tuple))
            and len(values) == len(completions)
        }
        rollout = pipeline.answer(
            list(originals),
            [[_rewrite(completion)] for completion in completions],
            num_responses=num_responses,
            seed=derive_seed(seed, step, next(calls)),
            columns=own,
        )
        return [group[0].reward if group[0].responses else None for group in rollout.rewrites]

    return alignpro_reward


# What TRL gives to a reward function beside the columns of the data.
_OF_TRL = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def _rewrite(completion: Any) -> str:
    """Without a block of reasoning; "" of one that was cut in it."""
    answer, _ = split_reasoning(_text(completion))
    return (answer or "").strip()


def _text(completion: Any) -> str:
    """Of a completion as TRL has it: a text, or the turns that were written."""
    if isinstance(completion, str):
        return completion
    own = [m for m in completion if isinstance(m, Mapping) and m.get("role") == "assistant"]
    written = [{**m, "tool_calls": None} for m in own if m.get("content")]
    # Nothing, or calls of tools alone, is no rewrite.
    return text_messages(written[-1:])[0]["content"] if written else ""
