"""What a step learns from: trajectories of the policy, whichever of the two models it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from alignpro.config import TrainConfig
from alignpro.objective import (
    MovingBaseline,
    group_normalized,
    reinforce,
    rloo,
    zero_advantage_groups,
)
from alignpro.types import Rewrite, Rollout


@dataclass(frozen=True)
class Trajectory:
    """One sequence that the policy wrote, and what it earned."""

    context: list[int]  # what the policy read
    tokens: list[int]  # what it wrote, EOS included
    logprobs: list[float]  # of ``tokens``, as recorded when they were drawn
    reward: float
    finished: bool  # by itself, not at the limit
    anchor: list[int] | None = None  # what the reference reads in the place of ``context``

    @property
    def sequence(self) -> list[int]:
        return self.context + self.tokens


@dataclass(frozen=True)
class StepBatch:
    """The trajectories of one step, those of a prompt beside each other."""

    rewards: torch.Tensor  # [R] float64, of all that was sampled and answered
    trajectories: list[Trajectory]  # S of them, those that are learnt from
    groups: list[list[int]]  # of each prompt: which trajectories are its own
    advantages: torch.Tensor  # [S] float32: reward minus baseline; rewards where a critic has it
    zero_advantage_groups: int  # prompts whose trajectories all earned the same, kept or skipped


def trajectories_of(
    rollout: Rollout, policy: Literal["prompter", "target"]
) -> list[list[Trajectory]]:
    """[P][N]: rewrites with the mean reward of their responses, or responses to raw prompts. A
    rewrite without a response is no trajectory: nobody judged it."""
    if policy == "prompter":
        return [
            [written_by_prompter(w) for w in group if w.responses] for group in rollout.rewrites
        ]
    return [
        [
            Trajectory(w.target_tokens, r.tokens, r.logprobs, r.reward, r.finish_reason == "stop")
            for w in group
            for r in w.responses
        ]
        for group in rollout.rewrites
    ]


def written_by_prompter(w: Rewrite) -> Trajectory:
    return Trajectory(w.prompter_tokens, w.tokens, w.logprobs, w.reward, w.finish_reason == "stop")


def step_batch(
    config: TrainConfig,
    rollout: Rollout,
    baseline: MovingBaseline,
    anchors: Sequence[list[int] | None] = (),
) -> StepBatch:
    """The trajectories to learn from, with the advantages of the configured algorithm. anchors: of
    the rollout's prompts, where any has one."""
    of_prompts = anchors or [None] * len(rollout.rewrites)
    written = [
        [replace(t, anchor=anchor) for t in group]
        for group, anchor in zip(trajectories_of(rollout, config.policy), of_prompts, strict=True)
    ]
    rewards = [torch.tensor([t.reward for t in g], dtype=torch.float64) for g in written]
    equal = [len(r) > 1 and bool(zero_advantage_groups(r[None])) for r in rewards]
    advantages = advantages_of(config, rewards, baseline)
    # A rewrite whose siblings all failed has nothing to be compared with, and teaches as little.
    teaches = [len(r) > (1 if config.group_baseline else 0) for r in rewards]
    trajectories: list[Trajectory] = []
    groups: list[list[int]] = []
    kept: list[torch.Tensor] = []
    for row, group in enumerate(written):
        skipped = config.zero_advantage_group == "skip" and (equal[row] or not teaches[row])
        if not group or skipped:
            continue
        groups.append(list(range(len(trajectories), len(trajectories) + len(group))))
        trajectories += group
        kept.append(advantages[row])
    return StepBatch(
        rewards=torch.cat(rewards),
        trajectories=trajectories,
        groups=groups,
        advantages=torch.cat(kept or [torch.zeros(0)]).to(torch.float32),
        zero_advantage_groups=sum(equal),
    )


def advantages_of(
    config: TrainConfig, rewards: Sequence[torch.Tensor], baseline: MovingBaseline
) -> list[torch.Tensor]:
    """[P][N] to [P][N]. With a value head the rewards as they are: `gae` has the baseline."""
    if config.algorithm == "reinforce":
        sizes = [len(r) for r in rewards]
        if sum(sizes) < 2 and baseline.value is None:  # nothing to be compared with
            return [torch.zeros_like(r) for r in rewards]
        return list(torch.split(reinforce(torch.cat(list(rewards))[None], baseline)[0], sizes))
    if config.ppo.value_head:
        return list(rewards)
    compared = group_normalized if config.normalize_advantage else rloo
    return [compared(r[None])[0] if len(r) > 1 else torch.zeros_like(r) for r in rewards]


def scored(trajectories: Sequence[Trajectory]) -> tuple[list[list[int]], list[int]]:
    """Sequences and starts for the scorer: what the policy read, then what it wrote."""
    return [t.sequence for t in trajectories], [len(t.context) for t in trajectories]


def token_sequence(trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """[T]: the trajectory that each written token belongs to."""
    lengths = torch.tensor([len(t.tokens) for t in trajectories])
    return torch.repeat_interleave(torch.arange(len(trajectories)), lengths)


def sampled_logprobs(trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """[T] float32, as recorded while sampling."""
    return torch.tensor([p for t in trajectories for p in t.logprobs], dtype=torch.float32)
