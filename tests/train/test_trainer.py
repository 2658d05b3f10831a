"""The trainer on the enumerable model: the optimum, exact resume, parity, interruption."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch

from alignpro.config import LoraConfig, Prompting, TrainConfig
from alignpro.interrupts import exit_status
from alignpro.pipeline import Pipeline
from alignpro.rewards.check import RewardError
from alignpro.run_directory import error_notes
from alignpro.train.callbacks import TrainCallback
from alignpro.train.checkpoint import load_checkpoint
from alignpro.train.metrics import read_metrics
from alignpro.train.policy import LoraPolicy, initial_weights
from alignpro.train.trainer import Trainer
from alignpro.types import SamplingParams
from train.toy_model import LETTERS, MODULE, ToyModel

PROMPTS = list(LETTERS)
VALUES = {letter: index / len(LETTERS) for index, letter in enumerate(LETTERS)}


def letter_reward(prompts, rewrites, responses, **columns):
    """A value a letter, and more for the prompt's own letters."""
    pairs = zip(prompts, rewrites, strict=True)
    return [sum(VALUES[c] + 0.1 * (c in prompt) for c in rewrite) for prompt, rewrite in pairs]


def config(tmp_path, **changes):
    defaults = {
        "run_dir": str(tmp_path / "run"),
        "steps": 10,
        "prompts_per_step": 3,
        "num_rewrites": 4,
        "rewrite": SamplingParams(max_new_tokens=4),
        "response": SamplingParams(max_new_tokens=2),
        "prompting": Prompting(template="{prompt}", separator=""),
        "learning_rate": 0.02,
        "kl_coef": 0.1,
        "lora": LoraConfig(rank=4, alpha=4.0),
        "checkpoint_every": 100,
    }
    return TrainConfig(**{**defaults, **changes})


def make(config, *, model=None, reward=letter_reward, warm=True, **options):
    model = model or ToyModel()
    reference = "base"
    policy = LoraPolicy.fresh(model, config.lora, seed=config.seed)
    if warm:
        reference = initial_weights(model, config.lora, seed=3)
        reference.matrices[MODULE][1][:] = 0.2
        policy = LoraPolicy(model, reference)
    pipeline = Pipeline(
        model,
        model,
        reward,
        prompting=config.prompting,
        rewrite_params=config.rewrite,
        response_params=config.response,
    )
    return Trainer(config, pipeline, policy, PROMPTS, reference=reference, **options)


def matrices(trainer):
    a, b = trainer.policy.weights().matrices[MODULE]
    return np.concatenate([a.ravel(), b.ravel()])


def log(trainer):
    """The rows without what the clock says."""
    rows = read_metrics(trainer.run_dir / "metrics.jsonl")
    timed = {"seconds", "tokens_per_second"}
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_a_heavy_kl_penalty_holds_the_reference(tmp_path):
    free = make(config(tmp_path / "free", steps=40, kl_coef=0.0))
    held = make(config(tmp_path / "held", steps=40, kl_coef=50.0))
    for trainer in (free, held):
        trainer.train()
    assert log(free)[-1]["kl_per_rewrite"] > 0.5
    assert log(held)[-1]["kl_per_rewrite"] < 0.02


def test_the_first_step_starts_at_the_reference_exactly(tmp_path):
    for warm in (True, False):
        trainer = make(config(tmp_path / str(warm), steps=1), warm=warm)
        trainer.train()
        (row,) = log(trainer)
        assert row["kl_per_rewrite"] == row["k1_per_rewrite"] == row["k3_per_rewrite"] == 0.0
        assert row["ratio_mean"] == row["ratio_max"] == 1.0
        assert row["parity_max_abs"] == 0.0


def test_ten_steps_are_five_then_five(tmp_path):
    whole = make(config(tmp_path / "whole", lr_schedule="linear"))
    whole.train()

    settings = config(tmp_path / "split", lr_schedule="linear")
    first = make(settings)

    class Stop(TrainCallback):
        def on_step(self, row):
            if row["step"] == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train([Stop()])
    second = make(settings, resume=True)
    assert (second.step, second.cursor) == (5, 15)
    second.train()

    assert np.array_equal(matrices(whole), matrices(second))
    assert log(whole) == log(second)
    states = [load_checkpoint(t.run_dir, ToyModel.lora_modules) for t in (whole, second)]
    assert states[0].step == states[1].step == 10
    for mine, theirs in zip(*(s.optimizer["state"].values() for s in states), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_rows_after_the_checkpoint_are_written_again(tmp_path):
    # A crash between checkpoints leaves rows in the log that the resumed run repeats.
    settings = config(tmp_path, steps=4, checkpoint_every=2)
    make(settings).train()
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "stale": true}\n{"step": 5, "cu')
    resumed = make(dataclasses.replace(settings, steps=6), resume=True)
    resumed.train()
    assert [row["step"] for row in log(resumed)] == list(range(6))
    assert not any("stale" in row for row in log(resumed))


@pytest.mark.parametrize(
    ("changes", "micro_batches", "mode"),
    [
        ({"micro_batch_size": 1}, 12, {"keep"}),
        ({"micro_batch_size": 3}, 4, {"keep"}),
        ({"micro_batch_size": 5}, 3, {"keep"}),
        ({"memory_limit": 4200, "activations": "keep"}, None, {"keep"}),
        ({"memory_limit": 4200, "micro_batch_size": 2}, 6, {"keep"}),
        ({"memory_limit": 420}, None, {"recompute"}),  # what the longest rewrite needs
        ({"activations": "recompute"}, 1, {"recompute"}),
        ({"memory_limit": 1050, "activations": "recompute"}, None, {"recompute"}),
    ],
)
def test_micro_batches_do_not_change_the_gradient(tmp_path, changes, micro_batches, mode):
    whole = make(config(tmp_path / "whole", steps=1))
    parts = make(config(tmp_path / "parts", steps=1, **changes))
    for trainer in (whole, parts):
        trainer.train()
    (a,), (b,) = log(whole), log(parts)
    scores = parts.policy.model.core_model.scores
    assert a["micro_batches"] == 1 and b["micro_batches"] == len(scores)
    assert len(scores) == micro_batches or (micro_batches is None and len(scores) > 1)
    assert {score.activations for score in scores} == mode
    for name in ("loss", "grad_norm", "entropy", "reward_mean"):
        assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-7)
    # Of the gradients: AdamW turns a rounding error in a near-zero one into a full step.
    for mine, theirs in zip(parts.policy.parameters(), whole.policy.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_a_rewrite_over_the_memory_limit_is_named(tmp_path):
    trainer = make(config(tmp_path, memory_limit=100))
    with pytest.raises(
        ValueError, match=r"^sequence 0: scoring its \d+ tokens .*memory_limit is 100;"
    ):
        trainer.train()
    assert trainer.step == 0


def test_a_scorer_that_differs_from_the_sampler_stops_training(tmp_path):
    trainer = make(config(tmp_path / "strict"))
    trainer.policy.model.core_model.error = 1e-3
    before = matrices(trainer)
    with pytest.raises(RuntimeError, match=r"step 0: scored log-probabilities differ .* 0\.001"):
        trainer.train()
    assert np.array_equal(matrices(trainer), before) and trainer.step == 0
    lax = make(config(tmp_path / "lax", steps=1, strict_parity=False))
    lax.policy.model.core_model.error = 1e-3
    lax.train()
    assert log(lax)[0]["parity_max_abs"] == pytest.approx(1e-3, rel=1e-3)


def test_what_a_fast_policy_differs_by_is_measured(tmp_path):
    trainer = make(config(tmp_path, steps=1))
    trainer.policy.model.bit_exact = False
    trainer.policy.model.core_model.error = 1e-3
    trainer.train()
    assert log(trainer)[0]["parity_max_abs"] == pytest.approx(1e-3, rel=1e-3)


def test_equal_rewards_leave_the_weights_alone(tmp_path):
    trainer = make(
        config(tmp_path, steps=3, kl_coef=0.0),
        reward=lambda prompts, rewrites, responses: [1.0] * len(prompts),
    )
    before = matrices(trainer)
    trainer.train()
    # Exactly: AdamW makes a full step of the smallest rounding error.
    assert [(row["zero_advantage_groups"], row["grad_norm"]) for row in log(trainer)] == [
        (3, 0.0)
    ] * 3
    assert np.array_equal(matrices(trainer), before)


def test_one_nan_reward_stops_with_its_row_and_a_checkpoint(tmp_path):
    calls = []

    def reward(prompts, rewrites, responses):
        calls.append(1)
        scores = [0.5] * len(prompts)
        if len(calls) > 2:
            scores[5] = float("nan")
        return scores

    trainer = make(config(tmp_path), reward=reward)
    with pytest.raises(RewardError, match="row 5"):
        trainer.train()
    assert load_checkpoint(trainer.run_dir, ToyModel.lora_modules).step == 2
    assert not (trainer.run_dir / "adapter").exists()


def test_ctrl_c_in_the_optimizer_waits_for_the_step(tmp_path):
    trainer = make(config(tmp_path))
    plain_step = trainer.learner.optimizer.step

    def interrupted_step():
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        plain_step()

    trainer.learner.optimizer.step = interrupted_step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 4 and len(log(trainer)) == 4
    assert load_checkpoint(trainer.run_dir, ToyModel.lora_modules).step == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_is_as_ctrl_c(tmp_path, number):
    class Send(TrainCallback):
        def on_step(self, row):
            if row["step"] == 2:
                os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_DFL)
    try:
        trainer = make(config(tmp_path))
        with pytest.raises(KeyboardInterrupt, match="after step 3; go on with") as caught:
            trainer.train([Send()])
        assert exit_status(caught.value) == 128 + number
        assert load_checkpoint(trainer.run_dir, ToyModel.lora_modules).step == 3
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # nohup
        make(config(tmp_path), resume=True).train([Send()])
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_first_step_that_fails_is_in_nobodys_way(tmp_path):
    def reward(prompts, rewrites, responses):
        raise KeyError("a typo")

    with pytest.raises(RewardError):
        make(config(tmp_path, steps=2), reward=reward).train()
    assert not (tmp_path / "run" / "checkpoints").exists()
    make(config(tmp_path, steps=1, kl_coef=0.2)).train()  # the corrected command
    with pytest.raises(FileExistsError, match="is not empty: --resume"):
        make(config(tmp_path))


def test_a_torn_checkpoint_costs_the_steps_since_the_one_before(tmp_path, caplog):
    whole = make(config(tmp_path / "whole"))
    whole.train()
    settings = config(tmp_path / "torn", steps=5, checkpoint_every=2)
    make(settings).train()
    (tmp_path / "torn" / "run" / "checkpoints" / "step-000005" / "optimizer.pt").write_bytes(b"PK")
    resumed = make(dataclasses.replace(settings, steps=10), resume=True)
    assert resumed.step == 4 and "step-000005: damaged" in caplog.text
    resumed.train()
    assert log(resumed) == log(whole) and np.array_equal(matrices(resumed), matrices(whole))


def test_rewards_get_the_columns_of_their_prompts(tmp_path):
    def reward(prompts, rewrites, responses, answer):
        assert [p.upper() for p in prompts] == list(answer)
        return [0.0] * len(prompts)

    make(
        config(tmp_path, steps=2), reward=reward, columns={"answer": [p.upper() for p in PROMPTS]}
    ).train()


def test_an_epoch_visits_every_prompt_once(tmp_path):
    seen = []

    def reward(prompts, rewrites, responses):
        seen.extend(dict.fromkeys(prompts))
        return [0.0] * len(prompts)

    trainer = make(config(tmp_path, steps=4, prompts_per_step=4), reward=reward)
    trainer.train()
    assert sorted(seen[:8]) == sorted(seen[8:]) == PROMPTS
    assert seen[:8] != seen[8:]
    assert [row["epoch"] for row in log(trainer)] == [0, 0, 1, 1]


def test_what_a_run_leaves_behind(tmp_path):
    settings = config(tmp_path, steps=5, checkpoint_every=1)
    trainer = make(settings)
    trainer.train()
    assert json.loads((trainer.run_dir / "config.json").read_text())["kl_coef"] == 0.1
    assert (trainer.run_dir / "adapter").is_dir()
    kept = sorted(p.name for p in (trainer.run_dir / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000005"]


def test_a_run_that_is_complete_resumes_to_nothing(tmp_path):
    settings = config(tmp_path, steps=2)
    done = make(settings)
    done.train()
    again = make(settings, resume=True)
    again.train()
    assert log(again) == log(done) and np.array_equal(matrices(again), matrices(done))


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    make(config(tmp_path, steps=2)).train()
    with pytest.raises(ValueError, match="steps: the run has done 2, more than the 1 that are"):
        make(config(tmp_path, steps=1), resume=True)


def test_resuming_under_another_configuration_is_refused(tmp_path):
    settings = config(tmp_path, steps=1)
    make(settings).train()
    other = dataclasses.replace(settings, kl_coef=0.2, steps=3)
    with pytest.raises(ValueError, match=r"another configuration: kl_coef was 0\.1, is 0\.2$"):
        make(other, resume=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["kl_coef"] == 0.1


def test_torch_keeps_its_threads_but_in_loss_and_optimizer(tmp_path, monkeypatch):
    seen = {"reward": set(), "callback": set(), "loss": set(), "optimizer": set()}

    def reward(prompts, rewrites, responses):  # a classifier runs on all of them
        seen["reward"].add(torch.get_num_threads())
        return letter_reward(prompts, rewrites, responses)

    class Look(TrainCallback):
        def on_step(self, row):
            seen["callback"].add(torch.get_num_threads())

    trainer = make(config(tmp_path, steps=2), reward=reward)
    score, step = trainer.policy.score, trainer.learner.optimizer.step

    def scored(*arguments, **options):
        seen["loss"].add(torch.get_num_threads())
        return score(*arguments, **options)

    def stepped():
        seen["optimizer"].add(torch.get_num_threads())
        step()

    monkeypatch.setattr(trainer.policy, "score", scored)
    monkeypatch.setattr(trainer.learner.optimizer, "step", stepped)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        trainer.train([Look()])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {"reward": {3}, "callback": {3}, "loss": {1}, "optimizer": {1}}


def test_a_checkpoint_that_fails_does_not_hide_why_the_run_ended(tmp_path, monkeypatch):
    def reward(prompts, rewrites, responses):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("the defect")
        return [0.0] * len(prompts)

    def full(*_):
        raise OSError("disk full")

    class Bad(TrainCallback):
        def on_end(self, run_dir):
            raise RuntimeError("cannot end")

    calls = []
    trainer = make(config(tmp_path), reward=reward)
    monkeypatch.setattr("alignpro.train.trainer.save_checkpoint", full)
    with pytest.raises(RewardError, match="the defect") as caught:
        trainer.train([Bad()])
    log = trainer.run_dir / "error.log"
    assert error_notes(caught.value) == [
        "then writing the checkpoint failed: disk full",
        "then Bad.on_end failed: cannot end",
        f"traceback: {log}",
    ]
    text = log.read_text()
    for part in ("KeyError: 'the defect'", "OSError: disk full", "RuntimeError: cannot end"):
        assert part in text


def test_ctrl_c_is_told_with_the_checkpoint_that_failed(tmp_path, monkeypatch):
    class Stop(TrainCallback):
        def on_step(self, row):
            raise KeyboardInterrupt

    def full(*_):
        raise OSError("disk full")

    trainer = make(config(tmp_path))
    monkeypatch.setattr("alignpro.train.trainer.save_checkpoint", full)
    with pytest.raises(KeyboardInterrupt, match="after step 1; go on with") as caught:
        trainer.train([Stop()])
    assert error_notes(caught.value) == ["then writing the checkpoint failed: disk full"]


def test_a_run_is_one_processs_while_it_trains(tmp_path):
    class Second(TrainCallback):
        def on_step(self, row):
            with pytest.raises(FileExistsError, match="in use by this process"):
                make(settings, resume=True)

    settings = config(tmp_path, steps=1)
    make(settings).train([Second()])
    make(settings, resume=True).train()


def test_pieces_that_do_not_fit(tmp_path):
    settings = config(tmp_path)
    trainer = make(settings)
    policy, pipeline = trainer.policy, trainer.pipeline
    fresh = dataclasses.replace(settings, run_dir=str(tmp_path / "other"))

    def refused(config, pipeline, policy, prompts, match, **options):
        with pytest.raises(ValueError, match=match):
            Trainer(config, pipeline, policy, prompts, **options)

    refused(fresh, pipeline, policy, [], "prompts: expected at least one")
    refused(fresh, pipeline, policy, PROMPTS, "column a: expected 8", columns={"a": [1]})
    refused(fresh, pipeline.without_reward(), policy, PROMPTS, "needs a reward")
    stranger = LoraPolicy.fresh(ToyModel(), settings.lora, seed=0)
    refused(fresh, pipeline, stranger, PROMPTS, "not the model the policy trains")
    changed = dataclasses.replace(fresh, response=SamplingParams(max_new_tokens=9))
    refused(changed, pipeline, policy, PROMPTS, "response_params are not the configuration's")
    assert not (tmp_path / "other").exists()  # nothing is made for a run that cannot start
