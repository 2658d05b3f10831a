"""From trajectories to new weights: scores, losses, gradients and optimizer steps."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from alignpro.config import TrainConfig
from alignpro.objective import (
    LossResult,
    Metric,
    PolicyBatch,
    merge_metrics,
    policy_loss,
    token_advantages,
)
from alignpro.train.critic import Critic
from alignpro.train.micro_batches import MicroBatch
from alignpro.train.policy import Policy, Reference, ScoreTensors, one_torch_thread
from alignpro.train.schedule import apply_gradients, make_optimizer, rate_factor
from alignpro.train.trajectories import (
    StepBatch,
    Trajectory,
    sampled_logprobs,
    scored,
    token_sequence,
)
from alignpro.train.updates import Update, plan_updates, summarise


class Learner:
    """The policy, its reference, the optimizer, and the critic where PPO has one."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        reference: Reference,
        value_head: torch.nn.Module | None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.reference = reference
        self.optimizer = make_optimizer(policy.parameters(), config)
        self.critic: Critic | None = None
        if value_head is not None:
            self.critic = Critic(value_head, learning_rate=config.ppo.value_learning_rate)

    @one_torch_thread()
    def improve(
        self, batch: StepBatch, kl_coef: float, step: int, stop_if_asked: Callable[[], None]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The optimizer steps that a batch is good for: all of them or, on an error, none. Metrics,
        and the seconds of "gradient" (scores included) and "optimizer".

        stop_if_asked: called between micro-batches; may raise.
        """
        seconds = {"gradient": 0.0, "optimizer": 0.0}
        updates = plan_updates(self.config, batch, step)
        if not updates:
            nothing = {"updates": 0, "micro_batches": 0, "tokens": 0, "grad_norm": 0.0}
            return nothing | {"kl_per_rewrite": float("nan"), "parity_max_abs": 0.0}, seconds
        before = self._copy_of_state() if len(updates) > 1 else None
        try:
            started = time.perf_counter()
            targets = self._token_targets(batch, kl_coef, stop_if_asked)
            metrics = []
            for update in updates:
                row = self._accumulate_gradients(batch, targets, update, kl_coef, stop_if_asked)
                scored_at = time.perf_counter()
                metrics.append(row | self._apply_gradients(update.step))
                applied_at = time.perf_counter()
                seconds["gradient"] += scored_at - started
                seconds["optimizer"] += applied_at - scored_at
                started = applied_at
        except BaseException:
            if before is not None:
                self.load_state(*before)
            raise
        return summarise(updates, metrics), seconds

    def _token_targets(
        self, batch: StepBatch, kl_coef: float, stop_if_asked: Callable[[], None]
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        if self.critic is None:
            return None
        targets = []
        for micro in self._micro_batches(batch.trajectories):
            stop_if_asked()
            trajectories = micro.of(batch.trajectories)
            with torch.no_grad():
                scores = self._score(trajectories, micro)
            assert scores.hidden is not None and scores.kl is not None
            targets += self.critic.targets(
                scores.hidden,
                batch.advantages[micro.begin : micro.end],
                scores.kl,
                token_sequence(trajectories),
                kl_coef=kl_coef,
                gae_lambda=self.config.ppo.gae_lambda,
            )
        return targets

    def _accumulate_gradients(
        self,
        batch: StepBatch,
        targets: list[tuple[torch.Tensor, torch.Tensor]] | None,
        update: Update,
        kl_coef: float,
        stop_if_asked: Callable[[], None],
    ) -> dict[str, Metric]:
        """The gradient of one update, micro-batch by micro-batch under one denominator."""
        config = self.config
        trajectories = [batch.trajectories[row] for row in update.rows]
        total_tokens = sum(len(t.tokens) for t in trajectories)
        self.optimizer.zero_grad(set_to_none=True)
        if self.critic is not None:
            self.critic.optimizer.zero_grad(set_to_none=True)
        results: list[LossResult] = []
        kl_parts: list[dict[str, Metric]] = []
        parity = value_loss = 0.0
        for micro in self._micro_batches(trajectories):
            stop_if_asked()
            rows, part = list(micro.of(update.rows)), micro.of(trajectories)
            scores, sequence = self._score(part, micro), token_sequence(part)
            assert scores.kl is not None and scores.reference_logprob is not None
            tokens = PolicyBatch(
                logprob=scores.logprob,
                kl=scores.kl,
                entropy=scores.entropy,
                reference_logprob=scores.reference_logprob,
                sampled_logprob=sampled_logprobs(part),
                sequence=sequence,
                advantage=(
                    token_advantages(batch.advantages[rows], scores.kl, sequence, kl_coef)
                    if targets is None
                    else torch.cat([targets[row][0] for row in rows])
                ),
            )
            if update.fresh:
                parity = max(parity, self._check_parity(tokens, update.step))
            parted = _parted_kl(part, scores.kl.detach(), sequence)
            result = policy_loss(
                tokens,
                kl_coef,
                total_rewrites=len(trajectories),
                clip_range=config.ppo.clip_range if config.algorithm == "ppo" else None,
            )
            result.loss.backward()  # type: ignore[no-untyped-call]
            results.append(result)
            kl_parts.append(parted)
            if self.critic is not None and targets is not None:
                assert scores.hidden is not None
                returns = torch.cat([targets[row][1] for row in rows])
                loss = self.critic.loss(scores.hidden, returns, total_tokens=total_tokens)
                loss.backward()  # type: ignore[no-untyped-call]
                value_loss += float(loss.detach())
        merged = merge_metrics([result.metrics for result in results]) | merge_metrics(kl_parts)
        merged["micro_batches"] = Metric(len(results), kind="work")
        if update.fresh:
            merged["parity_max_abs"] = Metric(parity, kind="largest")
        if self.critic is not None:
            merged["value_loss"] = Metric(value_loss * total_tokens, total_tokens)
        return merged

    def _micro_batches(self, trajectories: Sequence[Trajectory]) -> list[MicroBatch]:
        return self.policy.micro_batches(
            *scored(trajectories),
            self.config,
            with_reference=True,
            # An anchored reference is handed over as states, too.
            with_hidden=self.critic is not None or any(t.anchor is not None for t in trajectories),
        )

    def _score(self, trajectories: Sequence[Trajectory], micro: MicroBatch) -> ScoreTensors:
        return self.policy.score(
            *scored(trajectories),
            temperature=self.config.sampled.temperature,
            reference=self.reference,
            anchors=[t.anchor for t in trajectories],
            activations=micro.activations,
            with_hidden=self.critic is not None,
        )

    def _check_parity(self, batch: PolicyBatch, step: int) -> float:
        """The largest difference between sampled and scored log-probabilities; 0.0 is expected
        but of a model that is not deterministic."""
        difference = float((batch.logprob.detach() - batch.sampled_logprob).abs().max())
        if self.config.strict_parity and self.policy.model.bit_exact and difference != 0.0:
            raise RuntimeError(
                f"step {step}: scored log-probabilities differ from the sampled ones by up to "
                f"{difference:.3g}, expected exactly 0: sampler and scorer do not compute the same "
                "(strict_parity=false goes on regardless)"
            )
        return difference

    def _apply_gradients(self, step: int) -> dict[str, Metric]:
        """One optimizer step of the policy, and of the critic with it or of neither; the norm is
        that of the policy's gradient before it was clipped."""
        config = self.config
        factor = rate_factor(config, step)
        rate = config.learning_rate * factor
        rates: dict[torch.optim.Optimizer, float] = {self.optimizer: rate}
        if self.critic is not None:
            rates[self.critic.optimizer] = self.critic.learning_rate * factor
        norm, *_ = apply_gradients(rates, max_grad_norm=config.max_grad_norm)
        return {
            "grad_norm": Metric(norm, kind="largest"),
            "learning_rate": Metric(rate, kind="largest"),  # one for all updates of a step
        }

    def _copy_of_state(self) -> tuple[Any, ...]:
        critic = None if self.critic is None else copy.deepcopy(self.critic.state_dict())
        return self.policy.weights(), copy.deepcopy(self.optimizer.state_dict()), critic

    def load_state(
        self, weights: Any, optimizer: dict[str, Any], critic: dict[str, Any] | None
    ) -> None:
        self.policy.load_weights(weights)
        self.optimizer.load_state_dict(optimizer)
        if self.critic is not None and critic is not None:
            self.critic.load_state_dict(critic)


def _parted_kl(
    trajectories: Sequence[Trajectory], kl: torch.Tensor, sequence: torch.Tensor
) -> dict[str, Metric]:
    """Nats per trajectory [T] to those with an anchor and those without; nothing without anchors.
    A KL to another prompt's reference is above 0 where nothing was learnt."""
    anchored = torch.tensor([t.anchor is not None for t in trajectories])
    parts = {"kl_anchored": anchored, "kl_plain": ~anchored} if bool(anchored.any()) else {}
    return {
        name: Metric(float(kl[rows[sequence]].sum()), float(rows.sum()))
        for name, rows in parts.items()
        if bool(rows.any())
    }
