"""prompt -> rewrite -> response -> reward.

The prompter is a `LanguageModel`; the target is one too, which may be the same object, or a
`ChatModel` behind an endpoint. A rewrite is handed to the target the moment it is finished: no
barrier stands between the models, and where prompter and target are one engine their rows decode
in one batch. Text crosses between them once per rewrite, and the tokens on both sides are kept,
where there are tokens.

Long because every way through the two models is a method of one class, which users know.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from alignpro import trace
from alignpro.config import (
    RESPONSE,
    REWRITE,
    ExtractConfig,
    ModelConfig,
    Prompting,
    SelfImproveConfig,
    StageConfig,
    check_sampling,
)
from alignpro.models.answer_scores import TargetScorer
from alignpro.models.arguments import check_counts, check_models, check_params, check_texts
from alignpro.models.in_flight import InFlight, Request
from alignpro.models.language_model import ChatModel, Handle, LanguageModel
from alignpro.models.mixture import soft_rows
from alignpro.models.native_model import NativeModel
from alignpro.models.reading import (
    check_columns,
    check_roles,
    naming,
    prompter_tokens,
    read_prompts,
    target_tokens,
    too_long,
)
from alignpro.models.seeds import derive_seed, fresh_seed
from alignpro.types import (
    Completion,
    Conversation,
    Prompt,
    PromptLike,
    Response,
    Reward,
    Rewrite,
    Rollout,
    SamplingParams,
)

if TYPE_CHECKING:
    from pathlib import Path

    from alignpro.extract.draw import Extraction
    from alignpro.extract.schema import Format, Schema

REWRITE_STREAM, RESPONSE_STREAM = 1, 2  # streams of randomness
Answered = dict[tuple[int, str], Rewrite]  # by prompt and text
OnResponse = Callable[[Response | None], None]  # None: of one that failed


class Pipeline:
    """A prompter in front of a frozen target, and the reward that judges the answers.

    Args:
        prompter: the model that writes rewrites; None where all of them are given (`answer`).
        target: the model that answers them; pass the same object where they share base weights.
            None where rewrites alone are written (`rewrite`).
        reward: scores responses against the original prompts; None leaves rewards NaN.
        prompter_adapter: what ``prompter.submit`` takes as adapter; None is the base model. A
            folder is read here, once.
        target_adapter: likewise for ``target.submit``; the target itself stays frozen, and this is
            for a comparison with one that was tuned.
        max_failed: share of a call's responses that may fail and be left out; one always may, but
            with 0. See `ModelConfig`.

    Raises:
        ValueError, FileNotFoundError: an adapter that its model does not take
            (`NativeModel.prepare`), or another argument that is none.
    """

    def __init__(
        self,
        prompter: LanguageModel | None,
        target: LanguageModel | ChatModel | None,
        reward: Reward | None,
        *,
        prompting: Prompting | None = None,
        prompter_adapter: Any = None,
        target_adapter: Any = None,
        rewrite_params: SamplingParams | None = None,
        response_params: SamplingParams | None = None,
        max_failed: float = ModelConfig.max_failed,
    ) -> None:
        check_models(prompter, target, reward)
        if reward is not None and target is not None:
            from alignpro.rewards.check import offer_scorer

            offer_scorer(reward, TargetScorer(target))
        self.prompter = prompter
        self._target = target
        # Asked once: to look whether an object has all that a protocol names takes 40 us.
        self._target_here = target if isinstance(target, LanguageModel) else None
        self.reward = reward
        self.prompting = prompting or Prompting()
        self._adapters = prompter_adapter, target_adapter  # as they were given
        self._writes = _prepared(prompter, prompter_adapter)
        self._answers = _prepared(target, target_adapter)
        self.rewrite_params = rewrite_params or REWRITE
        self.response_params = response_params or RESPONSE
        self.max_failed = max_failed
        for name, params in (("rewrite", self.rewrite_params), ("response", self.response_params)):
            check_sampling(name, params)
            check_params(name, params)

    @classmethod
    def configured(
        cls,
        config: StageConfig | SelfImproveConfig | ExtractConfig,
        prompter: LanguageModel | None,
        target: LanguageModel | ChatModel,
        reward: Reward | None,
    ) -> Pipeline:
        """The pipeline of a stage: its prompting, its sampling parameters, the target's own adapter
        and how much of it may fail."""
        answers = config.target or ModelConfig()
        return cls(
            prompter,
            target,
            reward,
            prompting=config.prompting,
            target_adapter=answers.adapter,
            rewrite_params=config.rewrite,
            response_params=config.response,
            max_failed=answers.max_failed,
        )

    @property
    def target(self) -> LanguageModel | ChatModel:
        """The model that answers. Raises ValueError where there is none."""
        if self._target is None:
            raise ValueError(
                "target: expected a model that answers, got None; load_model loads one"
            )
        return self._target

    @property
    def prompter_adapter(self) -> Any:
        """The prompter's, as it was given; `with_adapter` takes another."""
        return self._adapters[0]

    @property
    def target_adapter(self) -> Any:
        """The target's, as it was given; `with_target_adapter` takes another."""
        return self._adapters[1]

    def with_adapter(self, adapter: Any) -> Pipeline:
        """The same pipeline with another prompter adapter."""
        other = copy.copy(self)
        other._adapters = adapter, self.target_adapter
        other._writes = _prepared(self.prompter, adapter)
        return other

    def with_target_adapter(self, adapter: Any) -> Pipeline:
        """The same pipeline before another target of the same base weights."""
        other = copy.copy(self)
        other._adapters = self.prompter_adapter, adapter
        other._answers = _prepared(self._target, adapter)
        return other

    def without_reward(self) -> Pipeline:
        """The same pipeline leaving rewards NaN, for callers that score by themselves."""
        other = copy.copy(self)
        other.reward = None
        return other

    def without_target(self) -> Pipeline:
        """The same prompter alone, whose rewrites no target has to be able to read."""
        other = copy.copy(self)
        other._target = other._target_here = None
        other._adapters, other._answers = (self.prompter_adapter, None), None
        return other

    def rollout(
        self,
        prompts: Sequence[PromptLike],
        *,
        num_rewrites: int = 1,
        num_responses: int = 1,
        seed: int | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        common_draws: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        """N rewrites a prompt, M responses a rewrite, each scored against its original prompt.

        Draws are keyed by (seed, prompt index, rewrite index, response index). An empty rewrite
        leaves the prompt as it is in both modes; it is kept, with ``text == ""``.

        Args:
            seed: None draws a fresh one.
            columns: more of the prompts' data for the reward, each aligned with ``prompts``.
            common_draws: all rewrites of a prompt draw what rewrite 0 draws. Rewrites of one text
                then have the same responses, which are generated and scored once.
            on_progress: called with the number of rewrites and responses finished so far.

        Raises:
            ValueError: what is no prompt (`Conversation.of`), or one that does not fit its model's
                context; the message names the index. RewardError: see `rewards.check`.
            FailedRowsError: more of the responses failed than ``max_failed`` allows; those of a
                rewrite that does not fit the target, and those cut in their reasoning, are failed.
        """
        seed = fresh_seed() if seed is None else seed
        check_counts(num_rewrites=num_rewrites, num_responses=num_responses)
        check_columns(columns, len(prompts))
        given = read_prompts(prompts)
        with trace.span("rollout"):
            started = time.perf_counter()
            rewrites, done = self._generate(
                given, num_rewrites, num_responses, seed, common_draws, on_progress
            )
            return self._scored(given, rewrites, done, columns, common_draws, started)

    def rewrite(
        self, prompts: Sequence[PromptLike], *, num_rewrites: int = 1, seed: int | None = None
    ) -> list[list[Rewrite]]:
        """Rewrites alone, ``[prompts][N]``, without responses; the same draws as in `rollout`."""
        check_counts(num_rewrites=num_rewrites)
        seed = fresh_seed() if seed is None else seed
        return self._generate(read_prompts(prompts), num_rewrites, 0, seed)[0]

    def respond(
        self,
        prompts: Sequence[PromptLike],
        *,
        num_responses: int = 1,
        seed: int | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        """The target alone on the raw prompts: one empty rewrite a prompt, M responses each.

        The responses draw what those of rewrite 0 draw in `rollout` under the same seed.
        """
        return self.answer(
            prompts,
            [[""] for _ in prompts],
            num_responses=num_responses,
            seed=seed,
            columns=columns,
            on_progress=on_progress,
        )

    def answer(
        self,
        prompts: Sequence[PromptLike],
        texts: Sequence[Sequence[str]],
        *,
        num_responses: int = 1,
        seed: int | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        common_draws: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        """The target on rewrites that are given: M responses each, scored as in `rollout`.

        Args:
            texts: rewrites ``[prompts][N]``, N >= 1 and free to differ; "" is the raw prompt. The
                responses to ``texts[i][j]`` draw what those of rewrite j of prompt i draw in
                `rollout` under the same seed.
            common_draws: as in `rollout`, for a comparison between a prompt's rewrites.

        Raises:
            ValueError: as `rollout`, or texts that are not one list a prompt. FailedRowsError: as
                `rollout`.
        """
        seed = fresh_seed() if seed is None else seed
        check_counts(num_responses=num_responses)
        check_columns(columns, len(prompts))
        given = read_prompts(prompts)
        check_texts(texts, len(given))
        started = time.perf_counter()
        rewrites: list[list[Rewrite]] = []
        answered: Answered | None = {} if common_draws else None
        rows = sum(len(group) for group in texts) * num_responses
        with InFlight(rows, self.max_failed, on_progress) as in_flight:
            for index, (prompt, group) in enumerate(zip(given, texts, strict=True)):
                read = [self._read_by_target(prompt, index, text) for text in group]
                hand_over = partial(self._hand_over, in_flight, num_responses, seed, answered)
                rewrites.append([hand_over(w, sample) for sample, w in enumerate(read)])
            in_flight.run_until_done()
        return self._scored(given, rewrites, in_flight, columns, common_draws, started)

    def extract(
        self,
        texts: Sequence[PromptLike],
        schema: str | Path | Mapping[str, Any] | Schema,
        *,
        attempts: int = 4,
        form: Format = "json",
        seed: int | None = None,
        numbers: Sequence[int] | None = None,
        on_extracted: Callable[[int, Extraction], None] | None = None,
    ) -> list[Extraction]:
        """Records of texts. The target draws one for each, anew until it verifies by the schema
        (`extract.check.verify`), ``attempts`` times at most; the first that does is taken, or else
        the one with the fewest violations. Where there is a prompter, each draw has a rewrite of
        its own. No true record is needed.

        Args:
            schema: a file, the name of a packaged one, or what such a file holds.
            form: what the target is asked to write, "json" or "lines". It reads the schema's
                template, unless the pipeline's prompting has a ``target_template`` of its own.
            numbers: of the texts, by which their draws are keyed; None is their order.
            on_extracted: called with the index and the record of a text as soon as it is done.

        Raises:
            ValueError: a schema that is none, no text, or one that does not fit the target's
                context. FailedRowsError: as `rollout`.
        """
        from alignpro.extract.draw import extract_records
        from alignpro.extract.schema import read_schema

        check_counts(attempts=attempts)
        read, given = read_schema(schema), read_prompts(texts)
        asked, key = self.for_schema(read, form), fresh_seed() if seed is None else seed
        keyed = range(len(given)) if numbers is None else numbers

        def draw(in_flight: InFlight, index: int, sample: int, on_response: OnResponse) -> None:
            asked._draw(in_flight, given[index], keyed[index], sample, key, on_response)

        return extract_records(
            draw,
            given,
            read,
            attempts=attempts,
            form=form,
            max_failed=self.max_failed,
            on_extracted=on_extracted,
        )

    def for_schema(self, schema: Schema, form: Format) -> Pipeline:
        """A copy whose target reads the schema's template, unless it has one of its own."""
        asked = copy.copy(self)
        if self.prompting.target_template == Prompting.target_template:
            template = schema.template(form)
            asked.prompting = replace(self.prompting, target_template=template)
        return asked

    def _draw(
        self,
        in_flight: InFlight,
        prompt: Prompt,
        index: int,
        sample: int,
        seed: int,
        on_response: OnResponse,
    ) -> None:
        """Queue one rewrite of the prompt, where there is a prompter, and one response to it: the
        draws of rewrite ``sample`` in `rollout`. on_response: gets the response, or None of one
        that failed."""

        def hand_over(rewrite: Rewrite) -> None:
            if rewrite.text and self._too_long(rewrite) is not None:
                rewrite = self._read_by_target(prompt, index, "")  # what surely fits
            self._hand_over(in_flight, 1, seed, None, rewrite, sample, on_response)

        if self.prompter is None:
            hand_over(self._read_by_target(prompt, index, ""))
            return

        def written(completion: Completion | None) -> None:
            assert completion is not None  # as in `_generate`
            hand_over(self.as_rewrite(prompt, index, completion))

        handle = in_flight.client(self.prompter).submit(
            self.prompter_tokens(prompt, index),
            self.params_of_rewrite(seed, index),
            adapter=self._writes,
            sample=sample,
        )
        in_flight.add(handle, Request(f"rewrite {sample} of prompt {index}", "hand-off", written))

    def _generate(
        self,
        prompts: Sequence[Prompt],
        num_rewrites: int,
        num_responses: int,
        seed: int,
        common_draws: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> tuple[list[list[Rewrite]], InFlight]:
        """Rewrites [prompts][N] with responses [M] still unscored, and what is known of the
        requests."""
        prompter = self._prompter()
        rewrites: list[dict[int, Rewrite]] = [{} for _ in prompts]
        answered: Answered | None = {} if common_draws else None
        with trace.span("read prompts"):
            read = [self.prompter_tokens(p, i) for i, p in enumerate(prompts)]
            if self._target_here is not None:
                check_roles(self._target_here.tokenizer, prompts)
        rows = len(prompts) * num_rewrites * max(1, num_responses)
        with InFlight(rows, self.max_failed, on_progress) as in_flight:

            def finished(index: int, sample: int, completion: Completion | None) -> None:
                assert completion is not None  # the engine's requests are answered, or the end
                rewrite = self.as_rewrite(prompts[index], index, completion)
                rewrites[index][sample] = self._hand_over(
                    in_flight, num_responses, seed, answered, rewrite, sample
                )

            for index, tokens in enumerate(read):
                params = self.params_of_rewrite(seed, index)
                for sample in range(num_rewrites):
                    handle = in_flight.client(prompter).submit(
                        tokens, params, adapter=self._writes, sample=sample
                    )
                    what = f"rewrite {sample} of prompt {index}"
                    on_finished = partial(finished, index, sample)
                    in_flight.add(handle, Request(what, "hand-off", on_finished))
            in_flight.run_until_done()
        ordered = [[group[j] for j in range(num_rewrites)] for group in rewrites]
        return ordered, in_flight

    def _hand_over(
        self,
        in_flight: InFlight,
        num_responses: int,
        seed: int,
        answered: Answered | None,
        rewrite: Rewrite,
        sample: int,
        on_response: OnResponse | None = None,
    ) -> Rewrite:
        """Queue M responses; they are appended to ``rewrite.responses`` in order of their index.
        With ``answered`` draws are common: a second rewrite of a text has the first one's list."""
        unfit = self._too_long(rewrite)
        if unfit is not None and not rewrite.text:
            raise ValueError(f"prompt {rewrite.prompt_index}: {unfit}")
        if unfit is not None:
            for _ in range(max(1, num_responses)):
                in_flight.leave_out(f"rewrite {sample} of prompt {rewrite.prompt_index}: {unfit}")
        if unfit is not None or num_responses == 0:
            return rewrite
        if answered is not None:
            first = answered.setdefault((rewrite.prompt_index, rewrite.text), rewrite)
            if first is not rewrite:
                return replace(rewrite, responses=first.responses)
        key = sample if answered is None else 0
        drawn = derive_seed(seed, RESPONSE_STREAM, rewrite.prompt_index, key)
        params = replace(self.response_params, seed=drawn)
        arrived: dict[int, Response | None] = {}

        def finished(number: int, completion: Completion | None) -> None:
            arrived[number] = None if completion is None else _as_response(completion)
            if completion is not None and not rewrite.target_tokens:
                rewrite.target_tokens.extend(completion.prompt_tokens)  # where an endpoint tells
            if len(arrived) == num_responses:
                ordered = (arrived[m] for m in range(num_responses))
                rewrite.responses.extend(r for r in ordered if r is not None)
            if on_response is not None:
                on_response(arrived[number])

        for number in range(num_responses):
            handle = self._submit(in_flight, rewrite, params, number)
            what = f"response {number} to rewrite {sample} of prompt {rewrite.prompt_index}"
            on_finished = partial(finished, number)
            in_flight.add(handle, Request(what, "answer", on_finished, wants_answer=True))
        return rewrite

    def _submit(
        self, in_flight: InFlight, rewrite: Rewrite, params: SamplingParams, number: int
    ) -> Handle:
        """One response to what the target reads: tokens where it is here, else a conversation."""
        if self._target_here is not None:
            return in_flight.client(self._target_here).submit(
                rewrite.target_tokens, params, adapter=self._answers, sample=number
            )
        target = cast(ChatModel, self.target)
        if self.target_adapter is not None:
            raise ValueError(f"target_adapter: expected None, {target.name} is not here")
        conversation = Conversation.of(rewrite.target_prompt).messages
        return in_flight.chat_client(target).submit(conversation, params, sample=number)

    # --- one rewrite, for callers that drive the prompter by themselves ---

    def prompter_tokens(self, prompt: Prompt, index: int) -> list[int]:
        """What the prompter reads of a prompt. Raises ValueError for one that does not fit, which
        names the index."""
        prompter, params = self._prompter(), self.rewrite_params
        with naming(f"prompt {index}"):
            tokens = prompter_tokens(
                *(prompter.tokenizer, self.prompting, prompt),
                *(prompter.context_length, params.max_new_tokens, soft_rows(self._writes)),
            )
        unfit = too_long(prompter, len(tokens), params)
        if unfit is not None:
            raise ValueError(f"prompt {index} in its template: {unfit}")
        return tokens

    def params_of_rewrite(self, seed: int, index: int) -> SamplingParams:
        """How rewrites of the prompt with this index are drawn."""
        return replace(self.rewrite_params, seed=derive_seed(seed, REWRITE_STREAM, index))

    def as_rewrite(self, prompt: Prompt, index: int, completion: Completion) -> Rewrite:
        """What the prompter wrote, and what the target reads of it."""
        return replace(
            self._read_by_target(prompt, index, completion.text.strip()),
            prompter_tokens=completion.prompt_tokens,
            tokens=completion.tokens,
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            reasoning=completion.reasoning,
        )

    def _prompter(self) -> LanguageModel:
        if self.prompter is None:
            raise ValueError("prompter: expected a model that writes rewrites, got None")
        return self.prompter

    def _read_by_target(self, prompt: Prompt, index: int, text: str) -> Rewrite:
        """What the target reads for a rewrite that no prompter wrote; "" is the raw prompt."""
        read = self.prompting.target_prompt(prompt, text)
        tokens, here = [], self._target_here
        if here is not None:
            with naming(f"the rewrite of prompt {index}" if text else f"prompt {index}"):
                rows, most = soft_rows(self._answers), here.context_length
                tokens = target_tokens(here.tokenizer, read, rows, most)
        return Rewrite(
            prompt_index=index,
            prompter_tokens=[],
            tokens=[],
            logprobs=[],
            text=text,
            target_prompt=read,
            target_tokens=tokens,
            finish_reason="stop",
        )

    def _too_long(self, rewrite: Rewrite) -> str | None:
        """Why the target cannot read a rewrite; one behind an endpoint says so itself."""
        if self._target_here is None:
            return None
        return too_long(self._target_here, len(rewrite.target_tokens), self.response_params)

    def _scored(
        self,
        prompts: list[Prompt],
        rewrites: list[list[Rewrite]],
        done: InFlight,
        columns: Mapping[str, Sequence[Any]] | None,
        common_draws: bool,
        started: float,
    ) -> Rollout:
        """What was generated since ``started``, by the requests ``done``, with its rewards."""
        written, unscored = time.perf_counter(), 0
        if self.reward is not None:
            from alignpro.rewards.check import score_rewrites

            with trace.span("reward"):
                rewrites, unscored = score_rewrites(self.reward, prompts, rewrites, columns or {})
        return Rollout(
            prompts=prompts,
            rewrites=rewrites,
            seconds={"generate": written - started, "reward": time.perf_counter() - written},
            generated_tokens=done.generated_tokens,
            failed=done.failed,
            unscored=unscored,
            common_draws=common_draws,
        )


def _prepared(model: LanguageModel | ChatModel | None, adapter: Any) -> Any:
    """The engine's copy, whose files are not looked at again for every prompt and rewrite."""
    return model.prepare(adapter) if isinstance(model, NativeModel) else adapter


def _as_response(completion: Completion) -> Response:
    return Response(
        tokens=completion.tokens,
        text=completion.text,
        logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        kept_mass=completion.kept_mass,
        reasoning=completion.reasoning,
        usage=completion.usage,
    )
