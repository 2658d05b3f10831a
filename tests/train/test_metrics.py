"""The metrics log survives what happens to logs."""

from __future__ import annotations

import json

import pytest

from alignpro.train.metrics import MetricsLog, read_metrics, truncate_metrics


def test_rows_come_back(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 0, "loss": 1.5, "seconds": {"step": 2.0}})
    log.append({"step": 1, "loss": float("nan"), "seconds": {"step": float("inf")}})
    first, second = read_metrics(log.path)
    assert first == {"step": 0, "loss": 1.5, "seconds": {"step": 2.0}}
    assert second == {"step": 1, "loss": None, "seconds": {"step": None}}
    for line in log.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_row_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 0})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 0}\n'


def test_a_cut_last_line_is_left_out_and_a_broken_one_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo')
    assert read_metrics(path) == [{"step": 0}]
    path.write_text('{"step": 0\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:1: not JSON"):
        read_metrics(path)
    path.write_text("3\n")
    with pytest.raises(ValueError, match="expected a JSON object, got 3"):
        read_metrics(path)


def test_truncation_keeps_the_steps_before(tmp_path):
    path = tmp_path / "m.jsonl"
    truncate_metrics(path, steps=3)  # no log yet
    assert not path.exists()
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(5)) + '{"step": 5, "cut')
    truncate_metrics(path, steps=3)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
