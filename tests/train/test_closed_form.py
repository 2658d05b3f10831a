"""The closed-form fit on the enumerable model: optimum, KL penalty, rollouts kept in a crash."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from alignpro.config import ClosedFormConfig, LoraConfig, Prompting, TrainConfig
from alignpro.objective.pooled_rewards import pooled_rewards
from alignpro.pipeline import Pipeline
from alignpro.rewards.check import RewardError
from alignpro.train.callbacks import TrainCallback
from alignpro.train.closed_form import ClosedFormFit
from alignpro.train.policy import LoraPolicy, initial_weights
from alignpro.types import Conversation, Response, Rewrite, SamplingParams, Usage
from train.test_trainer import PROMPTS, VALUES, log, matrices
from train.toy_model import GEN, LETTERS, MODULE, ToyModel

LOSSES = ["variance", "likelihood"]


def letter_value(prompts, rewrites, responses, **columns):
    return [VALUES.get(rewrite[:1], 0.0) for rewrite in rewrites]


def config(tmp_path, loss="variance", **changes):
    defaults = {
        "algorithm": "closed_form",
        "closed_form": ClosedFormConfig(loss=loss),
        "run_dir": str(tmp_path / "run"),
        "steps": 6,
        "prompts_per_step": 3,
        "num_rewrites": 4,
        "rewrite": SamplingParams(max_new_tokens=3),
        "response": SamplingParams(max_new_tokens=2),
        "prompting": Prompting(template="{prompt}", separator=""),
        "learning_rate": 0.02,
        "kl_coef": 0.5,
        "lora": LoraConfig(rank=4, alpha=4.0),
    }
    return TrainConfig(**{**defaults, **changes})


class Evenly(ToyModel):
    """Samples 0..count-1 of a request divide the unit interval evenly: as good as a great many."""

    count = 400

    def submit(self, tokens, params, *, adapter=None, sample=0):
        handle = super().submit(tokens, params, adapter=adapter, sample=sample)
        handle.uniform = lambda: (sample + 0.5) / self.count
        return handle


def make(config, *, reward=letter_value, model=None, **options):
    model = model or ToyModel()
    reference = initial_weights(model, config.lora, seed=3)
    reference.matrices[MODULE][1][:] = 0.2
    pipeline = Pipeline(
        model,
        model,
        reward,
        prompting=config.prompting,
        rewrite_params=config.rewrite,
        response_params=config.response,
    )
    policy = LoraPolicy(model, reference)
    return ClosedFormFit(config, pipeline, policy, PROMPTS, reference=reference, **options)


def distribution(fit):
    """Of one-token rewrites."""
    return fit.policy.model.core_model.table(fit.policy.core_adapter(), 1.0)[GEN].detach().exp()


def one_token(tmp_path, loss, **changes):
    return config(
        tmp_path,
        loss,
        **{
            "rewrite": SamplingParams(max_new_tokens=1),
            "response": SamplingParams(max_new_tokens=1),
            "prompts_per_step": 1,
            "num_rewrites": Evenly.count,
            "steps": 80,
            "learning_rate": 0.03,
            "lr_schedule": "linear",
            "max_grad_norm": 100.0,
            "memory_limit": 2**40,
            **changes,
        },
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_the_fit_is_the_optimum_of_the_objective(tmp_path, loss):
    # One-token rewrites: rho* = rho_ref exp(R / kl_coef) / Z can be written down (MATH).
    fit = make(one_token(tmp_path, loss), model=Evenly())
    reference = distribution(fit)
    fit.train()
    kl_coef = fit.config.kl_coef
    values = torch.tensor([VALUES.get(t, 0.0) for t in ["", "", "", *LETTERS]])
    optimum = torch.softmax(reference.log() + values / kl_coef, 0)
    best = kl_coef * float((reference * (values / kl_coef).exp()).sum().log())

    def distance(p):
        return 0.5 * float((p - optimum).abs().sum())

    def objective(p):
        return float((p * (values - kl_coef * (p.log() - reference.log()))).sum())

    fitted = distribution(fit)
    assert distance(reference) > 0.15  # there was a way to go
    assert objective(optimum) == pytest.approx(best)
    assert distance(fitted) < 0.02
    assert objective(fitted) == pytest.approx(best, rel=0.01)
    # What the log says of the prompter, estimated from the reference's rollouts alone.
    last = log(fit)[-1]
    assert last["reward_mean"] == pytest.approx(float((fitted * values).sum()), rel=0.02)
    kl = float((fitted * (fitted / reference).log()).sum())
    assert last["kl_per_rewrite"] == pytest.approx(kl, rel=0.01)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_heavy_kl_penalty_returns_the_reference(tmp_path, loss):
    fit = make(one_token(tmp_path, loss, kl_coef=500.0, steps=40), model=Evenly())
    reference = distribution(fit)
    fit.train()
    assert 0.5 * float((distribution(fit) - reference).abs().sum()) < 0.02


def pooled(tmp_path, answers=None, **changes):
    how = ClosedFormConfig(loss="pooled", answers=answers, candidates=13, batch_size=8)
    return one_token(tmp_path, "pooled", closed_form=how, **changes)


def test_the_pooled_fit_is_the_optimum_too(tmp_path):
    # Every text is a candidate and the reward is exact, so the targets are rho* itself.
    settings = pooled(tmp_path, steps=800, learning_rate=0.0015)
    fit = make(settings, model=Evenly())
    reference = distribution(fit)
    fit.train()
    values = torch.tensor([0.0, *VALUES.values()])
    # Several control tokens are the empty text; its candidate is the last of them.
    reference, fitted = (p[2:] / p[2:].sum() for p in (reference, distribution(fit)))
    optimum = torch.softmax(reference.log() + values / settings.kl_coef, 0)
    assert 0.5 * float((reference - optimum).abs().sum()) > 0.3
    assert 0.5 * float((fitted - optimum).abs().sum()) < 0.08  # a label a prompt and step: noise
    first = log(fit)[0]
    assert first["expected_reward"] == pytest.approx(float((optimum * values).sum()), rel=1e-3)
    assert first["target_tokens"] > 0 and "target_tokens" not in log(fit)[1]


class Asked:
    """The letters' values, and what was asked for them: (prompt, rewrite), in order."""

    def __init__(self, stop_at=None):
        self.pairs, self.stop_at = [], stop_at

    def __call__(self, prompts, rewrites, responses):
        self.pairs += zip(prompts, rewrites, strict=True)
        if self.stop_at is not None and len(self.pairs) >= self.stop_at:
            raise KeyboardInterrupt
        return letter_value(prompts, rewrites, responses)


def test_answers_go_to_the_least_tried_text_and_then_to_the_most_promising(tmp_path):
    settings = pooled(tmp_path, 4, steps=200, learning_rate=0.0015)
    asked = Asked()
    fit = make(settings, reward=asked, model=Evenly())
    fit.train()
    rounds = [asked.pairs[i : i + len(PROMPTS)] for i in range(0, 4 * len(PROMPTS), len(PROMPTS))]
    assert len(asked.pairs) == 4 * len(PROMPTS)
    assert len({text for _, text in rounds[0]}) == len(PROMPTS)  # there are more texts than prompts
    assert len(set(asked.pairs)) == len(asked.pairs)  # no text twice behind a prompt
    # Texts are worth the same behind every prompt, so later answers go to the best that are known.
    earned = [np.mean(letter_value(*zip(*r, strict=True), [""] * len(r))) for r in rounds]
    assert earned[1] > earned[0] + 0.2
    first = log(fit)[0]
    assert first["reward_mean"] == pytest.approx(np.mean(earned))
    values = torch.tensor([VALUES.get(t, 0.0) for t in ["", "", "", *LETTERS]])
    assert float(distribution(fit) @ values) > earned[0] + 0.1


def test_rounds_of_answers_resume_where_they_were_broken_off(tmp_path):
    settings = pooled(tmp_path, 3, steps=40, num_rewrites=16)
    whole_asked, first, second = Asked(), Asked(stop_at=12), Asked()
    whole = dataclasses.replace(settings, run_dir=str(tmp_path / "whole"))
    expected = make(whole, reward=whole_asked, model=ToyModel())
    expected.train()
    goes_on = r"with what was drawn kept; go on with: alignpro train .*config\.json --resume"
    with pytest.raises(KeyboardInterrupt, match=goes_on):
        make(settings, reward=first, model=ToyModel()).train()  # in the second round
    again = make(settings, reward=second, model=ToyModel(), resume=True)
    again.train()
    # One prompt a line of the rollouts: the one that was broken off is asked again.
    assert first.pairs[:-1] + second.pairs == whole_asked.pairs
    assert np.array_equal(matrices(again), matrices(expected))
    with pytest.raises(ValueError, match=r"another configuration: closed_form\.answers was 3"):
        changed = dataclasses.replace(settings.closed_form, answers=2)
        make(dataclasses.replace(settings, closed_form=changed), resume=True)


def test_the_fit_begins_when_every_answer_is_drawn(tmp_path):
    told = []

    class Watch(TrainCallback):
        def on_start(self, run_dir, config, step):
            told.append("start")

    trainer = make(pooled(tmp_path, 2, steps=4, num_rewrites=4))
    trainer.train([Watch()], lambda stage, done, total: told.append(stage))
    assert list(dict.fromkeys(told)) == [
        "rollouts",
        "answers, round 1",
        "answers, round 2",
        "start",
    ]


def test_an_answer_is_looked_at_by_the_guards_once(tmp_path, monkeypatch):
    judged = []

    def spy(config, prompts, groups):
        judged.extend(rewrite.text for group in groups for rewrite in group)
        return list(map(list, groups)), {"broken_guards": {"cut": len(groups)}}

    monkeypatch.setattr("alignpro.train.closed_form.penalise", spy)
    fit = make(pooled(tmp_path, 3, steps=1, num_rewrites=16))
    fit.train()
    assert len(judged) == 3 * len(PROMPTS)
    assert log(fit)[0]["broken_guards"] == {"cut": 3 * len(PROMPTS)}


def test_prompts_are_told_apart_by_the_base_model(tmp_path, monkeypatch):
    given = []

    def spy(features, *observed, **sizes):
        given.append((features, *observed))
        return pooled_rewards(features, *observed, **sizes)

    monkeypatch.setattr("alignpro.train.pooled.pooled_rewards", spy)
    make(pooled(tmp_path, 2, steps=20, num_rewrites=16)).train()
    (_, before, *_), (features, prompt, *_) = given
    assert len(prompt) == 2 * len(before) == 2 * len(PROMPTS)
    assert len(features) == len(PROMPTS)
    last, mean = features.unflatten(1, (2, -1)).unbind(dim=1)
    assert last.abs().max() < 1e-9  # the toy's state is its last token's, and theirs is the same
    apart = torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist")
    assert 1 < apart.max() < 2 + 1e-9  # between directions
    same = [[one == other for other in PROMPTS] for one in PROMPTS]
    assert torch.equal(apart < 1e-9, torch.tensor(same))
    assert int(prompt.max()) == len(PROMPTS) - 1


def test_prompts_that_share_no_texts_are_told_so(tmp_path):
    settings = config(tmp_path, "pooled", rewrite=SamplingParams(max_new_tokens=12))
    with pytest.raises(ValueError, match="pooled needs a prompter that chooses among few texts"):
        make(settings).train()


def test_the_first_step_starts_at_the_reference_exactly(tmp_path):
    fit = make(config(tmp_path))
    fit.train()
    first, *_, last = log(fit)
    assert first["kl_per_rewrite"] == first["weighted_log_ratio"] == 0.0
    assert first["reward_mean"] == pytest.approx(first["rollout_reward_mean"])
    assert last["kl_per_rewrite"] > 0.0 and last["weighted_log_ratio"] > 0.0


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"memory_limit": 2000}])
def test_micro_batches_do_not_change_the_gradient(tmp_path, changes):
    whole = make(config(tmp_path / "whole", steps=1))
    parts = make(config(tmp_path / "parts", steps=1, **changes))
    for fit in (whole, parts):
        fit.train()
    (a,), (b,) = log(whole), log(parts)
    assert a["micro_batches"] == 1 < b["micro_batches"]
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    for mine, theirs in zip(parts.policy.parameters(), whole.policy.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_target_tokens_are_spent_once(tmp_path):
    calls = []

    def reward(prompts, rewrites, responses):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return letter_value(prompts, rewrites, responses)

    fit = make(config(tmp_path), reward=reward)
    with pytest.raises(KeyboardInterrupt):
        fit.train()
    with (fit.run_dir / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 2, "prom')  # cut short
    again = make(config(tmp_path), reward=reward, resume=True)
    again.train()
    assert calls == [12, 12, 8, 8]  # 3 + 3 + 2 prompts of 4 rewrites: the third chunk twice
    whole = make(config(tmp_path / "whole"))
    whole.train()
    assert np.array_equal(matrices(again), matrices(whole)) and log(again) == log(whole)
    # Another fit of the same rollouts.
    other = make(config(tmp_path, loss="likelihood", kl_coef=2.0), reward=reward, resume=True)
    other.train()
    assert calls == [12, 12, 8, 8]
    assert log(other)[0]["kl_coef"] == 2.0 and len(log(other)) == 6
    assert not np.array_equal(matrices(other), matrices(whole))


def test_rollouts_of_another_configuration_are_refused(tmp_path):
    make(config(tmp_path)).train()
    with pytest.raises(ValueError, match=r"another configuration: num_rewrites was 4, is 5$"):
        make(config(tmp_path, num_rewrites=5), resume=True)
    fewer = ClosedFormConfig(num_prompts=5)
    with pytest.raises(ValueError, match=r"closed_form\.num_prompts was None, is 5$"):
        make(config(tmp_path, closed_form=fewer), resume=True)


def test_a_scorer_that_differs_from_the_sampler_stops_the_fit(tmp_path):
    fit = make(config(tmp_path))
    fit.policy.model.core_model.error = 1e-3
    before = matrices(fit)
    with pytest.raises(RuntimeError, match=r"differ from the recorded ones by up to 0\.001"):
        fit.train()
    assert np.array_equal(matrices(fit), before)
    lax = make(config(tmp_path / "lax", strict_parity=False))
    lax.policy.model.core_model.error = 1e-3
    lax.train()
    fast = make(config(tmp_path / "fast"))
    fast.policy.model.bit_exact = False
    fast.policy.model.core_model.error = 1e-3
    fast.train()


def test_the_first_prompts_of_a_shuffled_pass(tmp_path):
    seen = []

    def reward(prompts, rewrites, responses, number):
        assert [PROMPTS.index(p) for p in prompts] == list(number)
        seen.extend(dict.fromkeys(prompts))
        return letter_value(prompts, rewrites, responses)

    settings = config(tmp_path, closed_form=ClosedFormConfig(num_prompts=5))
    fit = make(settings, reward=reward, columns={"number": list(range(len(PROMPTS)))})
    progress = []
    fit.rollouts(lambda *args: progress.append(args))
    assert len(set(seen)) == len(seen) == 5
    assert progress == [("rollouts", done, 5) for done in (0, 3, 5)]
    too_many = dataclasses.replace(settings, closed_form=ClosedFormConfig(num_prompts=9))
    with pytest.raises(ValueError, match=r"^closed_form\.num_prompts: expected at most the 8"):
        make(dataclasses.replace(too_many, run_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_one_nan_reward_stops_before_the_fit(tmp_path):
    def reward(prompts, rewrites, responses):
        return [float("nan")] * len(prompts)

    fit = make(config(tmp_path), reward=reward)
    with pytest.raises(RewardError, match="row 0"):
        fit.train()
    assert not (fit.run_dir / "adapter").exists()


def test_what_a_run_leaves_behind(tmp_path):
    fit = make(config(tmp_path))
    rows = []

    class Watcher(TrainCallback):
        def on_step(self, row):
            rows.append(row)

    fit.train([Watcher()])
    assert [row["step"] for row in rows] == list(range(6)) and fit.step == 6
    assert json.loads((fit.run_dir / "config.json").read_text())["algorithm"] == "closed_form"
    assert (fit.run_dir / "adapter").is_dir()
    assert {"epoch", "effective_samples", "grad_norm"} <= set(rows[0])


def test_torch_keeps_its_threads_but_in_the_fit(tmp_path, monkeypatch):
    seen = {"reward": set(), "score": set()}

    def reward(prompts, rewrites, responses):
        seen["reward"].add(torch.get_num_threads())
        return letter_value(prompts, rewrites, responses)

    fit = make(config(tmp_path, "variance", steps=2), reward=reward)
    score = fit.policy.score

    def scored(*arguments, **options):
        seen["score"].add(torch.get_num_threads())
        return score(*arguments, **options)

    monkeypatch.setattr(fit.policy, "score", scored)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        fit.train()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {"reward": {3}, "score": {1}}


def test_an_error_while_rolling_out_is_kept_in_the_run(tmp_path):
    def reward(prompts, rewrites, responses):
        raise KeyError("the defect")

    fit = make(config(tmp_path, "variance"), reward=reward)
    with pytest.raises(RewardError, match="the defect"):
        fit.rollouts()
    assert "KeyError: 'the defect'" in (fit.run_dir / "error.log").read_text()


def test_a_rewrite_of_a_conversation_is_read_as_it_was_written_down():
    chat = Conversation((("system", "Be kind."), ("user", "a"), ("assistant", "b")), "last")
    responses = [Response([1], "x", [-0.5], "stop", 1.0, usage=Usage(3, 1))]
    for read in (chat, "last"):
        rewrite = Rewrite(0, [1], [2], [-0.5], "r", read, [], "stop", responses)
        assert Rewrite.of_plain(json.loads(json.dumps(rewrite.to_plain()))) == rewrite
