"""Training before a target behind an endpoint: rows that fail, budgets, kill, resume and replay."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from alignpro.config import ClosedFormConfig, ModelConfig
from alignpro.models.endpoint import EndpointModel
from alignpro.models.http_client import BudgetError
from alignpro.models.in_flight import FailedRowsError
from alignpro.objective import MovingBaseline, group_normalized, rloo
from alignpro.pipeline import Pipeline
from alignpro.run_directory import CALLS, error_notes
from alignpro.train.callbacks import TrainCallback
from alignpro.train.closed_form import ClosedFormFit
from alignpro.train.policy import LoraPolicy, initial_weights
from alignpro.train.trainer import Trainer
from alignpro.train.trajectories import step_batch, trajectories_of
from alignpro.types import Response, Rewrite, Rollout, Usage
from chat_server import ChatServer, Fault
from fake_model import FakeModel
from train.test_trainer import LETTERS, MODULE, PROMPTS, config, log, matrices
from train.toy_model import ToyModel


def drawn(asked):
    """Of a model that draws afresh for every call, whatever the seed."""
    return Fault.reply("".join(random.choices(LETTERS, k=4)), usage=(5, 4))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("alignpro.models.http_client._FIRST_PAUSE", 0.02)
    with ChatServer(drawn) as running:
        yield running


def reward(prompts, rewrites, responses, **columns):
    return [response.count("a") + 0.1 * response.count("b") for response in responses]


def settings(server, path, *, client=None, **changes):
    target = {
        "endpoint": server.url,
        "model": "big",
        "max_failed": changes.pop("max_failed", 0.3),
        "client": {"max_retries": 1, "timeout_seconds": 5.0, **(client or {})},
    }
    options = {"steps": 4, "num_responses": 2, "checkpoint_every": 1, **changes}
    return config(path, target=target, **options)


def make(config, *, score=reward, **options):
    model = ToyModel()
    reference = initial_weights(model, config.lora, seed=3)
    reference.matrices[MODULE][1][:] = 0.2
    target = EndpointModel(config.target, Path(config.run_dir) / CALLS)
    pipeline = Pipeline.configured(config, model, target, score)
    policy = LoraPolicy(model, reference)
    return Trainer(config, pipeline, policy, PROMPTS, reference=reference, **options)


def test_a_run_is_killed_resumed_and_replayed_to_the_bit(server, tmp_path):
    class Killed(TrainCallback):
        def on_step(self, row):
            if row["step"] == 1:
                server.kill()  # in mid-run, and comes back for the resumed run

    first = make(settings(server, tmp_path / "killed"))
    with pytest.raises(FailedRowsError, match=r"of 24 responses failed, more than target\.max_fai"):
        first.train([Killed()])
    server.start()
    asked = len(server.asked)
    second = make(settings(server, tmp_path / "killed"), resume=True)
    assert second.step == 2
    second.train()
    assert len(server.asked) == asked + 2 * 24
    server.kill()

    # The same run, from the file of its calls alone.
    run = tmp_path / "replayed/run"
    run.mkdir(parents=True)
    (run / CALLS).write_bytes((second.run_dir / CALLS).read_bytes())
    replayed = make(settings(server, tmp_path / "replayed"))
    replayed.train()
    assert log(replayed) == log(second)
    assert np.array_equal(matrices(replayed), matrices(second))
    # --overwrite does not throw away what was paid for.
    again = make(settings(server, tmp_path / "replayed"), overwrite=True)
    again.train()
    assert log(again) == log(second)
    usage = {"input_tokens": 5 * 24, "output_tokens": 4 * 24, "cost": None}
    assert log(second)[0]["target_usage"] == usage
    server.start()


def test_rows_that_fail_leave_their_group_and_are_counted(server, tmp_path):
    """Every rewrite with an "h" in it fails for good; its siblings learn from each other."""
    refused = []

    def answer(asked):
        prompt, rewrite = asked.turn[0], asked.turn[1:]
        if "h" in rewrite:
            refused.append((prompt, rewrite))
            return Fault.error(400, "not this one")
        return drawn(asked)

    server.answer = answer
    seen = []

    def score(prompts, rewrites, responses):
        seen.extend(rewrites)
        return reward(prompts, rewrites, responses)

    run = settings(server, tmp_path, max_failed=0.9, steps=3)
    trainer = make(run, score=score)
    trainer.train()
    rows = log(trainer)
    assert sum(row["failed_responses"] for row in rows) == len(refused) > 0
    assert not any("h" in rewrite for rewrite in seen)
    assert len(seen) == 3 * 24 - len(refused)
    # Replayed without a server, with the same rows left out.
    server.kill()
    again = make(run, score=score, overwrite=True)
    again.train()
    assert log(again) == rows and np.array_equal(matrices(again), matrices(trainer))
    server.start()


def test_the_closed_form_fits_the_prompts_with_every_answer(server, tmp_path):
    def answer(asked):
        return Fault.error(400, "not this one") if asked.turn[0] == "c" else drawn(asked)

    server.answer = answer
    run = settings(
        server,
        tmp_path,
        algorithm="closed_form",
        max_failed=0.9,
        closed_form=ClosedFormConfig(num_prompts=8),
        prompts_per_step=8,
    )
    model = ToyModel()
    pipeline = Pipeline.configured(run, model, EndpointModel(run.target), reward)
    policy = LoraPolicy(model, initial_weights(model, run.lora, seed=3))
    reference = policy.weights()
    fit = ClosedFormFit(run, pipeline, policy, PROMPTS, reference=reference)
    fit.train()
    kept = [group for group in fit.rollouts() if all(w.responses for w in group)]
    assert len(kept) == 7 and len(fit.rollouts()) == 8
    # The usage of a response is read back from the file.
    assert kept[0][0].responses[0].usage == Usage(5, 4)
    assert len(log(fit)) == 4 and log(fit)[0]["rollout_reward_mean"] >= 0


def test_a_budget_stops_the_run_with_a_checkpoint(server, tmp_path):
    run = settings(server, tmp_path, client={"budget": {"calls": 60}})
    trainer = make(run)
    with pytest.raises(BudgetError, match="the budget of 60 calls is spent; raise it") as caught:
        trainer.train()
    assert len(server.asked) == 60 and len(log(trainer)) == 2
    (note, _) = error_notes(caught.value)
    assert note == f"after step 2; go on with: alignpro train {tmp_path}/run/config.json --resume"
    more = settings(server, tmp_path, client={"budget": {"calls": 100}})
    resumed = make(more, resume=True)
    resumed.train()
    assert len(server.asked) == 4 * 24  # nothing was asked twice
    assert len(log(resumed)) == 4


def test_rewrites_go_out_while_others_are_still_written(server):
    prompter = FakeModel("prompter", rows=2)
    running = []
    server.answer = lambda asked: running.append(len(prompter.under_way())) or "x"
    target = EndpointModel(ModelConfig("m", endpoint=server.url))
    submit = prompter.step

    def slow_step():
        time.sleep(0.02)
        return submit()

    prompter.step = slow_step
    Pipeline(prompter, target, None).rollout(["one", "two"], num_rewrites=8, seed=0)
    assert len(running) == 16 and running[0] > 0


# --- groups with rows missing ---


def rollout_of(*groups):
    """Rewards by prompt and rewrite; None is a rewrite without an answer."""
    rewrites = [
        [
            Rewrite(i, [0], [3], [-1.0], "a", "a", [], "stop",
                    [] if r is None else [Response([], "x", [], "stop", r)])
            for r in group
        ]
        for i, group in enumerate(groups)
    ]  # fmt: skip
    failed = ["gone" for group in groups for r in group if r is None]
    return Rollout(["a"] * len(groups), rewrites, {"generate": 1.0}, 0, failed)


def batch_of(tmp_path, *groups, **changes):
    run = config(tmp_path, prompts_per_step=len(groups), **changes)
    return step_batch(run, rollout_of(*groups), MovingBaseline())


def test_the_baseline_is_over_the_siblings_that_were_answered(tmp_path):
    batch = batch_of(tmp_path, [1.0, None, 4.0, 10.0], [0.0, 2.0, 4.0, 6.0], [None] * 4)
    assert batch.rewards.tolist() == [1.0, 4.0, 10.0, 0.0, 2.0, 4.0, 6.0]
    alone = [rloo(torch.tensor([group]))[0] for group in ([1.0, 4.0, 10.0], [0.0, 2.0, 4.0, 6.0])]
    assert torch.equal(batch.advantages, torch.cat(alone))
    # By hand: 1 - (4 + 10) / 2.
    assert batch.advantages[0] == -6.0
    assert batch.groups == [[0, 1, 2], [3, 4, 5, 6]] and len(batch.trajectories) == 7


def test_normalized_groups_divide_by_their_own_deviation(tmp_path):
    batch = batch_of(tmp_path, [1.0, None, 4.0], [0.0, 2.0, 4.0], normalize_advantage=True)
    first = group_normalized(torch.tensor([[1.0, 4.0]], dtype=torch.float64))[0]
    assert torch.equal(batch.advantages[:2], first.float())


@pytest.mark.parametrize("zero", ["keep", "skip"])
def test_a_rewrite_alone_teaches_nothing_but_the_kl(tmp_path, zero):
    batch = batch_of(tmp_path, [5.0, None], [1.0, 3.0], zero_advantage_group=zero)
    if zero == "keep":
        assert batch.advantages.tolist() == [0.0, -2.0, 2.0] and batch.groups == [[0], [1, 2]]
    else:
        assert batch.advantages.tolist() == [-2.0, 2.0] and batch.groups == [[0, 1]]
    assert batch.zero_advantage_groups == 0


def test_a_moving_baseline_learns_from_a_rewrite_alone(tmp_path):
    run = config(tmp_path, prompts_per_step=2, algorithm="reinforce")
    baseline = MovingBaseline().after(torch.tensor([[2.0]]), 0.9)
    batch = step_batch(run, rollout_of([5.0, None], [1.0, 3.0]), baseline)
    assert batch.advantages.tolist() == [3.0, -1.0, 1.0]


def test_a_rewrite_is_worth_the_mean_of_the_responses_that_are_there():
    rollout = rollout_of([1.0])
    rollout.rewrites[0][0].responses.append(Response([], "y", [], "stop", 2.0))
    assert trajectories_of(rollout, "prompter")[0][0].reward == 1.5
