"""Rows whose prompt the models cannot read: found before the first step, by their place in the
user's data, and refused, left out or cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from alignpro.config import OnTooLong
from alignpro.data.load import PairRow, PromptRow
from alignpro.data.preferences import PreferenceRow
from alignpro.models.language_model import LanguageModel
from alignpro.models.mixture import soft_rows
from alignpro.models.reading import PROBE, ChatLengths, naming, prompter_tokens, too_long
from alignpro.pipeline import Pipeline
from alignpro.rewards.check import SOURCE, rewards_unread_by
from alignpro.types import Conversation, Prompt, Reward

_log = logging.getLogger(__name__)
Row = TypeVar("Row", PromptRow, PairRow, PreferenceRow)
CUT_MARK = " [...] "  # where the middle of a turn was
_SHOWN = 3  # places in a note


@dataclass(frozen=True)
class FittedRows(Generic[Row]):
    """The rows that can be read, in order, and the places of what became of the others."""

    rows: list[Row]
    skipped: list[str]
    cut: list[str]

    @property
    def note(self) -> str | None:
        """A sentence for who watches; None where every row is as it was."""
        places, done = (self.skipped, "left out") if self.skipped else (self.cut, "cut")
        if not places:
            return None
        shown = "; ".join(places[:_SHOWN]) + ("; ..." if len(places) > _SHOWN else "")
        total = len(self.rows) + len(self.skipped)
        return f"{len(places)} of {total} rows were too long for a model, and {done}: {shown}"


def fit_rows(
    rows: Sequence[Row], unread: Callable[[Row], str | None], on_too_long: OnTooLong
) -> FittedRows[Row]:
    """The rows that the models can read.

    unread: why they cannot read one, None where they can (`unread_by`).

    Raises:
        ValueError: a row that cannot be read, with "error", or where nothing of the prompt is left
            to cut; a conversation that a chat template refuses; no rows left. It names the row.
    """
    kept: list[Row] = []
    bad: list[tuple[str, str]] = []
    cut: list[str] = []
    for index, row in enumerate(rows):
        place = row.place or f"prompt {index}"
        with naming(place):
            reason = unread(row)
            shorter = row if reason is None else None
            if reason is not None and on_too_long == "cut":
                shorter = _cut(row, unread)
                if shorter is None:
                    raise ValueError(f"{reason}; nothing of the prompt is left to cut")
                cut.append(place)
        if shorter is None:
            bad.append((place, reason or ""))
        else:
            kept.append(shorter)
    if bad and (on_too_long == "error" or not kept):
        place, reason = bad[0]
        remedy = "" if on_too_long == "skip" else "; on_too_long takes skip or cut as well"
        raise ValueError(f"{place}: {reason} ({len(bad)} of {len(rows)} rows{remedy})")
    fitted = FittedRows(kept, [place for place, _ in bad], cut)
    if fitted.note is not None:
        _log.warning(fitted.note)
    return fitted


def unread_by(
    pipeline: Pipeline,
    *,
    rewrites: bool = True,
    responses: bool = True,
    texts: Sequence[str] = (),
    scored_by: Sequence[Reward] = (),
) -> Callable[[PromptRow], str | None]:
    """Why prompter, target or reward cannot read a row, with all that may be written behind it.

    rewrites, responses: whether the prompter takes part, and whether the target does. texts: what
        is put behind every prompt besides. scored_by: what scores the responses besides the
        pipeline's reward.
    Rows of soft prompts, of the pipeline's adapters, count. A target behind an endpoint says so
    itself, when it is asked.
    """
    prompter = pipeline.prompter if rewrites else None
    rows = soft_rows(pipeline.prompter_adapter)
    reads = None if prompter is None else ChatLengths(prompter, pipeline.rewrite_params, rows)
    answers = None
    added = again = 0  # tokens behind the prompt, or in the place of its last turn
    if responses and isinstance(pipeline.target, LanguageModel):
        of_target = soft_rows(pipeline.target_adapter)
        answers = ChatLengths(pipeline.target, pipeline.response_params, of_target)
        encode, separator = pipeline.target.tokenizer.encode, pipeline.prompting.separator
        added = max((len(encode(separator + text)) for text in texts if text), default=0)
        if rewrites and pipeline.prompting.mode == "append":
            most = len(encode(separator)) if separator else 0
            added = max(added, most + pipeline.rewrite_params.max_new_tokens)
        elif rewrites:
            again = pipeline.rewrite_params.max_new_tokens
    rewards = [reward for reward in (pipeline.reward, *scored_by) if reward is not None]
    judged = rewards_unread_by(rewards if responses else (), pipeline.response_params)

    def unread(row: PromptRow) -> str | None:
        conversation = Conversation.of(row.prompt)
        if prompter is not None and reads is not None:
            turns = pipeline.prompting.prompter_turns(row.prompt)
            if not reads.surely_holds(Conversation((), turns[0])):
                tokens = prompter_tokens(
                    *(prompter.tokenizer, pipeline.prompting, row.prompt),
                    *(prompter.context_length, pipeline.rewrite_params.max_new_tokens, rows),
                )
                reason = too_long(prompter, len(tokens), pipeline.rewrite_params)
                if reason is not None:
                    return f"in the prompter's template: {reason}"
        if answers is not None:
            with_rewrite = "" if not added and not again else ", with the longest rewrite"
            reason = answers.unread(pipeline.prompting.target_prompt(row.prompt, ""), added)
            if reason is None and again:
                probe = conversation.with_last_turn(PROBE).short
                reason = answers.unread(pipeline.prompting.target_prompt(probe, ""), again)
            if reason is not None:
                return f"in the target's template{with_rewrite}: {reason}"
        return judged(row.prompt, row.columns)

    return unread


def _cut(row: Row, unread: Callable[[Row], str | None]) -> Row | None:
    """The row with as little as possible cut off its prompt; None where that is not enough.

    First the oldest turns of the conversation, each up to the next one of the user, for templates
    that want the two sides in turn; system messages stay. Then the middle of the last turn, whose
    beginning and end both may hold what is asked (as LongBench cuts, arXiv 2308.14508), and what is
    cut of it out of a source that stands in it.
    """
    conversation = Conversation.of(row.prompt)

    def with_prompt(prompt: Prompt) -> Row:
        return replace(row, prompt=prompt)

    history = list(conversation.history)
    while any(role == "user" for role, _ in history):
        of_users = [i for i, (role, _) in enumerate(history) if role == "user"]
        until = of_users[1] if len(of_users) > 1 else len(history)
        kept = [m for m in history[:until] if m[0] not in ("user", "assistant")]
        history = kept + history[until:]
        shorter = with_prompt(Conversation(tuple(history), conversation.last_turn).short)
        if unread(shorter) is None:
            return shorter
    history = [m for m in history if m[0] != "assistant"]  # what no user's turn stood before
    turn = conversation.last_turn

    def ends(length: int) -> Row:
        """With so many characters of the turn: one half of its beginning, one of its end."""
        head = turn[: length - length // 2].rstrip()
        tail = turn[len(turn) - length // 2 :].lstrip()
        text = head + CUT_MARK + tail
        changes: dict[str, Any] = {"prompt": Conversation(tuple(history), text).short}
        if isinstance(row, PromptRow):
            changes["columns"] = _with_cut_source(row.columns, turn, head, tail)
        return replace(row, **changes)

    low, high = 0, len(turn) - 1  # the most characters that fit: low does, or nothing
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if unread(ends(middle)) is None else (low, middle - 1)
    # Tokens are not quite monotonic in characters, so what was found is looked at once more.
    return next((ends(n) for n in range(low, max(0, low - 8), -1) if unread(ends(n)) is None), None)


def _with_cut_source(columns: dict[str, Any], turn: str, head: str, tail: str) -> dict[str, Any]:
    """Of a turn of which head and tail are left: a source in it is what its reader has of it."""
    source = columns.get(SOURCE)
    if not isinstance(source, str) or source in head or source in tail or source not in turn:
        return columns
    begin = turn.index(source)
    behind = len(turn) - begin - len(source)
    left = head[begin:] + CUT_MARK + tail[: max(0, len(tail) - behind)]
    return {**columns, SOURCE: left.strip()}
