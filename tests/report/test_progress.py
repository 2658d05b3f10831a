"""What a command says while it works: a log file's lines, and bars on a terminal."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from alignpro.report import progress
from alignpro.report.progress import Bars, TrainBar


class Clock:
    """time.monotonic of the module, moved by the test."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Log(Bars):
    """Lines without the thread: the test ticks."""

    def __init__(self, **options):
        self.file = io.StringIO()
        super().__init__(console=Console(file=self.file, width=40), **options)

    @property
    def lines(self):
        return self.file.getvalue().splitlines()


def test_a_line_says_what_is_done_and_what_is_left(clock):
    bars = Log()
    bars.show("training", 0, 10)
    assert bars.lines == []  # nothing yet: the next line comes with news, or after 5 seconds
    clock.now += 30
    bars.show("training", 2, 10, "reward 0.5")
    # What came before the first advance is no pace: it may have been done once for all of them.
    assert bars.lines == ["training 2/10, 0:00:30, reward 0.5"]
    clock.now += 3
    bars.show("training", 3, 10)
    assert len(bars.lines) == 1
    clock.now += 3
    bars.quiet()
    assert bars.lines[-1] == "training 3/10, 0:00:36, 0:00:18 left"
    bars.show("training", 10, 10)
    bars.show("training", 10, 10)
    assert bars.lines[2:] == ["training 10/10, 0:00:36"]


def test_no_stretch_of_work_is_silent(clock):
    bars = Log(doing="loading data and models")
    for _ in range(4):
        clock.now += 3
        bars.quiet()
    assert bars.lines == ["loading data and models, 0:00:06", "loading data and models, 0:00:12"]
    bars.show("raw", 8, 8)
    clock.now += 6
    bars.quiet()
    assert bars.lines[-1] == "working, 0:00:06"  # between two counts
    assert progress.QUIET_SECONDS < 10


def test_a_run_that_goes_on_is_estimated_from_where_it_began(clock):
    bars = Log()
    bars.show("training", 90, 100)
    clock.now += 10
    bars.show("training", 95, 100)
    clock.now += 10
    bars.show("training", 97, 100)
    assert bars.lines == ["training 95/100, 0:00:10", "training 97/100, 0:00:20, 0:00:15 left"]


def test_a_fit_to_answers_that_are_drawn_says_its_loss(clock):
    bars = Log()
    bar = TrainBar(bars)
    bar.on_start(Path("run"), {"steps": 1}, 0)
    bar.on_step({"step": 0, "reward_mean": 0.265, "loss": 1.25})
    assert bars.lines == ["training 1/1, 0:00:00, loss 1.250"]


def test_the_thread_speaks_by_itself(monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(progress, "_TICK_SECONDS", 0.01)
    file = io.StringIO()
    with Bars("counting", console=Console(file=file, width=40)):
        for _ in range(1000):
            if "counting, 0:00:0" in file.getvalue():
                break
            progress.time.sleep(0.01)
    assert "counting, 0:00:0" in file.getvalue()


def test_what_is_logged_meanwhile_is_said(clock):
    logger = logging.getLogger("alignpro")
    before = (logger.level, list(logger.handlers))
    bars = Log()
    with bars:
        logging.getLogger("alignpro.models.resolve").info("fetching %s", "a model")
        logging.getLogger("alignpro.fingerprints").warning("another model")
    logging.getLogger("alignpro.models.resolve").info("later")
    assert bars.lines == ["fetching a model", "warning: another model"]
    assert (logger.level, list(logger.handlers)) == before


def test_a_terminal_has_bars_with_an_estimate():
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None)
    with Bars("loading", console=console) as bars:
        bars.show("training", 1, 4, "reward 0.5")
        bars._bars.progress.refresh()
        bars.show("training", 4, 4, "reward 0.6")
        bars.doing("writing")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert re.search(r"training +\S+ 4/4 0:00:00 +reward 0.6", shown), shown
    assert re.search(r"1/4 0:00:00 -:--:-- left reward 0.5", shown), shown
    assert "loading" not in shown.splitlines()[-1] and "writing" not in shown.splitlines()[-1]
