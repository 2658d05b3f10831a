"""What a run does with its chat template: reasoning, variables, and one date to the end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from alignpro.config import (
    EvalConfig,
    LoraConfig,
    ModelConfig,
    Prompting,
    SftConfig,
    TrainConfig,
    from_mapping,
    load_yaml,
)
from alignpro.evaluate.run import run_evaluate
from alignpro.models.native_model import load_model, load_models
from alignpro.run_directory import recorded_date
from alignpro.train.metrics import read_metrics
from alignpro.train.policy import LoraPolicy
from alignpro.train.run import make_trainer
from alignpro.train.sft import warm_start
from alignpro.types import SamplingParams
from scripted_model import scripted_model

DATED = (
    "{{ strftime_now('%d') }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    "<|assistant|>"
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("thinker") / "model"
    chain = ["<|assistant|>", "<think>", "h", "m", "</think>", "B", "e", "</s>"]
    return scripted_model(folder, tiny_model_dir("llama"), [chain, [":", "S", "o", "</s>"]])


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"how do {x} fly"}) + "\n" for x in "abcdefgh"))
    return str(file)


def config(tmp_path, data, model, **changes):
    settings = {
        "prompter": model,
        "data": {"path": data, "split": None},
        "reward": "letter_reward:count_e",
        "run_dir": str(tmp_path / "run"),
        "steps": 2,
        "prompts_per_step": 4,
        "num_rewrites": 2,
        "rewrite": SamplingParams(max_new_tokens=8),
        "response": SamplingParams(max_new_tokens=8, temperature=0.7),
        "prompting": Prompting(template="say {prompt}"),
        "lora": LoraConfig(rank=2),
        "threads": 1,
        **changes,
    }
    return TrainConfig(**settings)


def log(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in rows]


def test_a_run_keeps_its_date(tiny_model_dir, tmp_path, data, monkeypatch):
    def on(day):
        monkeypatch.setattr("alignpro.train.run.today", lambda: f"2026-11-{day}")

    model = ModelConfig(str(tiny_model_dir("llama")), chat_template=DATED)
    whole = config(tmp_path, data, model, run_dir=str(tmp_path / "whole"), steps=3)
    parts = config(tmp_path, data, model, steps=2)
    on(28)
    make_trainer(whole).train()
    make_trainer(parts).train()
    on(29)
    make_trainer(replace(parts, steps=3), resume=True).train()
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    other = replace(parts, run_dir=str(tmp_path / "other"), steps=3)
    make_trainer(other).train()
    assert log(tmp_path / "other") != log(tmp_path / "whole")  # it does read the date

    adapter = tmp_path / "run" / "adapter"
    assert recorded_date(None, tmp_path, adapter) == recorded_date(adapter) == "2026-11-28"
    assert (
        recorded_date(tmp_path / "run" / "checkpoints" / "step-000003" / "adapter") == "2026-11-28"
    )
    with pytest.raises(ValueError, match="date was '2026-11-28', is '2026-11-30'"):
        make_trainer(replace(parts, steps=4, date="2026-11-30"), resume=True)
    evaluation = EvalConfig(
        prompter=model,
        trained=str(adapter),
        data={"path": data, "split": None},
        num_prompts=2,
        num_rewrites=1,
        reward="letter_reward:count_e",
        rewrite=whole.rewrite,
        response=whole.response,
        prompting=whole.prompting,
        threads=1,
    )
    report = run_evaluate(evaluation)
    assert report.evaluation_config["date"] == report["evaluation_config"]["date"] == "2026-11-28"


def test_a_date_of_yaml_is_a_date():
    assert from_mapping(TrainConfig, {"date": "2026-11-28"}).date == "2026-11-28"
    assert load_yaml(TrainConfig, None, ["date=2026-11-28"]).date == "2026-11-28"
    with pytest.raises(ValueError, match=r'^date: expected a date such as "2026-11-28"'):
        TrainConfig(date="28 Nov")


def test_a_prompter_that_thinks_is_trained_on_all_that_it_wrote(thinker, tmp_path, data):
    target = ModelConfig(str(thinker), chat_template_kwargs={"enable_thinking": False})
    settings = config(tmp_path, data, str(thinker), target=target)
    trainer = make_trainer(settings)  # which checks that scored and sampled are equal to the bit
    trainer.train()
    for row in log(tmp_path / "run"):
        assert row["sample"] == "Be" and row["rewrite_tokens"] == 7 and row["reasoning_alone"] == 0
        assert row["failed_responses"] == 0 and row["parity_max_abs"] == 0.0
    pipeline = trainer.pipeline
    assert pipeline.target is not pipeline.prompter
    assert pipeline.target.core_model is pipeline.prompter.core_model


def test_a_rewrite_that_is_cut_in_its_reasoning_is_an_empty_one(thinker, tmp_path, data):
    target = ModelConfig(str(thinker), chat_template_kwargs={"enable_thinking": False})
    short = SamplingParams(max_new_tokens=3)
    make_trainer(config(tmp_path, data, str(thinker), target=target, rewrite=short)).train()
    row = log(tmp_path / "run")[0]
    assert row["empty_rewrites"] == row["reasoning_alone"] == row["truncated_rewrites"] == 8
    assert "reasoning alone, cut before it ended" in row["warnings"]["reasoning_alone"]


def test_a_template_of_ones_own_where_the_file_has_none(tiny_model_dir, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_dir("llama"), folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    bare = ModelConfig(str(folder))
    with pytest.raises(
        ValueError, match=r"^prompter: .* has no chat template; chat_template takes"
    ):
        load_models(bare, None, 1)
    file = tmp_path / "own.jinja"
    file.write_text("<|user|>{{ messages[0].content }}<|assistant|>")
    with pytest.raises(ValueError, match=r"^target: .* has no chat template"):
        load_models(replace(bare, chat_template=str(file)), bare, 1)
    prompter, target = load_models(replace(bare, chat_template=str(file)), None, 1)
    assert target is prompter
    assert prompter.generate(["hi"], SamplingParams(max_new_tokens=2))[0].tokens


def test_no_instruction_is_taught_inside_a_block_of_reasoning(thinker):
    pairs, settings = [("Why?", "Be brief.")], SftConfig(prompting=Prompting(template="{prompt}"))

    def policy(**options):
        return LoraPolicy.fresh(load_model(thinker, 1, **options), LoraConfig(rank=2), seed=0)

    assert warm_start(policy(), pairs, settings)
    with pytest.raises(ValueError, match="pair 0: the chat template opens a block of reasoning"):
        warm_start(policy(chat_template_kwargs={"force_thinking": True}), pairs, settings)
