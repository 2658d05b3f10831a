"""Headroom and evaluation before a target behind an endpoint; what needs more than text says so."""

from __future__ import annotations

import itertools
import json

import pytest

from alignpro.config import (
    BoundConfig,
    EvalConfig,
    HeadroomConfig,
    SftConfig,
    TrainConfig,
    from_mapping,
    to_mapping,
)
from alignpro.evaluate.headroom import complete_rewards, run_headroom
from alignpro.evaluate.results import to_json
from alignpro.evaluate.run import run_evaluate
from alignpro.models.in_flight import FailedRowsError
from alignpro.types import Response, Rewrite, Rollout
from chat_server import ChatServer, Fault


@pytest.fixture
def server():
    numbers = itertools.count()  # another answer for every call
    with ChatServer(lambda asked: Fault.reply(f"{next(numbers)} good", usage=(6, 3))) as running:
        yield running


@pytest.fixture
def stage(server, tiny_model_dir, tmp_path, monkeypatch):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "Why {i}?"}}\n' for i in range(4)))
    module = "def score(responses):\n    return [len(r) for r in responses]\n"
    (tmp_path / "length_of_responses.py").write_text(module)
    monkeypatch.chdir(tmp_path)  # where the reward's module is looked for
    prices = {"input_price": 1.0, "output_price": 2.0}
    return {
        "prompter": str(tiny_model_dir("llama")),
        "target": {"endpoint": server.url, "model": "big", "max_failed": 0.4, "client": prices},
        "data": {"path": str(data), "split": None},
        "reward": "length_of_responses:score",
        "num_prompts": 4,
        "num_rewrites": 2,
        "num_responses": 2,
        "rewrite": {"max_new_tokens": 4},
        "threads": 1,
    }


def test_headroom_before_an_endpoint_and_its_calls_beside_the_samples(stage, server, tmp_path):
    config = from_mapping(HeadroomConfig, stage)
    report = run_headroom(config, samples=tmp_path / "samples.jsonl")
    assert len(server.asked) == 16
    assert to_json(report.target_usage) == {
        "input_tokens": 96,
        "output_tokens": 48,
        "cost": pytest.approx(192e-6),
    }
    (tmp_path / "samples.jsonl").unlink()
    server.kill()
    again = run_headroom(config, samples=tmp_path / "samples.jsonl")
    assert to_json(again) == to_json(report)
    server.start()


def test_an_evaluation_before_an_endpoint_is_replayed(stage, server, tmp_path):
    stage = {**stage, "static": "Be brief."}
    config = from_mapping(EvalConfig, stage)
    report = to_json(run_evaluate(config, output=tmp_path / "evaluation.json"))
    asked = len(server.asked)
    assert set(report["arms"]) == {"raw", "static", "untuned"}
    assert report["arms"]["raw"]["response_tokens"] == 3
    assert report["target_usage"]["output_tokens"] == 3 * 3 * 16
    # An empty rewrite is the raw prompt with the raw arm's draws, which were paid for already.
    assert asked <= 3 * 16
    server.kill()
    again = to_json(run_evaluate(config, output=tmp_path / "evaluation.json"))
    del report["tokens_per_second"], again["tokens_per_second"]
    assert again == report
    server.start()


def test_prompts_without_an_answer_in_an_arm_leave_all_of_them(stage, server):
    def answer(asked):
        if asked.turn == "Why 2?":
            return Fault.error(400, "not this one")
        return Fault.reply("x" * (3 if asked.turn == "Why 3?" else 1), usage=(1, 1))

    server.answer = answer
    report = run_evaluate(from_mapping(EvalConfig, {**stage, "static": "Be brief."}))
    assert {name: arm.n for name, arm in report.arms.items()} == dict.fromkeys(report.arms, 3)
    assert report.failed_responses >= 4
    assert report.arms["raw"].reward.mean == pytest.approx((1 + 1 + 3) / 3)
    assert [sample.prompt for sample in report.samples] == ["Why 0?", "Why 1?", "Why 3?"]


def test_the_headroom_is_over_prompts_with_every_response():
    def rollout(*counts):
        rewrites = [
            [Rewrite(i, [], [], [], "a", "a", [], "stop", [Response([], "x", [], "stop", i)] * n)]
            for i, n in enumerate(counts)
        ]
        return Rollout(["p"] * len(counts), rewrites, {}, 0)

    assert complete_rewards(rollout(2, 1, 2, 0)).tolist() == [[[0, 0]], [[2, 2]]]
    with pytest.raises(FailedRowsError, match="of 3 prompts 1 have every response"):
        complete_rewards(rollout(2, 1, 0))


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        (BoundConfig, {"tuned": "a"}, "target.endpoint: expected null: an adapter of the target"),
        (TrainConfig, {"policy": "target"}, "target.endpoint: expected null: it is trained"),
        (EvalConfig, {"tuned": "a"}, "target.endpoint: expected null: an adapter of the target"),
    ],
)
def test_what_needs_more_than_text_says_so_before_anything_is_loaded(kind, settings, line):
    target = {"endpoint": "http://127.0.0.1:9/v1", "model": "big"}
    with pytest.raises(ValueError, match=r"^target\.endpoint") as caught:
        from_mapping(kind, {"target": target, **settings})
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [TrainConfig, EvalConfig, HeadroomConfig, BoundConfig, SftConfig])
def test_a_prompter_is_here(kind):
    prompter = {"endpoint": "http://127.0.0.1:9/v1", "model": "big"}
    with pytest.raises(ValueError, match=r"^prompter\.endpoint: expected null: "):
        from_mapping(kind, {"prompter": prompter})


def test_the_configuration_of_a_run_with_an_endpoint_is_read_back(stage, tmp_path):
    from alignpro.train.checkpoint import check_same_run

    del stage["num_prompts"]
    config = from_mapping(TrainConfig, stage)
    saved = json.loads(json.dumps(to_mapping(config)))
    assert from_mapping(TrainConfig, saved) == config
    moved = {**stage["target"], "endpoint": "http://127.0.0.1:10/v1", "max_failed": 0.0}
    moved["client"] = {"concurrency": 3, "budget": {"calls": 5}}
    check_same_run(saved, to_mapping(from_mapping(TrainConfig, {**stage, "target": moved})))
    other = {**stage["target"], "model": "other"}
    with pytest.raises(ValueError, match=r"target\.model was 'big', is 'other'"):
        check_same_run(saved, to_mapping(from_mapping(TrainConfig, {**stage, "target": other})))
