"""What keys are called: old names, and those of other trainers."""

from __future__ import annotations

import re

import pytest

from alignpro.config import (
    BoundConfig,
    DataConfig,
    EvalConfig,
    ExtractConfig,
    HeadroomConfig,
    ModelConfig,
    TrainConfig,
    from_mapping,
    load_yaml,
)


def refusal(make, *arguments):
    with pytest.raises(ValueError) as caught:
        make(*arguments)
    return str(caught.value)


STAGES = pytest.mark.parametrize("cls", [TrainConfig, EvalConfig, HeadroomConfig, BoundConfig])


@STAGES
@pytest.mark.parametrize(
    ("old", "value", "new", "is_now"),
    [
        ("model", "x", {"prompter": {"model": "x"}}, "prompter.model"),
        ("adapter", "x", {"prompter": {"adapter": "x"}}, "prompter.adapter"),
        ("untuned", "x", {"prompter": {"adapter": "x"}}, "prompter.adapter"),
        ("prompter_device", "cuda", {"prompter": {"device": "cuda"}}, "prompter.device"),
        ("prompter_compute", "float32", {"prompter": {"compute": "float32"}}, "prompter.compute"),
        ("target_device", "cuda", {"target": {"device": "cuda"}}, "target.device"),
        ("target_compute", "int8", {"target": {"compute": "int8"}}, "target.compute"),
        ("split", None, {"data": {"split": None}}, "data.split"),
    ],
)
def test_old_keys_are_read_as_the_new_ones_and_said(cls, old, value, new, is_now, tmp_path, caplog):
    wanted = from_mapping(cls, new)
    typed = "null" if value is None else value
    (tmp_path / "old.yaml").write_text(f"{old}: {typed}\n")
    for made in (
        lambda: from_mapping(cls, {old: value}),
        lambda: load_yaml(cls, None, [f"{old}={typed}"]),
        lambda: load_yaml(cls, tmp_path / "old.yaml"),
        lambda: cls(**{old: value}),
    ):
        caplog.clear()
        assert made() == wanted
        assert caplog.messages == [f"{old}: is now {is_now}"]


@STAGES
@pytest.mark.parametrize("of", ["prompter", "target"])
def test_old_keys_whose_values_mean_nothing_now_name_the_new_one(cls, of):
    said = f"{of}_mode: is now {of}.deterministic (true for strict, false for fast)"
    assert refusal(from_mapping, cls, {f"{of}_mode": "strict"}) == said
    assert refusal(load_yaml, cls, None, [f"{of}_mode=strict"]) == said
    with pytest.raises(TypeError, match=re.escape(said)):
        cls(**{f"{of}_mode": "strict"})


def test_old_keys_beside_new_ones(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("model: m\nprompter: {adapter: a}\ndata: p.csv\nsplit: null\n")
    read = load_yaml(TrainConfig, file)
    assert read.prompter == ModelConfig("m", adapter="a")
    assert read.data == DataConfig("p.csv", split=None)
    typed = load_yaml(TrainConfig, file, ["model=n", "data=q.csv", "split=test"])
    assert (typed.prompter.model, typed.data) == ("n", DataConfig("q.csv", split="test"))
    for beside in ("p", {"model": "p"}):
        line = refusal(from_mapping, TrainConfig, {"model": "m", "prompter": beside})
        assert line == "model: is now prompter.model, which is given as well"
    both = {"zero_signal": "skip", "zero_advantage_group": "keep"}
    line = refusal(from_mapping, TrainConfig, both)
    assert line == "zero_signal: is now zero_advantage_group, which is given as well"


def test_old_keys_inside_a_group_and_old_words(caplog):
    read = from_mapping(EvalConfig, {"static": {"split": None}})
    assert read.static.data.split is None
    assert from_mapping(TrainConfig, {"zero_signal": "skip"}).zero_advantage_group == "skip"
    assert caplog.messages == [
        "static.split: is now static.data.split",
        "zero_signal: is now zero_advantage_group",
    ]


def test_a_configuration_that_never_had_a_key_asks_which_is_meant():
    said = 'did you mean "target.model" or "prompter.model"'
    with pytest.raises(ValueError, match=said):
        from_mapping(ExtractConfig, {"model": "x"})  # the target is what it cannot do without
    with pytest.raises(ValueError, match=said):
        load_yaml(ExtractConfig, None, ["model=x"])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "learning_rate"),
        ("prompt_column", "data.prompt"),
        ("lora_rank", "lora.rank"),
        ("target_model", "target.model"),
        ("response_max_tokens", "response.max_new_tokens"),
        ("LEARNING-RATE", "learning_rate"),
        ("report_to", "track"),
    ],
)
def test_what_others_call_a_key_names_ours(key, meant):
    said = f'unknown configuration key "{key}"; did you mean "{meant}"?'
    assert refusal(from_mapping, TrainConfig, {key: 1}) == said
    assert refusal(load_yaml, TrainConfig, None, [f"{key}=1"]) == said
    with pytest.raises(TypeError, match=re.escape(said)):
        TrainConfig(**{key: 1})


@pytest.mark.parametrize(
    ("mapping", "key", "meant"),
    [
        ({"data": {"column": 1}}, "data.column", "data.prompt"),
        ({"data": {"train_files": 1}}, "data.train_files", "data.path"),
        ({"lora": {"r": 1}}, "lora.r", "lora.rank"),
        ({"response": {"max_length": 1}}, "response.max_length", "response.max_new_tokens"),
        ({"actor": {"optim": {"lr": 1}}}, "actor.optim.lr", "learning_rate"),
    ],
)
def test_what_others_call_a_key_of_a_group_names_ours(mapping, key, meant):
    said = f'unknown configuration key "{key}"; did you mean "{meant}"?'
    assert refusal(from_mapping, TrainConfig, mapping) == said


def test_the_keys_that_are_known_are_those_that_can_be_given():
    line = refusal(from_mapping, TrainConfig, {"data": {"zzz": 1}})
    assert line.endswith("known: path, split, subset, revision, prompt, system")
