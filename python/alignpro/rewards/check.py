"""The one door through which rewards are called: each score is checked, no failure becomes 0."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from alignpro.types import Reward

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
    prompts: Sequence[str],
    rewrites: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[float]:
    """Calls ``reward`` on aligned rows and returns one finite float per row.

    Raises RewardError naming the row (index and prompt) where the reward raises (chained as the
    cause), or gives None, NaN, an infinity, something that is no number, or the wrong count. To
    name the row behind a failed batch, rows are scored one by one until one fails.
    Raises ValueError where the inputs themselves are not aligned.
    """
    rows = _Rows(prompts, rewrites, responses, dict(columns or {}))
    _check_aligned(rows)
    if not prompts:
        return []
    name = reward_name(reward)
    try:
        scores = rows.scored_by(reward)
    except RewardError:
        raise  # a component has already named its row
    except Exception as error:
        failed, cause = _failed_batch(reward, rows, error)
        raise failed from cause
    if len(scores) != len(prompts):
        row = _find_row_with_wrong_count(reward, rows)
        where = "" if row is None else f"; row {_describe(row, prompts)} alone does not give 1"
        raise RewardError(
            f"reward {name!r}: expected {len(prompts)} scores, one a row, got {len(scores)}{where}",
            row,
        )
    return [_as_score(score, name, row, prompts) for row, score in enumerate(scores)]


def _check_aligned(rows: _Rows) -> None:
    clash = sorted(RESERVED_COLUMNS & rows.columns.keys())
    if clash:
        raise ValueError(f"column {clash[0]!r} collides with a reward argument; rename the column")
    inputs = {"rewrites": rows.rewrites, "responses": rows.responses, **rows.columns}
    for what, values in inputs.items():
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
    # float() would read "1.5" and one-element arrays; neither is a score somebody meant to give.
    is_text = isinstance(value, (str, bytes, bytearray))
    if value is None or is_text or getattr(value, "ndim", 0) != 0:
        raise RewardError(f"{where}: expected a number, got {_describe_value(value)}", row)
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RewardError(
            f"{where}: expected a number, got {_describe_value(value)}", row
        ) from error
    if not math.isfinite(score):
        raise RewardError(f"{where}: expected a finite number, got {score}", row)
    return score


def _describe(row: int, prompts: Sequence[str]) -> str:
    return f"{row} (prompt {shorten(prompts[row])})"


def _describe_value(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {shorten(repr(value), 40)}"


def _failed_batch(
    reward: Reward, rows: _Rows, batch_error: Exception
) -> tuple[RewardError, Exception]:
    """What to raise where a batch failed, by the first row that fails alone, and its cause."""
    name = reward_name(reward)
    for row, alone in rows.alone():
        try:
            alone.scored_by(reward)
        except Exception as error:
            kind, where = type(error).__name__, _describe(row, rows.prompts)
            return RewardError(f"reward {name!r} raised {kind} at row {where}: {error}", row), error
    return RewardError(
        f"reward {name!r} raised {type(batch_error).__name__} on a batch of {len(rows.prompts)} "
        f"rows, though on no row alone: {batch_error}"
    ), batch_error


def _find_row_with_wrong_count(reward: Reward, rows: _Rows) -> int | None:
    for row, alone in rows.alone():
        try:
            count = len(alone.scored_by(reward))
        except Exception:
            return row
        if count != 1:
            return row
    return None
