"""The closed-form fit: the optimum of the objective from one set of the reference's rollouts.

``rho* = rho_ref exp(R / kl_coef) / Z`` (MATH: "The optimum, in closed form") asks for no rollouts
but the reference's. They are drawn first and written down as they come; the fit that follows is
off-policy and costs the target nothing, for any kl_coef. With the loss "pooled" the target may be
asked for so many answers a prompt instead, round by round, each for the text that is worth a try.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignpro.config import to_mapping
from alignpro.data.load import PromptRow
from alignpro.fingerprints import Fingerprints
from alignpro.interrupts import interruptible
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.seeds import derive_seed
from alignpro.objective import sum_per_sequence, zero_advantage_groups
from alignpro.objective.closed_form import (
    closed_form_weights,
    effective_samples,
    log_variance_loss,
    off_policy_kl,
    weighted_likelihood_loss,
)
from alignpro.pipeline import Pipeline
from alignpro.run_directory import CONFIG, read_record
from alignpro.train.callbacks import OnProgress, TrainCallback, Watchers
from alignpro.train.checkpoint import check_same_run
from alignpro.train.distill import MixtureReward
from alignpro.train.guard_penalty import penalise
from alignpro.train.metrics import MetricsLog, read_metrics, truncate_metrics
from alignpro.train.policy import one_torch_thread, save_trained
from alignpro.train.pooled import Pool, Target, distinct_responses, draw
from alignpro.train.schedule import (
    apply_gradients,
    batch_indices,
    count_prompts,
    make_optimizer,
    rate_factor,
)
from alignpro.train.sft import likelihood_gradients
from alignpro.train.trainer import TrainingRun, said_of_resume, tell_of_resume
from alignpro.train.trajectories import (
    Trajectory,
    sampled_logprobs,
    scored,
    token_sequence,
    written_by_prompter,
)
from alignpro.types import Conversation, Rewrite

ROLLOUTS = "rollouts.jsonl"  # in the run directory: a line for each ``prompts_per_step`` prompts

_LOSSES = {"variance": log_variance_loss, "likelihood": weighted_likelihood_loss}


class ClosedFormFit(TrainingRun):
    """Fits the policy to the optimum of ``mean reward - kl_coef * KL``, from rollouts drawn once.

    Arguments and errors are those of `TrainingRun`. The rollouts are the starting policy's, so
    ``reference`` must be what the policy starts as. ``resume`` takes up the rollouts that are
    there, draws what is missing, and fits anew: kl_coef and everything else that only the fit reads
    may then be another.
    """

    def _begin(self, value_head: torch.nn.Module | None) -> None:
        count_prompts(self.config, len(self.prompts))
        folder = self.config.closed_form.mixture
        self._mixture = None
        if folder is not None:
            self._mixture = MixtureReward(Path(folder), self.policy.model)

    def _made_from(self, held_out: Sequence[PromptRow]) -> Fingerprints:
        mixed = {} if self._mixture is None else self._mixture.made_from
        return {**super()._made_from(held_out), **mixed}

    def _restore(self, same: Mapping[str, str]) -> int:
        saved = read_record(self.run_dir / CONFIG)
        mine = to_mapping(self.config)
        check_same_run(_of_the_rollouts(saved), _of_the_rollouts(mine), same)
        truncate_metrics(self.log.path, steps=0)
        return self.step

    def train(
        self, callbacks: Sequence[TrainCallback] = (), on_progress: OnProgress | None = None
    ) -> None:
        """Draw the rollouts that are missing, fit, and write adapter/. Raises as `Trainer.train`;
        the rollouts before an error are on disk. on_progress: told of them as they come.
        """
        watchers = Watchers(self.directory, [*self.trackers, *callbacks])
        with interruptible(), self.directory:
            try:
                groups = self.rollouts(on_progress)
                drawn = None
                if self.config.closed_form.loss == "pooled":
                    drawn = self._draw_targets(groups, on_progress)
                with watchers.watching(to_mapping(self.config), 0):
                    if drawn is None:
                        self._fit(groups, watchers)
                    else:
                        self._fit_pooled(*drawn, watchers)
            except BaseException as error:
                after = said_of_resume("train", self.run_dir, 0)
                if (self.run_dir / ROLLOUTS).exists():
                    goes_on = f"alignpro train {self.run_dir / CONFIG} --resume"
                    after = f"with what was drawn kept; go on with: {goes_on}"
                tell_of_resume(error, after)
                raise
            save_trained(self.run_dir / "adapter", self.policy, self.config)

    def _draw_targets(
        self, groups: list[list[Rewrite]], on_progress: OnProgress | None
    ) -> tuple[list[Target], dict[str, Any], dict[str, float]]:
        """What is to be fitted, once every answer is there; and of the first row what is known of
        it, and seconds."""
        started = time.perf_counter()
        pool = Pool(self.policy, self.reference, self.config)
        groups, broken = self._pooled(pool, groups, on_progress)
        drawn = time.perf_counter()
        with one_torch_thread():
            targets, pooled = pool.targets()
        answers = [r for group in groups for _, r in distinct_responses(group)]
        first = {
            "reward_mean": float(np.mean([w.reward for g in groups for w in g if w.responses])),
            "target_tokens": sum(r.num_tokens for r in answers),
            "expected_reward": float(np.mean([t.expected for t in targets])),
            "noise_variance": pooled.noise,
            "text_by_features_variance": pooled.text_by_features,
            **broken,
        }
        return targets, first, {"rollouts": drawn - started, "pool": time.perf_counter() - drawn}

    def _fit_pooled(
        self,
        targets: list[Target],
        first: dict[str, Any],
        seconds: dict[str, float],
        watchers: Watchers,
    ) -> None:
        config, reward = self.config, first["reward_mean"]
        optimizer = make_optimizer(self.policy.parameters(), config)
        size, rows = config.closed_form.batch_size, len(targets)
        for step in range(config.steps):
            begun = time.perf_counter()
            cursor, seed = step * size, derive_seed(config.seed, _FIT)
            chosen = batch_indices(seed=seed, cursor=cursor, count=min(size, rows), rows=rows)
            batch = draw([targets[i] for i in chosen], derive_seed(seed, step))
            rate = config.learning_rate * rate_factor(config, step)
            with one_torch_thread():
                metrics = likelihood_gradients(
                    self.policy,
                    batch,
                    config,
                    temperature=config.rewrite.temperature,
                    per="text",  # else the step is biased towards short ones
                )
                (norm,) = apply_gradients({optimizer: rate}, max_grad_norm=config.max_grad_norm)
            seconds["step"] = time.perf_counter() - begun
            self._report(
                {
                    "epoch": cursor // rows,
                    "reward_mean": reward,
                    **metrics,
                    **first,
                    "grad_norm": norm,
                    "learning_rate": rate,
                },
                seconds,
                watchers,
            )
            first, seconds = {}, {}

    def _pooled(
        self, pool: Pool, groups: list[list[Rewrite]], on_progress: OnProgress | None
    ) -> tuple[list[list[Rewrite]], dict[str, Any]]:
        """Fills the pool with the rollouts and, where they have none, with answers round by round.
        Returns what was answered, and metrics of it."""
        order, rounds = self._order(), self.config.closed_form.answers
        if rounds is None:
            groups, broken = self._penalised(groups)
            for prompt, group in zip(order, groups, strict=True):
                pool.add(prompt, [w for w in group if w.responses])
            return groups, broken
        for prompt, group in zip(order, groups, strict=True):
            pool.add(prompt, group)
        answered: list[list[Rewrite]] = [[] for _ in order]
        broken = {}
        for number in range(1, rounds + 1):
            with one_torch_thread():
                texts = pool.most_wanted()
            answers, said = self._penalised(self.rollouts(on_progress, number, texts))
            for prompt, group, (answer,) in zip(order, answered, answers, strict=True):
                group.append(answer)
                pool.observe(prompt, answer)
            for name, counts in said.items():
                broken[name] = dict(Counter(broken.get(name)) + Counter(counts))
        return answered, broken

    def _report(
        self, row: Mapping[str, Any], seconds: Mapping[str, float], watchers: Watchers
    ) -> None:
        """A row of the log, for the step that was just done."""
        config = self.config
        whole = {
            "step": self.step,
            **row,
            **(self.notes if self.step == 0 else {}),
            "kl_coef": config.kl_coef,
            "num_rewrites": config.num_rewrites,
            "num_responses": config.num_responses,
            "seconds": dict(seconds),
        }
        self.log.append(whole)
        self.step += 1
        watchers.on_step(whole)

    def _penalised(
        self, groups: Sequence[Sequence[Rewrite]]
    ) -> tuple[list[list[Rewrite]], dict[str, Any]]:
        """The rollouts as `penalise` has them: those on disk are without it."""
        return penalise(self.config, [self.prompts[i] for i in self._order()], groups)

    def _fit(self, rollouts: Sequence[Sequence[Rewrite]], watchers: Watchers) -> None:
        config = self.config
        rollouts, broken = self._penalised(rollouts)
        # The losses compare all N rewrites of a prompt, so one without an answer leaves it out.
        answered = [g for g in rollouts if all(w.responses for w in g)]
        if not answered:
            raise FailedRowsError("no prompt has an answer to every rewrite; resume asks again")
        groups = [[written_by_prompter(w) for w in group] for group in answered]
        rewards = torch.tensor([[t.reward for t in g] for g in groups], dtype=torch.float64)
        optimizer = make_optimizer(self.policy.parameters(), config)
        answers = [r for group in answered for _, r in distinct_responses(group)]
        first = {"target_tokens": sum(r.num_tokens for r in answers), **broken}
        for step in range(config.steps):
            started = time.perf_counter()
            cursor = step * config.prompts_per_step
            chosen = batch_indices(
                seed=derive_seed(config.seed, _FIT),
                cursor=cursor,
                count=min(config.prompts_per_step, len(groups)),
                rows=len(groups),
            )
            rate = config.learning_rate * rate_factor(config, step)
            with one_torch_thread():
                metrics = self._accumulate_gradients([groups[i] for i in chosen], rewards[chosen])
                (norm,) = apply_gradients({optimizer: rate}, max_grad_norm=config.max_grad_norm)
            self._report(
                {
                    "epoch": cursor // len(groups),
                    **metrics,
                    **first,
                    "grad_norm": norm,
                    "learning_rate": rate,
                },
                {"step": time.perf_counter() - started},
                watchers,
            )
            first = {}

    def _order(self) -> list[int]:
        """The prompts that are rolled out: a shuffled pass over all, or so many of it."""
        rows = len(self.prompts)
        count = count_prompts(self.config, rows)
        return batch_indices(seed=self.config.seed, cursor=0, count=count, rows=rows)

    def rollouts(
        self, on_progress: OnProgress | None = None, number: int = 0, texts: Sequence[str] = ()
    ) -> list[list[Rewrite]]:
        """N rewrites of every prompt with their rewards: those on disk, and the missing ones, which
        are the policy's as it is.

        `train` asks for them; to be called before it by who wants them alone. With
        ``closed_form.answers`` they have no responses, and round ``number`` of these, from 1 on,
        is the answers to ``texts``, one a prompt.
        """
        size, order = self.config.prompts_per_step, self._order()
        starts = range(0, len(order), size)
        before = number * len(starts)  # lines of the rounds before
        path = self.run_dir / ROLLOUTS
        there = (read_metrics(path) if path.exists() else [])[before : before + len(starts)]
        groups = [
            [Rewrite.of_plain(w) for w in group] for row in there for group in row["rewrites"]
        ]
        if len(there) == len(starts):
            return groups
        truncate_metrics(path, steps=before + len(there))  # a line that a crash cut short
        stage = f"answers, round {number}" if number else "rollouts"
        if on_progress is not None:
            on_progress(stage, len(groups), len(order))
        log, pipeline = MetricsLog(path), self._with_policy()
        with self.directory:
            for line, start in list(enumerate(starts, before))[len(there) :]:
                chunk = order[start : start + size]
                rewrites = self._draw(pipeline, line, chunk, texts[start : start + size])
                log.append(
                    {
                        "step": line,
                        "prompts": [Conversation.of(self.prompts[i]).plain for i in chunk],
                        "rewrites": [[w.to_plain() for w in group] for group in rewrites],
                    }
                )
                groups += rewrites
                if on_progress is not None:
                    on_progress(stage, len(groups), len(order))
        return groups

    def _draw(
        self, pipeline: Pipeline, line: int, chunk: list[int], texts: Sequence[str]
    ) -> list[list[Rewrite]]:
        """What a line of the rollouts holds: `rollouts` says what."""
        config = self.config
        assert config.num_responses != "auto"  # the configuration's rule
        picked, columns = self._pick(chunk)
        seed = derive_seed(config.seed, line)
        if self._mixture is not None:
            rollout = self._mixture.rollout(pipeline, picked, config.num_rewrites, seed)
        elif texts:
            rollout = pipeline.answer(
                picked,
                [[text] for text in texts],
                num_responses=config.num_responses,
                seed=seed,
                columns=columns,
            )
        elif config.closed_form.answers is not None:
            return pipeline.rewrite(picked, num_rewrites=config.num_rewrites, seed=seed)
        else:
            rollout = pipeline.rollout(
                picked,
                num_rewrites=config.num_rewrites,
                num_responses=config.num_responses,
                seed=seed,
                columns=columns,
                common_draws=config.common_draws,
            )
        if rollout.unscored:
            known = self.notes.get("unscored_responses", 0)
            self.notes["unscored_responses"] = known + rollout.unscored
        return rollout.rewrites

    def _accumulate_gradients(
        self, groups: Sequence[Sequence[Trajectory]], rewards: Tensor
    ) -> dict[str, Any]:
        """The gradient of the whole batch, micro-batch by micro-batch.

        The losses look at a prompt's rewrites together, and micro-batches may part them. So all are
        scored first, without a graph; the loss's derivatives by their log-probabilities are then
        the weights of what each micro-batch differentiates.
        """
        config = self.config
        rewrites = [t for group in groups for t in group]
        leaf, measured = self._look(rewrites)
        leaf.requires_grad_()
        loss = _LOSSES[config.closed_form.loss](leaf, rewards, config.kl_coef)
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        derivative = leaf.grad.flatten()
        self.policy.zero_grad(set_to_none=True)
        plan = self.policy.micro_batches(*scored(rewrites), config, with_reference=False)
        for micro in plan:
            part = micro.of(rewrites)
            scores = self.policy.score(
                *scored(part),
                temperature=config.rewrite.temperature,
                activations=micro.activations,
            )
            weights = derivative[micro.begin : micro.end][token_sequence(part)]
            (weights * scores.logprob).sum().backward()  # type: ignore[no-untyped-call]
        weights = closed_form_weights(rewards, config.kl_coef)
        log_ratio = leaf.detach().double()
        ratio = log_ratio.exp()
        return {
            "loss": float(loss.detach()),
            # Of the prompter as it is, by importance weights on the rollouts it was fitted to.
            "reward_mean": float((ratio * rewards).sum() / ratio.sum()),
            "rollout_reward_mean": float(rewards.mean()),
            "weighted_log_ratio": float((weights * log_ratio).sum(dim=1).mean()),
            "effective_samples": float(effective_samples(weights).mean()),
            **measured,
            "micro_batches": len(plan),
            "zero_advantage_groups": int(zero_advantage_groups(rewards).sum()),
        }

    def _look(self, rewrites: Sequence[Trajectory]) -> tuple[Tensor, dict[str, float]]:
        """log rho - log rho_ref [P, N] under the weights as they are, and metrics: the KL in nats
        per rewrite of the prompter's, estimated off-policy and exact at every token."""
        config = self.config
        plan = self.policy.micro_batches(*scored(rewrites), config, with_reference=True)
        with torch.no_grad():
            parts = [
                self.policy.score(
                    *scored(micro.of(rewrites)),
                    temperature=config.rewrite.temperature,
                    reference=self.reference,
                )
                for micro in plan
            ]
        log_ratio = torch.cat([part.logprob for part in parts]) - sampled_logprobs(rewrites)
        kl = torch.cat([part.kl for part in parts if part.kl is not None])
        sequence = token_sequence(rewrites)
        exact = config.strict_parity and self.policy.model.bit_exact
        if self.step == 0 and exact and bool((log_ratio != 0).any()):
            raise RuntimeError(
                "scored log-probabilities differ from the recorded ones by up to "
                f"{float(log_ratio.abs().max()):.3g}, expected exactly 0: the rollouts are not "
                "this prompter's (strict_parity=false goes on regardless)"
            )
        summed = sum_per_sequence(log_ratio, sequence, len(rewrites))
        return summed.view(-1, config.num_rewrites), {
            "kl_per_rewrite": float(off_policy_kl(log_ratio, kl, sequence, len(rewrites)).mean()),
            "entropy": float(torch.cat([part.entropy for part in parts]).mean()),
            "tokens": len(log_ratio),
        }


_FIT = 1 << 32  # the stream of the fit's order, beside those of the rollouts

# What the rollouts depend on; the fit alone reads the rest.
_ROLLOUT_FIELDS = (
    *("prompter", "target", "data", "on_too_long", "reward", "seed"),
    *("prompts_per_step", "num_rewrites", "num_responses", "common_draws"),
    *("rewrite", "response", "prompting"),
)


def _of_the_rollouts(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: config.get(name) for name in _ROLLOUT_FIELDS}
    closed_form = config.get("closed_form", {})
    names = ("num_prompts", "mixture", "answers")
    return {**fields, **{f"closed_form.{name}": closed_form.get(name) for name in names}}
