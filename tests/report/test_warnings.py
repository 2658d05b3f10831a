"""Every warning on both sides of its threshold."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from alignpro import findings
from alignpro.evaluate.results import JudgeResult, Report
from alignpro.report import warnings
from alignpro.report.warnings import find_warnings
from made_up_report import arm, comparison, evaluation, full_metrics, full_report, typed


def keys(report=None, metrics=()):
    return [finding.key for finding in find_warnings(report or Report(), metrics)]


def only(report=None, metrics=()):
    """The one finding's text."""
    (finding,) = find_warnings(report or Report(), metrics)
    return finding.text


def rows(count=20, **values):
    return [{"step": step, **values} for step in range(count)]


def arms(**trained):
    others = {"response_tokens": 40.0, "rewrite_tokens": 20.0}
    made = {"raw": arm(**others), "untuned": arm(**others), "trained": arm(**{**others, **trained})}
    return Report(evaluation(made))


def test_nothing_known_is_nothing_to_doubt():
    assert keys() == []
    assert keys(Report(evaluation({})), rows()) == []


def test_kl_per_token():
    def far(kl):
        return Report(evaluation({}, kl_per_token=kl))

    assert keys(far(0.5)) == []
    assert "KL per token is 0.51 nats, above 0.5" in only(far(0.51))
    # Without an evaluation, the mean of the last steps counts.
    early = rows(15, kl_per_token=9.0) + [{**r, "step": 15} for r in rows(5, kl_per_token=0.5)]
    assert keys(None, early) == []
    assert keys(None, rows(kl_per_token=0.6)) == ["kl_per_token"]
    assert keys(far(0.1), rows(kl_per_token=0.6)) == []


@pytest.mark.parametrize(("tokens", "way"), [(50.1, "longer"), (29.9, "shorter")])
def test_response_length(tokens, way):
    assert keys(arms(response_tokens=50.0)) == keys(arms(response_tokens=30.0)) == []
    text = only(arms(response_tokens=tokens))
    assert f"responses are 25% {way} than those of the raw prompt and 25% {way}" in text


def test_rewrite_length():
    assert keys(arms(rewrite_tokens=25.0)) == keys(arms(rewrite_tokens=15.0)) == []
    assert keys(arms(rewrite_tokens=25.1)) == keys(arms(rewrite_tokens=14.9)) == ["rewrites_length"]
    assert "longer than those of the untuned prompter, past 25%" in only(arms(rewrite_tokens=40))


def test_copy_rate():
    assert keys(arms(copy_rate=0.5)) == []
    assert "copy rate is 51%, above 50%" in only(arms(copy_rate=0.51))


def test_overfitting():
    # A quarter of the deviation is 0.1.
    report = Report(evaluation({"trained": arm(0.5, (0.45, 0.55), reward_variance=0.16)}))
    assert keys(report, rows(reward_mean=0.6)) == []
    assert "0.601 in the last training steps" in only(report, rows(reward_mean=0.601))
    assert keys(report, rows(reward_mean=0.3)) == []
    # Inside: may be chance.
    report = Report(evaluation({"trained": arm(0.5, (0.38, 0.62), reward_variance=0.16)}))
    assert keys(report, rows(reward_mean=0.61)) == []
    assert keys(report, rows(reward_mean=0.63)) == ["overfitting"]
    # Early steps do not count: the last tenth does, and no fewer than five.
    assert keys(report, rows(15, reward_mean=0.9) + rows(5, reward_mean=0.5)) == []
    assert keys(report, rows(91, reward_mean=0.5) + rows(9, reward_mean=0.9)) == ["overfitting"]


def judge(**row):
    result = JudgeResult("judge", 100, 0, 0, {"trained_vs_raw": comparison(**row)})
    return Report(evaluation({}, judge=result))


def test_length_controlled_win_rate():
    rates = {"win_rate": 0.60, "length_controlled_win_rate": 0.555}
    assert keys(judge(**rates)) == []
    text = only(judge(win_rate=0.60, length_controlled_win_rate=0.54))
    assert "against raw prompt: the win rate falls from 60% to 54%" in text
    assert keys(judge(win_rate=0.5, length_controlled_win_rate=0.6)) == []
    assert keys(judge(win_rate=0.5, length_controlled_win_rate=None)) == []


def test_order_disagreements():
    assert keys(judge(order_disagreements=25)) == []
    assert "in 26% of the comparisons, above 25%" in only(judge(order_disagreements=26))
    assert keys(judge(n=0)) == []


def test_effective_samples():
    def report(samples, recommended=0.1):
        given = full_report()["headroom"]
        point = given["frontier"][0]
        given["num_rewrites"], given["recommended_kl_coef"] = 8, recommended
        given["frontier"] = [
            {**point, "kl_coef": 0.1, "effective_samples": samples},
            {**point, "kl_coef": 0.01, "effective_samples": 1.0},  # not the recommended one
        ]
        return typed({"headroom": given})

    assert keys(report(3.0)) == []
    assert "2.9 effective rewrites a prompt of 8, fewer than 3" in only(report(2.9))
    assert "No kl_coef of the headroom's grid is supported" in only(report(1.0, None))


def test_a_bound_that_does_not_hold():
    given = full_report()["bound"]
    assert keys(typed({"bound": given})) == []
    assert keys(typed({"bound": {**given, "holds": False}})) == ["bound"]


def test_parity():
    assert keys(None, rows(parity_max_abs=0.0)) == []
    off = [*rows(3, parity_max_abs=0.0), {"step": 3, "parity_max_abs": 1e-6}]
    assert "differ in 1 steps, by up to 1e-06; 0 is expected" in only(None, off)
    # The log writes null for what was not finite.
    assert "by up to infinity or NaN" in only(None, rows(1, parity_max_abs=None))
    loose, strict = {"deterministic": False}, {"deterministic": True}
    for config in ({"target": loose}, {"prompter": loose, "policy": "target", "target": strict}):
        assert "; 0 is expected." in only(Report(config=config), off)
    for config in (
        {"prompter": loose, "target": strict},
        {"prompter": strict, "policy": "target", "target": loose},
        {"prompter": loose, "policy": "target", "target": None},
    ):
        assert "; deterministic: false lets them." in only(Report(config=config), off)


def test_equal_rewards_of_responses_that_were_cut():
    equal = {"zero_advantage_groups": 2, "scored_responses": 8}
    text = only(metrics=rows(10, **equal, truncated_responses=8))
    assert "80 of 80 responses were cut at response.max_new_tokens" in text
    text = only(metrics=rows(10, **equal, truncated_responses=2))
    assert "a finer reward" in text  # a quarter may be cut


def test_rows_too_long_are_said():
    note = "1 of 9 rows were too long for a model, and left out: a.csv, line 3"
    assert only(metrics=rows(10, too_long=note)) == f"In training, {note}."
    found = only(Report(replace(evaluation({}), too_long=note)))
    assert found == f"In the evaluation, {note}."


def test_zero_advantage_groups():
    half = rows(10, zero_advantage_groups=0) + rows(10, zero_advantage_groups=2)
    assert keys(None, half) == []
    more = [*half, {"step": 20, "zero_advantage_groups": 1}]
    assert keys(None, more) == ["zero_advantage_groups"]


def test_truncated_rewrites():
    """16 prompts x 4 rewrites: the line is at 16."""
    config = Report(config={"train": {"prompts_per_step": 16, "num_rewrites": 2}})
    step = {"num_rewrites": 4}  # what a step says of itself goes before the configuration
    assert keys(config, rows(truncated_rewrites=16, **step)) == []
    assert "27% of the rewrites" in only(config, rows(truncated_rewrites=17, **step))
    flat = Report(config={"prompts_per_step": 16, "num_rewrites": 4})
    assert keys(flat, rows(truncated_rewrites=17)) == ["truncated_rewrites"]
    # Without a configuration: 640 tokens at 10 tokens a rewrite.
    lengths = {"tokens": 640.0, "rewrite_tokens": 10.0}
    assert keys(None, rows(truncated_rewrites=16, **lengths)) == []
    assert keys(None, rows(truncated_rewrites=17, **lengths)) == ["truncated_rewrites"]
    assert keys(None, rows(truncated_rewrites=17)) == []  # of how many is unknown


def test_one_rewrite_for_every_prompt():
    varied = [{"step": step, "common_rewrite": 0.9} for step in range(4)]
    stuck = [{"step": step, "common_rewrite": 1.0} for step in range(4, 9)]
    assert keys(None, varied) == keys(None, [*stuck, {"step": 9, "common_rewrite": 0.2}]) == []
    text = only(None, varied + stuck)
    assert "100% of the rewrites of a step are one text from step 4 on, above 90%" in text
    # The arm's number goes before the steps', which say since when.
    assert "95% of the trained prompter's rewrites are one text from step 4 on" in only(
        arms(common_rewrite=0.95), varied + stuck
    )
    assert keys(arms(common_rewrite=0.5), varied + stuck) == []


def test_components_cuts_and_leaks():
    errors = {"component_errors": {"vader": 0.01}}
    assert "vader falls to 0.400" in only(arms(components={"vader": 0.4}, **errors))
    assert keys(arms(components={"vader": 0.6}, **errors)) == []
    assert keys(arms(truncated_responses=0.3)) == ["truncated_responses"]
    assert keys(arms(leaked_answers=0.2)) == ["leaked_answers"]
    # What the arm says of its rewrites goes before what the training's last steps say.
    cut = rows(truncated_rewrites=17, num_rewrites=4)
    config = {"prompts_per_step": 16}
    report = arms(truncated_rewrites=0.1)
    assert keys(Report(report.evaluation, config=config), cut) == []
    assert keys(arms(truncated_rewrites=0.3)) == ["truncated_rewrites"]


def test_order_of_reading_and_purity():
    report, metrics = typed(full_report()), full_metrics()
    found = find_warnings(report, metrics)
    assert [f.key for f in found] == ["length_controlled_win_rate"] * 3 + ["effective_samples"]
    assert (report, metrics) == (typed(full_report()), full_metrics())
    assert found == find_warnings(report, metrics)


def test_every_threshold_has_its_reason():
    files = (warnings.__file__, findings.__file__)
    source = [line for file in files for line in Path(file).read_text("utf-8").splitlines()]
    thresholds = [i for i, line in enumerate(source) if re.match(r"[A-Z_]+ = [0-9.]+$", line)]
    assert len(thresholds) >= 10
    assert all(source[i - 1].startswith("#") for i in thresholds)
