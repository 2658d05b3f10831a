"""One prompter from a mixture, on the engine: its rewards, the mixture itself, and a stop."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import (
    REWRITE,
    LoraConfig,
    PreferConfig,
    PreferencesConfig,
    TrainConfig,
    from_mapping,
    to_mapping,
)
from alignpro.models.adapter import save_peft
from alignpro.models.native_model import load_model
from alignpro.price.fit import price_fit
from alignpro.run_directory import config_of_run
from alignpro.train.distill import distill_config
from alignpro.train.metrics import read_metrics
from alignpro.train.policy import LoraPolicy
from alignpro.train.run import run_train
from native_runs import lora, save_run

EXPONENTS = {"kind": 0.7, "brief": 0.5}  # as runs of unequal kl_coef have them: no weights of 1


@pytest.fixture
def place(tiny_model_dir, tmp_path, monkeypatch):
    """Two runs of a tiny model that writes one token, and their mixture."""
    monkeypatch.chdir(tmp_path)
    base, model = tiny_model_dir("llama"), load_model(tiny_model_dir("llama"), threads=1)
    rows = "".join(json.dumps({"prompt": f"tell me about {i}"}) + "\n" for i in range(4))
    (tmp_path / "prompts.jsonl").write_text(rows)
    for seed, name in enumerate(EXPONENTS, start=1):
        save_run(tmp_path / name, base, new_tokens=1, data="prompts.jsonl", threads=1)
        weights = lora(model, seed=seed)
        small = {n: (a, b * np.float32(0.15)) for n, (a, b) in weights.matrices.items()}
        save_peft(tmp_path / name / "adapter", replace(weights, matrices=small))
    (tmp_path / "mixed").mkdir()
    members = {f"../{run}/adapter": exponent for run, exponent in EXPONENTS.items()}
    members["base"] = 1 - sum(EXPONENTS.values())
    (tmp_path / "mixed" / "mixture.json").write_text(json.dumps({"members": members}))
    return tmp_path


def config(place, **changes):
    small = {"steps": 4, "prompts_per_step": 2, "num_rewrites": 8}
    return distill(place, "kind", **{**small, **changes})


def distill(place, *names, **changes):
    runs = {place / name: config_of_run(place / name) for name in names}
    return distill_config(place / "mixed", runs, **changes)


def next_token(model, adapter, read):
    """[vocabulary] log-probabilities of what follows."""
    core = None if adapter is None else model.make_adapter(adapter)
    sequences = [[*read, token] for token in range(int(model.config["vocab_size"]))]
    score = model.core_model.score(sequences, [len(read)] * len(sequences), adapter=core)
    return np.asarray(score.logprob, np.float64)


def test_it_becomes_the_mixture(place):
    # One-token rewrites: rho_ref prod_k (rho_k / rho_ref)^e_k / Z can be written down.
    options = {"num_rewrites": 256, "steps": 60, "prompts_per_step": 4, "learning_rate": 0.02}
    trainer = run_train(config(place, **options))
    model = trainer.policy.model
    rows = read_metrics(place / "mixed" / "distilled" / "rollouts.jsonl")
    experts = [model.load_adapter(place / run / "adapter") for run in EXPONENTS]
    for group in rows[0]["rewrites"][:2]:
        read = group[0]["prompter_tokens"]
        reference = next_token(model, None, read)
        reward = sum(
            exponent * (next_token(model, expert, read) - reference)
            for expert, exponent in zip(experts, EXPONENTS.values(), strict=True)
        )
        for written in group:
            (response,) = written["responses"]
            assert response["reward"] == pytest.approx(reward[written["tokens"][0]], abs=1e-4)
        mixture = np.exp(reference + reward)
        mixture /= mixture.sum()

        def distance(logprobs, mixture=mixture):
            return 0.5 * np.abs(np.exp(logprobs) - mixture).sum()

        fitted = distance(next_token(model, trainer.policy.weights(), read))
        assert fitted < 0.2 * distance(reference) and distance(reference) > 0.1
        assert fitted < 0.5 * min(distance(next_token(model, e, read)) for e in experts)
    first, *_, last = read_metrics(place / "mixed" / "distilled" / "metrics.jsonl")
    assert first["target_tokens"] == 0 and last["loss"] < 0.1 * first["loss"]


def test_what_was_stopped_goes_on_to_the_bit(place):
    whole = run_train(config(place, run_dir="whole"))

    def stop(what, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_train(config(place), on_progress=stop)
    assert len(read_metrics(place / "mixed" / "distilled" / "rollouts.jsonl")) == 1  # of two
    record = json.loads((place / "mixed" / "distilled" / "config.json").read_text())
    again = run_train(from_mapping(TrainConfig, record), resume=True)
    for name, pair in whole.policy.weights().matrices.items():
        assert all(map(np.array_equal, pair, again.policy.weights().matrices[name]))
    # Another kl_coef is another fit of the same rollouts: as far as it says.
    less = run_train(config(place, kl_coef=4.0), resume=True)
    assert less.log.path.exists() and less.config.kl_coef == 4.0
    save_peft(place / "kind" / "adapter", lora(less.policy.model, seed=9))
    with pytest.raises(ValueError, match="mixture"):
        run_train(config(place), resume=True)


def test_mixtures_that_are_none(place):
    (place / "mixed" / "mixture.json").unlink()
    with pytest.raises(ValueError, match=r"closed_form.mixture: .*mixed/mixture.json: no such"):
        run_train(config(place))
    for changes, line in (
        ({"closed_form": {"loss": "pooled", "mixture": "mixed"}}, "mixture: expected its default"),
        ({"closed_form": {"mixture": "mixed"}, "num_responses": 3}, "num_responses: expected its"),
    ):
        with pytest.raises(ValueError, match=line):
            from_mapping(TrainConfig, {"algorithm": "closed_form", **changes})


def test_no_step_holds_more_than_a_dry_run_says(place, monkeypatch):
    held, score = [], LoraPolicy.score

    def scored(self, sequences, starts, *, activations="keep", **options):
        held.append(self.score_bytes(sequences, starts, activations, with_reference=False))
        return score(self, sequences, starts, activations=activations, **options)

    most = price_fit(config(place))["memory"]["scoring (memory_limit bounds it)"]
    monkeypatch.setattr(LoraPolicy, "score", scored)
    run_train(config(place))
    assert most / 2 < max(held) <= most


def test_the_command(place):
    arguments = ["mix", "runs=[kind,brief]", "num_prompts=4", "num_rewrites=8", "threads=1"]
    done = CliRunner().invoke(app, [*arguments, "--distill"])
    assert done.exit_code == 2 and "--output FOLDER" in done.output
    (place / "mixed" / "mixture.json").unlink()
    done = CliRunner().invoke(app, [*arguments, "--output", "mixed", "--dry-run"])
    assert done.exit_code == 2 and "add --distill" in done.output
    of_two = ["mix", "runs=[kind,nowhere]", "--output", "dry", "--distill", "--dry-run"]
    done = CliRunner().invoke(app, of_two)
    assert done.exit_code == 2 and "nowhere: expected the directory of a run" in done.output
    done = CliRunner().invoke(app, [*arguments, "--output", "dry", "--distill", "--dry-run"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "4 prompts, of" in done.output and not (place / "dry").exists()
    done = CliRunner().invoke(app, [*arguments, "--output", "mixed", "--distill"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert f"adapter: {place.relative_to(place) / 'mixed/distilled/adapter'}" in done.output
    assert (place / "mixed" / "distilled" / "adapter" / "adapter_config.json").is_file()
    done = CliRunner().invoke(app, [*arguments, "--output", "mixed", "--distill"])
    assert done.exit_code == 2
    assert "it goes on with: alignpro train mixed/distilled/config.json --resume" in done.output


def test_what_was_mixed_is_distilled_by_the_same_command(place, monkeypatch):
    """Killed between the mixture and its training."""
    words = ["mix", "runs=[kind,brief]", "num_rewrites=4", "threads=1", "--output", "new"]
    for run in ("kind", "brief"):  # as training leaves it: the mixture copies matrices alone
        (place / run / "adapter" / "prompter.json").write_text("{}")

    def killed(*given, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("alignpro.train.run.run_train", killed)
        done = CliRunner().invoke(app, [*words, "--distill"])
    assert done.exit_code == 130 and (place / "new" / "mixture.json").is_file()
    written = (place / "new" / "mixture.json").read_bytes()
    done = CliRunner().invoke(app, [*words, "seed=1", "--distill"])
    assert done.exit_code == 2 and "new: is not empty" in done.output
    kept = (place / "kind" / "adapter" / "adapter_model.safetensors").read_bytes()
    save_peft(place / "kind" / "adapter", lora(load_model(place_model(place), threads=1), seed=9))
    done = CliRunner().invoke(app, [*words, "--distill"])
    assert done.exit_code == 2 and "new: is not empty" in done.output  # of another adapter
    (place / "kind" / "adapter" / "adapter_model.safetensors").write_bytes(kept)
    monkeypatch.setattr("alignpro.evaluate.mix.load_model", None)
    done = CliRunner().invoke(app, [*words, "--distill"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert (place / "new" / "mixture.json").read_bytes() == written
    assert (place / "new" / "distilled" / "adapter" / "adapter_config.json").is_file()


def place_model(place):
    return config_of_run(place / "kind").prompter.model


def on_preferences(place, name, rows):
    """Make a run one on pairs, which it has in a file."""
    (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = config_of_run(place / name)
    preferring = PreferConfig(
        prompter=trained.prompter,
        prompting=trained.prompting,
        data=PreferencesConfig(f"{name}.jsonl"),
        lora=LoraConfig(rank=3),
        threads=1,
    )
    (place / name / "config.json").write_text(json.dumps(to_mapping(preferring)))


def test_trainings_on_preferences_are_distilled(place):
    pairs = [{"prompt": p, "chosen": c, "rejected": "no"} for p in ("he", "on") for c in ("a", "b")]
    for name in EXPONENTS:
        on_preferences(place, name, pairs)
    (place / "mixed" / "mixture.json").unlink()
    words = ["mix", "runs=[kind,brief]", "num_rewrites=4", "threads=1", "--output", "mixed"]
    done = CliRunner().invoke(app, [*words, "--distill", "--dry-run"])
    assert done.exit_code == 0 and "4 prompts, of" in done.output, done.output
    done = CliRunner().invoke(app, [*words, "--distill"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    made = config_of_run(place / "mixed" / "distilled")
    assert (made.data.path, made.lora.rank, made.rewrite) == ("kind.jsonl", 3, REWRITE)
    rows = read_metrics(place / "mixed" / "distilled" / "rollouts.jsonl")
    assert {prompt for row in rows for prompt in row["prompts"]} == {"he", "on"}
    assert (place / "mixed" / "distilled" / "adapter" / "adapter_config.json").is_file()


def test_one_on_preferences_is_sampled_as_one_by_a_reward(place):
    on_preferences(place, "kind", [{"prompt": "he", "chosen": "a", "rejected": "b"}])
    made = distill(place, "kind", "brief")
    assert made.rewrite.max_new_tokens == 1 and made.data.path == "kind.jsonl"
    assert made.reward == TrainConfig().reward
    other = distill(place, "brief", "kind")
    assert other.reward == config_of_run(place / "brief").reward


def test_pairs_that_have_no_prompts_of_their_own(place):
    said = [[{"role": "user", "content": "he"}, {"role": "assistant", "content": c}] for c in "ab"]
    on_preferences(place, "kind", [{"chosen": said[0], "rejected": said[1]}])
    words = ["mix", "runs=[kind,brief]", "threads=1", "--output", "other"]
    done = CliRunner().invoke(app, [*words, "--distill"])
    assert done.exit_code == 2 and "kind: its pairs have no prompts of their own" in done.output
    assert "kind.jsonl" in done.output and "name a run by a reward first" in done.output
    assert not (place / "other").exists()


def test_no_target_reads_the_prompts(place):
    short = replace(config(place).prompter, context_length=16)
    trainer = run_train(config(place, target=short, steps=1))
    assert trainer.pipeline.target.context_length == 16
