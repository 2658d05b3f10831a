"""The GPU's benchmarks run to their end where the device is emulated: what they time means nothing,
that they write their table does."""

from __future__ import annotations

import json
import math

from gpu import bench


def test_the_benchmarks_run(tmp_path):
    out, table = tmp_path / "bench.json", tmp_path / "bench.md"
    assert bench.main(str(out), str(table)) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert "emulated" in report["device"]
    rows = report["rows"]
    assert {"linear", "attention_decode", "linear_logprob", "decode", "prefill", "rollout"} <= {
        row["op"] for row in rows
    }
    numbers = [v for row in rows for v in row.values() if isinstance(v, float)]
    assert all(math.isfinite(number) for number in numbers)
    assert all(row["ours_ms"] > 0 for row in rows)
    assert len(table.read_text(encoding="utf-8").splitlines()) == len(rows) + 4
