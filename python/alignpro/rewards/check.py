"""The one door through which rewards are called: each score is checked, no failure becomes 0.

None is no score (TRL's word for a row that is not this reward's): NaN here, and nowhere a 0.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from alignpro.types import (
    AnswerScorer,
    Conversation,
    Message,
    Prompt,
    Response,
    Reward,
    Rewrite,
    SamplingParams,
    Texts,
)

CONVERSATIONS = "conversations"
COMPLETION_IDS = "completion_ids"  # tokens of the responses, of a target in this process
RESPONSE_LOGPROBS = "response_logprobs"  # nats by token, of a target that tells them
SOURCE = "source"  # a column of the data: what responses are to be faithful to
T = TypeVar("T")
Unread = Callable[[Prompt, Mapping[str, Any]], str | None]
_OF_RESPONSES = (COMPLETION_IDS, RESPONSE_LOGPROBS)
RESERVED = frozenset({"prompts", "rewrites", "responses", *_OF_RESPONSES})
_SHOWN_CHARACTERS = 60
# Of a failed batch. One that took longer has paid for something, as a judge or an endpoint does,
# and its rows are not scored once more to find the one that failed.
_CHEAP_SECONDS = 1.0


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
        """Of copies of the lists: a reward may work on what it is given."""
        *texts, columns = self
        prompts, rewrites, responses = map(list, texts)
        own = {name: list(values) for name, values in columns.items()}
        with _exits_said():
            result = resolved(reward(prompts, rewrites, responses, **own))
            return _as_list(result, reward_name(reward))

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
) -> list[float]:
    """Calls ``reward``, plain or async, on aligned rows: one finite float a row, or NaN for None.

    Raises RewardError naming the row (index and prompt) where the reward raises (chained as the
    cause), or gives NaN, an infinity, something that is no number, or the wrong count. To name the
    row behind a failed batch, rows are scored one by one until one fails, unless that may cost
    money: where the reward is async, says ``costs_money = True``, or took a second or more.
    Raises ValueError where the inputs themselves are not aligned.
    """
    texts, given = reward_inputs(prompts, columns)
    rows = _Rows(texts, rewrites, responses, _accepted(reward, texts, given))
    _check_aligned(rows)
    if not prompts:
        return []
    name, started = reward_name(reward), time.monotonic()

    def again() -> Iterator[tuple[int, _Rows]]:
        costs = getattr(reward, "costs_money", False)
        cheap = not costs and time.monotonic() - started < _CHEAP_SECONDS
        return rows.alone() if cheap else iter(())

    try:
        scores = rows.scored_by(reward)
    except RewardError:
        raise  # a component has already named its row
    except Exception as error:
        looked = False
        for row, alone in again():
            looked = True
            try:
                alone.scored_by(reward)
            except Exception as cause:
                raised = f"raised {type(cause).__name__} at row {_describe(row, texts)}"
                raise RewardError(f"reward {name!r} {raised}: {cause}", row) from cause
        alone_too = ", though on no row alone" if looked else ""
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__} on a batch of {len(prompts)} rows"
            f"{alone_too}: {error}"
        ) from error
    if len(scores) != len(prompts):
        wrong = next((r for r, alone in again() if not _gives_one(reward, alone)), None)
        where = "" if wrong is None else f"; row {_describe(wrong, texts)} alone does not give 1"
        raise RewardError(
            f"reward {name!r}: expected {len(prompts)} scores, one a row, got {len(scores)}{where}",
            wrong,
        )
    return [
        math.nan if score is None else _as_score(score, name, row, texts)
        for row, score in enumerate(scores)
    ]


def score_rewrites(
    reward: Reward,
    prompts: Sequence[Prompt],
    rewrites: Sequence[Sequence[Rewrite]],
    columns: Mapping[str, Sequence[Any]],
) -> tuple[list[list[Rewrite]], int]:
    """One call of the reward for every (prompt, rewrite, response), in that order. Responses
    without a score are left out, and counted. Rewrites that share a list of responses share their
    scores. columns: by prompt. Raises as `score_checked`."""
    lists = {id(w.responses): w for group in rewrites for w in group}
    rows = [(w, r) for w in lists.values() for r in w.responses]
    scored = score_checked(
        reward,
        [prompts[w.prompt_index] for w, _ in rows],
        [w.text for w, _ in rows],
        [r.text for _, r in rows],
        {name: [values[w.prompt_index] for w, _ in rows] for name, values in columns.items()}
        | response_columns([r for _, r in rows]),
    )
    scores = iter(scored)
    with_rewards = {
        key: [
            replace(r, reward=score)
            for r, score in zip(w.responses, scores, strict=False)  # the next of all scores
            if not math.isnan(score)
        ]
        for key, w in lists.items()
    }
    return [
        [replace(w, responses=with_rewards[id(w.responses)]) for w in group] for group in rewrites
    ], sum(map(math.isnan, scored))


@contextmanager
def _exits_said() -> Iterator[None]:
    """sys.exit() in a reward is an error of it, and no end of the run without a word."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"it exited, with status {error.code}") from error


def resolved(result: object) -> object:
    """What a reward returned; of an awaitable, what it comes to.

    All run on one event loop, in a thread of its own, so that a client that belongs to a loop
    serves every batch, and a caller that has a loop under way (a notebook) may wait as well.
    """
    if not inspect.isawaitable(result):
        return result

    async def waited() -> object:
        with _exits_said():  # one would end the thread of the loop, and leave who waits
            return await result

    future = asyncio.run_coroutine_threadsafe(waited(), _event_loop())
    try:
        return future.result()
    except BaseException:  # Ctrl-C as well
        future.cancel()
        raise


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def reward_inputs(
    prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]] | None
) -> tuple[list[str], dict[str, Sequence[Any]]]:
    """The last user turns; the columns with the conversations where a prompt has earlier turns."""
    given = dict(columns or {})
    if isinstance(prompts, str):
        raise ValueError("reward input 'prompts': expected a list, got text")
    if any(isinstance(prompt, Conversation) for prompt in prompts):
        messages = [messages_of(prompt) for prompt in prompts]
        if list(given.setdefault(CONVERSATIONS, messages)) != messages:
            raise ValueError(
                f"column {CONVERSATIONS!r} collides with a reward argument; rename the column"
            )
    return [p.last_turn if isinstance(p, Conversation) else p for p in prompts], given


def response_columns(responses: Sequence[Response]) -> dict[str, Sequence[Any]]:
    """What rewards may be given of the responses beside their text, where the target tells it of
    all: their tokens, and the log-probabilities that they were drawn with."""
    columns: dict[str, Sequence[Any]] = {}
    if all(response.tokens for response in responses):
        columns[COMPLETION_IDS] = [response.tokens for response in responses]
    if all(response.logprobs for response in responses):
        columns[RESPONSE_LOGPROBS] = [response.logprobs for response in responses]
    return columns


def offer_scorer(reward: Reward, scorer: AnswerScorer) -> None:
    """Give the target to a reward that asks it for more than responses. Raises ValueError for one
    that the target does not serve, before anything is computed."""
    use = getattr(reward, "use_scorer", None)
    if use is not None:
        use(scorer)


def rewards_unread_by(rewards: Iterable[Reward], params: SamplingParams) -> Unread:
    """Why one of the rewards, which reads with a model, cannot read a row, by its prompt and its
    columns, with a response that is drawn by ``params``; None where all can, or read with none."""
    of = [getattr(reward, "unread_by", None) for reward in rewards]
    parts: list[Unread] = [unread_by(params) for unread_by in of if unread_by is not None]

    def unread(prompt: Prompt, columns: Mapping[str, Any]) -> str | None:
        reasons = (part(prompt, columns) for part in parts)
        return next((reason for reason in reasons if reason is not None), None)

    return unread


def check_columns(reward: Reward, columns: Mapping[str, Sequence[Any]]) -> None:
    """Refuse, before anything is computed, columns of the data that are called as something else
    that a reward is given, and a reward that cannot do without one that they have not, or reads no
    such value as a row has (`FunctionReward.check_columns`). Raises ValueError."""
    check_names(columns)
    own: dict[str, Sequence[Any]] = dict.fromkeys((CONVERSATIONS, *_OF_RESPONSES), ())
    check_required(reward, {**columns, **own})


def check_required(reward: Reward, columns: Mapping[str, Sequence[Any]]) -> None:
    """columns: of the data, and what is given beside them."""
    check = getattr(reward, "check_columns", None)
    if check is not None:
        check(columns)


def check_names(columns: Iterable[str], taken: Collection[str] = RESERVED) -> None:
    """Refuse a column of the data that has the name of something else that a reward is given."""
    for name in columns:
        if name in taken:
            raise ValueError(f"column {name!r} collides with a reward argument; rename the column")


def no_column(name: str, columns: Iterable[str]) -> str:
    """Of a column that a reward cannot do without: that the data has others."""
    own = sorted(set(columns) - {CONVERSATIONS, *_OF_RESPONSES})
    return f"needs the data column {name!r}; columns here: {', '.join(own) or 'none'}"


def read_rows(what: str, values: Iterable[T]) -> list[T]:
    """The values, which are read as they come. Raises ValueError, which names the row."""
    found: list[T] = []
    try:
        for value in values:
            found.append(value)  # how many there are says which row is refused
    except ValueError as error:
        raise ValueError(f"{what}, row {len(found)}: {error}") from None
    return found


def messages_of(prompt: Prompt) -> list[Message]:
    """What a reward reads of a prompt under ``conversations``."""
    if isinstance(prompt, Conversation):
        return prompt.messages
    return [{"role": "user", "content": prompt}]  # which the reward may take empty


def _accepted(
    reward: Reward, prompts: Sequence[str], columns: dict[str, Sequence[Any]]
) -> dict[str, Sequence[Any]]:
    """The columns with the conversations for who names them, without for who takes no columns; the
    tokens of responses, or their log-probabilities, for who names these."""
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return columns
    if CONVERSATIONS in parameters and CONVERSATIONS not in columns:
        return columns | {CONVERSATIONS: [messages_of(prompt) for prompt in prompts]}
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    dropped = set()
    if CONVERSATIONS not in parameters and not everything:
        dropped.add(CONVERSATIONS)
    for name in _OF_RESPONSES:
        if name not in parameters and not getattr(reward, f"takes_{name}", False):
            dropped.add(name)
    return {name: values for name, values in columns.items() if name not in dropped}


def _check_aligned(rows: _Rows) -> None:
    check_names(rows.columns, RESERVED - {*_OF_RESPONSES})
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
        raise RewardError(f"{where}: expected a number, got {given}", row) from error
    if not math.isfinite(score):
        no_score = "; None is no score" if math.isnan(score) else ""
        raise RewardError(f"{where}: expected a finite number, got {score}{no_score}", row)
    return score


def _describe(row: int, prompts: Sequence[str]) -> str:
    return f"{row} (prompt {shorten(prompts[row])})"


def _gives_one(reward: Reward, row: _Rows) -> bool:
    try:
        return len(row.scored_by(reward)) == 1
    except Exception:
        return False
