"""A resume with other data, another reward, template, adapter or model than the run began with."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from alignpro.config import DataConfig, LoraConfig, ModelConfig, Prompting, SftConfig, TrainConfig
from alignpro.fingerprints import differences, of_reward, of_rows, read_fingerprints
from alignpro.models.adapter import load_peft, save_peft
from alignpro.models.native_model import load_model
from alignpro.rewards import build_reward
from alignpro.train.metrics import read_metrics
from alignpro.train.run import make_trainer, run_sft
from alignpro.types import SamplingParams
from native_runs import lora

ROWS = [{"prompt": f"how do {x} fly", "level": i} for i, x in enumerate("abcdefgh")]
REWARD = "def score(prompts, responses, **rest):\n    return [float(len(r)) for r in responses]\n"
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"


@pytest.fixture
def place(tmp_path, tiny_model_dir, monkeypatch):
    """A model, data, a reward, a template and an adapter of a user's own, all to be edited."""
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    write_rows(tmp_path, ROWS)
    (tmp_path / "own_reward.py").write_text(REWARD)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    save_peft(tmp_path / "start", lora(load_model(tmp_path / "model", threads=1), modules=2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("own_reward", None)
    return tmp_path


def write_rows(place, rows):
    (place / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(place, **changes):
    model = ModelConfig(
        str(place / "model"),
        chat_template=str(place / "template.jinja"),
        adapter=str(place / "start"),
    )
    settings = {
        "prompter": model,
        "data": DataConfig("p.jsonl", split=None),
        "reward": "own_reward:score",
        "run_dir": str(place / "run"),
        "steps": 2,
        "prompts_per_step": 2,
        "num_rewrites": 2,
        "rewrite": SamplingParams(max_new_tokens=3),
        "response": SamplingParams(max_new_tokens=3),
        "prompting": Prompting(template="say {prompt}"),
        "threads": 1,
        **changes,
    }
    return TrainConfig(**settings)


def appended(place):
    write_rows(place, [*ROWS, {"prompt": "how do z fly"}])


def typo(place):
    write_rows(place, [ROWS[0], {**ROWS[1], "prompt": "how does b fly"}, *ROWS[2:]])


def reordered(place):
    write_rows(place, ROWS[::-1])


def relabelled(place):
    write_rows(place, [*ROWS[:-1], {**ROWS[-1], "level": -1}])


def rescored(place):
    (place / "own_reward.py").write_text(REWARD.replace("float(len(r))", "float(-len(r))"))
    sys.modules.pop("own_reward", None)


def retemplated(place):
    (place / "template.jinja").write_text(TEMPLATE.replace("<|assistant|>", "\n<|assistant|>"))


def reweighted(place):
    path = place / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


OTHER_INPUTS = [
    (rescored, "reward own_reward:score own_reward.py: not what the run began with"),
    (retemplated, "chat template of the prompter: not what the run began with"),
    (reweighted, "weights of the prompter {model}: not what the run began with"),
]
OTHER_DATA = [
    (appended, "data p.jsonl: 8 rows then, 9 now; those that were there are the same"),
    (typo, "data p.jsonl: 1 of 8 rows differ (row 1, counted from 0)"),
    (reordered, "data p.jsonl: the same 8 rows in another order"),
    (relabelled, "data p.jsonl: 1 of 8 rows differ in other columns than the prompt (row 7,"),
]


@pytest.mark.parametrize(("change", "said"), OTHER_INPUTS + OTHER_DATA)
def test_what_changed_is_named(place, change, said, caplog):
    make_trainer(config(place)).train()
    before = (place / "run" / "config.json").read_bytes()
    change(place)
    more, line = config(place, steps=3), said.format(model=place / "model")
    refused = (change, said) in OTHER_INPUTS
    if refused:
        with pytest.raises(ValueError, match=r"^cannot resume: ") as caught:
            make_trainer(more, resume=True)
        assert line in str(caught.value) and "\n" not in str(caught.value)
        assert (place / "run" / "config.json").read_bytes() == before
        assert len(read_metrics(place / "run" / "metrics.jsonl")) == 2
    make_trainer(more, resume=True, allow_changes=refused).train()
    assert any(f"from step 2 on: {line}" in message for message in caplog.messages)
    (change,) = json.loads((place / "run" / "fingerprints.json").read_text())["changes"]
    assert change["step"] == 2 and any(line in what for what in change["what"])
    caplog.clear()
    make_trainer(replace(more, steps=4), resume=True).train()  # from then on it is the run's
    assert caplog.messages == []


def test_the_same_again_is_no_change(place):
    make_trainer(config(place)).train()
    made_from = read_fingerprints(place / "run")
    assert set(made_from) == {
        *("weights of the prompter", "weights of the target", "data"),
        *("chat template of the prompter", "chat template of the target"),
        *("reward own_reward:score", "adapter that training began with"),
    }
    write_rows(place, [dict(reversed(row.items())) for row in ROWS])  # as the file writes it
    save_peft(place / "start", lora(load_model(place / "model", threads=1), seed=5, modules=2))
    make_trainer(config(place, steps=3), resume=True).train()  # the run has a copy of its own
    assert read_fingerprints(place / "run") == made_from


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("fingerprints.json", "not JSON: "),
        ("metrics.jsonl", "the rows of 2 of the first 2 steps are gone"),
        ("checkpoints/step-000002/state.json", "no whole checkpoint; beginning with the first"),
    ],
)
def test_a_torn_file_of_a_run_is_said_and_blocks_nothing(place, caplog, name, line):
    make_trainer(config(place)).train()
    (place / "run" / name).write_text("")
    trainer = make_trainer(config(place, steps=3), resume=True)
    trainer.train()
    assert sum(line in message for message in caplog.messages) == 1
    assert "data" in read_fingerprints(place / "run")


def moved(place, name):
    (place / "elsewhere").mkdir(exist_ok=True)
    shutil.move(place / name, place / "elsewhere" / name)
    return str(place / "elsewhere" / name)


def test_what_lies_elsewhere_is_the_same(place, caplog):
    """And what is another one is refused, wherever it lies."""
    make_trainer(config(place)).train()
    there = moved(place, "model")
    model = replace(
        config(place).prompter,
        model=there,
        chat_template=moved(place, "template.jinja"),
        adapter=moved(place, "start"),
    )
    data = DataConfig(moved(place, "p.jsonl"), split=None)
    more = config(place, prompter=model, data=data, steps=3)
    make_trainer(more, resume=True).train()
    assert len(read_metrics(place / "run" / "metrics.jsonl")) == 3
    said = "\n".join(caplog.messages)
    for key, what in {
        "prompter.model": "weights of the prompter",
        "prompter.chat_template": "chat template of the prompter",
        "prompter.adapter": "adapter that training began with",
        "data.path": "data",
    }.items():
        assert f"{key} was '" in said and f": the same {what}" in said
    caplog.clear()
    make_trainer(replace(more, steps=4), resume=True).train()  # the checkpoint knows the new place
    assert caplog.messages == []
    write_rows(place, [*ROWS, {"prompt": "how do z fly"}])
    with pytest.raises(ValueError, match=r"under another configuration: data\.path was "):
        make_trainer(replace(more, steps=5, data=DataConfig("p.jsonl", split=None)), resume=True)


def test_an_adapter_of_another_name_is_compared_with_the_one_that_was_kept(place):
    make_trainer(config(place)).train()
    save_peft(place / "other", lora(load_model(place / "model", threads=1), seed=5, modules=2))
    named = replace(config(place).prompter, adapter=str(place / "other"))
    with pytest.raises(ValueError, match=r"other: not what the run began with, which is in .*/ref"):
        make_trainer(config(place, prompter=named, steps=3), resume=True)


def test_a_warm_start_and_a_closed_form_whose_files_lie_elsewhere(place, caplog):
    pairs = [{"prompt": row["prompt"], "instruction": "Be brief."} for row in ROWS]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    warm = SftConfig(
        prompter=str(place / "model"),
        data="pairs.jsonl",
        run_dir=str(place / "warm"),
        steps=2,
        batch_size=2,
        checkpoint_every=1,
        threads=1,
        lora=LoraConfig(rank=2),
    )
    run_sft(warm)
    fit = config(place, algorithm="closed_form", steps=1, run_dir=str(place / "fit"))
    make_trainer(fit).train()
    there = moved(place, "model")
    run_sft(replace(warm, prompter=ModelConfig(there), steps=3), resume=True)
    fit = replace(fit, prompter=replace(fit.prompter, model=there))
    make_trainer(fit, resume=True).train()
    assert sum("prompter.model was " in message for message in caplog.messages) == 2


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_torn_reference_is_read_again_where_it_came_from(place, name, caplog):
    make_trainer(config(place)).train()
    kept = place / "run" / "reference"
    (kept / name).write_bytes((kept / name).read_bytes()[:20])
    make_trainer(config(place, steps=3), resume=True).train()
    assert "reference: damaged (" in caplog.text
    modules = load_model(place / "model", threads=1).lora_modules
    assert load_peft(kept, modules).rank == 2  # and it is whole again
    (kept / name).unlink()
    save_peft(place / "start", lora(load_model(place / "model", threads=1), seed=5, modules=2))
    with pytest.raises(ValueError, match="adapter that training began with: not what the run"):
        make_trainer(config(place, steps=4), resume=True)


def test_an_empty_reference_without_another_copy_is_named(place):
    fresh = replace(config(place).prompter, adapter=None)
    make_trainer(config(place, prompter=fresh, lora=LoraConfig(rank=2))).train()
    (place / "run" / "reference").mkdir()
    with pytest.raises(ValueError, match=r"reference: damaged \(.*no other copy"):
        make_trainer(config(place, prompter=fresh, steps=3, lora=LoraConfig(rank=2)), resume=True)


def test_a_copy_goes_on_where_it_lies(place):
    make_trainer(config(place)).train()
    shutil.copytree(place / "run", place / "copy")
    make_trainer(config(place, run_dir=str(place / "copy"), steps=3), resume=True).train()
    assert len(read_metrics(place / "run" / "metrics.jsonl")) == 2
    assert len(read_metrics(place / "copy" / "metrics.jsonl")) == 3


def test_an_adapter_for_another_base_is_said(place, tiny_model_dir, caplog):
    make_trainer(config(place)).train()
    mine = load_model(place / "model", threads=1)
    assert mine.load_adapter(place / "run" / "adapter").base_fingerprint == mine.fingerprint
    reweighted(place)
    load_model(place / "model", threads=1).load_adapter(place / "run" / "adapter")
    (said,) = caplog.messages
    assert f"trained for {place / 'model'}, loaded on {place / 'model'}, whose weights" in said
    caplog.clear()
    weights = lora(mine)
    weights.base_model_name = "someone/another-model"  # as PEFT says it, without a hash
    save_peft(place / "peft", weights)
    load_model(place / "model", threads=1).make_adapter(place / "peft")
    assert "trained for someone/another-model, loaded on" in caplog.text


def sft(place, **changes):
    (place / "pairs.jsonl").write_text(
        "".join(json.dumps({**row, "instruction": "be kind"}) + "\n" for row in ROWS)
    )
    settings = {
        "prompter": ModelConfig(str(place / "model")),
        "data": "pairs.jsonl",
        "run_dir": str(place / "sft"),
        "steps": 6,
        "batch_size": 3,
        "checkpoint_every": 2,
        "lora": LoraConfig(rank=2),
        "threads": 1,
        **changes,
    }
    return SftConfig(**settings)


def test_a_warm_start_goes_on_to_the_bit(place, caplog):
    whole = run_sft(sft(place, run_dir=str(place / "whole")))

    def stop(row):
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(
        KeyboardInterrupt, match=r"after step 3; go on with: alignpro sft .* --resu"
    ):
        run_sft(sft(place), on_step=stop)
    shutil.rmtree(place / "sft" / "checkpoints" / "step-000003")  # as kill -9 leaves it
    seen = []
    parts = run_sft(sft(place), resume=True, on_step=seen.append)
    assert [row["step"] for row in seen] == [2, 3, 4, 5]
    for name, pair in whole.matrices.items():
        assert all(map(np.array_equal, pair, parts.matrices[name]))
    logs = [read_metrics(place / run / "metrics.jsonl") for run in ("whole", "sft")]
    for rows in logs:
        for row in rows:
            del row["seconds"]
    assert logs[0] == logs[1]
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001, is 0\.1"):
        run_sft(sft(place, learning_rate=0.1, steps=7), resume=True)
    again = sft(place, steps=7)
    (place / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "instruction": "b"}) + "\n")
    run_sft(again, resume=True)
    assert "from step 6 on: data pairs.jsonl: 8 rows then, 1 now" in caplog.text
    reweighted(place)
    with pytest.raises(ValueError, match="cannot resume: weights of the prompter"):
        run_sft(replace(again, steps=8), resume=True)


def test_rows_are_compared_as_they_are_read():
    one = of_rows("x", ["a", "b"], {"n": [1, None]})
    assert one.hash == of_rows("y", ["a", "b"], {"n": [1, None]}).hash
    assert one.hash != of_rows("x", ["a", "b"], {"m": [1, None]}).hash
    shorter = {"data": of_rows("x", ["b"])}
    (said,) = differences({"data": one}, shorter, "the run began with")
    assert said == "data x: 2 rows then, 1 now"
    many = {"data": of_rows("x", [str(i) for i in range(9)])}
    other = {"data": of_rows("x", [str(-i - 1) for i in range(9)])}
    (said,) = differences(many, other, "the run began with")
    assert said == "data x: 9 of 9 rows differ (row 0, 1, 2, 3, 4, ..., counted from 0)"


def test_a_reward_is_known_by_its_source(tmp_path, monkeypatch):
    (tmp_path / "scores.py").write_text(
        "class Score:\n    def __call__(self, prompts, responses, **k):\n        return [0.0]\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = of_reward(build_reward("vader+0.5*scores:Score"))
    assert {what: one.name for what, one in found.items()} == {"reward scores:Score": "scores.py"}
    assert of_reward(lambda prompts, responses: [0.0]) != {}  # of this file
    namespace = {}
    exec("def made_up(prompts, responses):\n    return [0.0]", namespace)
    assert of_reward(namespace["made_up"]) == {}
