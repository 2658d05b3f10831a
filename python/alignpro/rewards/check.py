"""The one door through which rewards are called: each score is checked, no failure becomes 0."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from alignpro.types import Conversation, Message, Prompt, Reward, Texts

CONVERSATIONS = "conversations"
RESERVED_COLUMNS = frozenset({"prompts", "rewrites", "responses"})
_SHOWN_CHARACTERS = 60


class RewardError(ValueError):
    """A reward failed, or gave something that is no score. ``row``: its index, where known."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


def reward_name(reward: object) -> str:
    """What errors and reports call a reward: its ``name``, its function name, or its type's."""
    for attribute in ("name", "__name__"):
        value = getattr(reward, attribute, None)
        if isinstance(value, str) and value:
            return value
    return type(reward).__name__


def shorten(text: str, limit: int = _SHOWN_CHARACTERS) -> str:
    """One printable line of at most ``limit`` characters, quoted."""
    line = " ".join(text.split())
    return ascii(line if len(line) <= limit else line[: limit - 3] + "...")


class _Rows(NamedTuple):
    """The arguments of a reward, aligned."""

    prompts: Sequence[str]
    rewrites: Sequence[str]
    responses: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def scored_by(self, reward: Reward) -> list[object]:
        prompts, rewrites, responses, columns = self
        return _as_list(reward(prompts, rewrites, responses, **columns), reward_name(reward))

    def alone(self) -> Iterator[tuple[int, _Rows]]:
        """Every row by itself, with its index."""
        for row in range(len(self.prompts)):
            *texts, columns = self
            prompts, rewrites, responses = ([column[row]] for column in texts)
            own = {name: [values[row]] for name, values in columns.items()}
            yield row, _Rows(prompts, rewrites, responses, own)


def score_checked(
    reward: Reward,
    prompts: Sequence[Prompt],
    rewrites: Texts,
    responses: Texts,
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    may_abstain: bool = False,
) -> list[float]:
    """Calls ``reward`` on aligned rows and returns one finite float per row.

    Raises RewardError naming the row (index and prompt) where the reward raises (chained as the
    cause), or gives None, NaN, an infinity, something that is no number, or the wrong count. To
    name the row behind a failed batch, rows are scored one by one until one fails. With
    ``may_abstain`` None is NaN instead, for a sum in which the other parts count.
    Raises ValueError where the inputs themselves are not aligned.
    """
    texts, given = reward_inputs(prompts, columns)
    rows = _Rows(texts, rewrites, responses, _accepted(reward, texts, given))
    _check_aligned(rows)
    if not prompts:
        return []
    name = reward_name(reward)
    try:
        scores = rows.scored_by(reward)
    except RewardError:
        raise  # a component has already named its row
    except Exception as error:
        for row, alone in rows.alone():
            try:
                alone.scored_by(reward)
            except Exception as cause:
                raised = f"raised {type(cause).__name__} at row {_describe(row, texts)}"
                raise RewardError(f"reward {name!r} {raised}: {cause}", row) from cause
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__} on a batch of {len(prompts)} rows, "
            f"though on no row alone: {error}"
        ) from error
    if len(scores) != len(prompts):
        wrong = next((r for r, alone in rows.alone() if not _gives_one(reward, alone)), None)
        where = "" if wrong is None else f"; row {_describe(wrong, texts)} alone does not give 1"
        raise RewardError(
            f"reward {name!r}: expected {len(prompts)} scores, one a row, got {len(scores)}{where}",
            wrong,
        )
    return [
        math.nan if may_abstain and score is None else _as_score(score, name, row, texts)
        for row, score in enumerate(scores)
    ]


def reward_inputs(
    prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]] | None
) -> tuple[list[str], dict[str, Sequence[Any]]]:
    """The last user turns; the columns with the conversations where a prompt has earlier turns."""
    given = dict(columns or {})
    if isinstance(prompts, str):
        raise ValueError("reward input 'prompts': expected a list, got text")
    if any(isinstance(prompt, Conversation) for prompt in prompts):
        if CONVERSATIONS in given:
            raise ValueError(
                f"column {CONVERSATIONS!r} collides with a reward argument; rename the column"
            )
        given[CONVERSATIONS] = [messages_of(prompt) for prompt in prompts]
    return [p.last_turn if isinstance(p, Conversation) else p for p in prompts], given


def messages_of(prompt: Prompt) -> list[Message]:
    """What a reward reads of a prompt under ``conversations``."""
    if isinstance(prompt, Conversation):
        return prompt.messages
    return [{"role": "user", "content": prompt}]  # which the reward may take empty


def _accepted(
    reward: Reward, prompts: Sequence[str], columns: dict[str, Sequence[Any]]
) -> dict[str, Sequence[Any]]:
    """The columns with the conversations for who names them, without for who takes no columns."""
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return columns
    if CONVERSATIONS in parameters and CONVERSATIONS not in columns:
        return columns | {CONVERSATIONS: [messages_of(prompt) for prompt in prompts]}
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if CONVERSATIONS not in parameters and not everything:
        columns = {name: values for name, values in columns.items() if name != CONVERSATIONS}
    return columns


def _check_aligned(rows: _Rows) -> None:
    clash = sorted(RESERVED_COLUMNS & rows.columns.keys())
    if clash:
        raise ValueError(f"column {clash[0]!r} collides with a reward argument; rename the column")
    inputs = {"rewrites": rows.rewrites, "responses": rows.responses, **rows.columns}
    for what, values in inputs.items():
        if isinstance(values, str):
            raise ValueError(f"reward input {what!r}: expected a list, got text")
        if len(values) != len(rows.prompts):
            raise ValueError(
                f"reward input {what!r}: expected {len(rows.prompts)} rows as prompts, got "
                f"{len(values)}"
            )


def _as_list(result: object, name: str) -> list[object]:
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise RewardError(
            f"reward {name!r} returned an awaitable; rewards are plain functions: "
            "run the coroutine inside, with asyncio.run"
        )
    if isinstance(result, (str, bytes, Mapping)) or not isinstance(result, Iterable):
        raise RewardError(
            f"reward {name!r}: expected a sequence of numbers, got {type(result).__name__}"
        )
    return list(result)


def _as_score(value: Any, name: str, row: int, prompts: Sequence[str]) -> float:
    where = f"reward {name!r}, row {_describe(row, prompts)}"
    try:
        # float() would read "1.5" and one-element arrays, which nobody meant as a score.
        if isinstance(value, (str, bytes, bytearray)) or getattr(value, "ndim", 0) != 0:
            raise TypeError
        score = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        given = f"{type(value).__name__} {shorten(repr(value), 40)}"
        if value is None:
            given = "None, which abstains in a sum alone, where other rewards score the row"
        raise RewardError(f"{where}: expected a number, got {given}", row) from error
    if not math.isfinite(score):
        raise RewardError(f"{where}: expected a finite number, got {score}", row)
    return score


def _describe(row: int, prompts: Sequence[str]) -> str:
    return f"{row} (prompt {shorten(prompts[row])})"


def _gives_one(reward: Reward, row: _Rows) -> bool:
    try:
        return len(row.scored_by(reward)) == 1
    except Exception:
        return False
