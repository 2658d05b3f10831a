"""The arms of an evaluation (MATH: arms): who answers what, under the same seeds.

raw: the prompt as it is. static: one instruction behind every prompt. policy_text: a whole policy
behind every prompt. untuned, trained: a prompter. labelled: the instruction of the row's label.
optimum: resampled from what the untuned prompter writes. soft: the prompt with trained rows beside
it. tuned: the prompt as it is, before a target that was tuned. Every arm answers the same prompts,
so that differences are paired by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from typing import Any

from alignpro.config import EvalConfig
from alignpro.evaluate.kept import KeptArms, plain_rollout, read_rollout
from alignpro.evaluate.optimum import num_sequences, resample_optimum
from alignpro.evaluate.progress import OnProgress, watch
from alignpro.evaluate.static import StaticInstruction, in_append_form
from alignpro.models.adapter import AdapterWeights
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.mixture import Mixture
from alignpro.models.soft_prompt import SoftPrompt
from alignpro.pipeline import Pipeline
from alignpro.rewards.combine import score_rollout
from alignpro.types import Prompt, Rollout

OnRollout = Callable[[int], None] | None  # told how much of a rollout is done


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
    prompters: Mapping[str, AdapterWeights | Mixture | None],
    static: StaticInstruction | None = None,
    labelled: Sequence[str] | None = None,
    soft: SoftPrompt | None = None,
    tuned: AdapterWeights | Mixture | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    kept: KeptArms | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Arm]:
    """Sample and score every arm that is asked for; "raw" always is.

    Args:
        prompts: held out, at least 2. columns: more of their data for the reward, aligned.
        prompters: "untuned" and "trained" -> adapter (None: the base model as prompter).
            ``config.optimum`` needs "untuned".
        labelled: an instruction for each prompt, "" for none.
        soft, tuned: adapters of the target.
        kept: the arms that an evaluation before this one has finished, and where others go.

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
    kept = kept or KeptArms()
    num_answers = config.num_rewrites * config.num_responses
    answers = len(prompts) * num_answers

    def add(
        name: str,
        of: Any,
        sample: Callable[[OnRollout], Rollout],
        *,
        adds: bool,
        total: int = answers,
        about: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """An arm, which depends on ``of`` beside what all do; see `KeptArms`."""
        of = kept.of_prompts(of, prompts)
        show, known = watch(on_progress, name, total), kept.get(name, of)
        if known is not None:
            arms[name] = _read_arm(known, prompts)
            if show is not None:
                show(total)
            return
        rollout = sample(show)
        rollout, rewards, components, paid = score_rollout(reward, rollout, columns)
        arms[name] = Arm(rollout, rewards, components, adds, about(), paid)
        kept.put(name, of, _plain_arm(arms[name]))

    def respond(before: Pipeline) -> Callable[[OnRollout], Rollout]:
        return lambda show: before.respond(
            prompts, num_responses=num_answers, seed=config.seed, on_progress=show
        )

    def instruct(name: str, texts: Sequence[str], **about: Any) -> None:
        def answer(show: OnRollout) -> Rollout:
            return in_append_form(unscored).answer(
                prompts,
                [[text] * config.num_rewrites for text in texts],
                num_responses=config.num_responses,
                seed=config.seed,
                on_progress=show,
            )

        add(name, list(texts), answer, adds=True, about=lambda: about)

    def prompted(adapter: AdapterWeights | Mixture | None) -> Callable[[OnRollout], Rollout]:
        return lambda show: unscored.with_adapter(adapter).rollout(
            prompts,
            num_rewrites=config.num_rewrites,
            num_responses=config.num_responses,
            seed=config.seed,
            on_progress=show,
        )

    add("raw", None, respond(unscored), adds=False)
    if static is not None:
        instruct("static", [static.text] * len(prompts), instruction=static.text)
    if config.policy_text is not None:
        text = config.policy_text.strip()
        instruct("policy_text", [text] * len(prompts), instruction=text)
    for name, adapter in prompters.items():
        total = answers + len(prompts) * config.num_rewrites
        add(name, kept.hash_of(adapter), prompted(adapter), adds=True, total=total)
    if labelled is not None:
        instruct("labelled", labelled)
    if config.optimum is not None:
        options, untuned = config.optimum, prompters["untuned"]
        about: dict[str, Any] = {"kl_coef": config.kl_coef}

        def optimum(show: OnRollout) -> Rollout:
            resampled = resample_optimum(
                pipeline.with_adapter(untuned),
                prompts,
                config,
                options,
                columns=columns,
                on_progress=show,
            )
            about.update(
                num_candidates=options.num_candidates,
                effective_samples=resampled.effective_samples,
                selection_reliability=resampled.reliability,
            )
            return replace(
                resampled.rollout,
                seconds={"generate": resampled.seconds},
                generated_tokens=resampled.generated_tokens,
            )

        add(
            "optimum",
            [kept.hash_of(untuned), config.kl_coef, asdict(options)],
            optimum,
            adds=True,
            total=num_sequences(len(prompts), config, options),
            about=lambda: about,
        )
    for name, of_target in (("soft", soft), ("tuned", tuned)):
        if of_target is not None:
            before = unscored.with_target_adapter(of_target)
            add(name, kept.hash_of(of_target), respond(before), adds=False)
    return _answered(arms)


def _plain_arm(arm: Arm) -> dict[str, Any]:
    components = {
        name: [None if score != score else score for score in scores]  # NaN: abstained
        for name, scores in arm.components.items()
    }
    return {
        **plain_rollout(arm.rollout),
        "rewards": arm.rewards,
        "components": components,
        "adds": arm.adds,
        "about": arm.about,
        "paid": sorted(arm.paid),
    }


def _read_arm(plain: Mapping[str, Any], prompts: Sequence[Prompt]) -> Arm:
    components = {
        name: [math.nan if score is None else score for score in scores]
        for name, scores in plain["components"].items()
    }
    rollout, paid = read_rollout(plain, prompts), frozenset(plain["paid"])
    return Arm(rollout, plain["rewards"], components, plain["adds"], plain["about"], paid)


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
