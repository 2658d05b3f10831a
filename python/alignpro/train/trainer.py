"""Reinforcement learning of the prompter with a KL leash: the loop on one screen."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alignpro.config import TrainConfig
from alignpro.models.adapter import save_peft
from alignpro.objective import (
    LossResult,
    PolicyBatch,
    merge_metrics,
    policy_loss,
    rloo,
    zero_signal_groups,
)
from alignpro.pipeline import Pipeline, derive_seed
from alignpro.train.checkpoint import (
    Checkpoint,
    as_config,
    check_same_run,
    load_checkpoint,
    prepare_run_dir,
    save_checkpoint,
    write_config,
)
from alignpro.train.metrics import MetricsLog, truncate_metrics
from alignpro.train.micro_batches import Activations, plan_micro_batches
from alignpro.train.policy import LoraPolicy, Reference, one_torch_thread
from alignpro.train.schedule import batch_indices, learning_rate_factor
from alignpro.types import Rewrite, Rollout

OnStep = Callable[[Mapping[str, Any]], None]


class Trainer:
    """Maximises mean reward - kl_coef * KL(policy || reference) over the prompts (MATH: objective).

    Args:
        pipeline: prompter, target and reward; its prompter is the policy's model. Its sampling
            parameters are the configuration's ``rewrite`` and ``response``.
        policy: what is trained. reference: what it is held to: "base", or frozen matrices.
        prompts: one text each. columns: more of the prompts' data for the reward, aligned.
        run_dir: where metrics.jsonl, checkpoints/ and adapter/ go; None: the configuration's.
        resume, overwrite: what to do when the directory holds a run; see `prepare_run_dir`.

    Raises:
        ValueError: no prompts, pieces that do not fit, a resume under another configuration.
        FileExistsError: the run directory is in use.
    """

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Pipeline,
        policy: LoraPolicy,
        prompts: Sequence[str],
        *,
        reference: Reference = "base",
        columns: Mapping[str, Sequence[Any]] | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        _check_pieces(config, pipeline, policy, prompts, columns)
        self.config = config
        self.pipeline = pipeline
        self.policy = policy
        self.reference = reference
        self.prompts = list(prompts)
        self.columns = {name: list(values) for name, values in (columns or {}).items()}
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = 0  # steps done
        self.cursor = 0  # prompts drawn
        self.run_dir = prepare_run_dir(
            config.run_dir if run_dir is None else run_dir, resume=resume, overwrite=overwrite
        )
        self.log = MetricsLog(self.run_dir / "metrics.jsonl")
        if resume:
            self._restore()
        write_config(self.run_dir, as_config(config))

    @one_torch_thread()
    def train(self, on_step: OnStep | None = None) -> None:
        """Run the steps that are left; write a checkpoint at the end, and at Ctrl-C or an error.

        Raises:
            RuntimeError: a scored log-probability differs from the sampled one (``strict_parity``).
            KeyboardInterrupt: after the checkpoint is written; it says how to go on.
            RewardError, ValueError: likewise after the checkpoint.
        """
        saved = self.step if self.step > 0 else -1
        try:
            while self.step < self.config.steps:
                started = time.perf_counter()
                rollout = self._rollout()
                metrics = self._accumulate_gradients(rollout)
                with _interrupts_deferred():  # a step is done as a whole or not at all
                    metrics |= self._apply_gradients()
                    self.step += 1
                    self.cursor += self.config.prompts_per_step
                    row = self._row(rollout, metrics, time.perf_counter() - started)
                    self.log.append(row)
                if on_step is not None:
                    on_step(row)
                if self.step % self.config.checkpoint_every == 0:
                    saved = self._checkpoint(saved)
        except KeyboardInterrupt:
            command = f"alignpro train {self.run_dir / 'config.json'} --resume"
            raise KeyboardInterrupt(f"after step {self.step}; go on with: {command}") from None
        finally:
            self._checkpoint(saved)
        save_peft(self.run_dir / "adapter", self.policy.weights())

    def _rollout(self) -> Rollout:
        """N rewrites and N x M responses for the next prompts, under the weights as they are."""
        config = self.config
        rows = batch_indices(
            seed=config.seed,
            cursor=self.cursor,
            count=config.prompts_per_step,
            rows=len(self.prompts),
        )
        return self.pipeline.with_adapter(self.policy.core_adapter()).rollout(
            [self.prompts[i] for i in rows],
            num_rewrites=config.num_rewrites,
            num_responses=config.num_responses,
            seed=derive_seed(config.seed, self.step),
            columns={name: [values[i] for i in rows] for name, values in self.columns.items()},
        )

    def _accumulate_gradients(self, rollout: Rollout) -> dict[str, float]:
        """The gradient of the whole rollout, micro-batch by micro-batch under one denominator."""
        config = self.config
        rewards = torch.tensor(
            [[rewrite.reward for rewrite in group] for group in rollout.rewrites],
            dtype=torch.float64,
        )
        advantages = rloo(rewards).flatten().to(torch.float32)
        rewrites = [rewrite for group in rollout.rewrites for rewrite in group]
        self.optimizer.zero_grad(set_to_none=True)
        results: list[LossResult] = []
        parity = 0.0
        for micro in plan_micro_batches(
            *_scored(rewrites),
            limit=config.memory_limit,
            bytes_of=functools.partial(self.policy.score_bytes, with_reference=True),
            activations=config.activations,
            most=config.micro_batch_size,
        ):
            part = advantages[micro.begin : micro.end]
            batch = self._score(micro.of(rewrites), part, micro.activations)
            parity = max(parity, self._check_parity(batch))
            result = policy_loss(batch, config.kl_coef, total_rewrites=len(rewrites))
            result.loss.backward()  # type: ignore[no-untyped-call]
            results.append(result)
        return {
            **merge_metrics(results),
            "micro_batches": len(results),
            "parity_max_abs": parity,
            "zero_signal_groups": zero_signal_groups(rewards),
        }

    def _score(
        self, rewrites: Sequence[Rewrite], advantages: torch.Tensor, activations: Activations
    ) -> PolicyBatch:
        """The rewrites' tokens under policy and reference, aligned with what was sampled."""
        scores = self.policy.score(
            *_scored(rewrites),
            temperature=self.config.rewrite.temperature,
            reference=self.reference,
            activations=activations,
        )
        assert scores.kl is not None and scores.reference_logprob is not None
        lengths = torch.tensor([len(w.tokens) for w in rewrites])
        return PolicyBatch(
            logprob=scores.logprob,
            kl=scores.kl,
            entropy=scores.entropy,
            reference_logprob=scores.reference_logprob,
            sampled_logprob=torch.tensor(
                [p for w in rewrites for p in w.logprobs], dtype=torch.float32
            ),
            sequence=torch.repeat_interleave(torch.arange(len(rewrites)), lengths),
            advantage=advantages,
        )

    def _check_parity(self, batch: PolicyBatch) -> float:
        """The largest difference between sampled and scored log-probabilities; 0.0 is expected."""
        difference = float((batch.logprob.detach() - batch.sampled_logprob).abs().max())
        if self.config.strict_parity and difference != 0.0:
            raise RuntimeError(
                f"step {self.step}: scored log-probabilities differ from the sampled ones by up to "
                f"{difference:.3g}, expected exactly 0: sampler and scorer do not compute the same "
                "(strict_parity=false goes on regardless)"
            )
        return difference

    def _apply_gradients(self) -> dict[str, float]:
        config = self.config
        factor = learning_rate_factor(
            self.step,
            steps=config.steps,
            warmup_steps=config.warmup_steps,
            schedule=config.lr_schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.parameters(), config.max_grad_norm, error_if_nonfinite=True
        )
        self.optimizer.step()
        return {"grad_norm": float(norm), "learning_rate": config.learning_rate * factor}

    def _row(
        self, rollout: Rollout, metrics: Mapping[str, float], seconds: float
    ) -> dict[str, Any]:
        """One line of the metrics log: raw numbers, before any clipping."""
        rewrites = [w for group in rollout.rewrites for w in group]
        rewards = torch.tensor(
            [r.reward for w in rewrites for r in w.responses], dtype=torch.float64
        )
        return {
            "step": self.step - 1,
            "epoch": (self.cursor - 1) // len(self.prompts),
            "reward_mean": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            **metrics,
            "rewrite_tokens": sum(len(w.tokens) for w in rewrites) / len(rewrites),
            "truncated_rewrites": sum(w.finish_reason == "length" for w in rewrites),
            "empty_rewrites": sum(not w.text for w in rewrites),
            "sample": rewrites[0].text,
            "generated_tokens": rollout.generated_tokens,
            "tokens_per_second": rollout.generated_tokens / max(rollout.seconds["generate"], 1e-9),
            "seconds": {**rollout.seconds, "step": seconds},
        }

    def _checkpoint(self, saved: int) -> int:
        """Write a checkpoint unless this step's is there; returns the step that is saved."""
        if saved != self.step:
            with _interrupts_deferred():
                save_checkpoint(
                    self.run_dir,
                    Checkpoint(
                        step=self.step,
                        cursor=self.cursor,
                        config=as_config(self.config),
                        weights=self.policy.weights(),
                        optimizer=self.optimizer.state_dict(),
                    ),
                )
        return self.step

    def _restore(self) -> None:
        """Go back to the last checkpoint; without one, to the start."""
        checkpoint = load_checkpoint(self.run_dir, self.policy.model.lora_modules)
        if checkpoint is not None:
            check_same_run(checkpoint.config, as_config(self.config))
            self.policy.load_weights(checkpoint.weights)
            self.optimizer.load_state_dict(checkpoint.optimizer)
            self.step, self.cursor = checkpoint.step, checkpoint.cursor
        truncate_metrics(self.log.path, steps=self.step)


def _scored(rewrites: Sequence[Rewrite]) -> tuple[list[list[int]], list[int]]:
    """Sequences and starts for the scorer: what the prompter read, then what it wrote."""
    sequences = [w.prompter_tokens + w.tokens for w in rewrites]
    return sequences, [len(w.prompter_tokens) for w in rewrites]


def _check_pieces(
    config: TrainConfig,
    pipeline: Pipeline,
    policy: LoraPolicy,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None,
) -> None:
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    for name, values in (columns or {}).items():
        if len(values) != len(prompts):
            raise ValueError(f"column {name}: expected {len(prompts)} values, got {len(values)}")
    if pipeline.prompter is not policy.model:
        raise ValueError("pipeline: its prompter is not the model the policy trains")
    if pipeline.reward is None:
        raise ValueError("pipeline: training needs a reward, got None")
    for name in ("rewrite", "response"):
        if getattr(pipeline, f"{name}_params") != getattr(config, name):
            raise ValueError(f"pipeline: its {name}_params are not the configuration's {name}")
    if pipeline.prompting != config.prompting:
        raise ValueError("pipeline: its prompting is not the configuration's")


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that state on disk and in memory stays whole."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
    if arrived:
        raise KeyboardInterrupt
