"""Tables, plots and the page, read back as a reader or a browser would."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from alignpro.evaluate.results import JudgeResult, Report, Sample
from alignpro.report import plots
from alignpro.report.grids import arms_grid, judge_grid, texts_grid
from alignpro.report.html import is_report, render_report, write_report
from alignpro.report.plots import arms_svg, curve_svgs, paired_svg, reward_curve
from alignpro.report.tables import (
    costs_table,
    grid_table,
    report_view,
    verdict_lines,
)
from alignpro.report.words import printable
from made_up_report import HOSTILE, comparison, evaluation, full_metrics, full_report, typed

FULL, ROWS = typed(full_report()), full_metrics()
SECTIONS = (
    "arms",
    "judge",
    "training",
    "headroom",
    "bound",
    "samples",
    "costs",
    "configuration",
)

GIVEN = {
    "model": "SmolLM2-135M-Instruct",
    "reward": "vader+0.5*topic",
    "seed": 3,
    "versions": {"alignpro": "0.1.0", "torch": "2.13.0"},
    "config": {"kl_coef": 0.05, "name": HOSTILE},
    "arms": {
        "untuned": {
            "mean_reward": 0.401,
            "reward_variance": 0.211,
            "ci95": [0.301, 0.501],
            "n": 64,
            "num_responses": 256,
            "empty_rewrites": 0,
            "response_tokens": 40.0,
            "components": {"vader": 0.25, "topic": 0.302},
        },
        "raw": {
            "mean_reward": 0.312,
            "reward_variance": 0.222,
            "ci95": [0.212, 0.412],
            "n": 64,
            "num_responses": 256,
            "empty_rewrites": 0,
            "response_tokens": 40.0,
            "components": {"vader": 0.15, "topic": 0.324},
        },
        "trained": {
            "mean_reward": 0.623,
            "reward_variance": 0.133,
            "ci95": [0.573, 0.673],
            "n": 64,
            "num_responses": 256,
            "empty_rewrites": 0,
            "response_tokens": 40.0,
            "components": {"vader": 0.45, "topic": 0.346},
        },
    },
    "paired": {
        "trained_minus_raw": {"mean": 0.311, "ci95": [0.211, 0.411]},
        "trained_minus_untuned": {"mean": 0.022, "ci95": [-0.02, 0.064]},
    },
    "kl_per_rewrite": 2.345,
    "kl_per_token": 0.2,
    "tokens_per_second": 1234.5,
    "seconds": {"sft": 40.25, "train": 200.5},
    "peak_rss_bytes": 700 * 2**20,
    "samples": [
        {
            "prompt": f"What is snow? {HOSTILE}",
            "rewrite_untuned": f"Be brief. {HOSTILE}",
            "rewrite_trained": f"Be kind. {HOSTILE}",
            "response_raw": f"Frozen water. {HOSTILE}",
            "response_untuned": "Water.",
            "reward_untuned": 0.5,
            "response_trained": f"Lovely frozen water! {HOSTILE}",
            "reward_raw": 0.1,
            "reward_trained": 0.9,
        },
        {"prompt": "Only a prompt"},
    ],
}
REPORT = typed(GIVEN)
ARMS = REPORT.evaluation
METRICS = [
    {"stage": "sft", "loss": 2.0},
    {"step": 0, "reward_mean": 0.3, "kl_per_rewrite": 0.0},
    {"step": 1, "reward_mean": 0.5, "kl_per_rewrite": 1.5},
    {"step": 2, "reward_mean": 0.6, "kl_per_rewrite": 2.5},
]


def show(renderable, width=140) -> str:
    console = Console(width=width, color_system="truecolor", force_terminal=True, record=True)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data):
        self.text += data

    @property
    def ids(self) -> list[str | None]:
        return [a["id"] for _, a in self.tags if "id" in a]

    @property
    def line(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def page() -> tuple[str, Page]:
    html = render_report(REPORT, METRICS)
    return html, Page(html)


@pytest.fixture(scope="module")
def full_page() -> tuple[str, Page]:
    html = render_report(FULL, ROWS)
    return html, Page(html)


# The terminal


def test_arms_table_in_the_order_of_reading():
    lines = plain(show(grid_table(arms_grid(ARMS)))).splitlines()
    rows = [line for line in lines if "prompt" in line and "." in line]
    assert ["raw" in rows[0], "untuned" in rows[1], "trained" in rows[2]] == [True] * 3
    for cell in ("0.623", "0.573 to 0.673", "0.133", "0.450", "0.346", "64"):
        assert cell in rows[2]


def test_nine_arms_by_their_names():
    grid = arms_grid(FULL.evaluation)
    assert [row[0] for row in grid.rows] == [
        "raw prompt",
        "static instruction",
        "policy text",
        "untuned prompter",
        "trained prompter",
        "labelled rule",
        "resampled optimum",
        "soft prompt",
        "tuned target",
    ]
    assert grid.strong == 4
    shown = plain(show(grid_table(grid)) + show(grid_table(texts_grid(FULL.evaluation))))
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown  # nothing is cut off


def test_an_arm_of_ones_own_and_a_single_component():
    given = copy.deepcopy(GIVEN)
    for arm in given["arms"].values():
        arm["components"] = {"vader": arm["mean_reward"]}
    given["arms"]["[bold]mine[/bold]"] = {**given["arms"]["raw"], "mean_reward": 0.777}
    shown = plain(show(grid_table(arms_grid(typed(given).evaluation))))
    assert "vader" not in shown
    assert re.search(r"\[bold\]mine\[/bold\].*0\.777", shown)


def test_the_judges_numbers_stand_in_their_columns():
    grid = judge_grid(FULL.evaluation.judge)
    header = ["trained prompter against", "raw prompt", "untuned prompter", "static instruction"]
    assert list(grid.header) == header
    assert [row[:2] for row in grid.rows] == [
        ["win rate", "69%"],
        ["95% interval", "58% to 80%"],
        ["at equal length", "62%"],
        ["95% interval", "50% to 74%"],
        ["wins", "39"],
        ["ties", "10"],
        ["losses", "15"],
        ["differ by order", "9"],
        ["without a verdict", "0"],
        ["longer by, characters", "+3.4"],
    ]
    mixed = {"a_vs_b": comparison(errors=2), "c_vs_b": comparison(first_chosen=0.75)}
    grid = judge_grid(JudgeResult("judge", 4, 0, 2, mixed))
    assert list(grid.header) == ["comparison", "a against b", "c against b"]
    assert ["shown first, chosen", "", "75%"] in list(grid.rows)
    assert ["without a verdict", "2", "0"] in list(grid.rows)
    assert "win rate" not in [title for title, *_ in grid.rows]  # no column of nothing


def test_the_tables_fit_a_terminal_of_eighty_columns():
    assert "\N{HORIZONTAL ELLIPSIS}" not in plain(
        show(grid_table(judge_grid(FULL.evaluation.judge)), 80)
    )


def test_verdict_lines_start_with_the_answer():
    lines = verdict_lines(ARMS).plain.splitlines()
    assert lines[0].startswith("In part: it beats the raw prompt")
    assert "beats the raw prompt: +0.311" in lines[1]
    assert "No clear difference between the trained prompter and the untuned prompter" in lines[2]
    full = verdict_lines(FULL.evaluation).plain
    assert full.startswith("The static instruction wins")
    assert "The judge prefers the trained prompter over the raw prompt: win rate 69%" in full
    assert "closes 70% (95% interval 52% to 88%) of the gap" in full


def test_costs_have_units():
    shown = plain(show(costs_table(REPORT)))
    for value in ("2.345 nats", "1,234 tokens/s", "700 MiB", "40.2 s", "200.5 s"):
        assert value in shown


def test_samples_show_untrusted_text_as_it_is():
    shown = show(report_view(REPORT))
    assert "\x1b[31m" not in shown  # the text's own escape sequence, not one of ours
    text = plain(shown)
    assert "[red]not red[/red]" in text
    assert "raw response (reward 0.100): Frozen water." in text
    assert "trained response (reward 0.900): Lovely" in text
    assert "untuned rewrite: Be brief." in text
    assert "Only a prompt" in text


def test_the_terminal_shows_every_part():
    shown = plain(show(report_view(FULL, ROWS)))
    for part in (
        "Held-out prompts",
        "What the arms wrote",
        "The judge",
        "Optimum by kl_coef",
        "Bound on the gap",
        "The static instruction wins",
        "The bound holds",
        "Smallest kl_coef that these samples support",
        "warning: Trained prompter against raw prompt: the win rate falls",
    ):
        assert part in shown
    assert "warning" not in plain(show(report_view(REPORT, METRICS)))
    bare = plain(show(report_view(Report(evaluation(ARMS.arms)))))
    assert "Frozen water" not in plain(show(report_view(REPORT, samples=False)))
    assert not {"The judge", "kl_coef", "bound"} & set(re.findall(r"The judge|kl_coef|bound", bare))


def test_printable_keeps_text_and_drops_control():
    assert printable("a\tb\nc \u00e9\U0001f600") == "a\tb\nc \u00e9\U0001f600"
    assert printable("a\r\nb") == "a\nb"
    assert printable("\x1b[31m\x00\x9b") == "\ufffd[31m\ufffd\ufffd"
    assert printable("\u202egnp.exe") == "\ufffdgnp.exe"
    assert printable("\ud800") == "?"


# The plots


def test_reward_curve_is_a_png(tmp_path):
    path = reward_curve(METRICS, tmp_path / "reward.png", evaluation=ARMS)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    alone = reward_curve(METRICS, tmp_path / "alone.png").read_bytes()
    width, width_alone = (int.from_bytes(d[16:20], "big") for d in (data, alone))
    assert 2 * width == 3 * width_alone  # the arms stand beside reward and KL


def test_the_plots_hold_the_measured_points():
    axes = plots.new_figure(3, 3).subplots()
    reward, kl = plots.panels_of(METRICS)
    plots.draw_panel(axes, reward, METRICS, ARMS)
    line, raw, trained = axes.lines
    assert line.get_xydata().tolist() == [[0, 0.3], [1, 0.5], [2, 0.6]]
    assert (raw.get_ydata()[0], trained.get_ydata()[0]) == (0.312, 0.623)
    axes = plots.new_figure(3, 3).subplots()
    plots.draw_panel(axes, kl, METRICS, ARMS)
    assert axes.lines[0].get_xydata().tolist() == [[0, 0.0], [1, 1.5], [2, 2.5]]
    axes = plots.new_figure(3, 3).subplots()
    plots.draw_arms(axes, ARMS)
    assert [c.lines[0].get_xdata()[0] for c in axes.containers] == [0.312, 0.401, 0.623]
    (bars,) = axes.containers[2].lines[2]
    assert bars.get_segments()[0][:, 0].tolist() == pytest.approx([0.573, 0.673])


def test_a_panel_needs_numbers_that_vary():
    titles = [title for title, _ in curve_svgs(ROWS, FULL.evaluation)]
    assert titles == [
        "Reward",
        "KL to the reference",
        "Entropy",
        "Lengths",
        "Gradient norm",
        "kl_coef",
        "Variance of the reward",
        "Groups without signal",
        "Rewrites that are one text",
    ]
    held = [{**row, "kl_coef": 0.05, "variance_between": None} for row in ROWS]
    panels = {panel.title: panel for panel in plots.panels_of(held)}
    assert "kl_coef" not in panels
    assert [s.key for s in panels["Variance of the reward"].series] == ["variance_within"]
    broken = [{"step": 0, "reward_mean": float("nan")}, {"step": 1, "reward_mean": None}]
    assert plots.panels_of(broken) == []


@pytest.mark.parametrize("metrics", [[], [{"step": 1}], [{"step": 0, "reward_mean": 0.5}]])
def test_plots_of_little(metrics, tmp_path):
    assert reward_curve(metrics, tmp_path / "r.png").stat().st_size > 1000
    assert len(curve_svgs(metrics, None)) == any("reward_mean" in row for row in metrics)


def test_the_svg_follows_the_page():
    svg = arms_svg(ARMS)
    assert svg.startswith("<svg")
    assert "currentColor" in svg and "var(--plot-trained)" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)
    opening = svg[: svg.index(">")]
    assert "viewBox" in opening and " width=" not in opening and " height=" not in opening
    assert svg == arms_svg(ARMS)
    assert "var(--plot-raw)" in paired_svg(ARMS)


def test_the_style_knows_every_colour_of_the_plots(full_page):
    html, _ = full_page
    used = set(re.findall(r"var\((--[a-z-]+)\)", html))
    for scheme in re.findall(r":root \{(.*?)\}", html, re.DOTALL):
        assert used <= set(re.findall(r"(--[a-z-]+):", scheme))
    assert len(used) > 10


# The page


def test_the_page_is_self_contained(full_page):
    html, parsed = full_page
    assert html.startswith("<!doctype html>")
    assert "<metadata" not in html
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert value is not None and value.startswith("#")
                assert value[1:] in parsed.ids
    assert "url(http" not in html and "@import" not in html


def test_untrusted_text_is_escaped_everywhere(full_page):
    html, parsed = full_page
    assert "<script" not in html and "\x1b" not in html
    # In a sample: the prompt, six rewrites, nine responses. Beside it: two requirements, the
    # instruction, the judge, the configuration.
    assert html.count("&lt;script&gt;") == 16 + 5 == parsed.text.count("alert('x')")
    assert [tag for tag, _ in parsed.tags].count("style") == 1 + len(re.findall("<svg", html))
    assert "{{ 7*7 }}" in parsed.text
    assert "&lt;b&gt;" in parsed.text  # text that was escaped already stays as it was
    assert not {"onmouseover"} & {name for _, attributes in parsed.tags for name in attributes}


def test_the_page_says_what_was_measured(page):
    _, parsed = page
    for value in (
        "The trained prompter beats the raw prompt: +0.311",
        "No clear difference",
        "0.573 to 0.673",
        "raw prompt reward 0.100 response Frozen water.",
        "trained prompter reward 0.900 rewrite Be kind.",
        "2.345 nats",
        "torch 2.13.0",
        "SmolLM2-135M-Instruct",
        '"kl_coef": 0.05',
        "40.2 s",
    ):
        assert value in parsed.line
    classes = [a["class"] for t, a in parsed.tags if t == "p" and "verdict" in str(a.get("class"))]
    assert classes == ["verdict better", "verdict unclear"]
    assert "warnings" not in parsed.ids


def test_the_full_page_says_what_was_measured(full_page):
    _, parsed = full_page
    for value in (
        "The trained prompter closes 70% (95% interval 52% to 88%)",
        "Answer warmly, in two sentences.",
        "The static instruction (given) was found among 52 candidates by 4,010 responses to "
        "training prompts, 159,870 tokens of the target.",
        "closes 41% (95% interval -20% to 95%) of the gap between the static instruction",
        "Required: trained>raw<script>",
        "of them the target's 120,000 tokens",
        "The judge prefers the static instruction over the trained prompter: win rate 31%",
        "Smallest kl_coef that these samples support: 0.0468 (2.2 of 16 rewrites effective).",
        "The optimum there has reward 0.660 at a KL of 2.00 nats per rewrite.",
        "The bound holds: measured gap 0.076, bound 2.650.",
        "It is vacuous: rewards span 2.200, so no gap can exceed that anyway.",
        "TV of tuned and frozen target 0.430 0.390 to 0.470",
        "measured gap, tuned target - prompted optimum 0.076 0.030 to 0.120",
        "-1.000 to 1.200, observed",
        "questions 384 of them replayed 0 without a verdict 2",
        "generated in training 160,000 tokens",
        "tuned target reward 0.800 response",
    ):
        assert value in parsed.line


def test_every_sample_is_there_once(full_page):
    _, parsed = full_page
    prompts = [" ".join(printable(sample.prompt).split()) for sample in FULL.evaluation.samples]
    assert len(prompts) == 8 and "4 more" in parsed.line
    assert [parsed.line.count(prompt) for prompt in prompts] == [1] * 8


def test_the_winner_stands_first(full_page):
    _, parsed = full_page
    start = parsed.line[parsed.line.index("Does the trained prompter help?") :]
    assert start.startswith(
        "Does the trained prompter help? The static instruction wins: it beats the trained "
        "prompter by 0.037 reward per prompt. The instruction is also cheaper per request"
    )
    assert parsed.line.index("4 warnings") < parsed.line.index("Mean reward")


def test_every_part_may_be_absent(full_page):
    _, parsed = full_page
    assert [i for i in parsed.ids if i in SECTIONS] == list(SECTIONS)
    whole = FULL.evaluation
    parts = {
        ("headroom",): Report(headroom=FULL.headroom),
        ("bound",): Report(bound=FULL.bound),
        ("arms", "costs"): Report(evaluation(whole.arms)),
        ("arms", "judge", "costs"): Report(evaluation(whole.arms, judge=whole.judge)),
        ("arms", "samples", "costs"): Report(evaluation(whole.arms, samples=whole.samples)),
    }
    for sections, report in parts.items():
        ids = Page(render_report(report, [])).ids
        assert [i for i in ids if i in SECTIONS] == [*sections, "configuration"]
    curves = Page(render_report(Report(), METRICS))
    assert [i for i in curves.ids if i in SECTIONS] == ["training", "configuration"]
    assert "Not known yet: no held-out evaluation" in curves.line


def test_ids_inside_the_page_are_unique(full_page):
    _, parsed = full_page
    assert len(parsed.ids) == len(set(parsed.ids))
    assert [i for i in parsed.ids if str(i).startswith("frontier-")]


def test_write_report_replaces_the_file_at_once(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert not is_report(path)
    assert write_report(REPORT, METRICS, path) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert is_report(path)
    assert list(tmp_path.iterdir()) == [path]


def test_text_with_lone_surrogates_can_be_written(tmp_path):
    report = Report(evaluation(ARMS.arms, samples=[Sample("\ud800", {})]))
    path = write_report(report, METRICS, tmp_path / "r.html")
    assert "?" in path.read_text(encoding="utf-8")


def test_importing_the_tables_loads_no_matplotlib():
    code = (
        "import sys, alignpro.report, alignpro.report.tables, alignpro.report.html\n"
        "import alignpro.report.frontier, alignpro.report.build\n"
        "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
