"""Reinforcement learning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from alignpro.config.fields import (
    Range,
    above,
    at_least,
    checked,
    only_default,
    require,
)
from alignpro.config.held_out import HeldOutConfig
from alignpro.config.model import (
    ModelConfig,
    check_trainable,
    target_of,
)
from alignpro.config.prompting import FitConfig, StageConfig, check_untruncated
from alignpro.types import SamplingParams


@dataclass(frozen=True)
@checked
class PpoConfig:
    """Several passes over a batch, with clipped ratios (Schulman et al. 2017, arXiv 1707.06347)."""

    # epsilon: a ratio beyond 1 +- this earns nothing more.
    clip_range: Annotated[float, Range(lambda v: 0 < v < 1, "between 0 and 1")] = 0.2
    epochs: Annotated[int, at_least(1)] = 2  # passes over a step's rewrites
    minibatches: Annotated[int, at_least(1)] = 2  # optimizer steps a pass; whole prompts each
    # A learned baseline for every token; without one, the mean of the rewrite's siblings.
    value_head: bool = False
    # With value_head; 1: its advantages do not trust the values.
    gae_lambda: Annotated[float, Range(lambda v: 0 <= v <= 1, "0 to 1")] = 0.95
    # With value_head; follows the policy's schedule.
    value_learning_rate: Annotated[float, above(0)] = 1e-3

    def __post_init__(self) -> None:
        if not self.value_head:
            for name in ("gae_lambda", "value_learning_rate"):
                only_default(self, name, "with value_head")


@dataclass(frozen=True)
@checked
class ClosedFormConfig:
    """Rollouts of the untuned prompter, and the fit to them.

    ``num_rewrites`` and ``num_responses`` of `TrainConfig` shape the rollouts; each of ``steps``
    steps reads ``prompts_per_step`` of the prompts with all their rewrites, pass after pass. Two
    passes are about right: more of them fit the noise (docs/notes/closed-form.md). With "pooled", a
    step reads one rewrite of ``batch_size`` prompts, and the rounds share the steps.
    """

    # Prompts rolled out, once each a round; None: all there are.
    num_prompts: Annotated[int, at_least(1)] | None = None
    # All are least at the optimum. variance: of reward - kl_coef * log ratio within a prompt.
    # likelihood: weighted by exp(reward / kl_coef), as the formula says; of a few noisy rewrites
    # it takes the best one and no more (seed 0 of docs/notes/closed-form.md: +0.05 of reward where
    # variance gains +0.18). pooled: the same, with rewards estimated from all prompts that a text
    # was answered behind (docs/notes/house-rules.md): for prompters that choose among few texts.
    loss: Literal["variance", "likelihood", "pooled"] = "variance"
    rounds: Annotated[int, at_least(1)] = 1  # of rollouts, each by the prompter fitted before
    candidates: Annotated[int, at_least(2)] = 3  # texts a prompt that a fit weighs, the best ones
    batch_size: Annotated[int, at_least(1)] = 8  # prompts a step of the fit

    def __post_init__(self) -> None:
        if self.loss != "pooled":
            for name in ("rounds", "candidates", "batch_size"):
                only_default(self, name, "with loss pooled")


@dataclass(frozen=True)
@checked
class TrainConfig(FitConfig, StageConfig):
    """Reinforcement learning of the prompter with a KL penalty."""

    # What is trained, and on what.
    # The prompter's adapter is where training starts, and the reference; None: a fresh one (lora),
    # whose reference is the base model. ``rewrite`` is of the untruncated distribution.
    # target: no prompter; the target itself is tuned on the raw prompts, with a LoRA and the same
    # objective (the paper's oracle, for comparison). num_rewrites then counts its responses, and
    # target.adapter is where training starts.
    policy: Literal["prompter", "target"] = "prompter"
    run_dir: str = "alignpro-run"

    # One step.
    prompts_per_step: Annotated[int, at_least(1)] = 16
    # N, rewrites a prompt: the group that the baseline is taken over.
    num_rewrites: Annotated[int, at_least(1)] = 4
    # M, responses a rewrite. auto: N and M follow from how much of the reward's variance is the
    # target's own noise, with N * M = response_budget.
    num_responses: Annotated[int, at_least(1)] | Literal["auto"] = 1
    response_budget: int | None = None  # responses a prompt and step, with auto
    # A prompt's rewrites are answered under the same random draws, and a text that several of them
    # wrote is answered once. Unbiased, with less of the target's noise, for fewer tokens.
    common_draws: bool = False

    # The objective: mean reward - kl_coef * KL(prompter || reference), KL in nats per rewrite.
    kl_coef: Annotated[float, at_least(0)] = 0.05
    # Nats per rewrite: kl_coef is only where to start, and is steered to this
    # (objective.adaptive_kl).
    kl_target: Annotated[float, above(0)] | None = None
    # With kl_target: a step moves kl_coef by exp(0.2 * this) at most.
    kl_gain: Annotated[float, above(0)] = 0.1

    # The baseline: siblings (rloo), earlier steps (reinforce). ppo: several clipped passes a
    # batch. closed_form: a fit to one set of samples of the reference; no rollouts while training.
    algorithm: Literal["rloo", "reinforce", "ppo", "closed_form"] = "rloo"
    # Divide a prompt's advantages by the standard deviation of its rewards, which optimises
    # something else (objective.advantage). With algorithm ppo: the advantage and the clipped loss
    # of GRPO (arXiv 2402.03300).
    normalize_advantage: bool = False
    # reinforce: what a step's mean reward keeps, a step later.
    baseline_decay: Annotated[float, Range(lambda v: 0 <= v < 1, "at least 0 and below 1")] = 0.9
    ppo: PpoConfig = field(default_factory=PpoConfig)
    closed_form: ClosedFormConfig = field(default_factory=ClosedFormConfig)
    # Prompts whose rewrites all earned the same teach nothing but the KL: keep that, or skip them
    # (not scored, not in the mean; a step of none else changes nothing).
    zero_advantage_group: Literal["keep", "skip"] = "keep"
    strict_parity: bool = True  # stop unless sampled and scored log-probabilities are equal

    heldout: HeldOutConfig | None = None  # prompts to watch while training; {} takes the defaults
    # Trackers beside metrics.jsonl (always) and TensorBoard (where it is installed).
    track: tuple[Literal["wandb", "trackio"], ...] = ()
    # Steps; one is always written at the end and at Ctrl-C.
    checkpoint_every: Annotated[int, at_least(1)] = 10

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        self._check_algorithm()
        self._check_counts()
        if self.kl_target is None:
            only_default(self, "kl_gain", "with kl_target")
        else:
            expected = "above 0 with kl_target, to be steered"
            require("kl_coef", self.kl_coef, self.kl_coef > 0, expected)
        once = len(set(self.track)) == len(self.track)
        require("track", self.track, once, "every tracker once")
        sampled, reason = "rewrite", "training draws from the untruncated policy"
        if self._tunes_target:
            self._check_tuned_target()
            sampled = "response"
        check_untruncated(sampled, self.sampled, reason)
        check_trainable(
            "target" if self.target and self._tunes_target else "prompter", self.trained
        )

    @property
    def trained(self) -> ModelConfig:
        """The model that is trained; its adapter is where training starts."""
        return target_of(self.prompter, self.target) if self._tunes_target else self.prompter

    @property
    def sampled(self) -> SamplingParams:
        """How the policy is sampled: ``rewrite``, or ``response`` where it is the target."""
        return self.response if self._tunes_target else self.rewrite

    @property
    def _tunes_target(self) -> bool:
        return self.policy == "target"

    @property
    def group_baseline(self) -> bool:
        """The baseline is taken over the rewrites of a prompt."""
        critic = self.algorithm == "ppo" and self.ppo.value_head
        return self.algorithm in ("rloo", "ppo") and not critic

    def _check_algorithm(self) -> None:
        if self.algorithm != "ppo":
            for f in fields(self.ppo):
                only_default(self.ppo, f.name, "with algorithm ppo", "ppo.")
        if self.algorithm != "reinforce":
            only_default(self, "baseline_decay", "with algorithm reinforce")
        batches, prompts = self.ppo.minibatches, self.prompts_per_step
        if self.algorithm == "ppo":
            expected = f"at most prompts_per_step ({prompts}): a minibatch has whole prompts"
            require("ppo.minibatches", batches, batches <= prompts, expected)
        if self.algorithm == "closed_form":
            require("kl_coef", self.kl_coef, self.kl_coef > 0, "above 0 with closed_form")
            for name in ("kl_target", "response_budget", "heldout"):
                only_default(self, name, "with an algorithm that samples while it trains")
            fixed = self.num_responses != "auto"
            require("num_responses", self.num_responses, fixed, "a number with closed_form")
            rounds = self.closed_form.rounds
            expected = f"a multiple of closed_form.rounds ({rounds}), which share them"
            require("steps", self.steps, self.steps % rounds == 0, expected)
        else:
            for f in fields(self.closed_form):
                only_default(self.closed_form, f.name, "with algorithm closed_form", "closed_form.")
        if not self.group_baseline:
            group = "with a baseline over the rewrites of a prompt (rloo, ppo without value head)"
            only_default(self, "normalize_advantage", group)
            equal = f"{group}: with another one, equal rewards do teach something"
            only_default(self, "zero_advantage_group", equal)

    def _check_counts(self) -> None:
        rewrites, responses, budget = self.num_rewrites, self.num_responses, self.response_budget
        if responses == "auto":
            only_default(self, "num_rewrites", "with a number of num_responses; auto chooses both")
            independent = "with a number of num_responses; auto measures independent draws"
            only_default(self, "common_draws", independent)
            require(
                "response_budget",
                budget,
                budget is not None
                and budget > 3
                and any(budget % m == 0 for m in range(2, math.isqrt(budget) + 1)),
                "a product of two numbers above 1 (responses a prompt and step), with "
                "num_responses auto",
            )
            return
        only_default(self, "response_budget", "with num_responses auto")
        if self.group_baseline or self.algorithm == "closed_form":
            expected = "at least 2: a rewrite is judged against the others of its prompt"
            require("num_rewrites", rewrites, rewrites >= 2, expected)
        if self.algorithm == "reinforce":
            expected = "2 or more with prompts_per_step 1: the first step is its own baseline"
            require("num_rewrites", rewrites, rewrites * self.prompts_per_step >= 2, expected)

    def _check_tuned_target(self) -> None:
        for name in ("num_responses", "common_draws"):
            only_default(self, name, "with policy prompter")
        adapter, alone = self.prompter.adapter, ModelConfig(self.prompter.model)
        require("prompter.adapter", adapter, adapter is None, "null: target.adapter is tuned")
        if self.target is not None:
            expected = "a model alone with policy target: it is not loaded"
            require("prompter", self.prompter, self.prompter == alone, expected)
        require(
            "algorithm",
            self.algorithm,
            self.algorithm != "closed_form",
            "another one with policy target: the closed form is the prompter's",
        )
