"""What the algorithms do in a run, beside reaching the optimum: order, state, refusals, resume."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict

import numpy as np
import pytest
import torch

from alignpro.config import PpoConfig, Prompting, from_mapping
from alignpro.objective import MovingBaseline
from alignpro.statistics import law_of_total_variance
from alignpro.train.adaptive import LEARNING_STEPS, RELEARN_EVERY, Adaptive, RunningSplit
from alignpro.train.callbacks import TrainCallback
from alignpro.train.checkpoint import load_checkpoint
from alignpro.train.trajectories import step_batch
from alignpro.train.updates import plan_updates
from alignpro.types import Response, Rewrite, Rollout, SamplingParams
from train.test_oracle import LinearValue
from train.test_trainer import PROMPTS, config, letter_reward, log, make, matrices
from train.toy_model import HIDDEN, VOCABULARY, ToyModel

PPO = {"algorithm": "ppo", "ppo": PpoConfig(epochs=3, minibatches=2)}
CRITIC = {"algorithm": "ppo", "ppo": PpoConfig(epochs=2, minibatches=2, value_head=True)}


def noisy_reward(prompts, rewrites, responses, **columns):
    """The rewrite's letters, and noise of the target's."""
    plain = letter_reward(prompts, rewrites, responses)
    return [v + 0.3 * len(r) for v, r in zip(plain, responses, strict=True)]


def head(**options):
    return {"value_head": LinearValue(HIDDEN)} if options.get("ppo", PpoConfig()).value_head else {}


def a_run(tmp_path, *, reward=letter_reward, resume=False, warm=True, **options):
    settings = config(tmp_path, **options)
    return make(settings, reward=reward, resume=resume, warm=warm, **head(**options))


def a_rollout(rewards, tokens=(2, 3)) -> Rollout:
    """Rewards [P][N][M]; rewrites and responses of so many tokens."""
    written, answered = ([7] * n for n in tokens)
    rewrites = [
        [
            Rewrite(
                prompt_index=p,
                prompter_tokens=[0, 5],
                tokens=written,
                logprobs=[-1.0] * len(written),
                text="x",
                target_prompt="x",
                target_tokens=[0, 6],
                finish_reason="stop",
                responses=[
                    Response(answered, "y", [-1.0] * len(answered), "stop", reward=r) for r in given
                ],
            )
            for given in group
        ]
        for p, group in enumerate(rewards)
    ]
    return Rollout(["a"] * len(rewards), rewrites, {"generate": 1.0, "reward": 1.0}, 10)


# --- a resume is exact, whatever there is to remember ---


@pytest.mark.parametrize(
    "options",
    [
        {"normalize_advantage": True},
        {"algorithm": "reinforce", "num_rewrites": 1},
        PPO,
        CRITIC,
        {"kl_target": 0.5, "kl_gain": 1.0},
        {
            "num_rewrites": 4,  # the default: auto chooses
            "num_responses": "auto",
            "response_budget": 8,
        },
        {"policy": "target", "response": SamplingParams(max_new_tokens=3)},
        {
            "zero_advantage_group": "skip",
            "num_rewrites": 2,
            "rewrite": SamplingParams(max_new_tokens=1),
        },
    ],
    ids=["normalized", "reinforce", "ppo", "critic", "kl_target", "auto", "target", "skip"],
)
def test_ten_steps_are_five_then_five(tmp_path, options):
    shared = {"reward": noisy_reward, "warm": options.get("policy") != "target"}
    whole = a_run(tmp_path / "whole", **shared, **options)
    whole.train()
    first = a_run(tmp_path / "split", **shared, **options)

    class Stop(TrainCallback):
        def on_step(self, row):
            if row["step"] == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train([Stop()])
    second = a_run(tmp_path / "split", resume=True, **shared, **options)
    assert second.adaptive == first.adaptive
    second.train()
    assert np.array_equal(matrices(whole), matrices(second))
    assert log(whole) == log(second) and len(log(whole)) == 10
    assert whole.adaptive == second.adaptive
    one, other = (load_checkpoint(t.run_dir, ToyModel.lora_modules) for t in (whole, second))
    assert one.adaptive == other.adaptive
    if whole.learner.critic is not None:
        mine, theirs = (t.learner.critic.state_dict() for t in (whole, second))
        assert all(torch.equal(mine["head"][k], theirs["head"][k]) for k in mine["head"])
        assert mine["head"]["out.weight"].abs().max() > 0
        assert str(mine["optimizer"]) == str(theirs["optimizer"])


def test_adaptive_state_survives_json_to_the_bit():
    state = Adaptive(1 / 3, MovingBaseline(0.1, 1.9), RunningSplit(0.1, 1 / 7, 1.8, 3.3, 2.2, 1.8))
    assert from_mapping(Adaptive, json.loads(json.dumps(asdict(state)))) == state


# --- ppo ---


def test_the_minibatches_of_ppo(tmp_path):
    settings = config(tmp_path, prompts_per_step=5, num_rewrites=2, **PPO)
    rollout = a_rollout([[[float(p)], [p + 1.0]] for p in range(5)])
    batch = step_batch(settings, rollout, MovingBaseline())
    updates = plan_updates(settings, batch, step=3)
    assert [len(u.rows) for u in updates] == [6, 4] * 3
    assert [u.epoch for u in updates] == [0, 0, 1, 1, 2, 2]
    assert [u.fresh for u in updates] == [True] + [False] * 5
    for epoch in range(3):
        rows = [row for u in updates if u.epoch == epoch for row in u.rows]
        assert sorted(rows) == list(range(10))
    # Whole prompts: their two rewrites are beside each other.
    assert all(u.rows[1::2] == [row + 1 for row in u.rows[::2]] for u in updates)
    assert len({tuple(u.rows) for u in updates if len(u.rows) == 6}) > 1  # another order each
    assert updates == plan_updates(settings, batch, step=3)
    other = plan_updates(settings, batch, step=4)
    assert [u.rows for u in updates] != [u.rows for u in other]


def test_the_first_ratio_of_ppo_is_one_and_later_ones_are_not(tmp_path):
    one = {"algorithm": "ppo", "ppo": PpoConfig(epochs=1, minibatches=1)}
    first = a_run(tmp_path / "first", steps=2, **one)
    first.train()
    assert [(r["ratio_max"], r["parity_max_abs"], r["updates"]) for r in log(first)] == [
        (1.0, 0.0, 1)
    ] * 2
    many = a_run(tmp_path / "many", steps=2, learning_rate=0.2, warmup_steps=0, **PPO)
    many.train()
    for row in log(many):
        assert row["parity_max_abs"] == 0.0 and row["updates"] == 6
        assert row["ratio_max"] > 1.2 and row["clip_fraction"] > 0.0  # raw, not clipped
    assert log(many)[0]["tokens"] == log(first)[0]["tokens"]  # of one pass


def test_a_minibatch_is_a_mean_over_itself(tmp_path):
    # Weights that stay where they are: the mean of two minibatches' losses is the batch's.
    losses = {}
    for minibatches in (1, 2):
        ppo = PpoConfig(epochs=1, minibatches=minibatches)
        options = {"steps": 1, "prompts_per_step": 4, "learning_rate": 1e-12, "algorithm": "ppo"}
        trainer = a_run(tmp_path / str(minibatches), ppo=ppo, **options)
        trainer.policy.lora_b[0].data += torch.randn(
            VOCABULARY, 4, generator=torch.manual_seed(0)
        )  # away from the reference: there is a KL
        trainer.train()
        (row,) = log(trainer)
        losses[minibatches] = [row[n] for n in ("policy_loss", "kl_per_rewrite", "k3_per_rewrite")]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5) and min(map(abs, losses[1])) > 1e-3


def test_one_pass_of_ppo_is_rloo(tmp_path):
    ppo = {"algorithm": "ppo", "ppo": PpoConfig(epochs=1, minibatches=1)}
    runs = [a_run(tmp_path / name, **options) for name, options in (("a", {}), ("b", ppo))]
    for run in runs:
        run.train()
    assert np.array_equal(*(matrices(run) for run in runs))


def test_a_scorer_that_differs_is_seen_in_the_first_minibatch(tmp_path):
    trainer = a_run(tmp_path, **PPO)
    trainer.policy.model.core_model.error = 1e-3
    with pytest.raises(RuntimeError, match=r"step 0: scored log-probabilities differ"):
        trainer.train()
    assert trainer.step == 0


@pytest.mark.parametrize("options", [PPO, CRITIC])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_breaks_off_in_the_middle_never_was(tmp_path, options, error):
    trainer = a_run(tmp_path / "cut", **options)
    score, calls = trainer.policy.score, []

    def interrupted(*arguments, **named):
        calls.append(trainer.step)
        if calls.count(2) == 3:  # of five or more
            if error is RuntimeError:
                raise RuntimeError("out of order")
            os.kill(os.getpid(), signal.SIGINT)
        return score(*arguments, **named)

    trainer.policy.score = interrupted
    with pytest.raises(error):
        trainer.train()
    trainer.policy.score = score
    assert trainer.step == 2 and len(log(trainer)) == 2
    two = a_run(tmp_path / "two", **{**options, "steps": 2})
    two.train()
    assert np.array_equal(matrices(trainer), matrices(two))
    resumed = a_run(tmp_path / "cut", resume=True, **options)
    resumed.train()
    whole = a_run(tmp_path / "whole", **options)
    whole.train()
    assert log(resumed) == log(whole) and np.array_equal(matrices(resumed), matrices(whole))


def test_the_value_head_learns_the_return(tmp_path):
    # Rewards of 3 everywhere: what is left to explain is nothing.
    trainer = a_run(
        tmp_path,
        reward=lambda prompts, rewrites, responses: [3.0] * len(prompts),
        steps=60,
        kl_coef=0.0,
        algorithm="ppo",
        ppo=PpoConfig(value_head=True, value_learning_rate=0.1),
        rewrite=SamplingParams(max_new_tokens=3),
    )
    trainer.train()
    rows = log(trainer)
    assert rows[0]["value_loss"] == pytest.approx(4.5, rel=0.2)
    assert rows[-1]["value_loss"] < 0.05
    values = trainer.learner.critic.head(trainer.policy.model.core_model.hidden)
    assert values.shape == (VOCABULARY,)


def test_micro_batches_do_not_change_what_a_critic_does(tmp_path):
    # One update: AdamW makes more of a rounding error in the first one than the second forgives.
    one = {"algorithm": "ppo", "ppo": PpoConfig(epochs=1, minibatches=1, value_head=True)}
    whole = a_run(tmp_path / "whole", steps=1, **one)
    parts = a_run(tmp_path / "parts", steps=1, micro_batch_size=1, **one)
    for trainer in (whole, parts):
        trainer.train()
    (a,), (b,) = log(whole), log(parts)
    assert b["micro_batches"] > a["micro_batches"]
    for name in ("loss", "value_loss", "grad_norm", "entropy", "kl_per_rewrite"):
        assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-7)
    mine, theirs = (t.learner.critic.head.out.weight for t in (parts, whole))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_a_value_head_that_is_missing_or_not_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"value_head: expected one with ppo\.value_head"):
        make(config(tmp_path, **CRITIC))
    with pytest.raises(ValueError, match="and none without"):
        make(config(tmp_path), value_head=LinearValue(HIDDEN))
    with pytest.raises(ValueError, match="closed_form samples once"):
        make(config(tmp_path, algorithm="closed_form"))
    assert not (tmp_path / "run").exists()


# --- groups without signal ---


def some_equal(prompts, rewrites, responses, **columns):
    """Only the rewrites of "a" and "b" differ."""
    values = letter_reward(prompts, rewrites, responses)
    return [v if p in "ab" else 1.0 for p, v in zip(prompts, values, strict=True)]


def test_skipped_groups_are_not_scored_and_not_in_the_mean(tmp_path):
    options = {"steps": 1, "prompts_per_step": 8, "reward": some_equal}
    kept = a_run(tmp_path / "kept", **options)
    skipped = a_run(tmp_path / "skipped", zero_advantage_group="skip", **options)
    for trainer in (kept, skipped):
        trainer.train()
    (a,), (b,) = log(kept), log(skipped)
    assert a["zero_advantage_groups"] == b["zero_advantage_groups"] == 6
    scored = [t.policy.model.core_model.scores[0].sequences for t in (kept, skipped)]
    assert [len(s) for s in scored] == [32, 8]
    assert {s[1] for s in scored[1]} == {3, 4}  # "a" and "b"
    assert a["reward_mean"] == b["reward_mean"]  # of everything that was sampled
    # At the reference the KL has no gradient: the sum is the same, the mean is over a quarter.
    assert b["grad_norm"] == pytest.approx(4 * a["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_a_step_of_equal_rewards_does_nothing_and_says_so(tmp_path, algorithm, normalize):
    trainer = a_run(
        tmp_path,
        reward=lambda prompts, rewrites, responses: [0.1] * len(prompts),
        steps=2,
        algorithm=algorithm,
        normalize_advantage=normalize,
        zero_advantage_group="skip",
    )
    before = matrices(trainer)
    trainer.train()
    assert np.array_equal(matrices(trainer), before)
    for row in log(trainer):
        assert (row["updates"], row["zero_advantage_groups"], row["grad_norm"]) == (0, 3, 0.0)
        assert row["kl_per_rewrite"] is None and row["kl_per_token"] is None
    assert not trainer.policy.model.core_model.scores


# --- nested sampling ---


def test_the_split_is_in_every_row_that_can_tell(tmp_path):
    options = {"steps": 2, "num_responses": 2, "reward": noisy_reward}
    shared = a_run(tmp_path / "shared", common_draws=True, **options)
    shared.train()
    assert log(shared)[0]["variance_within"] is None
    trainer = a_run(tmp_path / "two", **options)
    trainer.train()
    for row in log(trainer):
        assert row["variance_within"] > 0.0 and row["variance_between"] != 0.0
        assert (row["num_rewrites"], row["num_responses"]) == (4, 2)
    single = a_run(tmp_path / "one", steps=1)
    single.train()
    assert log(single)[0]["variance_within"] is None is log(single)[0]["variance_between"]


def test_auto_learns_the_split_and_then_chooses(tmp_path):
    def run(name, reward):
        trainer = a_run(
            tmp_path / name,
            reward=reward,
            steps=14,
            num_responses="auto",
            response_budget=16,
            learning_rate=1e-4,
        )
        trainer.train()
        return [(row["num_rewrites"], row["num_responses"]) for row in log(trainer)]

    # The target adds nothing: one response says it all, but for the steps that look again.
    settled = run("settled", letter_reward)
    assert settled[:LEARNING_STEPS] == [(8, 2)] * LEARNING_STEPS
    assert settled[RELEARN_EVERY] == (8, 2)
    rest = [c for i, c in enumerate(settled) if i >= LEARNING_STEPS and i != RELEARN_EVERY]
    assert rest == [(16, 1)] * len(rest)

    def of_the_response(prompts, rewrites, responses):
        return [float((7 * len(r) + 37 * i * i) % 101) for i, r in enumerate(responses)]

    noisy = run("noisy", of_the_response)  # the rewrite hardly matters
    assert all(m >= 4 for _, m in noisy[LEARNING_STEPS:])


def test_the_running_split_by_hand():
    rewards = [[[1.0, 3.0], [5.0, 5.0]], [[0.0, 2.0], [2.0, 4.0]]]
    split = law_of_total_variance(rewards)
    running = RunningSplit().after(a_rollout(rewards, tokens=(4, 6)), split)
    assert running.within / running.split_weight == pytest.approx(split.within_rewrite)
    assert running.rewrite_cost / running.cost_weight == pytest.approx(5 * 4)
    assert running.response_cost / running.cost_weight == pytest.approx(6)
    # A step of single responses: costs move on, the split stays.
    later = running.after(a_rollout([[[1.0], [2.0]]], tokens=(8, 2)), None)
    assert (later.between, later.within) == (running.between, running.within)
    assert later.rewrite_cost / later.cost_weight == pytest.approx((0.8 * 20 + 40) / 1.8)
    assert later.counts(step=0, budget=12) == (6, 2)
    # M* = sqrt(within / between * c_p / c_t) = sqrt(2 * 8) = 4.
    known = RunningSplit(1.0, 2.0, 1.0, 8.0, 1.0, 1.0)
    assert known.counts(step=LEARNING_STEPS, budget=64) == (16, 4)


# --- the tuned target ---


def test_the_target_is_trained_on_the_raw_prompts(tmp_path):
    seen = []

    def reward(prompts, rewrites, responses, **columns):
        seen.extend(zip(prompts, rewrites, responses, strict=True))
        return [float(len(r)) for r in responses]

    trainer = a_run(
        tmp_path,
        reward=reward,
        warm=False,
        steps=2,
        policy="target",
        # A template of the prompter's, which must play no part.
        prompting=Prompting(template="h{prompt}h", separator="hh"),
        response=SamplingParams(max_new_tokens=3, temperature=0.7),
    )
    before = matrices(trainer)
    trainer.train()
    assert not np.array_equal(matrices(trainer), before)
    assert len(seen) == 2 * 3 * 4 and {rewrite for _, rewrite, _ in seen} == {""}
    first = log(trainer)[0]
    assert (first["kl_per_rewrite"], first["ratio_max"], first["parity_max_abs"]) == (0.0, 1.0, 0.0)
    assert (first["num_rewrites"], first["num_responses"]) == (4, 1)
    assert "rewrite_tokens" not in first and first["response_tokens"] > 0
    prompts = {p for p, _, _ in seen}
    contexts = {
        tuple(s[:3]) for score in trainer.policy.model.core_model.scores for s in score.sequences
    }
    encode = trainer.pipeline.target.tokenizer.encode_chat
    assert contexts == {tuple(encode([{"role": "user", "content": p}])) for p in prompts}
    assert (trainer.run_dir / "adapter").is_dir()


def test_the_target_must_be_the_policys_model(tmp_path):
    trainer = a_run(tmp_path / "one", policy="target", steps=0, warm=False)
    trainer.pipeline._target = ToyModel()
    with pytest.raises(ValueError, match="its target is not the model the policy trains"):
        type(trainer)(trainer.config, trainer.pipeline, trainer.policy, PROMPTS, overwrite=True)


# --- the row ---


def test_a_row_of_the_log(tmp_path):
    trainer = a_run(
        tmp_path,
        steps=3,
        num_responses=2,
        reward=noisy_reward,
        response=SamplingParams(max_new_tokens=2, top_p=0.9),
        kl_target=0.5,
    )
    trainer.train()
    rows = log(trainer)
    for row in rows:
        assert row["reward_variance"] == pytest.approx(row["reward_std"] ** 2)
        assert row["kl_per_token"] == pytest.approx(
            row["kl_per_rewrite"] * 12 / row["tokens"], abs=1e-12
        )
        assert 0 < row["response_tokens"] <= 2 and row["kept_mass"] == 1.0  # the toy cuts nothing
        assert row["updates"] == 1 and row["entropy"] > 0
    assert rows[0]["kl_coef"] == 0.1 > rows[1]["kl_coef"] > rows[2]["kl_coef"]
    with (trainer.run_dir / "metrics.jsonl").open() as file:
        seconds = json.loads(file.readline())["seconds"]
    assert set(seconds) == {"generate", "reward", "gradient", "optimizer", "step"}


@pytest.mark.parametrize("spoiled", ["policy", "critic"])
def test_policy_and_critic_step_together_or_not_at_all(tmp_path, spoiled):
    one = {"algorithm": "ppo", "ppo": PpoConfig(epochs=1, minibatches=1, value_head=True)}
    trainer = a_run(tmp_path, steps=3, **one)
    learner = trainer.learner
    head = learner.critic.head
    parameters = [*trainer.policy.parameters(), *head.parameters()]
    mine = trainer.policy.lora_b[0] if spoiled == "policy" else head.out.weight
    before = [p.detach().clone() for p in parameters]
    mine.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        trainer.train()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert not learner.optimizer.state and not learner.critic.optimizer.state
    assert trainer.step == 0
