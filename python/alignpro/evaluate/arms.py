"""The arms of an evaluation (MATH: arms): who answers what, under the same seeds.

raw: the prompt as it is. static: one instruction behind every prompt. policy_text: a whole policy
behind every prompt. untuned, trained: a prompter. labelled: the instruction of the row's label.
optimum: resampled from what the untuned prompter writes. tuned: the prompt as it is, before a
target that was tuned. Every arm answers the same prompts, so that differences are paired by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

from alignpro.config import EvalConfig
from alignpro.evaluate.optimum import num_sequences, resample_optimum
from alignpro.evaluate.progress import OnProgress, watch
from alignpro.evaluate.static import StaticInstruction, in_append_form
from alignpro.models.adapter import LoraWeights
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.native_model import NativeModel
from alignpro.pipeline import Pipeline
from alignpro.rewards.combine import score_rollout
from alignpro.types import Prompt, Rollout


@dataclass(frozen=True)
class Arm:
    """One arm's sequences and rewards, [prompts][responses]."""

    rollout: Rollout
    rewards: list[list[float]]
    components: dict[str, list[float]]  # every part of the reward, unweighted, in `Scores` order
    adds: bool  # whether the target reads anything but the prompt
    about: dict[str, Any] = field(default_factory=dict)  # more of it for the report
    paid: frozenset[str] = frozenset()  # the parts whose weight is above 0

    @property
    def per_prompt(self) -> list[float]:
        """Mean reward of every prompt: the unit that the intervals resample."""
        return [sum(row) / len(row) for row in self.rewards]

    def response_texts(self, index: int) -> list[str]:
        """The responses to a prompt, rewrite by rewrite."""
        return [r.text for w in self.rollout.rewrites[index] for r in w.responses]


def sample_arms(
    pipeline: Pipeline,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    *,
    prompters: Mapping[str, LoraWeights | None],
    static: StaticInstruction | None = None,
    labelled: Sequence[str] | None = None,
    tuned: LoraWeights | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Arm]:
    """Sample and score every arm that is asked for; "raw" always is.

    Args:
        prompts: held out, at least 2. columns: more of their data for the reward, aligned.
        prompters: "untuned" and "trained" -> adapter (None: the base model as prompter).
            ``config.optimum`` needs "untuned".
        labelled: an instruction for each prompt, "" for none.
        tuned: an adapter of the target.

    Raises:
        ValueError: fewer than 2 prompts, no reward. RewardError: see `rewards.check`.
    """
    if len(prompts) < 2:
        raise ValueError(f"prompts: expected at least 2 for an interval, got {len(prompts)}")
    if pipeline.reward is None:
        raise ValueError("pipeline: an evaluation needs a reward, got None")
    if config.optimum is not None and "untuned" not in prompters:
        raise ValueError("optimum: it resamples the untuned prompter, which is not there")
    reward, unscored = pipeline.reward, pipeline.without_reward()
    arms: dict[str, Arm] = {}

    def add(name: str, rollout: Rollout, *, adds: bool, **about: Any) -> None:
        rollout, rewards, components, paid = score_rollout(reward, rollout, columns)
        arms[name] = Arm(rollout, rewards, components, adds, about, paid)

    num_answers = config.num_rewrites * config.num_responses
    answers = len(prompts) * num_answers

    def respond(before: Pipeline, name: str) -> Rollout:
        return before.respond(
            prompts,
            num_responses=num_answers,
            seed=config.seed,
            on_progress=watch(on_progress, name, answers),
        )

    def instruct(name: str, texts: Sequence[str], **about: Any) -> None:
        rollout = in_append_form(unscored).answer(
            prompts,
            [[text] * config.num_rewrites for text in texts],
            num_responses=config.num_responses,
            seed=config.seed,
            on_progress=watch(on_progress, name, answers),
        )
        add(name, rollout, adds=True, **about)

    add("raw", respond(unscored, "raw"), adds=False)
    if static is not None:
        instruct("static", [static.text] * len(prompts), instruction=static.text)
    if config.policy_text is not None:
        text = config.policy_text.strip()
        instruct("policy_text", [text] * len(prompts), instruction=text)
    for name, adapter in prompters.items():
        rollout = unscored.with_adapter(adapter).rollout(
            prompts,
            num_rewrites=config.num_rewrites,
            num_responses=config.num_responses,
            seed=config.seed,
            on_progress=watch(on_progress, name, answers + len(prompts) * config.num_rewrites),
        )
        add(name, rollout, adds=True)
    if labelled is not None:
        instruct("labelled", labelled)
    if config.optimum is not None:
        resampled = resample_optimum(
            pipeline.with_adapter(prompters["untuned"]),
            prompts,
            config,
            config.optimum,
            columns=columns,
            on_progress=watch(
                on_progress, "optimum", num_sequences(len(prompts), config, config.optimum)
            ),
        )
        add(
            "optimum",
            replace(
                resampled.rollout,
                seconds={"generate": resampled.seconds},
                generated_tokens=resampled.generated_tokens,
            ),
            adds=True,
            kl_coef=config.kl_coef,
            num_candidates=config.optimum.num_candidates,
            effective_samples=resampled.effective_samples,
            selection_reliability=resampled.reliability,
        )
    if tuned is not None:
        add("tuned", respond(unscored.with_target_adapter(tuned), "tuned"), adds=False)
    return _answered(arms)


def _answered(arms: dict[str, Arm]) -> dict[str, Arm]:
    """The prompts that every arm has an answer to, for differences to be paired by prompt."""
    rows = zip(*(arm.rewards for arm in arms.values()), strict=True)
    kept = [index for index, rewards in enumerate(rows) if all(rewards)]
    if not kept:
        unscored = sum(arm.rollout.unscored for arm in arms.values())
        why = f"the reward gave {unscored} of them none" if unscored else "see the endpoint's log"
        raise FailedRowsError(f"no prompt has responses with a score in every arm; {why}")
    return {name: _of_prompts(arm, kept) for name, arm in arms.items()}


def _of_prompts(arm: Arm, kept: Sequence[int]) -> Arm:
    if len(kept) == len(arm.rewards):
        return arm
    rollout = arm.rollout
    rewrites = [
        [replace(w, prompt_index=row) for w in rollout.rewrites[index]]
        for row, index in enumerate(kept)
    ]
    prompts = [rollout.prompts[index] for index in kept]
    of_kept = [index in kept for index, row in enumerate(arm.rewards) for _ in row]
    return replace(
        arm,
        rollout=replace(rollout, prompts=prompts, rewrites=rewrites),
        rewards=[arm.rewards[index] for index in kept],
        components={n: list(compress(values, of_kept)) for n, values in arm.components.items()},
    )


def kl_per_rewrite(
    model: NativeModel,
    rollout: Rollout,
    *,
    policy: LoraWeights | None,
    reference: LoraWeights | None,
    temperature: float,
) -> float:
    """Mean over the rollout's rewrites of ``sum_t KL(policy || reference)``, in nats.

    Exact at every token (MATH: KL). The rewrites must be the policy's own; None is the base model.
    """
    rewrites = [w for group in rollout.rewrites for w in group]
    total = 0.0
    for begin in range(0, len(rewrites), _SCORED_AT_ONCE):
        chunk = rewrites[begin : begin + _SCORED_AT_ONCE]
        score = model.core_model.score(
            [w.prompter_tokens + w.tokens for w in chunk],
            [len(w.prompter_tokens) for w in chunk],
            adapter=None if policy is None else model.make_adapter(policy),
            temperature=temperature,
            reference=None if reference is None else model.make_adapter(reference),
            with_reference=True,
        )
        assert score.kl is not None
        total += math.fsum(float(value) for value in score.kl)
    return total / len(rewrites)


_SCORED_AT_ONCE = 32  # rewrites; bounds the memory of a scoring pass
