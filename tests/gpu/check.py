"""Runs every case on the GPU: ``python -m gpu.check OUT.json [NAME ...]`` (PYTHONPATH=tests).

Writes each measurement with its budget, prints what is above it, and exits with 1 if anything is.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
import traceback
from pathlib import Path

import torch

from gpu import cases, gradient_cases, model_cases  # noqa: F401  (register their cases)


def main(out: str, *names: str) -> int:
    seed = secrets.randbits(32)  # fresh inputs each run; the seed is in the report
    chosen = [c for c in cases.CASES if not names or c.__name__ in names]
    report: dict[str, object] = {"seed": seed, "cases": {}}
    failed = 0
    for case in chosen:
        torch.manual_seed(seed)
        start = time.perf_counter()
        try:
            measured = case()
            torch.cuda.synchronize()
        except Exception:  # the others still tell something
            traceback.print_exc()
            measured = [("raised", float("inf"), 0.0)]
        wrong = [m for m in measured if not m[1] <= m[2]]
        failed += len(wrong)
        report["cases"][case.__name__] = [  # type: ignore[index]
            {"what": what, "error": error, "budget": budget} for what, error, budget in measured
        ]
        took = time.perf_counter() - start
        print(f"{case.__name__}: {len(measured)} measurements, {len(wrong)} above, {took:.1f} s")
        for what, error, budget in wrong:
            print(f"  ABOVE {what}: {error:.3g} > {budget:.3g}")
    report["device"] = torch.cuda.get_device_name()
    Path(out).write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"seed {seed}: {failed} measurements above their budget")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
