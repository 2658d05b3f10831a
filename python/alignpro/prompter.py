"""A trained prompter by itself: it rewrites prompts for a target that may be anywhere."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from alignpro.config import (
    REWRITE,
    GuardConfig,
    ModelConfig,
    Prompting,
    SftConfig,
    from_mapping,
)
from alignpro.models.adapter import AdapterWeights
from alignpro.models.adapter_files import CONFIG as ADAPTER_CONFIG
from alignpro.models.adapter_files import is_mixture
from alignpro.models.engine_thread import EngineThread
from alignpro.models.mixture import Mixture
from alignpro.models.native_model import NativeModel, load_model
from alignpro.models.reading import read_prompts
from alignpro.models.seeds import fresh_seed
from alignpro.pipeline import Pipeline
from alignpro.rewriting import (
    AsyncRewriteStream,
    Clock,
    Request,
    RewriteStream,
    Rewritten,
    Turn,
    beside,
)
from alignpro.run_directory import CONFIG, RunConfig, config_of_run
from alignpro.types import (
    Completion,
    PromptLike,
    Rewrite,
    SamplingParams,
)


class Prompter:
    """Rewrites prompts; no target takes part. Any thread and event loop may call it.

        prompter = alignpro.Prompter.from_run("alignpro-run")
        result = prompter.rewrite("How do bees find home?", deadline=0.1)
        result.prompt  # what the target is to be asked

    Args:
        model: the prompter's base model, or its path or name.
        adapter: a PEFT folder or matrices, or a mixture or its folder; None is the base model as
            prompter.
        prompting: how prompts are read and rewritten, as in training.
        params: how rewrites are sampled.
        guards: what a rewrite must keep for `rewrite` to use it; None uses whatever was written.

    Raises as `load_model` and `load_peft`.
    """

    def __init__(
        self,
        model: NativeModel | ModelConfig | str | os.PathLike[str],
        adapter: AdapterWeights | Mixture | str | os.PathLike[str] | None = None,
        *,
        prompting: Prompting | None = None,
        params: SamplingParams = REWRITE,
        guards: GuardConfig | None = None,
        threads: int | None = None,
        date: str | None = None,
    ) -> None:
        if prompting is not None and prompting.target_template != "{prompt}":
            raise ValueError(
                "prompting.target_template: this prompter was trained for a target that reads "
                "prompts in a template, as `alignpro extract` asks it; expected {prompt} alone here"
            )
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
            prompter_adapter=model.prepare(adapter),
            rewrite_params=params,
        )

    @classmethod
    def from_run(
        cls,
        run: str | os.PathLike[str],
        *,
        threads: int | None = None,
        guards: GuardConfig | None = None,
        sampling: Mapping[str, Any] | None = None,
        model: NativeModel | None = None,
        **options: Any,
    ) -> Prompter:
        """The prompter of a run of `train`, `prefer`, `sft` or `quickstart`, with the model, the
        prompting and the sampling that it was trained with.

        Args:
            sampling: fields of `SamplingParams` in which rewrites are drawn otherwise than in
                training, such as ``{"temperature": 0.0}``.
            model: one with the run's base weights that is loaded already, whatever its chat
                template; None loads it.
            options: fields of `ModelConfig` that are to be others here, such as ``device``.

        Raises:
            FileNotFoundError: no run, or one without an adapter yet. ValueError: a run that tuned
                the target, no such field, or ``options`` for a ``model``. Otherwise as the class.
        """
        config = config_of_prompter(run)
        params = from_mapping(SamplingParams, sampling or {}, path="sampling", base=config.rewrite)
        base = config.prompter
        if model is None:
            model = load_model(base, threads, date=config.date, **options)
        elif options:
            raise ValueError(f"{next(iter(options))}: expected none beside a model that is loaded")
        else:
            model = model.with_template(base.chat_template, base.chat_template_kwargs, config.date)
        return cls(
            model,
            Path(run) / "adapter",
            prompting=config.prompting,
            params=params,
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

        Raises as `load_peft`; the adapter in use then stays. ClosedError: `close` was called.
        """
        self._engine.check_open()
        self._pipeline = self._pipeline.with_adapter(self.model.prepare(self._adapter))

    def rewrite(
        self, prompt: PromptLike, *, deadline: float | None = None, seed: int | None = None
    ) -> Rewritten:
        """What the target is to be asked instead. Calls from many threads decode in one batch.

        Args:
            deadline: seconds from this call after which the prompt goes out as it is, at once where
                none are left; None waits.
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
        clock = Clock(deadline)
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
        clock = Clock(deadline)
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

        def judged() -> list[Rewritten]:
            return [request.rewritten(clock, self.guards) for request in requests]

        is_large = len(requests) > 1 or any(request.is_large for request in requests)
        return await beside(is_large, judged)

    def stream(
        self, prompt: PromptLike, *, deadline: float | None = None, seed: int | None = None
    ) -> RewriteStream:
        """`rewrite` as it is written: the last turn that the target is to be asked, in pieces.

            with prompter.stream("How do bees find home?", deadline=0.5) as pieces:
                for piece in pieces:
                    print(piece, end="")
            pieces.result.applied  # whether to use it

        Arguments and errors are those of `rewrite`.
        """
        clock = Clock(deadline)
        (request,) = self._prepare([prompt], seed)
        written: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._submit([request], clock, written.put)
        return RewriteStream(Turn(request, clock, self.guards), written)

    async def astream(
        self, prompt: PromptLike, *, deadline: float | None = None, seed: int | None = None
    ) -> AsyncRewriteStream:
        """`stream` for an event loop: ``async for piece in await prompter.astream(prompt)``."""
        clock = Clock(deadline)
        loop = asyncio.get_running_loop()
        written: asyncio.Queue[str | None] = asyncio.Queue()

        def put(piece: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads on
                loop.call_soon_threadsafe(written.put_nowait, piece)

        try:
            reading = asyncio.to_thread(self._prepare, [prompt], seed)
            (request,) = await asyncio.wait_for(reading, clock.left)
        except asyncio.TimeoutError:
            (read,) = read_prompts([prompt])
            request = Request(prompt, read, 0, self._pipeline, [], REWRITE)
            request.future.cancel()
        else:
            self._submit([request], clock, put)
        return AsyncRewriteStream(Turn(request, clock, self.guards), written)

    def _prepare(self, prompts: Sequence[PromptLike], seed: int | None) -> list[Request]:
        """What the engine is asked for. Raises ValueError and ClosedError."""
        self._engine.check_open()
        seed = fresh_seed() if seed is None else seed
        pipeline = self._pipeline
        return [
            Request(
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

    def _submit(
        self,
        requests: Sequence[Request],
        clock: Clock,
        put: Callable[[str | None], None] | None = None,
    ) -> None:
        submit: Callable[..., Future[Completion]] = self._engine.submit
        if put is not None:
            submit = partial(self._engine.stream, put=put)
        for request in requests:
            if clock.left == 0:
                request.future.cancel()
                continue
            adapter = request.pipeline.prompter_adapter
            request.future = submit(request.tokens, request.params, adapter=adapter)

    def rewrites(
        self, prompts: Sequence[PromptLike], *, num_rewrites: int = 1, seed: int | None = None
    ) -> list[list[Rewrite]]:
        """``[prompts][num_rewrites]`` with all that is known of each: text, tokens,
        log-probabilities, and ``target_prompt``, what the target is to be asked.

        Raises as `rewrite`.
        """
        self._engine.check_open()
        if isinstance(prompts, str):
            raise ValueError(
                "prompts: expected a list of prompts, got text; rewrite(prompt) takes it"
            )
        return self._pipeline.rewrite(prompts, num_rewrites=num_rewrites, seed=seed)


def config_of_prompter(
    run: str | os.PathLike[str],
) -> RunConfig:
    """What the run of a prompter was made with. Raises as `Prompter.from_run`."""
    run = Path(run)
    file, adapter = run / CONFIG, run / "adapter"
    if not file.is_file():
        hint = ""
        if is_mixture(run):
            hint = "; Prompter(model, adapter) takes a mixture, alignpro mix --distill makes it one"
        elif (run / ADAPTER_CONFIG).is_file():
            hint = "; Prompter(model, adapter) takes a PEFT folder"
        raise FileNotFoundError(f"{run}: expected the directory of a run, with {CONFIG}{hint}")
    if not adapter.is_dir():
        raise FileNotFoundError(
            f"{adapter}: not there yet; a run that has ended writes it: "
            f"alignpro train {file} --resume"
        )
    config = config_of_run(run)
    if not isinstance(config, SftConfig) and config.policy != "prompter":
        raise ValueError(f"{run}: expected the run of a prompter; this one tuned the target")
    if isinstance(config, SftConfig) and config.schema is not None:
        raise ValueError(f"{run}: expected the run of a prompter; this one taught extraction")
    return config
