"""A trained prompter by itself: it rewrites prompts for a target that may be anywhere."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignpro.config import (
    REWRITE,
    GuardConfig,
    ModelConfig,
    Prompting,
    SftConfig,
    TrainConfig,
    config_of_run,
)
from alignpro.guards import Candidate, broken_guard
from alignpro.models.adapter import LoraWeights
from alignpro.models.engine_thread import ClosedError, EngineThread
from alignpro.models.native_model import NativeModel, load_model
from alignpro.models.reading import read_prompts
from alignpro.pipeline import Pipeline, fresh_seed
from alignpro.types import (
    Completion,
    Conversation,
    Message,
    Prompt,
    PromptLike,
    Rewrite,
    SamplingParams,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewritten:
    """What the target is to be asked, and why.

    ``reason`` is "rewritten" where the rewrite is applied. Otherwise ``prompt`` is the original
    and the reason "deadline", "empty" (nothing was written), "unchanged", "guard_" and the name of
    the guard that was broken (see `broken_guard`), or "error", whose traceback is logged.
    """

    prompt: str | list[Message]  # text for text, messages for messages
    text: str  # what the prompter wrote; "" where it did not end
    applied: bool
    reason: str
    milliseconds: float  # since the call
    tokens: int = 0  # that the prompter wrote

    @classmethod
    def original(
        cls,
        given: PromptLike,
        reason: str,
        milliseconds: float = 0.0,
        text: str = "",
        tokens: int = 0,
    ) -> Rewritten:
        """Of a prompt that goes out as it was given."""
        if isinstance(given, str):
            prompt: str | list[Message] = given
        else:
            prompt = given.messages if isinstance(given, Conversation) else list(given)
        return cls(prompt, text, False, reason, milliseconds, tokens)

    @property
    def messages(self) -> list[Message]:
        """``prompt`` as a chat."""
        return Conversation.of(self.prompt).messages


class Prompter:
    """Rewrites prompts; no target takes part. Any thread and event loop may call it.

        prompter = alignpro.Prompter.from_run("alignpro-run")
        result = prompter.rewrite("How do bees find home?", deadline=0.1)
        result.prompt  # what the target is to be asked

    Args:
        model: the prompter's base model, or its path or name.
        adapter: a PEFT folder or matrices; None is the base model as prompter.
        prompting: how prompts are read and rewritten, as in training.
        params: how rewrites are sampled.
        guards: what a rewrite must keep for `rewrite` to use it; None uses whatever was written.

    Raises as `load_model` and `load_peft`.
    """

    def __init__(
        self,
        model: NativeModel | ModelConfig | str | os.PathLike[str],
        adapter: LoraWeights | str | os.PathLike[str] | None = None,
        *,
        prompting: Prompting | None = None,
        params: SamplingParams = REWRITE,
        guards: GuardConfig | None = None,
        threads: int | None = None,
        date: str | None = None,
    ) -> None:
        if not isinstance(model, NativeModel):
            model = load_model(model, threads, date=date)
        self.model = model
        self.guards = guards
        self._adapter = adapter
        self._engine = EngineThread(model)
        self._pipeline = Pipeline(
            model,
            None,
            None,
            prompting=prompting,
            prompter_adapter=model.make_adapter(adapter),
            rewrite_params=params,
        )

    @classmethod
    def from_run(
        cls,
        run: str | os.PathLike[str],
        *,
        threads: int | None = None,
        guards: GuardConfig | None = None,
        model: NativeModel | None = None,
        **options: Any,
    ) -> Prompter:
        """The prompter of a run of `train`, `sft` or `quickstart`, with the model, the prompting
        and the sampling that it was trained with.

        Args:
            model: one with the run's base weights that is loaded already; None loads it.
            options: fields of `ModelConfig` that are to be others here, such as ``device``.

        Raises:
            FileNotFoundError: no run, or one without an adapter yet. ValueError: a run that tuned
                the target. Otherwise as the class.
        """
        config = config_of_prompter(run)
        if model is None:
            model = load_model(config.prompter, threads, date=config.date, **options)
        return cls(
            model,
            Path(run) / "adapter",
            prompting=config.prompting,
            params=config.rewrite,
            guards=guards,
        )

    def __enter__(self) -> Prompter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way, whose callers get a `ClosedError`, and take nothing more."""
        self._engine.close()

    def reload(self) -> None:
        """Read the adapter's folder again. Rewrites under way end with the adapter that they began
        with; later ones see neither it nor what the model has cached under it.

        Raises as `load_peft`; the adapter in use then stays.
        """
        self._pipeline = self._pipeline.with_adapter(self.model.make_adapter(self._adapter))

    def rewrite(
        self, prompt: PromptLike, *, deadline: float | None = None, seed: int | None = None
    ) -> Rewritten:
        """What the target is to be asked instead. Calls from many threads decode in one batch.

        Args:
            deadline: seconds from this call after which the prompt goes out as it is; None waits.
            seed: the draw; None is a fresh one.

        Raises:
            ValueError: what is no prompt, or one that does not fit the model's context.
            ClosedError: `close` was called.
        """
        return self.rewrite_batch([prompt], deadline=deadline, seed=seed)[0]

    def rewrite_batch(
        self,
        prompts: Sequence[PromptLike],
        *,
        deadline: float | None = None,
        seed: int | None = None,
    ) -> list[Rewritten]:
        """`rewrite` of many prompts at once, each with a draw of its own."""
        clock = _Clock(deadline)
        requests = self._prepare(prompts, seed)
        try:
            self._submit(requests, clock)
            concurrent.futures.wait([request.future for request in requests], clock.left)
        finally:
            for request in requests:
                request.future.cancel()
        return [request.rewritten(clock, self.guards) for request in requests]

    async def arewrite(
        self, prompt: PromptLike, *, deadline: float | None = None, seed: int | None = None
    ) -> Rewritten:
        """`rewrite` for an event loop, which is never blocked. Cancelling it ends the request."""
        return (await self.arewrite_batch([prompt], deadline=deadline, seed=seed))[0]

    async def arewrite_batch(
        self,
        prompts: Sequence[PromptLike],
        *,
        deadline: float | None = None,
        seed: int | None = None,
    ) -> list[Rewritten]:
        """`rewrite_batch` for an event loop."""
        clock = _Clock(deadline)
        reading = asyncio.to_thread(self._prepare, prompts, seed)  # a long prompt takes its time
        try:
            requests = await asyncio.wait_for(reading, clock.left)
        except asyncio.TimeoutError:
            late = clock.milliseconds
            return [Rewritten.original(prompt, "deadline", late) for prompt in prompts]
        try:
            self._submit(requests, clock)
            waiting = [asyncio.wrap_future(request.future) for request in requests]
            if waiting:
                await asyncio.wait(waiting, timeout=clock.left)
        finally:
            for request in requests:
                request.future.cancel()
        return [request.rewritten(clock, self.guards) for request in requests]

    def _prepare(self, prompts: Sequence[PromptLike], seed: int | None) -> list[_Request]:
        """What the engine is asked for. Raises ValueError."""
        seed = fresh_seed() if seed is None else seed
        pipeline = self._pipeline
        return [
            _Request(
                given,
                prompt,
                index,
                pipeline,
                pipeline.prompter_tokens(prompt, index),
                pipeline.params_of_rewrite(seed, index),
            )
            for index, (given, prompt) in enumerate(
                zip(prompts, read_prompts(prompts), strict=True)
            )
        ]

    def _submit(self, requests: Sequence[_Request], clock: _Clock) -> None:
        for request in requests:
            if clock.left == 0:
                request.future.cancel()
                continue
            request.future = self._engine.submit(
                request.tokens, request.params, adapter=request.pipeline.prompter_adapter
            )

    def rewrites(
        self, prompts: Sequence[PromptLike], *, num_rewrites: int = 1, seed: int | None = None
    ) -> list[list[Rewrite]]:
        """``[prompts][num_rewrites]`` with all that is known of each: text, tokens,
        log-probabilities, and ``target_prompt``, what the target is to be asked."""
        if isinstance(prompts, str):
            raise ValueError(
                "prompts: expected a list of prompts, got text; rewrite(prompt) takes it"
            )
        return self._pipeline.rewrite(prompts, num_rewrites=num_rewrites, seed=seed)


def config_of_prompter(run: str | os.PathLike[str]) -> TrainConfig | SftConfig:
    """What the run of a prompter was made with. Raises as `Prompter.from_run`."""
    run = Path(run)
    file, adapter = run / "config.json", run / "adapter"
    if not file.is_file():
        hint = "; Prompter(model, adapter) takes a PEFT folder" * (
            (run / "adapter_config.json").is_file()
        )
        raise FileNotFoundError(f"{run}: expected the directory of a run, with config.json{hint}")
    if not adapter.is_dir():
        raise FileNotFoundError(
            f"{adapter}: not there yet; a run that has ended writes it: "
            f"alignpro train {file} --resume"
        )
    config = config_of_run(json.loads(file.read_text("utf-8")))
    if isinstance(config, TrainConfig) and config.policy != "prompter":
        raise ValueError(f"{run}: expected the run of a prompter; this one tuned the target")
    return config


class _Clock:
    """Since a call. Raises ValueError for what is no deadline."""

    def __init__(self, deadline: float | None) -> None:
        self._begin = time.perf_counter()
        if deadline is not None and not 0 < deadline < float("inf"):
            raise ValueError(f"deadline: expected seconds above 0, or None, got {deadline!r}")
        self._deadline = deadline

    @property
    def milliseconds(self) -> float:
        return (time.perf_counter() - self._begin) * 1e3

    @property
    def left(self) -> float | None:
        """Seconds; None where there is no deadline."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - self.milliseconds / 1e3)


@dataclass
class _Request:
    """One prompt, as it was given and as it is read, on its way through the engine."""

    given: PromptLike
    prompt: Prompt
    index: int
    pipeline: Pipeline  # with the adapter that it began with
    tokens: list[int]
    params: SamplingParams
    future: Future[Completion] = field(default_factory=Future)

    def rewritten(self, clock: _Clock, guards: GuardConfig | None) -> Rewritten:
        """What came of it. Raises ClosedError, and ValueError where the engine refuses it."""
        if self.future.cancelled():
            return self._original("deadline", clock)
        error = self.future.exception()
        if isinstance(error, (ValueError, ClosedError)):
            raise error
        if error is not None:
            _log.error("no rewrite", exc_info=error)
            return self._original("error", clock)
        rewrite = self.pipeline.as_rewrite(self.prompt, self.index, self.future.result())
        count = len(rewrite.tokens)
        if not rewrite.text:
            return self._original("empty", clock, tokens=count)
        if rewrite.target_prompt == self.prompt:
            return self._original("unchanged", clock, rewrite.text, count)
        new = Conversation.of(rewrite.target_prompt)
        if guards is not None:
            turn = Conversation.of(self.prompt).last_turn
            was_cut = rewrite.finish_reason == "length"
            candidate = Candidate(turn, new.last_turn, rewrite.text, was_cut)
            broken = broken_guard(candidate, self.pipeline.prompting, guards)
            if broken is not None:
                return self._original(f"guard_{broken}", clock, rewrite.text, count)
        asked = new.plain if isinstance(self.given, str) else new.messages
        return Rewritten(asked, rewrite.text, True, "rewritten", clock.milliseconds, count)

    def _original(self, reason: str, clock: _Clock, text: str = "", tokens: int = 0) -> Rewritten:
        return Rewritten.original(self.given, reason, clock.milliseconds, text, tokens)
