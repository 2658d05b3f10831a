"""What a run learns beside its weights: kl_coef, the baseline, where the reward's variance is.

A pure function of the steps that were logged, kept in the checkpoint, so that a resume is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from alignpro.config import TrainConfig
from alignpro.objective import AdaptiveKLController, MovingBaseline, allocate, allocations
from alignpro.statistics import VarianceSplit, law_of_total_variance
from alignpro.train.trajectories import StepBatch
from alignpro.types import Rollout

LEARNING_STEPS = 4  # the first ones, with several responses a rewrite, to learn the split
RELEARN_EVERY = 10  # and every so many steps once more
MEMORY = 0.8  # what a step's estimates keep, a step later

# Passes over the layers that a token of a rewrite costs: sampled, scored under policy and
# reference, backward, and read by the target. A token of a response is sampled, and that is all.
# What siblings share, the prompt, counts for neither. A token of either model counts the same.
REWRITE_PASSES, RESPONSE_PASSES = 5.0, 1.0


@dataclass(frozen=True)
class RunningSplit:
    """Moving means of a reward's two sources of variance, and of what a sample costs."""

    between: float = 0.0  # sums; divided by split_weight they are means
    within: float = 0.0
    split_weight: float = 0.0
    rewrite_cost: float = 0.0  # likewise, in passes of one token over the layers
    response_cost: float = 0.0
    cost_weight: float = 0.0

    def after(self, rollout: Rollout, split: VarianceSplit | None) -> RunningSplit:
        """With one more step. split: None where it had a single response a rewrite."""
        between, within, weight = self.between, self.within, self.split_weight
        if split is not None:
            between = MEMORY * between + split.between_rewrites
            within = MEMORY * within + split.within_rewrite
            weight = MEMORY * weight + 1.0
        rewrites = [w for group in rollout.rewrites for w in group]
        responses = [r for w in rewrites for r in w.responses]
        written = sum(len(w.tokens) for w in rewrites) / len(rewrites)
        answered = sum(r.num_tokens for r in responses) / max(1, len(responses))
        return RunningSplit(
            between,
            within,
            weight,
            MEMORY * self.rewrite_cost + REWRITE_PASSES * written,
            MEMORY * self.response_cost + RESPONSE_PASSES * answered,
            MEMORY * self.cost_weight + 1.0,
        )

    def counts(self, step: int, budget: int) -> tuple[int, int]:
        learning = next((n, m) for n, m in allocations(budget) if m >= 2)
        if self.split_weight == 0.0 or step < LEARNING_STEPS:
            return learning
        best = allocate(
            budget,
            between=self.between / self.split_weight,
            within=self.within / self.split_weight,
            rewrite_cost=self.rewrite_cost / self.cost_weight,
            response_cost=self.response_cost / self.cost_weight,
        )
        return learning if best[1] == 1 and step % RELEARN_EVERY == 0 else best


@dataclass(frozen=True)
class Adaptive:
    """The state of a run, after its last step."""

    kl_coef: float
    baseline: MovingBaseline = field(default_factory=MovingBaseline)
    split: RunningSplit = field(default_factory=RunningSplit)

    def after(
        self, config: TrainConfig, rollout: Rollout, batch: StepBatch, kl_per_rewrite: float
    ) -> Adaptive:
        """With one more step. kl_per_rewrite: NaN where nothing was scored; kl_coef then stays."""
        kl_coef, baseline, split = self.kl_coef, self.baseline, self.split
        if config.kl_target is not None and math.isfinite(kl_per_rewrite):
            controller = AdaptiveKLController(config.kl_target, config.kl_gain)
            kl_coef = controller.update(kl_coef, kl_per_rewrite)
        if config.algorithm == "reinforce":
            baseline = baseline.after(batch.rewards, config.baseline_decay)
        if config.num_responses == "auto":
            split = split.after(rollout, variance_split(rollout))
        return Adaptive(kl_coef, baseline, split)

    def counts(self, config: TrainConfig, step: int) -> tuple[int, int]:
        if config.num_responses != "auto":
            return config.num_rewrites, config.num_responses
        assert config.response_budget is not None  # the configuration's rule
        return self.split.counts(step, config.response_budget)


def variance_split(rollout: Rollout) -> VarianceSplit | None:
    """Where the reward's variance comes from, over the prompts with every response there; None
    without two rewrites and two responses each that were drawn independently."""
    if rollout.common_draws:
        return None
    rewards = [[[r.reward for r in w.responses] for w in group] for group in rollout.rewrites]
    most = max(len(row) for group in rewards for row in group)
    whole = [group for group in rewards if all(len(row) == most for row in group)]
    if most < 2 or not whole or len(whole[0]) < 2:
        return None
    return law_of_total_variance(whole)
