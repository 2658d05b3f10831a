"""Reinforcement learning of the prompter with a KL penalty: the loop on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from alignpro import fingerprints
from alignpro.config import TrainConfig, check_config, from_mapping, to_mapping
from alignpro.data.load import PromptRow, stack_columns
from alignpro.interrupts import interruptible, interrupts_deferred
from alignpro.lengths import fit_rows, unread_by
from alignpro.models.adapter import AdapterWeights
from alignpro.models.http_client import BudgetError, EndpointError
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.language_model import LanguageModel
from alignpro.models.native_model import NativeModel
from alignpro.models.reading import (
    check_columns,
    check_roles,
    naming,
    read_prompts,
    target_tokens,
    too_long,
)
from alignpro.models.seeds import derive_seed
from alignpro.pipeline import Pipeline
from alignpro.run_directory import CONFIG, RunDirectory, add_note, open_run_dir
from alignpro.train.adaptive import Adaptive
from alignpro.train.callbacks import OnProgress, TrainCallback, Watchers
from alignpro.train.checkpoint import (
    Checkpoint,
    begin_run,
    check_same_run,
    load_checkpoint,
    save_checkpoint,
)
from alignpro.train.guard_penalty import penalise
from alignpro.train.held_out import HeldOut, step_warnings
from alignpro.train.learner import Learner
from alignpro.train.metrics import MetricsLog, read_metrics, truncate_metrics
from alignpro.train.policy import Policy, Reference, save_trained, with_policy
from alignpro.train.row import rollout_row
from alignpro.train.schedule import batch_indices
from alignpro.train.trackers import make_trackers
from alignpro.train.trajectories import StepBatch, step_batch
from alignpro.types import Prompt, PromptLike, Rollout


class TrainingRun:
    """The pieces of a run and its directory: what both ways to train begin with.

    Args:
        pipeline: prompter, target and reward. The one of the two models that the configuration's
            ``policy`` names is the policy's model; its sampling parameters are the
            configuration's ``rewrite`` and ``response``.
        policy: what is trained. reference: what it is held to: "base", or a frozen adapter.
        prompts: one text each. columns: more of the prompts' data for the reward, aligned.
        value_head: a module from hidden states [T, D] to values [T], for ``ppo.value_head``.
        held_out: the prompts of the configuration's ``heldout``.
        anchors: with the configuration's ``anchor``, what the reference reads in the place of each
            prompt, None for the prompt itself (`train.anchor.anchors_of`).
        run_dir: where metrics.jsonl, checkpoints/ and adapter/ go, or such a directory that is held
            already; None: the configuration's.
        resume, overwrite: what to do when the directory holds a run; see `open_run_dir`.
        allow_changes: resume with other models, another adapter, template or reward than the run
            began with, which is then said and recorded, as other data always are.

    Raises:
        ValueError: no prompts, pieces that do not fit, a resume under another configuration.
        ImportError: a tracker of ``config.track`` that is not installed.
        FileExistsError: the run directory is in use.
    """

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Pipeline,
        policy: Policy,
        prompts: Sequence[PromptLike],
        *,
        reference: Reference = "base",
        columns: Mapping[str, Sequence[Any]] | None = None,
        value_head: torch.nn.Module | None = None,
        held_out: Sequence[PromptRow] = (),
        anchors: Sequence[Prompt | None] = (),
        run_dir: str | Path | RunDirectory | None = None,
        resume: bool = False,
        overwrite: bool = False,
        allow_changes: bool = False,
    ) -> None:
        check_config(config, TrainConfig)
        if not isinstance(pipeline, Pipeline):
            raise ValueError(
                f"pipeline: expected a Pipeline, got {type(pipeline).__name__}; "
                "alignpro.make_trainer(config) makes one, and all that a trainer needs"
            )
        if isinstance(policy, NativeModel | AdapterWeights):
            raise ValueError(
                f"policy: expected a Policy, got {type(policy).__name__}; "
                "LoraPolicy.fresh(model, config.lora, seed=0) makes one for a model, and "
                "LoraPolicy(model, weights) of an adapter"
            )
        if (config.heldout is not None) != bool(held_out):
            raise ValueError("held_out: expected prompts with heldout, and none without")
        if (config.anchor is not None) != bool(anchors):
            raise ValueError("anchors: expected one a prompt with anchor, and none without")
        self.held_out = HeldOut(config, held_out) if held_out else None
        self.config = config
        self.pipeline = pipeline
        self.policy = policy
        self.reference = reference
        self.prompts = read_prompts(prompts)
        check_columns(columns, len(self.prompts))
        self.columns = {name: list(values) for name, values in (columns or {}).items()}
        self.notes: dict[str, Any] = {}  # of the data, for the first row of metrics
        self._check_pieces()
        self._anchors = self._read_anchors(anchors)
        self._begin(value_head)
        self.trackers = make_trackers(config.track)
        self.step = 0  # steps done
        if isinstance(run_dir, RunDirectory):
            self.directory = run_dir
        else:
            wanted = config.run_dir if run_dir is None else run_dir
            self.directory = open_run_dir(wanted, resume=resume, overwrite=overwrite)
        self.run_dir = self.directory.path
        self.log = MetricsLog(self.run_dir / "metrics.jsonl")
        begin_run(
            *(self.run_dir, to_mapping(config), self._made_from(held_out)),
            reference if isinstance(reference, AdapterWeights) else None,
            self._restore if resume else None,
            allow_changes=allow_changes,
        )

    def _begin(self, value_head: torch.nn.Module | None) -> None:
        """Check and make what this way to train needs, before the directory is touched."""
        raise NotImplementedError

    def _restore(self, same: Mapping[str, str]) -> int:
        """Go on with what the directory holds, as `begin_run` asks for it."""
        raise NotImplementedError

    def _made_from(self, held_out: Sequence[PromptRow]) -> fingerprints.Fingerprints:
        found = fingerprints.of_models(self.pipeline.prompter, self.pipeline.target)
        found |= fingerprints.of_reward(self.pipeline.reward)
        found["data"] = fingerprints.of_rows(str(self.config.data.path), self.prompts, self.columns)
        if held_out:
            columns = stack_columns(held_out)
            prompts = [row.prompt for row in held_out]
            found["held-out data"] = fingerprints.of_rows("", prompts, columns)
        if isinstance(self.reference, AdapterWeights):
            found["adapter that training began with"] = fingerprints.of_adapter(self.reference)
        answers = self.pipeline.target_adapter
        if isinstance(answers, (str, Path)):
            found["adapter of the target"] = fingerprints.of_adapter_folder(answers)
        return found

    def _read_anchors(self, anchors: Sequence[Prompt | None]) -> list[list[int] | None]:
        """[prompts]: the tokens that the reference reads, None for those of the policy."""
        if not anchors:
            return [None] * len(self.prompts)
        if len(anchors) != len(self.prompts):
            raise ValueError(f"anchors: expected {len(self.prompts)}, got {len(anchors)}")
        return [
            None if anchor is None else self._read_by_policy(anchor, index)
            for index, anchor in enumerate(anchors)
        ]

    def _read_by_policy(self, prompt: Prompt, index: int) -> list[int]:
        """Raises ValueError for an anchor that does not fit."""
        with naming("anchor"):
            if self.config.policy == "prompter":
                return self._with_policy().prompter_tokens(prompt, index)
            model = self.policy.model
            most, rows = model.context_length, self.policy.rows
            tokens = target_tokens(model.tokenizer, prompt, rows, most)
            unfit = too_long(model, len(tokens), self.config.response)
            if unfit is not None:
                raise ValueError(f"of prompt {index}: {unfit}")
            return tokens

    def _with_policy(self) -> Pipeline:
        """The pipeline under the weights as they are."""
        return with_policy(self.pipeline, self.policy, self.config)

    def _pick(self, rows: Sequence[int]) -> tuple[list[Prompt], dict[str, list[Any]]]:
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return [self.prompts[i] for i in rows], columns

    def _check_pieces(self) -> None:
        config, pipeline, prompts = self.config, self.pipeline, self.prompts
        if not prompts:
            raise ValueError("prompts: expected at least one, got none")
        rows = [
            PromptRow(prompt, {name: values[i] for name, values in self.columns.items()})
            for i, prompt in enumerate(prompts)
        ]
        fit_rows(rows, unread_in_training(config, self._with_policy()), "error")
        if isinstance(pipeline.target, LanguageModel):
            check_roles(pipeline.target.tokenizer, prompts)
        if getattr(pipeline, config.policy) is not self.policy.model:
            raise ValueError(f"pipeline: its {config.policy} is not the model the policy trains")
        if pipeline.reward is None:
            raise ValueError("pipeline: training needs a reward, got None")
        for name in ("rewrite", "response"):
            if getattr(pipeline, f"{name}_params") != getattr(config, name):
                raise ValueError(f"pipeline: its {name}_params are not the configuration's {name}")
        if pipeline.prompting != config.prompting:
            raise ValueError("pipeline: its prompting is not the configuration's")


def unread_in_training(
    config: TrainConfig, pipeline: Pipeline
) -> Callable[[PromptRow], str | None]:
    """`unread_by` of a training; from a mixture, none of a target and its reward is asked."""
    asked = config.closed_form.mixture is None
    return unread_by(pipeline, rewrites=config.policy == "prompter", responses=asked)


class Trainer(TrainingRun):
    """Maximises mean reward - kl_coef * KL(policy || reference) over the prompts (MATH: objective).

    Arguments and errors are those of `TrainingRun`.
    """

    def _begin(self, value_head: torch.nn.Module | None) -> None:
        config = self.config
        if config.algorithm == "closed_form":
            raise ValueError("algorithm: closed_form samples once and then fits; not a Trainer's")
        if config.ppo.value_head != (value_head is not None):
            raise ValueError("value_head: expected one with ppo.value_head, and none without")
        self.learner = Learner(config, self.policy, self.reference, value_head)
        self.adaptive = Adaptive(config.kl_coef)
        self.cursor = 0  # prompts drawn
        self._saved = -1  # the step of the newest checkpoint

    def train(
        self, callbacks: Sequence[TrainCallback] = (), on_progress: OnProgress | None = None
    ) -> None:
        """Run the steps that are left; write a checkpoint at the end, and at an error, Ctrl-C,
        SIGTERM or SIGHUP.

        Args:
            callbacks: who else watches, beside the trackers of the configuration.
            on_progress: told of what comes before the first step, of which there is nothing here.

        Raises:
            RuntimeError: a scored log-probability differs from the sampled one (``strict_parity``).
            KeyboardInterrupt: after the checkpoint is written; it says how to go on.
            FailedRowsError, BudgetError, EndpointError: a target that cannot go on; likewise.
            OSError: a full disk; the checkpoints that were there stay.
            RewardError, ValueError, and what a callback raises: likewise after the checkpoint.
        """
        watchers = Watchers(self.directory, [*self.trackers, *callbacks])
        watching = watchers.watching(to_mapping(self.config), self.step)
        with interruptible(), self.directory, watching:
            self._train(watchers)

    def _train(self, watchers: Watchers) -> None:
        try:
            while self.step < self.config.steps:
                seen = self._look_at_held_out()
                started = time.perf_counter()
                rows = self._rows()
                rollout, broken = self._rollout(rows)
                with interrupts_deferred() as stop_if_asked:  # a step is done as a whole or not
                    batch = step_batch(
                        self.config,
                        rollout,
                        self.adaptive.baseline,
                        [self._anchors[i] for i in rows],
                    )
                    metrics, stages = self.learner.improve(
                        batch, self.adaptive.kl_coef, self.step, stop_if_asked
                    )
                    stages["step"] = time.perf_counter() - started
                    row = self._row(rollout, batch, metrics, stages) | broken
                    warnings = step_warnings(row) | seen.pop("warnings", {})
                    row |= seen | ({"warnings": warnings} if warnings else {})
                    self.adaptive = self.adaptive.after(
                        self.config, rollout, batch, _steered_kl(metrics)
                    )
                    self.step += 1
                    self.cursor += self.config.prompts_per_step
                    self.log.append(row)
                watchers.on_step(row)
                if self.step % self.config.checkpoint_every == 0:
                    self._checkpoint(watchers)
        except BaseException as error:
            tell_of_resume(error, said_of_resume("train", self.run_dir, self.step))
            with self.directory.after(error, "writing the checkpoint"):
                self._checkpoint(watchers, after=error)
            raise
        self._checkpoint(watchers)
        save_trained(self.run_dir / "adapter", self.policy, self.config)

    def _look_at_held_out(self) -> dict[str, Any]:
        if self.held_out is None:
            return {}
        return self.held_out.look(self.pipeline, self.policy.core_adapter(), self.step)

    def _rows(self) -> list[int]:
        """Of the next prompts."""
        return batch_indices(
            seed=self.config.seed,
            cursor=self.cursor,
            count=self.config.prompts_per_step,
            rows=len(self.prompts),
        )

    def _rollout(self, rows: Sequence[int]) -> tuple[Rollout, dict[str, Any]]:
        """N rewrites and N x M responses for the prompts of these rows, under the weights as they
        are; N responses to the prompts themselves where the target is the policy. And what the row
        says of the guards."""
        config = self.config
        prompts, columns = self._pick(rows)
        seed, pipeline = derive_seed(config.seed, self.step), self._with_policy()
        num_rewrites, num_responses = self.adaptive.counts(config, self.step)
        if config.policy == "target":
            return pipeline.respond(
                prompts, num_responses=num_rewrites, seed=seed, columns=columns
            ), {}
        rollout = pipeline.rollout(
            prompts,
            num_rewrites=num_rewrites,
            num_responses=num_responses,
            seed=seed,
            columns=columns,
            common_draws=config.common_draws,
        )
        rewrites, broken = penalise(config, rollout.prompts, rollout.rewrites)
        return replace(rollout, rewrites=rewrites), broken

    def _row(
        self,
        rollout: Rollout,
        batch: StepBatch,
        metrics: Mapping[str, float],
        stages: Mapping[str, float],
    ) -> dict[str, Any]:
        tokens_each = metrics["tokens"] / max(1, len(batch.trajectories))
        return {
            "step": self.step,
            "epoch": (self.cursor + self.config.prompts_per_step - 1) // len(self.prompts),
            "kl_coef": self.adaptive.kl_coef,
            **metrics,
            "kl_per_token": metrics["kl_per_rewrite"] / max(1.0, tokens_each),
            **rollout_row(rollout, batch, self.config.policy),
            **(self.notes if self.step == 0 else {}),
            "seconds": {**rollout.seconds, **stages},
        }

    def _checkpoint(self, watchers: Watchers, after: BaseException | None = None) -> None:
        """Write a checkpoint unless this step's is there, or no step is done at an error.
        after: the error that ends the run."""
        if self._saved == self.step or (after is not None and self.step == 0):
            return
        critic = self.learner.critic
        with interrupts_deferred(after=after):
            path = save_checkpoint(
                self.run_dir,
                Checkpoint(
                    step=self.step,
                    cursor=self.cursor,
                    config=to_mapping(self.config),
                    weights=self.policy.weights(),
                    optimizer=self.learner.optimizer.state_dict(),
                    adaptive=asdict(self.adaptive),
                    critic=None if critic is None else critic.state_dict(),
                ),
            )
            self._saved = self.step
        watchers.on_checkpoint(path, self.step, after)

    def _restore(self, same: Mapping[str, str]) -> int:
        """Go back to the last checkpoint; without one, to the start."""
        checkpoint = load_checkpoint(self.run_dir, self.policy.model.lora_modules)
        if checkpoint is not None:
            check_same_run(checkpoint.config, to_mapping(self.config), same, done=checkpoint.step)
            self.learner.load_state(checkpoint.weights, checkpoint.optimizer, checkpoint.critic)
            self.adaptive = from_mapping(Adaptive, checkpoint.adaptive)
            self.step, self.cursor = checkpoint.step, checkpoint.cursor
            self._saved = self.step
        truncate_metrics(self.log.path, steps=self.step)
        if self.held_out is not None and self.log.path.exists():
            self.held_out.restore(read_metrics(self.log.path))
        return self.step


def _steered_kl(metrics: Mapping[str, float]) -> float:
    """The KL that kl_target is for: that of plain prompts, where others have an anchor."""
    if "kl_anchored" in metrics:
        return metrics.get("kl_plain", float("nan"))
    return metrics["kl_per_rewrite"]


def tell_of_resume(error: BaseException, after: str) -> None:
    """Let an error after which a run goes on say how. after: of `said_of_resume`."""
    if isinstance(error, KeyboardInterrupt):
        error.args = (after,)
    elif isinstance(error, (FailedRowsError, BudgetError, EndpointError, OSError)):
        add_note(error, after)


def said_of_resume(command: str, run_dir: Path, step: int) -> str:
    """What a run that is interrupted after so many steps says of going on."""
    if step == 0:
        return "before the first step was done; the same command starts again"
    return f"after step {step}; go on with: alignpro {command} {run_dir / CONFIG} --resume"
