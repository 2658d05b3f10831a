"""Reinforcement learning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from alignpro.config.anchor import AnchorConfig
from alignpro.config.fields import Place, Range, above, at_least, checked, only_default, require
from alignpro.config.guards import GuardPenaltyConfig
from alignpro.config.held_out import HeldOutConfig
from alignpro.config.model import ModelConfig, check_policy, trained_of
from alignpro.config.prompting import FitConfig, StageConfig, check_tuner, check_untruncated
from alignpro.types import SamplingParams


@dataclass(frozen=True)
@checked
class PpoConfig:
    """Several passes over a batch, with clipped ratios (Schulman et al. 2017, arXiv 1707.06347)."""

    clip_range: Annotated[float, Range(lambda v: 0 < v < 1, "between 0 and 1")] = 0.2
    """Epsilon of the clipped ratio: a ratio beyond 1 +- this earns nothing more."""
    epochs: Annotated[int, at_least(1)] = 2
    """Passes over the rewrites of a step."""
    minibatches: Annotated[int, at_least(1)] = 2
    """Optimizer steps in a pass, each of whole prompts."""
    value_head: bool = False
    """Whether a learned baseline for every token takes the place of the mean of the rewrite's
    siblings."""
    gae_lambda: Annotated[float, Range(lambda v: 0 <= v <= 1, "0 to 1")] = 0.95
    """Lambda of the generalised advantage estimation with value_head; at 1 its advantages do not
    trust the values."""
    value_learning_rate: Annotated[float, above(0)] = 1e-3
    """The learning rate of the value head, which follows the schedule of the policy."""

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
    step reads one rewrite of ``batch_size`` prompts.
    """

    num_prompts: Annotated[int, at_least(1)] | None = None
    """How many prompts are rolled out, once each; null is all."""
    loss: Literal["variance", "likelihood", "pooled"] = "variance"
    """The loss of the fit, which all are least at the optimum.

    variance: of reward - kl_coef * log ratio within a prompt. likelihood: weighted by exp(reward /
    kl_coef), as the formula says; of a few noisy rewrites it takes the best one and no more (seed 0
    of docs/notes/closed-form.md: +0.05 of reward where variance gains +0.18). pooled: the same,
    with rewards estimated from all prompts that a text was answered behind
    (docs/notes/house-rules.md): for prompters that choose among few texts.
    """
    answers: Annotated[int, at_least(1)] | None = None
    """Texts of each prompt that the target answers, one a round; null is all that were written, at
    once.

    In the first round a prompt gets the one that was tried least of those it was rewritten to; in
    those after it, of all that prompts share, the one that promises most by the answers so far.
    With loss pooled.
    """
    candidates: Annotated[int, at_least(2)] = 3
    """Texts a prompt that a fit weighs, the best ones; with loss pooled."""
    batch_size: Annotated[int, at_least(1)] = 8
    """Prompts in a step of the fit; with loss pooled."""
    mixture: Place | None = None
    """The folder of a mixture, such as `alignpro mix` writes: the mixture is the reward, and the
    prompter becomes it at kl_coef 1; null is the configuration's reward.

    No target is asked. At a larger kl_coef the prompter goes less far, at a smaller one further.
    """

    def __post_init__(self) -> None:
        if self.loss != "pooled":
            for name in ("answers", "candidates", "batch_size"):
                only_default(self, name, "with loss pooled")
        else:
            only_default(self, "mixture", "with another loss: pooled reads a target's answers")


@dataclass(frozen=True)
@checked
class TrainConfig(FitConfig, StageConfig):
    """Reinforcement learning of the prompter with a KL penalty."""

    # What is trained, and on what.
    policy: Literal["prompter", "target"] = "prompter"
    """What is trained: the prompter, or the target itself on the raw prompts, for comparison.

    target: no prompter takes part; the target is tuned by the same objective, with a LoRA (the
    paper's oracle) or a soft prompt (the ceiling of fixed prompts). num_rewrites then counts its
    responses, and target.adapter is where training starts.
    """
    run_dir: Place = "alignpro-run"
    """The directory of the run."""

    # One step.
    prompts_per_step: Annotated[int, at_least(1)] = 16
    """Prompts in a step."""
    num_rewrites: Annotated[int, at_least(1)] = 4
    """Rewrites a prompt, the group that the baseline is taken over."""
    num_responses: Annotated[int, at_least(1)] | Literal["auto"] = 1
    """Responses to each rewrite; auto follows from how much of the reward's variance is the
    target's own noise.

    auto: num_rewrites follows as well, with num_rewrites * num_responses = response_budget.
    """
    response_budget: int | None = None
    """Responses a prompt and step, with num_responses auto."""
    common_draws: bool = False
    """Whether the rewrites of a prompt are answered under the same random draws.

    A text that several of them wrote is answered once. Unbiased, with less of the target's noise,
    for fewer tokens.
    """

    kl_coef: Annotated[float, at_least(0)] = 0.05
    """The weight of the KL penalty: the objective is mean reward - kl_coef * KL(prompter ||
    reference), in nats per rewrite."""
    kl_target: Annotated[float, above(0)] | None = None
    """The KL in nats per rewrite that kl_coef is steered to; null keeps kl_coef as it is.

    kl_coef is then only where to start (`alignpro.objective.adaptive_kl`).
    """
    kl_gain: Annotated[float, above(0)] = 0.1
    """How fast kl_coef is steered with kl_target: a step moves it by exp(0.2 * this) at most."""
    anchor: AnchorConfig | None = None
    """Prompts on which the reference reads another prompt than the policy ({} takes the defaults);
    null anchors none.

    The KL of these is above 0 from the first step on, and kl_target does not count them.
    """

    algorithm: Literal["rloo", "reinforce", "ppo", "closed_form"] = "rloo"
    """How the prompter learns: by a baseline of sibling rewrites (rloo) or of earlier steps
    (reinforce), by several clipped passes a batch (ppo), or by a fit to one set of samples
    (closed_form)."""
    normalize_advantage: bool = False
    """Whether a prompt's advantages are divided by the standard deviation of its rewards, which
    optimises something else.

    With algorithm ppo: the advantage and the clipped loss of GRPO (arXiv 2402.03300). See
    `alignpro.objective.advantage`.
    """
    baseline_decay: Annotated[float, Range(lambda v: 0 <= v < 1, "at least 0 and below 1")] = 0.9
    """What the baseline of reinforce keeps of a step's mean reward, a step later."""
    ppo: PpoConfig = field(default_factory=PpoConfig)
    """The settings of algorithm ppo."""
    closed_form: ClosedFormConfig = field(default_factory=ClosedFormConfig)
    """The settings of algorithm closed_form."""
    guards: GuardPenaltyConfig | None = None
    """What rewrites have to keep, or lose reward ({} takes the defaults); null checks nothing.

    `reward_mean` is then the mean of what is left; held-out rewards and evaluations are without it.
    """
    zero_advantage_group: Literal["keep", "skip"] = "keep"
    """What is done with prompts whose rewrites all earned the same: keep their KL in the loss, or
    skip them.

    They teach nothing but the KL. skip: not scored, not in the mean; a step of none else changes
    nothing.
    """
    strict_parity: bool = True
    """Whether the run stops unless sampled and scored log-probabilities are equal."""

    heldout: HeldOutConfig | None = None
    """Prompts to watch while training ({} takes the defaults); null watches none."""
    track: tuple[Literal["wandb", "trackio"], ...] = ()
    """Trackers beside metrics.jsonl, which is always written, and TensorBoard, which is used where
    it is installed."""
    checkpoint_every: Annotated[int, at_least(1)] = 10
    """Steps from one checkpoint to the next; one is always written at the end and at Ctrl-C."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        check_tuner(self)
        self._check_algorithm()
        self._check_counts()
        if self.kl_target is None:
            only_default(self, "kl_gain", "with kl_target")
        else:
            expected = "above 0 with kl_target, to be steered"
            require("kl_coef", self.kl_coef, self.kl_coef > 0, expected)
        once = len(set(self.track)) == len(self.track)
        require("track", self.track, once, "every tracker once")
        check_policy(self.policy, self.prompter, self.target)
        sampled, reason = "rewrite", "training draws from the untruncated policy"
        if self._tunes_target:
            self._check_tuned_target()
            sampled = "response"
        check_untruncated(sampled, self.sampled, reason)

    @property
    def trained(self) -> ModelConfig:
        """The model that is trained; its adapter is where training starts."""
        return trained_of(self.policy, self.prompter, self.target)

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
            for name in ("kl_target", "response_budget", "heldout", "anchor"):
                only_default(self, name, "with an algorithm that samples while it trains")
            if self.tuner != "lora":
                only_default(self.closed_form, "mixture", "with tuner lora", "closed_form.")
                loss = self.closed_form.loss
                expected = (
                    "another one with tuner soft_prompt: it reads prompts with the base model"
                )
                require("closed_form.loss", loss, loss != "pooled", expected)
            if self.closed_form.mixture is not None:
                for name in ("num_responses", "common_draws", "guards"):
                    only_default(self, name, "with a reward of responses: a mixture needs none")
            fixed = self.num_responses != "auto"
            require("num_responses", self.num_responses, fixed, "a number with closed_form")
            if self.closed_form.answers is not None:
                only_default(self, "common_draws", "without closed_form.answers, one text a round")
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
        for name in ("num_responses", "common_draws", "guards"):
            only_default(self, name, "with policy prompter")
        alone = ModelConfig(self.prompter.model)
        if self.target is not None:
            expected = "a model alone with policy target: it is not loaded"
            require("prompter", self.prompter, self.prompter == alone, expected)
        require(
            "algorithm",
            self.algorithm,
            self.algorithm != "closed_form",
            "another one with policy target: the closed form is the prompter's",
        )
