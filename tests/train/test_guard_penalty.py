"""What training takes from rewrites that would not be used."""

from __future__ import annotations

from dataclasses import replace

import pytest

import alignpro
from alignpro.config import REWRITE, GuardPenaltyConfig, from_mapping
from alignpro.evaluate.results import Report
from alignpro.report.grids import costs
from alignpro.train.guard_penalty import penalise
from alignpro.train.metrics import METRICS, read_metrics, tag_of
from alignpro.types import Response, Rewrite

PROMPTS = ["What is 12 times 7?", "Why is the sky blue?"]


def rewrite(index, text, rewards, *, finish_reason="stop"):
    given = [Response([1], "x", [0.0], "stop", reward) for reward in rewards]
    read = text or PROMPTS[index]
    return Rewrite(
        index,
        [1],
        [2],
        [0.0],
        text,
        read,
        [3],
        finish_reason,
        given,
    )


def config_of(**guards):
    prompting = alignpro.Prompting(mode="rewrite")
    return alignpro.TrainConfig(prompting=prompting, guards=GuardPenaltyConfig(**guards))


def test_what_breaks_a_guard_loses_the_penalty_and_is_counted():
    lost = rewrite(0, "Multiply a dozen by seven.", [1.0, 0.5])
    kept = rewrite(0, "What is the product of 12 and 7?", [1.0])
    empty = rewrite(0, "", [0.25])
    cut = rewrite(1, "Say why the sky is", [0.5], finish_reason="length")
    groups, row = penalise(config_of(penalty=0.75), PROMPTS, [[lost, kept, empty], [cut]])
    assert [[w.reward for w in group] for group in groups] == [[0.0, 1.0, 0.25], [-0.25]]
    assert [r.reward for r in groups[0][0].responses] == [0.25, -0.25]
    assert row == {"broken_guards": {"cut": 1, "spans": 1}}
    assert lost.reward == 0.75  # what came is as it was
    groups, row = penalise(config_of(spans=False, cut=False), PROMPTS, [[lost], [cut]])
    assert groups == [[lost], [cut]] and row == {"broken_guards": {}}
    assert penalise(alignpro.TrainConfig(), PROMPTS, [[lost], [cut]]) == ([[lost], [cut]], {})


def test_rewrites_of_one_text_go_on_sharing_their_responses():
    first = rewrite(0, "Multiply a dozen by seven.", [1.0])
    second = replace(first, tokens=[4])
    ((one, two), _), _ = penalise(config_of(), PROMPTS, [[first, second], []])
    assert one.responses is two.responses and one.reward == 0.0


def test_its_settings():
    config = from_mapping(alignpro.TrainConfig, {"guards": {}})
    assert config.guards == GuardPenaltyConfig() and config.guards.penalty == 1.0
    assert alignpro.TrainConfig().guards is None
    with pytest.raises(ValueError, match=r"guards\.penalty: expected above 0"):
        from_mapping(alignpro.TrainConfig, {"guards": {"penalty": 0}})
    with pytest.raises(ValueError, match=r"guards: .*with policy prompter"):
        from_mapping(alignpro.TrainConfig, {"policy": "target", "guards": {}})


ALGORITHMS = {"rloo": {}, "closed_form": {"algorithm": "closed_form"}}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_learns_from_what_is_left_and_says_how_much(tiny_model_dir, tmp_path, algorithm):
    base = alignpro.TrainConfig(
        prompter=alignpro.ModelConfig(str(tiny_model_dir("llama"))),
        steps=2,
        prompts_per_step=3,
        num_rewrites=2,
        reward="topic",
        threads=1,
        rewrite=replace(REWRITE, max_new_tokens=6),
        response=replace(REWRITE, max_new_tokens=3),
        lora=alignpro.LoraConfig(rank=2),
        **ALGORITHMS[algorithm],
    )
    if algorithm == "closed_form":
        base = replace(base, closed_form=replace(base.closed_form, num_prompts=3))
    # Every letter is too many, so that every rewrite with text breaks a guard.
    strict = GuardPenaltyConfig(max_growth=1e-9, free_characters=0, penalty=2.0)
    rows, adapters = {}, {}
    for name, guards in (("off", None), ("on", strict)):
        run = tmp_path / name
        alignpro.run_train(replace(base, guards=guards, run_dir=str(run)))
        rows[name] = read_metrics(run / "metrics.jsonl")
        adapters[name] = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    off, on = rows["off"][0], rows["on"][0]
    broken = sum(on["broken_guards"].values())
    assert 0 < broken <= 6 and "broken_guards" not in off
    assert off["reward_mean"] - on["reward_mean"] == pytest.approx(2.0 * broken / 6)
    assert broken == 6 or adapters["on"] != adapters["off"]
    said = dict(costs(Report(), rows["on"]))["broke a guard in training"]
    total = sum(sum((row.get("broken_guards") or {}).values()) for row in rows["on"])
    assert said.startswith(f"{total} rewrites (length ")
    assert "broken_guards" in METRICS
    assert tag_of("broken_guards/length") == "rewrites/broken_guards/length"
