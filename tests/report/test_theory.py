"""Headroom and bound as a reader meets them: sentences, tables, the frontier as a picture."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from alignpro.evaluate.results import (
    BoundReport,
    GoalForecast,
    GoalsForecast,
    Headroom,
    HeadroomReport,
    Interval,
    MixedGoal,
    MixReport,
    Report,
    from_json,
    to_json,
)
from alignpro.report import frontier
from alignpro.report.frontier import frontier_png, frontier_svg
from alignpro.report.grids import Grid, costs
from alignpro.report.tables import bound_tables, grid_table, headroom_tables
from alignpro.report.theory import (
    bound_verdicts,
    frontier_grid,
    goals_grid,
    goals_words,
    headroom_words,
    mix_words,
)
from alignpro.theory.goals import MaxMin
from made_up_report import evaluation


def point(kl_coef, objective, crossfit, samples):
    return {
        "kl_coef": kl_coef,
        "objective": objective,
        "objective_ci95": [objective - 0.1, objective + 0.1],
        "gain": 0.1,
        "gain_ci95": [0.05, 0.15],
        "reward": objective + 0.05,
        "kl": 0.05 / kl_coef,
        "effective_samples": samples,
        "crossfit_objective": crossfit,
        "crossfit_ci95": [crossfit - 0.1, crossfit + 0.1],
        "crossfit_reward": crossfit + 0.04,
        "crossfit_kl": 0.04 / kl_coef,
        "corrected_objective": 0.561,
        "corrected_ci95": [0.5, 0.6],
    }


GIVEN = {
    "num_prompts": 48,
    "num_rewrites": 8,
    "num_responses": 4,
    "untuned_reward": 0.456,
    "untuned_ci95": [0.388, 0.523],
    "frontier": [point(0.05, 0.687, 0.503, 1.7), point(0.2, 0.558, 0.436, 4.3)],
    "best_of_n": [
        {"n": 1, "reward": 0.456, "crossfit_reward": 0.456, "kl": 0.0},
        {"n": 8, "reward": 0.776, "crossfit_reward": 0.587, "kl": 1.204},
    ],
    "recommended_kl_coef": 0.2,
    "variance": {"between_rewrites": 0.1, "within_rewrite": 0.3},
}
HEADROOM = from_json(Headroom, GIVEN, "headroom")
TERM = {"mean": 0.25, "ci95": [0.2, 0.3]}
BOUND = {
    "reward_range": [-1.0, 1.2],
    "reward_range_source": "given",
    "kl_coef": 0.05,
    "terms": {"tv_tuned": TERM, "tv_rewrites": {"mean": 0.75, "ci95": [0.7, 0.8]}, "kl": TERM},
    "bound": {"mean": 2.187, "ci95": [2.0, 2.3]},
    "measured_gap": {"mean": 0.321, "ci95": [0.2, 0.4]},
    "slack": {"mean": 1.866, "ci95": [1.7, 2.0]},
    "holds": True,
    "vacuous": False,
    "closed_form": None,
    "trained_gap": None,
    "rewards": {"raw": TERM},
    "truncated_responses": 0.0,
    "tuned": "adapter",
    "num_prompts": 64,
    "num_rewrites": 8,
    "num_responses": 2,
    "parity_max_abs": None,
}


def bound_of(**changes):
    return from_json(BoundReport, {**BOUND, **changes}, "bound")


def bound_words(**changes):
    return " ".join(said.text for said in bound_verdicts(bound_of(**changes)))


def headroom_of(**changes):
    return from_json(Headroom, {**GIVEN, **changes}, "headroom")


def text(renderable, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_headroom_in_words():
    words = " ".join(headroom_words(HEADROOM))
    assert "25% lies between rewrites" in words
    assert "support: 0.2 (4.3 of 8 rewrites effective)" in words
    assert "0.456 (untuned) to 0.658" in words
    assert "is not worth its KL (0.436)" in words and "0.561 is the estimate corrected" in words
    assert "no KL above log 8 = 2.08" in words


def goal(**changes):
    fields = {"weight": 1.0, "untuned": 0.3, "alone": 0.6, "reward": 0.5, "normalized": 0.031}
    maxmin = {"maxmin_weight": 0.6, "maxmin_reward": 0.45, "maxmin_normalized": -0.02}
    raw = {"raw_maxmin_weight": 0.7, "raw_maxmin_reward": 0.46}
    return GoalForecast(**{**fields, **maxmin, **raw, **changes})


GOALS = GoalsForecast(
    kl_coef=0.2,
    goals={
        "vader": goal(),
        "topic": goal(weight=0.2, reward=0.31, normalized=-0.12, maxmin_weight=0.4),
    },
    worst="topic",
    effective_samples=3.0,
    maxmin=MaxMin(-0.03, 1e-11, 0.05, 6.2),
    raw_maxmin=MaxMin(0.4, 2e-11, 0.07, 5.9),
    num_prompts=48,
)


def test_goals_in_words():
    words = " ".join(goals_words(GOALS))
    assert "kl_coef 0.2, with the weights given, topic would be worst off: reward 0.310" in words
    assert "value -0.030, KL 0.05 nats, KKT gap 1.0e-11" in words and "vader 0.700" in words
    assert "6.2 samples a prompt carry the mixture" in words and "No weight" not in words
    idle = replace(GOALS, goals={**GOALS.goals, "topic": goal(maxmin_weight=0.0)})
    assert "No weight: topic;" in " ".join(goals_words(idle))
    flat = replace(GOALS, goals={**GOALS.goals, "topic": goal(alone=0.3 + 1e-16)})
    assert "No difference between rewrites beyond the noise of responses: topic." in " ".join(
        goals_words(flat)
    )
    assert "No difference" not in words
    assert goals_words(None) == [] and not goals_grid(None)


def mixed(weight, of_drawn, whole_weight):
    return MixedGoal("vader", 0.05, weight, weight, 0.1, -0.2, of_drawn, -0.2, whole_weight)


@pytest.mark.parametrize(
    ("idle", "said"),
    [
        (mixed(0.0, -0.1, 0.3), "No weight: kind; the mixture serves this goal as it is."),
        (mixed(0.0, -0.7, None), "No weight: kind; the mixture serves this goal as it is."),
        (mixed(0.0, -0.7, 0.3), "No weight: kind, although what is drawn serves it worst (-0.700)"),
    ],
)
def test_a_goal_without_weight_is_served_or_said_not_to_be(idle, said):
    whole_weight = None if idle.whole_weight is None else 0.7
    goals = {"kind": idle, "topic": mixed(1.0, -0.2, whole_weight)}
    report = MixReport(goals, 0.05, -0.1, 1e-12, 2.0, 5.0, 24, 12)
    (found,) = (line for line in mix_words(report) if line.startswith("No weight"))
    assert found.startswith(said)


def test_rows_to_doubt_are_faint():
    grid = frontier_grid(HEADROOM)
    assert (grid.strong, grid.faint) == (1, {0})  # 0.2 is recommended; 0.05 is below it
    assert frontier_grid(headroom_of(recommended_kl_coef=None)).faint == {0, 1}


def test_headroom_that_gains_without_training():
    better = headroom_of(frontier=[point(0.2, 0.558, 0.501, 4.3)])
    words = " ".join(headroom_words(better))
    assert "by 3 response(s) reaches 0.501 without training" in words
    assert "Dim rows" not in words


def test_headroom_that_is_not_supported():
    words = " ".join(headroom_words(headroom_of(recommended_kl_coef=None)))
    assert "No kl_coef of the grid leaves a third of 8 rewrites effective" in words
    assert "Forecast" not in words


def test_headroom_of_single_responses():
    single = copy.deepcopy(GIVEN)
    single.update(num_responses=1, variance=None)
    for p in single["frontier"]:
        for key in ("objective", "ci95", "reward", "kl"):
            p[f"crossfit_{key}"] = None
        p["corrected_objective"] = p["corrected_ci95"] = None
    for best in single["best_of_n"]:
        best["crossfit_reward"] = None
    single = from_json(Headroom, single, "headroom")
    words = " ".join(headroom_words(single))
    assert "makes the upper end too high" in words and "lies between" not in words
    assert "0.687" in text(headroom_tables(single))
    assert frontier_svg(single) != frontier_svg(HEADROOM)


def test_the_tables_fit_a_terminal_of_eighty_columns():
    shown = text(headroom_tables(HEADROOM, GOALS))
    for number in (
        "0.687",
        "0.587 to 0.787",
        "0.503",
        "0.561",
        "1.7",
        "0.776",
        "1.20",
        " Z ",
        "+0.031",
    ):
        assert number in shown
    assert "…" not in shown
    shown = text(bound_tables(bound_of()))
    for number in ("2.187", "2.000 to 2.300", "0.321", "1.866", "0.750"):
        assert number in shown
    assert "…" not in shown


def test_the_titles_of_a_wide_table_break_between_words():
    title = "cut responses"
    header = ["arm", "response tokens", "rewrite tokens", "copy rate", title, "one text"]
    header += ["hold the answer", "break a guard"]
    row = ["untuned prompter", "30.3", "11.8", "4%", "92%", "4%", "12%", "12%"]
    shown = text(grid_table(Grid("What the arms wrote", header, [row])))
    assert {word for words in header for word in words.split()} <= set(shown.split())
    assert "untuned prompter" in shown


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "The bound holds: measured gap 0.321, bound 2.187."),
        ({}, "It is not vacuous: rewards span 2.200."),
        ({"vacuous": True}, "It is vacuous: rewards span 2.200"),
        ({"holds": False}, "DOES NOT HOLD"),
        ({"reward_range_source": "observed"}, "is what was observed"),
        ({"closed_form": {"kl_coef": 0.3, "effective_samples": 4.2}}, "optimum at kl_coef 0.3"),
        ({"num_responses": 1}, "bound and gap too small"),
        ({"truncated_responses": 0.4}, "40% of the responses were cut off"),
    ],
)
def test_the_bound_in_words(changes, sentence):
    assert sentence in bound_words(**changes)
    if changes:
        assert sentence not in bound_words()


def test_the_gap_of_a_trained_prompter_is_shown():
    shown = text(bound_tables(bound_of(trained_gap={"mean": 0.111, "ci95": [0.0, 0.2]})))
    assert "trained prompter" in shown and "0.111" in shown
    assert "trained prompter" not in text(bound_tables(bound_of()))


GAIN = {"trained_minus_untuned": Interval(0.17, 0.11, 0.23)}
EVALUATION = evaluation({}, kl_per_rewrite=1.97, paired=GAIN)


def test_the_frontier_as_a_picture(tmp_path):
    path = frontier_png(HEADROOM, tmp_path / "frontier.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    svg = frontier_svg(HEADROOM)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "currentColor" in svg and "#010203" not in svg
    assert svg == frontier_svg(HEADROOM)  # the same data, the same file


def test_the_trained_prompter_joins_where_it_is_known():
    assert frontier_svg(HEADROOM, EVALUATION) != frontier_svg(HEADROOM)
    for missing in (evaluation({}, paired=GAIN), evaluation({}, kl_per_rewrite=1.97)):
        assert frontier_svg(HEADROOM, missing) == frontier_svg(HEADROOM)


def test_the_frontier_holds_the_measured_points():
    (axes,) = frontier._draw(HEADROOM, EVALUATION).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    expected = {
        "optimum by kl_coef": [[0.0, 0.456], [0.25, 0.608], [1.0, 0.737]],
        "cross-fit": [[0.0, 0.456], [0.2, 0.476], [0.8, 0.543]],
        "best of n": [[0.0, 0.456], [1.204, 0.587]],  # not judged by what chose it
        "recommended": [[0.25, 0.608]],
    }
    for label, points in expected.items():
        assert np.asarray(lines[label]) == pytest.approx(np.asarray(points)), label
    untuned, trained = (bar.lines[0].get_xydata().tolist() for bar in axes.containers)
    assert untuned == [[0.0, 0.456]]
    assert trained == [[1.97, pytest.approx(0.456 + 0.17)]]
    (bars,) = axes.containers[1].lines[2]
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([0.566, 0.686])
    assert next(t.get_text() for t in axes.texts) == "0.2"  # the recommended one has its name


def test_headroom_of_little(tmp_path):
    little = headroom_of(frontier=[], best_of_n=[], variance=None, recommended_kl_coef=None)
    assert frontier_svg(little, EVALUATION).startswith("<svg")
    png = frontier_png(little, tmp_path / "f.png", EVALUATION).read_bytes()
    assert png.startswith(b"\x89PNG")
    assert text(headroom_tables(little)).strip()


@pytest.mark.parametrize(
    ("kind", "name", "plain"),
    [(BoundReport, "bound", BOUND), (HeadroomReport, "headroom", {**GIVEN, "config": {}})],
)
def test_what_a_stage_took_of_an_endpoint_is_among_the_costs(kind, name, plain):
    usage = {"input_tokens": 5000, "output_tokens": 7, "cost": 0.5}
    for given, row in ((None, None), (usage, "5,000 tokens read, 7 written, cost 0.5")):
        stage = from_json(kind, {**plain, "target_usage": given}, name)
        assert dict(costs(Report(**{name: stage}))).get(f"target in the {name}") == row
        assert from_json(Report, to_json(Report(**{name: stage})), "report") == Report(
            **{name: stage}
        )


@pytest.mark.parametrize("key", sorted(GIVEN.keys() - {"recommended_kl_coef", "variance"}))
def test_a_number_of_a_headroom_that_is_absent_is_said(key):
    less = {k: v for k, v in GIVEN.items() if k != key}
    with pytest.raises(ValueError, match=f"headroom.{key}: expected .*, got nothing"):
        from_json(Headroom, less, "headroom")
    with pytest.raises(ValueError, match=f"headroom.{key}: expected .*, got nothing"):
        from_json(Report, {"headroom": less}, "report")


@pytest.mark.parametrize(
    "key", sorted(BOUND.keys() - {"closed_form", "trained_gap", "parity_max_abs"})
)
def test_a_number_of_a_bound_that_is_absent_is_said(key):
    less = {k: v for k, v in BOUND.items() if k != key}
    with pytest.raises(ValueError, match=f"bound.{key}: expected .*, got nothing"):
        from_json(BoundReport, less, "bound")
