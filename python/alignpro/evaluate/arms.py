"""The arms of an evaluation: raw prompt, untuned prompter, trained prompter (MATH: arms).

Every arm answers the same prompts under the same seeds, and differences are paired by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.config import EvalConfig
from alignpro.models.adapter import LoraWeights
from alignpro.models.native_model import NativeModel
from alignpro.pipeline import Pipeline
from alignpro.rewards.combine import score_components
from alignpro.statistics import bootstrap_mean_ci, paired_difference, variance
from alignpro.types import Reward, Rollout

OnProgress = Callable[[str, int, int], None]  # arm, sequences finished, sequences in all


@dataclass(frozen=True)
class Arm:
    """One arm's sequences and rewards, [prompts][responses]."""

    rollout: Rollout
    rewards: list[list[float]]
    components: dict[str, float]  # mean of every part of the reward, unweighted

    @property
    def per_prompt(self) -> list[float]:
        """Mean reward of every prompt: the unit that the intervals resample."""
        return [sum(row) / len(row) for row in self.rewards]


def evaluate_arms(
    pipeline: Pipeline,
    prompts: Sequence[str],
    config: EvalConfig,
    *,
    prompters: Mapping[str, LoraWeights | None],
    columns: Mapping[str, Sequence[Any]] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Sample every arm and compare them.

    Args:
        prompts: held out, at least 2. columns: more of their data for the reward, aligned.
        prompters: arm name -> adapter (None: the base model as prompter); the raw arm is added.
            "trained" is compared with every other arm; its KL is taken to "untuned".

    Returns:
        A part of report.json: ``arms`` {name: mean_reward, reward_variance, ci95, n, components,
        ...}, ``paired`` {trained_minus_X: mean, ci95}, ``kl_per_rewrite`` (nats; None without both
        prompters), ``tokens_per_second``, ``samples``.

    Raises:
        ValueError: fewer than 2 prompts, or no reward. RewardError: see `rewards.check`.
    """
    if len(prompts) < 2:
        raise ValueError(f"prompts: expected at least 2 for an interval, got {len(prompts)}")
    if pipeline.reward is None:
        raise ValueError("pipeline: an evaluation needs a reward, got None")
    reward, unscored = pipeline.reward, pipeline.without_reward()
    num_answers = config.num_rewrites * config.num_responses
    arms: dict[str, Arm] = {}
    for name in ("raw", *prompters):
        answers = len(prompts) * num_answers
        if name == "raw":
            rollout = unscored.respond(
                prompts,
                num_responses=num_answers,
                seed=config.seed,
                on_progress=_watch(on_progress, name, answers),
            )
        else:
            total = answers + len(prompts) * config.num_rewrites
            rollout = unscored.with_adapter(prompters[name]).rollout(
                prompts,
                num_rewrites=config.num_rewrites,
                num_responses=config.num_responses,
                seed=config.seed,
                on_progress=_watch(on_progress, name, total),
            )
        arms[name] = _score(reward, rollout, columns)
    seconds = math.fsum(arm.rollout.seconds["generate"] for arm in arms.values())
    tokens = sum(arm.rollout.generated_tokens for arm in arms.values())
    return {
        "arms": {name: _summary(arm, config) for name, arm in arms.items()},
        "paired": {
            f"trained_minus_{name}": _paired(arms["trained"], arm, config)
            for name, arm in arms.items()
            if "trained" in arms and name != "trained"
        },
        "kl_per_rewrite": _kl_per_rewrite(pipeline, arms, prompters),
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "samples": _samples(arms, config.num_samples),
    }


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


def _score(reward: Reward, rollout: Rollout, columns: Mapping[str, Sequence[Any]] | None) -> Arm:
    rows = [
        (index, rewrite.text, response.text)
        for index, group in enumerate(rollout.rewrites)
        for rewrite in group
        for response in rewrite.responses
    ]
    scores, components = score_components(
        reward,
        [rollout.prompts[index] for index, _, _ in rows],
        [text for _, text, _ in rows],
        [text for _, _, text in rows],
        {name: [values[index] for index, _, _ in rows] for name, values in (columns or {}).items()},
    )
    rewards: list[list[float]] = [[] for _ in rollout.prompts]
    for (index, _, _), score in zip(rows, scores, strict=True):
        rewards[index].append(score)
    means = {name: math.fsum(values) / len(values) for name, values in components.items()}
    return Arm(rollout, rewards, means)


def _summary(arm: Arm, config: EvalConfig) -> dict[str, Any]:
    interval = bootstrap_mean_ci(arm.per_prompt, seed=config.seed)
    rewrites = [w for group in arm.rollout.rewrites for w in group]
    responses = [r for w in rewrites for r in w.responses]
    return {
        "mean_reward": interval.mean,
        "reward_variance": variance([reward for row in arm.rewards for reward in row]),
        "ci95": [interval.low, interval.high],
        "n": len(arm.rewards),
        "num_responses": len(responses),
        "components": arm.components,
        "empty_rewrites": sum(not w.text for w in rewrites) if rewrites[0].tokens else 0,
        "response_tokens": sum(len(r.tokens) for r in responses) / len(responses),
    }


def _paired(treated: Arm, control: Arm, config: EvalConfig) -> dict[str, Any]:
    interval = paired_difference(treated.per_prompt, control.per_prompt, seed=config.seed)
    return {"mean": interval.mean, "ci95": [interval.low, interval.high]}


def _kl_per_rewrite(
    pipeline: Pipeline, arms: Mapping[str, Arm], prompters: Mapping[str, LoraWeights | None]
) -> float | None:
    if not {"trained", "untuned"} <= set(prompters) or pipeline.rewrite_params.temperature == 0:
        return None  # a greedy rewrite is no draw from the policy
    if not isinstance(pipeline.prompter, NativeModel):
        return None  # a remote prompter shows no distributions
    return kl_per_rewrite(
        pipeline.prompter,
        arms["trained"].rollout,
        policy=prompters["trained"],
        reference=prompters["untuned"],
        temperature=pipeline.rewrite_params.temperature,
    )


def _samples(arms: Mapping[str, Arm], count: int) -> list[dict[str, Any]]:
    """Before and after for the first prompts, first draw of each: not picked for their reward."""
    samples = []
    prompts = arms["raw"].rollout.prompts
    for index, prompt in enumerate(prompts[:count]):
        sample: dict[str, Any] = {"prompt": prompt}
        for name, arm in arms.items():
            rewrite = arm.rollout.rewrites[index][0]
            if name != "raw":
                sample[f"rewrite_{name}"] = rewrite.text
            sample[f"response_{name}"] = rewrite.responses[0].text
            sample[f"reward_{name}"] = arm.rewards[index][0]
        samples.append(sample)
    return samples


def _watch(on_progress: OnProgress | None, arm: str, total: int) -> Callable[[int], None] | None:
    if on_progress is None:
        return None
    return lambda done: on_progress(arm, done, total)
