"""How long TRL's GRPOTrainer takes to the held-out reward of a quickstart's run.

    python tests/bench/trl_reward.py --run RUN --json FILE [--times 5] [--every 4] [--prompts 4]
                                     [--rewrites 8] [--learning-rate 1e-3] [--kl-coef 0.02]

RUN is the folder of `alignpro quickstart` (house rules). TRL starts from its warm start, by peft,
and trains on its prompts, reward and sampling; the rewrites are answered by this engine with the
run's own target, so that the seconds that TRL is charged for answers are the ones that we are.
Every so many steps the clock stands still, the adapter is saved, and its held-out reward measured
by the engine as the run's own evaluation did: prompts, rewrites, temperatures and draws. Prints a
line for each, beside the run's reward, until it took --times the seconds of the run's training (the
warm start, which both have, is in neither).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback
from transformers.utils import logging
from trl import GRPOTrainer

from alignpro.bench.machine import versions
from alignpro.config import EvalConfig, TrainConfig, load_yaml
from alignpro.data.load import load_prompts, stack_columns
from alignpro.evaluate.inputs import load_rows
from alignpro.evaluate.of_run import settings_of_run
from alignpro.models.native_model import load_models
from alignpro.models.resolve import resolve_model
from alignpro.native import core
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.run_directory import config_of_run
from alignpro.trl import prompter_rows, rewrite_reward

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from run_trl import load, settings

_STEPS = 100_000  # the clock ends it


class HeldOut:
    """The mean reward of a folder's adapter on the run's held-out prompts."""

    def __init__(self, config: EvalConfig, prompter: Any, target: Any, reward: Any) -> None:
        rows = load_rows(config)
        self.prompts = [row.prompt for row in rows]
        self.columns = stack_columns(rows)
        self.config = config
        self.pipeline = Pipeline.configured(config, prompter, target, reward)

    def measure(self, adapter: Path) -> float:
        rollout = self.pipeline.with_adapter(str(adapter)).rollout(
            self.prompts,
            num_rewrites=self.config.num_rewrites,
            num_responses=self.config.num_responses,
            seed=self.config.seed,
            columns=self.columns,
        )
        rewards = [[w.reward for w in group] for group in rollout.rewrites]
        return statistics.mean(statistics.mean(group) for group in rewards)


class Watch(TrainerCallback):
    """Measures every so many steps, off the clock."""

    def __init__(self, held_out: HeldOut, folder: Path, report: dict[str, Any], options) -> None:
        self.held_out, self.folder, self.report = held_out, folder, report
        self.every, self.most_times, self.file = options.every, options.times, options.json
        self.seconds = 0.0
        self.since = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = time.perf_counter()

    def on_step_end(self, args, state, control, *, model=None, **kwargs):
        if state.global_step % self.every:
            return
        self.seconds += time.perf_counter() - self.since
        model.save_pretrained(self.folder)
        reward = self.held_out.measure(self.folder)
        row = {"step": state.global_step, "seconds": self.seconds, "reward": reward}
        self.report["measured"].append(row)
        self.file.write_text(json.dumps(self.report, indent=1))
        times = self.seconds / self.report["ours"]["seconds"]
        said = f"step {row['step']}: {row['seconds']:.0f} s ({times:.1f} times ours), {reward:.3f}"
        print(said, flush=True)
        control.should_training_stop = times > self.most_times
        self.since = time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    logging.set_verbosity_error()
    run = options.run
    train: TrainConfig = config_of_run(run)
    arms = json.loads((run / "report.json").read_text())
    prompter, target = load_models(train.prompter, train.target, options.threads, date=train.date)
    torch.set_num_threads(options.threads or core.available_cpus())
    reward = build_reward(train.reward)
    asked = load_yaml(EvalConfig, run / "evaluate.json", base=settings_of_run(EvalConfig, run))
    held_out = HeldOut(asked, prompter, target, reward)
    ours = arms["arms"]["trained"]["mean_reward"]
    report: dict[str, Any] = {
        "options": {k: str(v) for k, v in vars(options).items()},
        "ours": {
            "reward": ours,
            "measured_here": held_out.measure(run / "adapter"),
            "seconds": arms["seconds"]["train"],
        },
        "untuned": held_out.measure(run / "reference"),
        "measured": [],
        "versions": versions(("alignpro", "torch", "numpy"))
        | {name: metadata.version(name) for name in ("transformers", "trl", "peft")},
    }
    print(f"ours: {report['ours']}, untuned {report['untuned']:.3f}", flush=True)
    model, tokenizer = load(resolve_model(train.prompter.name))
    if train.prompter.chat_template is not None:
        tokenizer.chat_template = train.prompter.chat_template
    rows = load_prompts(train.data)
    data = Dataset.from_list(prompter_rows([row.prompt for row in rows], train.prompting))
    for name, values in stack_columns(rows).items():
        data = data.add_column(name, list(values))
    batch = options.prompts * options.rewrites
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(held_out, Path(folder) / "adapter", report, options)
        trainer = GRPOTrainer(
            model=PeftModel.from_pretrained(model, run / "reference", is_trainable=True),
            reward_funcs=rewrite_reward(
                target,
                reward,
                prompting=train.prompting,
                params=train.response,
                seed=options.seed,
            ),
            args=settings(
                folder,
                seed=options.seed,
                max_steps=_STEPS,
                per_device_train_batch_size=batch,
                num_generations=options.rewrites,
                max_completion_length=train.rewrite.max_new_tokens,
                temperature=train.rewrite.temperature,
                beta=options.kl_coef,
                learning_rate=options.learning_rate,
                lr_scheduler_type=options.schedule,
            ),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.train()
    reached = [row for row in report["measured"] if row["reward"] >= ours]
    report["reached"] = reached[0] if reached else None
    options.json.write_text(json.dumps(report, indent=1))
    best = max(report["measured"], key=lambda row: row["reward"])
    print(f"best {best}; reached {report['reached']}; ours {ours:.3f} in {report['ours']}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--times", type=float, default=5.0)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rewrites", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--schedule", default="constant")
    parser.add_argument("--kl-coef", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    return parser


if __name__ == "__main__":
    main()
