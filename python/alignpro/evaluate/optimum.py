"""The optimum of the objective, sampled without training (MATH: the optimum, in closed form)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from alignpro.config import EvalConfig, OptimumConfig
from alignpro.evaluate.headroom import complete_rewards
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.seeds import derive_seed
from alignpro.pipeline import Pipeline
from alignpro.statistics import law_of_total_variance
from alignpro.theory.optimum import effective_samples, optimum_weights
from alignpro.types import Prompt, Response, Rollout

# Candidates without a score are as good as each other.
_NO_MATTER = Response(tokens=[], text="", logprobs=[], finish_reason="stop", reward=0.0)
OPTIMUM_STREAM = 4  # of randomness, beside the pipeline's


@dataclass(frozen=True)
class Resampled:
    rollout: Rollout  # unscored
    effective_samples: float  # mean over prompts of 1 / sum w^2: of the candidates' weights
    reliability: float | None  # see `selection_reliability`
    generated_tokens: int  # candidates and their responses included
    seconds: float


def num_sequences(prompts: int, config: EvalConfig, optimum: OptimumConfig) -> int:
    """Everything that `resample_optimum` samples, for a progress bar."""
    candidates = optimum.num_candidates * (1 + optimum.num_responses)
    return prompts * (candidates + config.num_rewrites * config.num_responses)


def resample_optimum(
    untuned: Pipeline,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    optimum: OptimumConfig,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Resampled:
    """``num_rewrites`` draws a prompt from rho* = rho_sft exp(R / kl_coef) / Z, and their answers.

    For every prompt the untuned prompter writes candidates, a few responses estimate each one's
    R, and rewrites are drawn from the candidates, with replacement, by the weights
    exp(R_hat / kl_coef) / Z (sampling importance resampling, Rubin 1987). The answers are fresh:
    the responses that chose a rewrite were lucky and do not judge it.

    It is a yardstick and no prompter: it looks at the reward of the held-out prompts. Two things
    keep its reward below that of the true optimum: there are only so many candidates (few
    effective samples: the best one of them is all there is), and R_hat is noisy, so a part of the
    tilt goes to luck, which fresh answers do not repeat. `selection_reliability` says how much.
    """
    candidates = untuned.rollout(
        prompts,
        num_rewrites=optimum.num_candidates,
        num_responses=optimum.num_responses,
        seed=derive_seed(config.seed, OPTIMUM_STREAM, 0),
        columns=columns,
        on_progress=on_progress,
    )
    chosen, effective = [], []
    for index, written in enumerate(candidates.rewrites):
        group = [w for w in written if w.responses]
        if not group and candidates.unscored:  # the reward has no score for this prompt's answers
            group = [replace(w, responses=[_NO_MATTER]) for w in written]
        if not group:
            raise FailedRowsError(f"optimum: no candidate for prompt {index} was answered")
        weights = optimum_weights([w.reward for w in group], config.kl_coef)
        effective.append(float(effective_samples(weights)))
        draw = np.random.default_rng(derive_seed(config.seed, OPTIMUM_STREAM, 1, index))
        picks = draw.choice(len(group), size=config.num_rewrites, p=weights)
        chosen.append([group[pick] for pick in picks])
    before = num_sequences(len(prompts), config, optimum) - (
        len(prompts) * config.num_rewrites * config.num_responses
    )
    fresh = untuned.without_reward().answer(
        prompts,
        [[w.text for w in group] for group in chosen],
        num_responses=config.num_responses,
        seed=config.seed,
        on_progress=None if on_progress is None else lambda done: on_progress(before + done),
    )
    rewrites = [
        [replace(w, responses=a.responses) for w, a in zip(group, answered, strict=True)]
        for group, answered in zip(chosen, fresh.rewrites, strict=True)
    ]
    return Resampled(
        replace(fresh, rewrites=rewrites),
        float(np.mean(effective)),
        selection_reliability(complete_rewards(candidates)),
        candidates.generated_tokens + fresh.generated_tokens,
        candidates.seconds["generate"] + fresh.seconds["generate"],
    )


def selection_reliability(rewards: ArrayLike) -> float | None:
    """Share of the variance of R_hat between the candidates of a prompt that is R's own, in [0, 1].

    ``rewards`` [P, N, M]: the law of total variance gives Var(R), and R_hat adds the responses'
    Var(r) / M to it. Near 0, the weights follow luck and the arm is the untuned prompter's. None
    with one response, which does not tell the two apart.
    """
    r = np.asarray(rewards, dtype=np.float64)
    responses = r.shape[2]
    return None if responses < 2 else law_of_total_variance(r).share_of_means(responses)
