"""Tables, plots and the page, read back as a reader or a browser would."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from alignpro.report.html import render_report, write_report
from alignpro.report.plots import reward_curve, reward_svg
from alignpro.report.tables import arms_table, costs_table, samples_panel, verdict_lines
from alignpro.report.words import printable, verdict

HOSTILE = "<script>alert('x')</script> & [red]not red[/red] {{ 7*7 }} \x1b[31m"

REPORT = {
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
            "components": {"vader": 0.25, "topic": 0.302},
        },
        "raw": {
            "mean_reward": 0.312,
            "reward_variance": 0.222,
            "ci95": [0.212, 0.412],
            "n": 64,
            "components": {"vader": 0.15, "topic": 0.324},
        },
        "trained": {
            "mean_reward": 0.623,
            "reward_variance": 0.133,
            "ci95": [0.573, 0.673],
            "n": 64,
            "components": {"vader": 0.45, "topic": 0.346},
        },
    },
    "paired": {
        "trained_minus_raw": {"mean": 0.311, "ci95": [0.211, 0.411]},
        "trained_minus_untuned": {"mean": 0.022, "ci95": [-0.02, 0.064]},
    },
    "kl_per_rewrite": 2.345,
    "tokens_per_second": 1234.5,
    "seconds": {"sft": 40.25, "train": 200.5},
    "peak_rss_bytes": 700 * 2**20,
}
METRICS = [
    {"stage": "sft", "loss": 2.0},
    {"step": 0, "reward_mean": 0.3, "kl_per_rewrite": 0.0},
    {"step": 1, "reward_mean": 0.5, "kl_per_rewrite": 1.5},
    {"step": 2, "reward_mean": 0.6, "kl_per_rewrite": 2.5},
]
SAMPLES = [
    {
        "prompt": f"What is snow? {HOSTILE}",
        "rewrite_untuned": f"Be brief. {HOSTILE}",
        "rewrite_trained": f"Be kind. {HOSTILE}",
        "response_raw": f"Frozen water. {HOSTILE}",
        "response_trained": f"Lovely frozen water! {HOSTILE}",
        "reward_raw": 0.1,
        "reward_trained": 0.9,
    },
    {"prompt": "Only a prompt"},
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


@pytest.fixture(scope="module")
def page() -> tuple[str, Page]:
    html = render_report(REPORT, METRICS, SAMPLES)
    return html, Page(html)


def test_arms_table_in_the_order_of_reading():
    lines = plain(show(arms_table(REPORT))).splitlines()
    rows = [line for line in lines if "prompt" in line and "." in line]
    assert ["raw" in rows[0], "untuned" in rows[1], "trained" in rows[2]] == [True] * 3
    for cell in ("0.623", "0.573 to 0.673", "0.133", "0.450", "0.346", "64"):
        assert cell in rows[2]


def test_an_arm_of_ones_own_and_a_single_component():
    report = copy.deepcopy(REPORT)
    for arm in report["arms"].values():
        arm["components"] = {"vader": arm["mean_reward"]}
    report["arms"]["[bold]static[/bold]"] = {**report["arms"]["raw"], "mean_reward": 0.777}
    shown = plain(show(arms_table(report)))
    assert "vader" not in shown
    assert re.search(r"\[bold\]static\[/bold\].*0\.777", shown)


def test_verdicts_claim_only_what_the_interval_supports():
    assert "beats" in verdict({"mean": 0.3, "ci95": [0.1, 0.5]}, "the raw prompt")
    assert "+0.300" in verdict({"mean": 0.3, "ci95": [0.1, 0.5]}, "the raw prompt")
    assert "does worse than" in verdict({"mean": -0.3, "ci95": [-0.5, -0.1]}, "x")
    for interval in ([-0.1, 0.5], [0.0, 0.5], [-0.5, 0.0]):
        assert "No clear difference" in verdict({"mean": 0.2, "ci95": interval}, "x")
    text = verdict_lines(REPORT).plain
    assert "beats the raw prompt: +0.311" in text
    assert "No clear difference between the trained prompter and the untuned prompter" in text


def test_costs_have_units():
    shown = plain(show(costs_table(REPORT)))
    for value in ("2.345 nats", "1,234 tokens/s", "700 MiB", "40.2 s", "200.5 s"):
        assert value in shown


def test_samples_show_untrusted_text_as_it_is():
    shown = show(samples_panel(SAMPLES))
    assert "\x1b[31m" not in shown  # the text's own escape sequence, not one of ours
    text = plain(shown)
    assert "[red]not red[/red]" in text
    assert "before (reward 0.100): Frozen water." in text
    assert "after (reward 0.900): Lovely" in text
    assert "Only a prompt" in text


def test_printable_keeps_text_and_drops_control():
    assert printable("a\tb\nc \u00e9\U0001f600") == "a\tb\nc \u00e9\U0001f600"
    assert printable("a\r\nb") == "a\nb"
    assert printable("\x1b[31m\x00\x9b") == "\ufffd[31m\ufffd\ufffd"
    assert printable("\ud800") == "?"


def test_reward_curve_is_a_png(tmp_path):
    path = reward_curve(METRICS, tmp_path / "reward.png", report=REPORT)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    alone = reward_curve(METRICS, tmp_path / "alone.png").read_bytes()
    width, width_alone = (int.from_bytes(d[16:20], "big") for d in (data, alone))
    assert width == 2 * width_alone


def test_the_plot_holds_the_measured_points():
    from alignpro.report import plots

    figure = plots._draw(METRICS, REPORT, "#000000")
    training, arms, kl = figure.axes
    assert training.lines[0].get_xydata().tolist() == [[0, 0.3], [1, 0.5], [2, 0.6]]
    assert kl.lines[0].get_xydata().tolist() == [[0, 0.0], [1, 1.5], [2, 2.5]]
    means = [container.lines[0].get_ydata()[0] for container in arms.containers]
    assert means == [0.312, 0.401, 0.623]
    (bars,) = arms.containers[2].lines[2]
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([0.573, 0.673])


@pytest.mark.parametrize("metrics", [[], [{"step": 1}], [{"step": 0, "reward_mean": 0.5}]])
def test_plots_of_little(metrics, tmp_path):
    assert reward_curve(metrics, tmp_path / "r.png").stat().st_size > 1000
    assert reward_svg(metrics).startswith("<svg")


def test_the_svg_follows_the_page():
    svg = reward_svg(METRICS, REPORT)
    assert svg.startswith("<svg")
    assert "currentColor" in svg and "#010203" not in svg
    opening = svg[: svg.index(">")]
    assert "viewBox" in opening and " width=" not in opening and " height=" not in opening
    assert svg == reward_svg(METRICS, REPORT)


def test_the_page_is_self_contained(page):
    html, parsed = page
    assert "<metadata" not in html
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert value is not None and value.startswith("#")
    assert "url(http" not in html and "@import" not in html


def test_the_page_fits_a_phone_and_the_dark(page):
    html, parsed = page
    viewport = [a for t, a in parsed.tags if t == "meta" and a.get("name") == "viewport"]
    assert viewport and "width=device-width" in str(viewport[0]["content"])
    assert "prefers-color-scheme: dark" in html


def test_untrusted_text_is_escaped_everywhere(page):
    html, parsed = page
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 6  # five in the sample, one in the configuration
    assert parsed.text.count("alert('x')") == 6
    assert "{{ 7*7 }}" in parsed.text and "49" not in parsed.text.split("Before and after")[1]
    assert "\x1b" not in html


def test_the_page_says_what_was_measured(page):
    _, parsed = page
    text = " ".join(parsed.text.split())
    for value in (
        "The trained prompter beats the raw prompt: +0.311",
        "No clear difference",
        "0.573 to 0.673",
        "before: raw prompt, reward 0.100 Frozen water.",
        "after: trained prompter, reward 0.900 Lovely frozen water!",
        "2.345 nats",
        "torch 2.13.0",
        "SmolLM2-135M-Instruct",
        '"kl_coef": 0.05',
        "40.2 s",
    ):
        assert value in text
    classes = [a["class"] for t, a in parsed.tags if t == "p" and "verdict" in str(a.get("class"))]
    assert classes == ["verdict better", "verdict unclear"]


def test_ids_inside_the_page_are_unique(page):
    _, parsed = page
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert ids and len(ids) == len(set(ids))


def test_write_report_replaces_the_file_at_once(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(REPORT, METRICS, SAMPLES, path) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def test_a_bare_report_still_renders():
    bare = {"arms": {"raw": {k: v for k, v in REPORT["arms"]["raw"].items() if k != "components"}}}
    text = Page(render_report(bare, [], [])).text
    assert "0.312" in text and "Before and after" not in text


def test_text_with_lone_surrogates_can_be_written(tmp_path):
    path = write_report(REPORT, METRICS, [{"prompt": "\ud800"}], tmp_path / "r.html")
    assert "?" in path.read_text(encoding="utf-8")


def test_importing_the_tables_loads_no_matplotlib():
    code = (
        "import sys, alignpro.report, alignpro.report.tables, alignpro.report.html\n"
        "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
