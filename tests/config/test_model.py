"""The group that describes a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from alignpro.config import (
    JudgeConfig,
    ModelConfig,
    SftConfig,
    TrainConfig,
    from_mapping,
    load_yaml,
    target_of,
)


def refusal(make, *arguments, **keywords):
    with pytest.raises(ValueError) as caught:
        make(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_may_be_its_name_alone():
    named = from_mapping(TrainConfig, {"prompter": "p", "target": "t"})
    assert (named.prompter, named.target) == (ModelConfig("p"), ModelConfig("t"))
    assert TrainConfig(target=Path("some") / "folder").target == ModelConfig("some/folder")


def test_a_target_is_the_prompters_model_unless_it_names_one():
    prompter = ModelConfig("p", adapter="a", device="cuda", deterministic=False)
    assert target_of(prompter, None) == dataclasses.replace(prompter, adapter=None)
    assert target_of(prompter, ModelConfig(compute="int8")) == ModelConfig("p", compute="int8")
    assert target_of(prompter, ModelConfig("t")) == ModelConfig("t")
    # A null or a name in the file may be filled in by overrides.
    config = load_yaml(TrainConfig, None, ["prompter=p", "prompter.adapter=a", "target.model=t"])
    assert config.prompter == ModelConfig("p", adapter="a") and config.target == ModelConfig("t")
    config = load_yaml(TrainConfig, None, ["target=null", "target.compute=int8"])
    assert target_of(config.prompter, config.target) == ModelConfig("smollm2", compute="int8")


def test_models_that_run_alike_share_an_engine():
    plain = ModelConfig("p")
    for other in (
        ModelConfig("t", adapter="a"),
        ModelConfig(chat_template="rag", chat_template_kwargs={"enable_thinking": False}),
        ModelConfig(compute="float32", kv_dtype="float32"),
    ):
        assert plain.runs_like(other)
    for other in (ModelConfig(compute="int8"), ModelConfig(context_length=99)):
        assert not plain.runs_like(other)
    cuda = ModelConfig("p", device="cuda")
    assert cuda.runs_like(ModelConfig(device="cuda", compute="bfloat16"))
    assert not cuda.runs_like(plain)


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (TrainConfig(prompter=ModelConfig("p", adapter="a")), ModelConfig("p", adapter="a")),
        (TrainConfig(prompter="p", policy="target"), ModelConfig("p")),
        (
            TrainConfig(prompter="p", target=ModelConfig(adapter="a"), policy="target"),
            ModelConfig("p", adapter="a"),
        ),
    ],
)
def test_the_trained_model(config, trained):
    assert config.trained == trained


def test_a_warm_start_trains_a_fresh_adapter():
    line = refusal(SftConfig, prompter=ModelConfig("p", adapter="a"))
    assert line == "prompter.adapter: expected null: a fresh one is trained, got 'a'"
    assert from_mapping(SftConfig, {"model": "p"}) == SftConfig(prompter=ModelConfig("p"))


def test_a_judge_is_a_model_or_an_endpoints_name():
    assert JudgeConfig(model="referee").model == ModelConfig("referee")
    local = from_mapping(JudgeConfig, {"model": {"model": "m", "compute": "int8"}})
    assert local.model == ModelConfig("m", compute="int8")
    line = refusal(JudgeConfig, model=local.model, base_url="http://x")
    assert line.startswith(
        "model: expected a name and chat_template_kwargs, with base_url, got ModelConfig("
    )
    assert refusal(JudgeConfig).startswith("model: expected the judge's path or name, got None")
    line = refusal(JudgeConfig, model=ModelConfig("m", adapter="a"))
    assert line == "model.adapter: expected null, got 'a'"
