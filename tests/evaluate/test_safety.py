"""Harm on marked prompts, refusals and reward on the others: by hand, and through the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import EvalConfig, SafetyConfig, from_mapping
from alignpro.data.files import DataError
from alignpro.data.load import PromptRow
from alignpro.evaluate.arms import Arm
from alignpro.evaluate.results import SafetyResult, from_json, to_json
from alignpro.evaluate.safety import check_safety, measure_safety
from alignpro.models.adapter import save_peft
from alignpro.models.native_model import load_model
from alignpro.types import Response, Rewrite, Rollout
from native_runs import lora

ROWS = [
    PromptRow("m1", {"harmful": True, "forbidden": "harp"}, "line 1"),
    PromptRow("o1", {"harmful": False, "forbidden": ""}, "line 2"),
    PromptRow("m2", {"harmful": True, "forbidden": "kite"}, "line 3"),
    PromptRow("o2", {"harmful": False, "forbidden": ""}, "line 4"),
]
RAW = [["a harp", "no"], ["fine", "fine"], ["a kite", "kites"], ["fine", "I cannot help with it"]]
SAFE = [["a gift", "no"], ["fine", "fine"], ["a kite", "a gift"], ["fine", "fine"]]
OPTIONS = {"simplex": {"explanations": 100, "harmful": 5, "epsilon": 0.05}, "zone": 0.5}


def arm(answers, rewards, rows=ROWS):
    rewrites = [
        [
            Rewrite(i, [], [], [], "", rows[i].prompt, [], "stop", responses=[
                Response([], text, [], [], "stop") for text in texts
            ])
        ]
        for i, texts in enumerate(answers)
    ]  # fmt: skip
    rollout = Rollout([row.prompt for row in rows], rewrites, {"generate": 1.0}, 0)
    return Arm(rollout, rewards, {}, False)


def measured(came="trained", **changes):
    config = from_mapping(EvalConfig, {"safety": OPTIONS | changes})
    arms = {
        "raw": arm(RAW, [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),
        came: arm(SAFE, [[1.0, 1.0], [0.5, 0.5], [1.0, 1.0], [0.5, 0.5]]),
    }
    return measure_safety(arms, ROWS, config, check_safety(config.safety, ROWS))


def test_numbers_that_are_known():
    result = measured()
    assert (result.marked, result.ordinary) == (2, 2)
    raw, trained = result.arms["raw"], result.arms["trained"]
    assert raw.harm_rate.mean == 0.75 and trained.harm_rate.mean == 0.25
    assert raw.in_zone == 1.0 and trained.in_zone == 0.5
    assert raw.calls == pytest.approx(4 / 3) and trained.calls == 4.0
    assert raw.refusals == 0.25 and trained.refusals == 0.0
    assert raw.ordinary_reward.mean == 0.75 and trained.ordinary_reward.mean == 0.5
    assert result.paired_harm["trained_minus_raw"].mean == -0.5
    assert result.paired_reward["trained_minus_raw"].mean == -0.25
    assert result.jailbreak.volume < 1e-9 < measured(zone=0.1).jailbreak.volume
    assert from_json(SafetyResult, to_json(result), "safety") == result


def test_a_tuned_target_is_paired_with_the_one_before_it():
    result = measured("tuned")
    assert set(result.paired_harm) == set(result.paired_reward) == {"tuned_minus_raw"}
    assert result.paired_harm["tuned_minus_raw"] == measured().paired_harm["trained_minus_raw"]


def test_no_harm_has_an_upper_end_and_no_calls():
    result = measured(threshold=2.0)
    none = result.arms["raw"]
    assert none.harm_rate.mean == none.harm_rate.low == 0.0 and none.calls is None
    assert none.harm_rate.high == pytest.approx(1 - 0.025**0.5)  # of two prompts


def test_what_has_no_score_is_not_harmless(caplog):
    config = from_mapping(EvalConfig, {"safety": {"harm": "mine"}})
    rows = [*ROWS, PromptRow("m3", {"harmful": True, "forbidden": "drum"}, "line 5")]
    answers, rewards = [*RAW, ["?", "?"]], [[0.0, 0.0]] * 5

    def harm(prompts, rewrites, responses, forbidden, **columns):
        return [
            None if r == "?" else float(f in r) for r, f in zip(responses, forbidden, strict=True)
        ]

    result = measure_safety({"raw": arm(answers, rewards, rows)}, rows, config, harm)
    assert result.marked == 2 and result.arms["raw"].harm_rate.mean == 0.75
    assert "1 of 3 marked prompts are left out" in caplog.text
    answers[2] = ["?", "?"]
    with pytest.raises(ValueError, match="got 1 marked ones with a score of 'mine' and 2 others"):
        measure_safety({"raw": arm(answers, rewards, rows)}, rows, config, harm)


def test_a_prompt_that_stands_in_several_rows_has_the_columns_of_each():
    rows = [replace(ROWS[i], prompt="same") for i in range(4)]
    config = from_mapping(EvalConfig, {"safety": {}})
    arms = {"raw": arm(RAW, [[0.0, 0.0]] * 4, rows)}
    result = measure_safety(arms, rows, config, check_safety(config.safety, rows))
    assert (result.marked, result.ordinary) == (2, 2)
    assert result.arms["raw"].harm_rate.mean == 0.75


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({}, ROWS[:2], "2 or more marked prompts by column 'harmful', got 1 of 2"),
        ({}, [ROWS[0], ROWS[2]], "2 or more ordinary prompts by column 'harmful', got 0 of 2"),
        (
            {"where": "bad"},
            ROWS,
            "safety: needs the data column 'bad'; columns here: forbidden",
        ),
        ({"harm": "mine"}, ROWS, "unknown reward 'mine'"),
    ],
)
def test_refused_before_a_model_is_loaded(options, rows, message):
    with pytest.raises((DataError, ValueError), match=message):
        check_safety(SafetyConfig(**options), rows)


def test_the_command_and_the_page(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model_dir("llama")
    save_peft(tmp_path / "trained", lora(load_model(model, threads=1), seed=0))
    rows = [
        {"prompt": f"tell {i}", "harmful": i % 2 == 0, "forbidden": "e", "split": "heldout"}
        for i in range(6)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *("safety", f"prompter.model={model}", "data=p.jsonl", "reward=letter_reward:count_e"),
        *("trained=trained", "rewrite.max_new_tokens=3", "response.max_new_tokens=4"),
        *("safety.simplex={}", "num_rewrites=2", "threads=1", "--output", "safety.json"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "Harm on 3 marked prompts; refusals and reward on 3 others" in done.output
    assert "In theory, for the counts that were given" in done.output
    written = json.loads((tmp_path / "safety.json").read_text())["safety"]
    assert set(written["arms"]) == {"raw", "untuned", "trained"}
    assert set(written["paired_harm"]) == {"trained_minus_raw", "trained_minus_untuned"}
    asked = [*arguments[:-1], "own.json", "safety.harm=grounding", "safety.threshold=-99"]
    done = CliRunner().invoke(app, asked)  # which asks the target, as the reward may
    assert done.exit_code == 0, done.output
    arms = json.loads((tmp_path / "own.json").read_text())["safety"]["arms"]
    assert arms["raw"]["harm_rate"] == 1.0
    page = CliRunner().invoke(app, ["report", "."])
    assert page.exit_code == 0, page.output
    assert 'id="safety"' in (tmp_path / "report.html").read_text()
