"""Every file under examples/ loads, and the paper's say everything that a run needs."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import yaml

from alignpro.config import (
    BoundConfig,
    EvalConfig,
    HeadroomConfig,
    ModelConfig,
    PreferConfig,
    QuickstartConfig,
    SelfImproveConfig,
    SftConfig,
    TrainConfig,
    load_yaml,
)
from alignpro.config.fields import default_of
from alignpro.data.load import load_prompts
from alignpro.price.devices import Rates
from alignpro.price.estimate import price_train
from alignpro.rewards.build import build_reward
from alignpro.train.sft import read_pairs

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = sorted(EXAMPLES.rglob("*.yaml"))
PAPER = [file for file in FILES if file.parent.name == "paper"]

# What the data sets' cards say they hold.
CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
HUB = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        ("train_prefs", "test_prefs"),
        {"prompt": "x", "prompt_id": "1", "chosen": CHAT, "rejected": CHAT, "messages": CHAT}
        | {"score_chosen": 8.0, "score_rejected": 5.0},
    ),
    "nvidia/HelpSteer": (
        ("train", "validation"),
        {"prompt": "x", "response": "y", "helpfulness": 3, "correctness": 4, "coherence": 4}
        | {"complexity": 2, "verbosity": 1},
    ),
    "HuggingFaceH4/orca_dpo_pairs": (
        ("train_prefs", "test_prefs"),
        {"chosen": [{"role": "system", "content": "s"}, *CHAT], "rejected": CHAT, "prompt": "x"},
    ),
}


def names(files):
    return [str(file.relative_to(EXAMPLES)) for file in files]


KINDS = {
    "prefer.yaml": PreferConfig,
    "rules.yaml": QuickstartConfig,
    "sentiment.yaml": QuickstartConfig,
}


def kind(file):
    return KINDS.get(file.name, EvalConfig if file.name.startswith("evaluate-") else TrainConfig)


TRAINING = [file for file in FILES if kind(file) is TrainConfig]


def missing(cls, mapping, path=""):
    """Fields of the dataclass and of those inside it that the mapping leaves to defaults."""
    # What only a target behind an endpoint has; a model in this process refuses the first three.
    endpoints = {"endpoint", "api_key_env", "client", "max_failed"} if cls is ModelConfig else set()
    for field in dataclasses.fields(cls):
        if field.name in endpoints - mapping.keys():
            continue
        if field.name not in mapping:
            yield path + field.name
        elif dataclasses.is_dataclass(inner := default_of(field)):
            yield from missing(type(inner), mapping[field.name], f"{path}{field.name}.")


def test_the_files_are_those_of_the_experiment():
    pairs = [(p, d) for p in ("phi3.5", "qwen2.5") for d in ("ultrafeedback", "helpsteer", "orca")]
    for stage in ("train", "evaluate"):
        for prompter, data in pairs:
            assert EXAMPLES / "paper" / f"{stage}-{prompter}-{data}.yaml" in PAPER


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_it_loads(file):
    load_yaml(kind(file), file)


@pytest.mark.parametrize("file", PAPER, ids=names(PAPER))
def test_nothing_is_left_to_a_default(file):
    assert list(missing(kind(file), yaml.safe_load(file.read_text("utf-8")))) == []


def test_the_rules_of_ones_own_are_complete():
    sft, train, evaluation = load_yaml(QuickstartConfig, EXAMPLES / "rules.yaml").stages()
    pairs, _ = read_pairs(sft)
    assert Counter(pair.instruction for pair in pairs) == dict.fromkeys(sft.instructions, 120)
    assert {pair.prompt for pair in pairs} == {row.prompt for row in load_prompts(train.data)}
    # The rival may choose among all that the prompter was shown.
    assert set(sft.instructions) - {""} < set(evaluation.static.candidates)
    assert evaluation.data.split == "heldout"


def test_each_data_set_has_its_oracle():
    for data in ("ultrafeedback", "helpsteer", "orca"):
        oracle = load_yaml(TrainConfig, EXAMPLES / "paper" / f"oracle-{data}.yaml")
        train = load_yaml(TrainConfig, EXAMPLES / "paper" / f"train-phi3.5-{data}.yaml")
        assert (oracle.policy, train.policy) == ("target", "prompter")
        assert oracle.trained.model == train.target.model and oracle.target is None
        for field in ("data", "on_too_long", "reward", "response", "steps", "kl_coef"):
            assert getattr(oracle, field) == getattr(train, field)


def test_a_field_that_is_left_out_is_seen():
    mapping = {"seed": 1, "lora": {"rank": 3}}
    left_out = list(missing(TrainConfig, mapping))
    assert {"prompter", "lora.alpha", "rewrite"} <= set(left_out)
    assert not {"seed", "lora", "lora.rank"} & set(left_out)


@pytest.mark.parametrize("file", PAPER, ids=names(PAPER))
def test_its_data_has_the_column_and_the_split(file, monkeypatch):
    config = load_yaml(kind(file), file)

    def load_dataset(name, *, split):
        splits, row = HUB[name]
        assert split in splits
        return [row]

    hub = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    (row,) = load_prompts(config.data)
    assert row.prompt == "x"


@pytest.mark.parametrize("file", PAPER, ids=names(PAPER))
def test_its_reward_is_a_named_classifier(file, monkeypatch):
    import alignpro.rewards.classifier as classifier

    built = []
    monkeypatch.setattr(classifier, "ClassifierReward", lambda *a, **k: built.append((a, k)))
    build_reward(load_yaml(kind(file), file).reward)
    assert built == [(("OpenAssistant/reward-model-deberta-v3-large-v2",), {})]


@pytest.mark.parametrize("file", TRAINING, ids=names(TRAINING))
def test_it_can_be_priced(file, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_yaml(TrainConfig, file)
    report = price_train(config, rates=Rates(0.7, 0.6, 0.5, gflops=100.0, gbps=10.0))
    assert report["hours"] > report["least_hours"] > 0
    if file in PAPER:
        card = price_train(config, gpu_name="H200")
        assert card["hours"] is None and card["fits"] != "no"


def test_training_and_evaluation_belong_together():
    for file in PAPER:
        if not file.name.startswith("train-"):
            continue
        train = load_yaml(TrainConfig, file)
        evaluate = load_yaml(EvalConfig, file.with_name(file.name.replace("train-", "evaluate-")))
        for field in ("prompter", "target", "reward", "prompting", "rewrite", "response"):
            assert getattr(train, field) == getattr(evaluate, field), (file.name, field)
        assert evaluate.trained == f"{train.run_dir}/adapter"
        assert evaluate.data.path == train.data.path
        assert evaluate.data.split != train.data.split


def test_the_readme_says_that_nothing_was_run_and_names_what_is_there():
    text = (EXAMPLES / "paper" / "README.md").read_text("utf-8")
    assert "have not been run" in text
    for name in re.findall(r"examples/paper/[\w.-]+\.yaml", text):
        assert (EXAMPLES.parent / name).is_file()
    for data in HUB:
        assert data in text


CONFIGS = {
    "quickstart": QuickstartConfig,
    "sft": SftConfig,
    "train": TrainConfig,
    "prefer": PreferConfig,
    "self-improve": SelfImproveConfig,
    "evaluate": EvalConfig,
    "headroom": HeadroomConfig,
    "bound": BoundConfig,
}
PAGES = [EXAMPLES.parent / "README.md", EXAMPLES / "paper" / "README.md"]
PAGES += sorted((EXAMPLES.parent / "docs").rglob("*.md"))


def commands(text):
    """(stage, words) of every `alignpro STAGE ...` in the blocks of a page, or in backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    lines += re.findall(r"`(alignpro [^`]*)`", text)
    for line in lines:
        _, found, rest = line.partition("alignpro ")
        stage = (rest.split() or [""])[0]
        if found and stage in CONFIGS:
            yield stage, shlex.split(rest)[1:]


def loaded(stage, words):
    """The configuration that the words of a command make; options are left out, and so is a file
    that is the reader's own."""
    files = [w for w in words if w.endswith(".yaml") and w.startswith("examples/")]
    file = (
        EXAMPLES.parent / files[0].replace("$PROMPTER", "phi3.5").replace("$DATA", "orca")
        if files
        else None
    )
    return load_yaml(CONFIGS[stage], file, [w for w in words if "=" in w and w[0] != "-"])


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_the_settings_in_the_pages_exist(page, caplog):
    for stage, words in commands(page.read_text("utf-8")):
        if not words or words[0] != "CONFIG.yaml":
            loaded(stage, words)
    assert not caplog.messages  # none by an old name


def test_there_are_settings_in_the_pages():
    found = [c for page in PAGES for c in commands(page.read_text("utf-8"))]
    assert len(found) > 12 and {stage for stage, _ in found} == set(CONFIGS)
    oracle = "policy=target prompter.adapter=null run_dir=oracle"
    (command,) = [words for _, words in found if " ".join(words).endswith(oracle)]
    assert loaded("train", command).policy == "target"
