"""Win rates: a judge on a real HTTP server with the faults that real ones have."""

from __future__ import annotations

import functools
import json
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from alignpro.config import JudgeConfig
from alignpro.evaluate.arms import Arm
from alignpro.evaluate.judge import JudgeError, VerdictFile, judge_arms
from alignpro.evaluate.judges import (
    EndpointJudge,
    LocalJudge,
    read_verdict,
)
from alignpro.evaluate.results import to_json
from alignpro.models.native_model import load_model
from alignpro.statistics import length_controlled_win_rate
from alignpro.types import Conversation, Response, Rewrite, Rollout
from chat_server import Fault
from judge_server import JudgeServer

PROMPTS = ["Why {first}?", "How?\n\nTwo lines.", "What?", "Who?"]


def arm(texts, rewrite="REWRITTEN", prompts=None):
    """One response text a prompt, or a list of them."""
    prompts = prompts or PROMPTS
    groups = []
    for index, text in enumerate(texts):
        responses = [
            Response([1], t, [0.0], "stop") for t in ([text] if isinstance(text, str) else text)
        ]
        groups.append(
            [Rewrite(index, [], [1], [0.0], rewrite, f"{rewrite} turn", [1], "stop", responses)]
        )
    rollout = Rollout(list(prompts), groups, {"generate": 0.0}, 0)
    return Arm(rollout, [[0.0]] * len(texts), {}, True)


def better(asked):
    """Prefers the response that says "good"."""
    return "A" if "good" in asked.a else "B"


@pytest.fixture
def server(monkeypatch):
    # 1000 resamples a comparison take half a second; test_statistics.py looks at the interval.
    few = functools.partial(length_controlled_win_rate, resamples=60)
    monkeypatch.setattr("alignpro.evaluate.judge.length_controlled_win_rate", few)
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    with JudgeServer(better) as running:
        yield running


def config(server, **changes):
    settings = {
        "model": "referee",
        "base_url": server.url,
        "api_key_env": "JUDGE_KEY",
        "max_retries": 2,
        "timeout_seconds": 5.0,
        **changes,
    }
    return JudgeConfig(**settings)


def ask(server, arms, *, verdicts=None, calls=None, **changes):
    settings = config(server, **changes)
    return to_json(judge_arms(EndpointJudge(settings, calls), arms, settings, verdicts=verdicts))


ARMS = {
    "trained": arm(["good a", "good b", "poor c", "good d"]),
    "raw": arm(["poor 1", "poor 2", "good 3", "poor 4"]),
}


def test_wins_losses_and_what_the_judge_sees(server):
    report = ask(server, ARMS)
    assert (report["name"], report["questions"], report["failed"]) == ("referee", 8, 0)
    result = report["comparisons"]["trained_vs_raw"]
    assert (result["n"], result["wins"], result["ties"], result["losses"]) == (4, 3, 0, 1)
    assert result["win_rate"] == 0.75 and result["order_disagreements"] == 0
    low, high = result["ci95"]
    assert 0 <= low < 0.75 < high <= 1
    assert result["first_chosen"] == 0.5 and result["errors"] == 0
    assert result["mean_length_difference"] == 0.0
    # At equal lengths length control changes nothing but for the weak prior.
    assert result["length_controlled_win_rate"] == pytest.approx(0.75, abs=0.01)
    # The original prompt with both responses, in both orders; never a rewrite.
    trained, raw = (
        ("good a", "good b", "poor c", "good d"),
        ("poor 1", "poor 2", "good 3", "poor 4"),
    )
    expected = [*zip(PROMPTS, trained, raw, strict=True), *zip(PROMPTS, raw, trained, strict=True)]
    assert sorted((q.prompt, q.a, q.b) for q in server.asked) == sorted(expected)
    for asked in server.asked:
        assert "REWRITTEN" not in json.dumps(asked.body)
        assert asked.headers["authorization"] == "Bearer secret-key"
        assert asked.body["model"] == "referee" and asked.body["temperature"] == 0.0
        assert asked.body["max_tokens"] == 16


def test_the_judge_sees_the_whole_conversation(server):
    chat = Conversation((("system", "Be {first}."), ("user", "a"), ("assistant", "b")), "last")
    prompts = [chat, *PROMPTS[1:]]
    arms = {
        name: replace(one, rollout=replace(one.rollout, prompts=prompts))
        for name, one in ARMS.items()
    }
    ask(server, arms)
    assert {q.prompt for q in server.asked} == {chat.text, *PROMPTS[1:]}
    assert chat.text == "System: Be {first}.\n\nUser: a\n\nAssistant: b\n\nUser: last"


def test_a_judge_that_always_says_a_prefers_nothing(server):
    server.verdict = lambda asked: "A"
    result = ask(server, ARMS)["comparisons"]["trained_vs_raw"]
    assert (result["wins"], result["ties"], result["losses"]) == (0, 4, 0)
    assert result["win_rate"] == 0.5 and result["ci95"] == [0.5, 0.5]
    assert result["order_disagreements"] == 4 and result["first_chosen"] == 1.0


def test_a_judge_of_length_is_seen_through(server):
    """The trained arm is longer in three of four pairs, and the longer response always wins."""
    server.verdict = lambda asked: "A" if len(asked.a) > len(asked.b) else "B"
    draws = np.random.default_rng(0)
    prompts = [f"question {i}" for i in range(150)]
    lengths = draws.integers(40, 160, size=150)
    longer = np.rint(draws.normal(20, 30, size=150)).astype(int)
    arms = {
        "trained": arm(["t" * int(n) for n in np.maximum(lengths + longer, 1)], prompts=prompts),
        "raw": arm(["r" * int(n) for n in lengths], prompts=prompts),
    }
    result = ask(server, arms)["comparisons"]["trained_vs_raw"]
    assert result["win_rate"] > 0.7 and result["ci95"][0] > 0.6
    low, high = result["length_controlled_ci95"]
    assert low < 0.5 < high
    assert abs(result["length_controlled_win_rate"] - 0.5) < 0.1  # 150 pairs
    assert result["mean_length_difference"] == pytest.approx(longer.mean(), abs=1)


def test_three_comparisons_and_several_pairs(server):
    arms = {
        "trained": arm([["good 1", "poor 1"]] * 4),
        "raw": arm([["poor 2", "poor 2"]] * 4, ""),
        "untuned": arm([["poor 3", "good 3"]] * 4),
        "static": arm([["good 1", "poor 1"]] * 4),
        "optimum": arm([["x", "y"]] * 4),
        "tuned": arm([["x", "y"]] * 4),
    }
    report = ask(server, arms, num_prompts=3, num_pairs=2)
    found = report["comparisons"]
    assert list(found) == ["trained_vs_raw", "trained_vs_untuned", "trained_vs_static"]
    assert [found[name]["n"] for name in found] == [6, 6, 6]
    # poor 1 against poor 2: the server says B to both, which is a disagreement and a tie.
    raw = found["trained_vs_raw"]
    assert (raw["wins"], raw["ties"], raw["order_disagreements"]) == (3, 3, 3)
    assert (found["trained_vs_untuned"]["wins"], found["trained_vs_untuned"]["losses"]) == (3, 3)
    # The same text on both sides is a tie that nobody was asked about.
    static = found["trained_vs_static"]
    assert (static["ties"], static["identical"], static["order_disagreements"]) == (6, 6, 0)
    assert raw["identical"] == 0
    assert static["first_chosen"] is None
    assert report["questions"] == len(server.asked) == 24
    assert {asked.prompt for asked in server.asked} == set(PROMPTS[:3])


def test_the_same_question_is_asked_once(server):
    report = ask(server, {**ARMS, "untuned": ARMS["raw"]})
    assert report["questions"] == len(server.asked) == 8
    found = report["comparisons"]
    assert found["trained_vs_raw"] == found["trained_vs_untuned"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=429, headers={"Retry-After": "0"}),
        Fault(status=500, headers={"Retry-After": "0"}),
        Fault(status=503, body="<html>busy</html>", headers={"Retry-After": "0"}),
        Fault(body='{"choices": [{"mess', promise=500),
        Fault(body='{"choices": [{"mess'),
        Fault(body="[]"),
        Fault(body='{"choices": []}'),
        Fault(body="null"),
        Fault.reply("I think that both have their merits."),
        Fault.reply(None),
        Fault.reply(""),
    ],
)
def test_a_passing_fault_costs_no_verdict(server, fault):
    server.faults = [fault]
    report = ask(server, ARMS)
    assert report["failed"] == 0 and len(server.asked) == 9
    assert report["comparisons"]["trained_vs_raw"]["wins"] == 3


def test_retry_after_is_waited_for(server):
    server.faults = [Fault(status=429, headers={"Retry-After": "1"})]
    arms = {name: arm(["good", "bad"], prompts=PROMPTS[:2]) for name in ("trained", "raw")}
    arms["raw"] = arm(["bad", "bad"], prompts=PROMPTS[:2])
    ask(server, arms, concurrency=1)
    assert server.asked[1].at - server.asked[0].at >= 0.9
    assert server.asked[1].prompt == server.asked[0].prompt


def test_a_timeout_is_tried_again(server):
    server.faults = [Fault(sleep=1.5)]
    report = ask(server, ARMS, concurrency=1, timeout_seconds=0.3)
    assert report["failed"] == 0 and len(server.asked) == 9


def test_a_verdict_in_prose_is_asked_once_more_then_an_error(server):
    prose = Fault.reply("Response A is better, although B is shorter.")
    server.faults = [prose, prose]
    report = ask(server, ARMS, concurrency=1, max_failed=0.2)
    assert report["failed"] == 1 and len(server.asked) == 9
    again = server.asked[1].body["messages"]
    assert [m["role"] for m in again] == ["user", "assistant", "user"]
    assert again[0] == server.asked[0].body["messages"][0]
    result = report["comparisons"]["trained_vs_raw"]
    assert (result["n"], result["errors"]) == (3, 1)  # neither a loss nor a tie
    assert (result["wins"], result["ties"], result["losses"]) == (2, 0, 1)
    assert result["win_rate"] == pytest.approx(2 / 3)


def test_too_many_failures_stop_the_run_and_lose_nothing(server, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    server.verdict = lambda asked: better(asked) if "How" in asked.prompt else "hm"
    with pytest.raises(JudgeError, match=r"2 of \d questions got no verdict.*no verdict: hm") as e:
        ask(server, ARMS, max_failed=0.2, concurrency=1, verdicts=VerdictFile(path))
    assert "\n" not in str(e.value) and "0.2 of 8" in str(e.value)
    kept = len(path.read_text().splitlines()) if path.exists() else 0
    server.verdict, server.asked = better, []
    report = ask(server, ARMS, verdicts=VerdictFile(path))
    assert report["replayed"] == kept and len(server.asked) == 8 - kept


def test_nothing_is_asked_once_the_run_has_stopped(server):
    def slow_but_the_first(asked):
        time.sleep(0.2 if len(server.asked) > 2 or asked.prompt != PROMPTS[0] else 0.0)
        return "hm"

    server.verdict = slow_but_the_first
    with pytest.raises(JudgeError, match="1 of 1 questions got no verdict"):
        ask(server, ARMS, max_failed=0, concurrency=2)
    asking = [t.name for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
    assert asking == [] and len(server.asked) < 16


def test_a_server_that_is_down_is_one_line(server):
    server.always = Fault(status=502, headers={"Retry-After": "0"})
    with pytest.raises(JudgeError, match=r"1 of 1 questions got no verdict.*502"):
        ask(server, ARMS, concurrency=1, max_retries=1)
    assert len(server.asked) >= 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_unknown_model_stops_at_once(server, status):
    message = json.dumps({"error": {"message": "no such thing"}})
    server.always = Fault(status=status, body=message)
    with pytest.raises(
        JudgeError, match=f"^judge referee at http://.*: HTTP {status}: no such thing"
    ) as caught:
        ask(server, ARMS, max_failed=0.9, concurrency=1)
    assert "secret-key" not in str(caught.value)


def test_no_more_questions_at_once_than_asked_for(server):
    def slowly(asked):
        time.sleep(0.05)
        return better(asked)

    server.verdict = slowly
    prompts = [f"question {i}" for i in range(12)]
    wins = [["poor", "good"][i % 2] for i in range(12)]
    losses = [["good", "poor"][i % 2] for i in range(12)]
    arms = {
        name: arm([[f"{word} {j}" for j in range(4)] for word in words], prompts=prompts)
        for name, words in (("trained", wins), ("raw", losses))
    }

    def verdict(asked):  # three of the four pairs that the trained arm wins get none
        won = int(asked.prompt.split()[1]) % 2
        return "hm" if won and not asked.a.endswith("0") else better(asked)

    server.verdict = verdict
    result = ask(server, arms, num_pairs=4, max_failed=0.9)["comparisons"]["trained_vs_raw"]
    assert (result["n"], result["wins"], result["errors"]) == (30, 6, 18)
    assert result["win_rate"] == pytest.approx(0.2)
    low, high = result["ci95"]
    # The mean over prompts of their own rates is 0.5, and its interval 0.25 to 0.75.
    assert low < 0.2 < high < 0.5


def test_comparisons_of_one_prompt_have_no_interval(server):
    result = ask(server, ARMS, num_prompts=2)["comparisons"]["trained_vs_raw"]
    assert result["ci95"] is not None
    single = {name: arm([a.response_texts(0)[0]], prompts=PROMPTS[:1]) for name, a in ARMS.items()}
    result = ask(server, single)["comparisons"]["trained_vs_raw"]
    assert (result["n"], result["win_rate"], result["ci95"]) == (1, 1.0, None)
    assert result["length_controlled_win_rate"] is None


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "A"),
        ("**B**", "B"),
        ("Answer: B", "B"),
        ("The better response is A.", "A"),
        ("[[A]]", "A"),
        ("<think>\nB is long, so A?\n</think>\n\nB", "B"),
        ("B is longer</think>A", "A"),
        ("<reasoning>B is odd</reasoning>A", "A"),
        ('{"winner": "A"}', "A"),
        ('```json\n{"verdict": "B", "why": "A is short"}\n```', "B"),
        ('{"verdict": "tie"}', "tie"),
        ("tie", "tie"),
        ("Tie.", "tie"),
        ("It's a tie.", "tie"),
        ("Verdict: draw", "tie"),
        ("C", "tie"),
        ("[[C]]", "tie"),
        ("Both", "tie"),
        ("Both are equally good.", "tie"),
        ("Neither", "tie"),
        ("equal", "tie"),
        ("They are equal", "tie"),
        ("<think>A then", None),
        ("", None),
        ("a", "A"),
        ("answer: b", "B"),
        ("a tie", "tie"),
        ("<think>\nA or B?\n</think>\n\ntie", "tie"),
        ("A good answer, but B is better", None),
        ("Both have their merits, but B", None),
        ('{"winner": "A", "verdict": "B"}', None),
    ],
)
def test_a_reply_is_read_as_what_it_says(reply, verdict):
    assert read_verdict(reply) == verdict


def test_ties_are_worth_half(server):
    server.verdict = lambda asked: "tie" if asked.prompt in PROMPTS[:2] else better(asked)
    result = ask(server, ARMS)["comparisons"]["trained_vs_raw"]
    assert (result["wins"], result["ties"], result["losses"], result["errors"]) == (1, 2, 1, 0)
    assert result["win_rate"] == 0.5


def test_a_judge_cut_in_its_reasoning_is_told_apart_from_one_without_a_verdict(server):
    server.answer = lambda asked: Fault.reply("<think>First", "length")
    with pytest.raises(JudgeError, match=r"finish_reason length.*judge\.max_tokens is 16"):
        ask(server, ARMS)


def test_what_a_judge_took_is_reported(server):
    server.answer = lambda asked: Fault.reply(better(asked), usage=(100, 2))
    report = ask(server, ARMS)
    assert (report["usage"]["input_tokens"], report["usage"]["output_tokens"]) == (800, 16)
    server.asked.clear()
    with pytest.raises(JudgeError, match="the budget of 5 calls is spent"):
        ask(server, ARMS, budget={"calls": 5})
    assert len(server.asked) == 5


def test_a_judges_calls_are_recorded_and_replayed(server, tmp_path, monkeypatch):
    def answer(asked):
        if asked.prompt == PROMPTS[1]:
            return Fault.error(400, "not this one")
        return Fault.reply(better(asked), usage=(100, 2))

    server.answer = answer
    prices = {"input_price": 1.0, "output_price": 5.0, "max_failed": 0.5}
    calls = tmp_path / "judge.calls.jsonl"
    report = ask(server, ARMS, calls=calls, **prices)
    assert report["failed"] == 2 and report["usage"]["cost"] == pytest.approx(6 * 110e-6)
    server.kill()
    monkeypatch.delenv("JUDGE_KEY")
    assert ask(server, ARMS, calls=calls, **prices) == report  # its verdicts are not at hand
    server.start()


def test_what_a_judge_took_counts_in_the_next_process(server, tmp_path):
    verdicts, calls = tmp_path / "judge.jsonl", tmp_path / "judge.calls.jsonl"
    for _ in range(2):
        with pytest.raises(JudgeError, match="the budget of 5 calls is spent"):
            ask(server, ARMS, calls=calls, verdicts=VerdictFile(verdicts), budget={"calls": 5})
        assert len(server.asked) == 5
    with pytest.raises(ValueError, match=r"budget\.cost: expected null without both prices"):
        config(server, budget={"cost": 1})


def test_a_local_judge_inside_a_block_of_reasoning_is_refused(tiny_model_dir, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(tiny_model_dir("llama"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = settings["chat_template"]
    settings["chat_template"] += "{% if not closed %}<think>\n{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"opens a block of reasoning.*chat_template_kwargs"):
        LocalJudge(load_model(folder, threads=1))
    judges = [
        LocalJudge(load_model(folder, threads=1, **options))
        for options in (
            {"chat_template_kwargs": {"closed": True}},
            {"chat_template": own},
            {"chat_template": own + " "},
        )
    ]
    assert judges[0].identity == judges[1].identity  # which read the same
    assert judges[2].identity != judges[1].identity


def test_template_variables_go_to_the_judges_endpoint(server):
    name = {"model": "referee", "chat_template_kwargs": {"enable_thinking": False}}
    report = judge_arms(EndpointJudge(config(server, model=name)), ARMS, config(server))
    assert {a.body["chat_template_kwargs"]["enable_thinking"] for a in server.asked} == {False}
    assert report["comparisons"] == to_json(report.comparisons) and report["questions"] == 8
    plain, thinks = EndpointJudge(config(server)), EndpointJudge(config(server, model=name))
    assert plain.identity != thinks.identity
