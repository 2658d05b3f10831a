"""From a configuration to the bound: sample target, untuned prompter and tuned target, and score.

Every response is scored exactly as it was sampled: whole token sequences, its EOS among them, at
the temperature of ``response``. A target behind an endpoint tells tokens and log-probabilities
itself, or the bound is refused. So a response's log-probability under the prompt that it was drawn
for is the one recorded while sampling, to the bit, and the total variation of a target to itself 0.
Of a target that is not deterministic the two differ; by how much is measured and reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from alignpro.config import BoundConfig, to_mapping
from alignpro.data.load import PromptRow, stack_columns
from alignpro.evaluate.headroom import rewards_of
from alignpro.evaluate.inputs import check_adapters, load_adapter, load_rows, made_from_of
from alignpro.evaluate.kept import KeptArms, arms_path, calls_path, kept_date
from alignpro.evaluate.of_run import say_what_differs
from alignpro.evaluate.progress import OnProgress, watch
from alignpro.evaluate.results import BoundReport, ClosedForm
from alignpro.lengths import fit_rows, unread_by
from alignpro.models.adapter import AdapterWeights
from alignpro.models.adapter_files import is_mixture
from alignpro.models.answer_scores import sequence_logprobs, token_logprobs
from alignpro.models.chat_template import today
from alignpro.models.endpoint import EndpointModel
from alignpro.models.mixture import Mixture, read_mixture
from alignpro.models.native_model import NativeModel, load_models
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.rewards.check import check_columns
from alignpro.run_directory import recorded_date
from alignpro.statistics import Floats, bootstrap_mean_ci
from alignpro.theory.bound import (
    prompting_bound,
    tilted_total_variation,
    total_variation_samples,
)
from alignpro.theory.headroom import crossfit
from alignpro.theory.optimum import (
    effective_samples,
    optimum_weights,
    shrunk_rewards,
    weights_kl,
)
from alignpro.types import Response, Reward, Rollout

_SCORED_AT_ONCE = 32  # sequences, between two words of progress
_OTHER_DISTRIBUTION = 1.0  # nats of one token; bfloat16 and other batches move one by tenths


def run_bound(
    config: BoundConfig,
    *,
    output: Path | None = None,
    run: Path | None = None,
    on_progress: OnProgress | None = None,
) -> BoundReport:
    """Load what the configuration names; returns what `measure_bound` does, with the config.

    output, run: as for `run_evaluate`.

    Raises:
        ValueError: bad input, or an endpoint that does not tell log-probabilities of given tokens.
    """
    check_adapters(config, trained=config.trained, tuned=config.tuned)
    mixed = config.tuned is not None and is_mixture(config.tuned)
    if mixed and read_mixture(config.tuned or "").sampling == "sequence":
        raise ValueError(
            "tuned: expected a mixture with sampling token, got sequence, whose log-probabilities "
            "are not those of what was drawn"
        )
    rows = load_rows(config)
    reward = build_reward(config.reward)
    check_columns(reward, stack_columns(rows))
    arms = arms_path(output)
    recorded = recorded_date(config.trained, config.tuned) or kept_date(arms)
    date = config.date or recorded or today()
    config = replace(config, date=date)
    wanted = config.target
    if wanted is not None and wanted.endpoint is not None:
        wanted = replace(wanted, client=replace(wanted.client, logprobs=True))
    prompter, target = load_models(
        config.prompter, wanted, config.threads, calls=calls_path(output), date=date
    )
    if isinstance(target, EndpointModel):
        target.check_logprobs()
    adapter = load_adapter(config.prompter.adapter, prompter)
    made_from = made_from_of(config, prompter, target, reward, rows)
    around = (run, config.trained, config.tuned, config.prompter.adapter)
    say_what_differs(config, made_from, adapter, rows, *around)
    with KeptArms.at(arms, config, made_from) as kept:
        report = measure_bound(
            config,
            prompter,
            target,
            reward,
            rows,
            kept=kept,
            adapter=adapter,
            trained=load_adapter(config.trained, prompter),
            tuned=load_adapter(config.tuned, target) if isinstance(target, NativeModel) else None,
            on_progress=on_progress,
        )
    return replace(report, config=to_mapping(config))


def measure_bound(
    config: BoundConfig,
    prompter: NativeModel,
    target: NativeModel | EndpointModel,
    reward: Reward,
    rows: Sequence[PromptRow],
    *,
    adapter: AdapterWeights | Mixture | None = None,
    trained: AdapterWeights | Mixture | None = None,
    tuned: AdapterWeights | Mixture | None = None,
    kept: KeptArms | None = None,
    on_progress: OnProgress | None = None,
) -> BoundReport:
    """Every term of the bound and the gap beside it, over the same prompts (theory.bound).

    The tuned target pi* is the adapter ``tuned``, or without one the closed form over the N x M
    responses to the raw prompt, whose total variation and reward finite N x M biases low. With M >=
    2, KL(rho* || rho_sft) comes from the rewrites' rewards without noise, which would overstate it
    and so understate the bound, and J(rho*) is the cross-fitted reward, which lucky responses do
    not raise; finite N biases both low, which is the safe side of either. With M = 1 noise
    overstates both: bound and gap come out too small.

    Raises:
        ValueError: a reward outside the given range, or all rewards equal without one.
    """
    pipeline = Pipeline.configured(config, prompter, target, reward).with_adapter(adapter)
    fitted = fit_rows(rows, unread_by(pipeline), config.on_too_long)
    rows = fitted.rows
    prompts, columns = [row.prompt for row in rows], stack_columns(rows)
    pipeline.max_failed = 0.0  # every rollout has N x M rows for each of the same prompts
    answers = config.num_rewrites * config.num_responses

    arms = kept or KeptArms()

    def raw(
        name: str, pipeline: Pipeline, adapter: AdapterWeights | Mixture | None = None
    ) -> Rollout:
        sample = partial(
            pipeline.respond,
            prompts,
            num_responses=answers,
            seed=config.seed,
            columns=columns,
            on_progress=watch(on_progress, name, len(rows) * answers),
        )
        return arms.rollout(name, arms.hash_of(adapter), prompts, sample)

    def prompted(
        name: str, pipeline: Pipeline, adapter: AdapterWeights | Mixture | None
    ) -> Rollout:
        sample = partial(
            pipeline.rollout,
            prompts,
            num_rewrites=config.num_rewrites,
            num_responses=config.num_responses,
            seed=config.seed,
            columns=columns,
            on_progress=watch(on_progress, name, len(rows) * (answers + config.num_rewrites)),
        )
        return arms.rollout(name, arms.hash_of(adapter), prompts, sample)

    untuned = prompted("untuned prompter", pipeline, adapter)
    if untuned.unscored:
        raise ValueError(
            "bound: it compares the same prompts throughout, so every response needs a score; the "
            f"reward gave {untuned.unscored} of them none (None)"
        )
    if config.reward_range is not None:  # one that is too narrow mostly shows here already
        _reward_range(config, {"untuned": rewards_of(untuned)})
    rollouts = {"untuned": untuned, "raw": raw("raw prompt", pipeline)}
    raw_tokens = [group[0].target_tokens for group in rollouts["raw"].rewrites]
    if tuned is not None:
        rollouts["tuned"] = raw("tuned target", pipeline.with_target_adapter(tuned), tuned)
    if trained is not None:
        rollouts["trained"] = prompted("trained prompter", pipeline.with_adapter(trained), trained)

    tv_rewrites = _total_variation(target, untuned, raw_tokens, config, "rewrites", on_progress)
    if tuned is not None:
        tv_tuned = _total_variation(
            target, rollouts["tuned"], raw_tokens, config, "tuned target", on_progress
        )
    report = _report(config, rollouts, tv_rewrites, tv_tuned if tuned is not None else None)
    report = replace(report, too_long=fitted.note)
    if isinstance(target, NativeModel) and target.bit_exact:
        return report
    parity = _parity(target, rollouts["raw"], config)
    usage = target.usage() if isinstance(target, EndpointModel) else None
    return replace(report, parity_max_abs=parity, target_usage=usage)


def _report(
    config: BoundConfig,
    rollouts: dict[str, Rollout],
    tv_rewrites: Floats,
    tv_tuned: Floats | None,
) -> BoundReport:
    rewards = {name: rewards_of(rollout) for name, rollout in rollouts.items()}
    means = {name: r.mean(axis=(1, 2)) for name, r in rewards.items()}
    if tv_tuned is None:
        coefficient = config.kl_coef if config.tuned_kl_coef is None else config.tuned_kl_coef
        base = rewards["raw"][:, 0, :]
        weights = optimum_weights(base, coefficient)
        tv_tuned = tilted_total_variation(base, coefficient)
        means["tuned"] = (weights * base).sum(axis=1)
        closed_form = ClosedForm(coefficient, float(effective_samples(weights).mean()))
    else:
        closed_form = None
    means["optimum"], kl = _optimum(rewards["untuned"], config.kl_coef)
    span, source = _reward_range(config, rewards)
    result = prompting_bound(
        reward_range=span,
        kl_coef=config.kl_coef,
        tv_tuned=tv_tuned,
        tv_rewrites=tv_rewrites,
        kl=kl,
        gap=means["tuned"] - means["optimum"],
        seed=config.seed,
    )
    trained_gap = None
    if "trained" in means:
        trained_gap = bootstrap_mean_ci(means["tuned"] - means["trained"], seed=config.seed)
    return BoundReport(
        **vars(result),
        reward_range_source=source,
        tuned="adapter" if closed_form is None else "closed form",
        closed_form=closed_form,
        trained_gap=trained_gap,
        rewards={
            name: bootstrap_mean_ci(values, seed=config.seed) for name, values in means.items()
        },
        truncated_responses=_truncated(rollouts),
        num_prompts=len(rewards["raw"]),
        num_rewrites=config.num_rewrites,
        num_responses=config.num_responses,
        parity_max_abs=None,
    )


def _optimum(rewards: Floats, kl_coef: float) -> tuple[Floats, Floats]:
    """(reward, KL to rho_sft) of rho*, each [P], from ``rewards`` [P, N, M] of rho_sft."""
    if rewards.shape[2] >= 2:
        kl = weights_kl(optimum_weights(shrunk_rewards(rewards), kl_coef))
        return crossfit(rewards, kl_coef)[0], kl
    means = rewards.mean(axis=2)
    weights = optimum_weights(means, kl_coef)
    reward: Floats = (weights * means).sum(axis=1)
    return reward, weights_kl(weights)


def _reward_range(
    config: BoundConfig, rewards: dict[str, Floats]
) -> tuple[tuple[float, float], str]:
    low = min(float(r.min()) for r in rewards.values())
    high = max(float(r.max()) for r in rewards.values())
    if config.reward_range is None:
        if not low < high:
            raise ValueError(
                f"reward_range: every reward is {low}, which shows no range; give reward_range"
            )
        return (low, high), "observed"
    given = (config.reward_range[0], config.reward_range[1])
    if low < given[0] or high > given[1]:
        raise ValueError(
            f"reward_range: expected every reward from {given[0]} to {given[1]}, got "
            f"{low} to {high}"
        )
    return given, "given"


def _total_variation(
    target: NativeModel | EndpointModel,
    rollout: Rollout,
    raw_tokens: Sequence[list[int]],
    config: BoundConfig,
    name: str,
    on_progress: OnProgress | None,
) -> Floats:
    """TV [P] of what a rollout's responses were drawn from to the frozen target on the raw prompt.

    Unbiased for the mean over the rollout's rewrites (one empty rewrite: the raw prompt).
    """
    drawn: list[tuple[int, Response]] = [
        (w.prompt_index, response)
        for group in rollout.rewrites
        for w in group
        for response in w.responses
    ]
    for _, response in drawn:
        _check_told(response)
    other: list[float] = []
    for begin in range(0, len(drawn), _SCORED_AT_ONCE):
        chunk = drawn[begin : begin + _SCORED_AT_ONCE]
        other += sequence_logprobs(
            target,
            [raw_tokens[index] for index, _ in chunk],
            [response.tokens for _, response in chunk],
            config.response.temperature,
        )
        if on_progress is not None:
            on_progress(f"score {name}", len(other), len(drawn))
    samples = total_variation_samples([math.fsum(r.logprobs) for _, r in drawn], other)
    variation: Floats = samples.reshape(len(rollout.rewrites), -1).mean(axis=1)
    return variation


def _check_told(response: Response) -> None:
    """Refuse a response of which an endpoint told no token, or not all: without the end of text,
    say, it would stand for others that begin like it."""
    told, wrote = len(response.tokens), response.num_tokens
    if told != wrote or len(response.logprobs) != wrote:
        raise ValueError(
            f"target: of a response of {wrote} tokens the endpoint told {told}, and "
            f"{len(response.logprobs)} log-probabilities; the bound needs all of them"
        )


def _parity(target: NativeModel | EndpointModel, raw: Rollout, config: BoundConfig) -> float:
    """The largest difference between sampled and scored log-probabilities, of some responses."""
    drawn = [(group[0].target_tokens, r) for group in raw.rewrites for r in group[0].responses]
    drawn = drawn[:_SCORED_AT_ONCE]
    scored = token_logprobs(
        target,
        [prompt for prompt, _ in drawn],
        [response.tokens for _, response in drawn],
        config.response.temperature,
    )
    pairs = zip(scored, drawn, strict=True)
    found = max(float(np.abs(own - response.logprobs).max()) for own, (_, response) in pairs)
    if found > _OTHER_DISTRIBUTION:
        raise ValueError(
            "target: the log-probabilities of a token when it is written and when it is given are "
            f"{found:.3g} apart; they are not of one distribution"
        )
    return found


def _truncated(rollouts: dict[str, Rollout]) -> float:
    reasons = [
        response.finish_reason
        for rollout in rollouts.values()
        for group in rollout.rewrites
        for w in group
        for response in w.responses
    ]
    return sum(reason == "length" for reason in reasons) / len(reasons)
