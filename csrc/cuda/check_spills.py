"""Fails where ptxas spilled registers: ``python csrc/cuda/check_spills.py BUILD_LOG``.

Reads what ``-Xptxas -v`` printed. Every kernel of ours is meant to run from registers: a spill is a
mistake in one of them, and so is a stack frame larger than what a call into the math library keeps
(16 bytes for double precision before sm_90), or a log that names no kernel.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
LIBRARY_FRAME = 16
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def spills(log: str) -> tuple[int, list[str]]:
    """How many kernels the log tells of, and a complaint for each that spills."""
    kernel, count, complaints = "?", 0, []
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            kernel = f"{entry.group(1)} for {entry.group(2)}"
        elif frame := FRAME.search(line):
            count += 1
            stack, stores, loads = (int(n) for n in frame.groups())
            if stack > LIBRARY_FRAME or stores or loads:
                complaints.append(
                    f"{kernel}: {stack} bytes of stack, {stores} of spill stores, "
                    f"{loads} of spill loads"
                )
    return count, complaints


def main(path: str) -> int:
    count, complaints = spills(Path(path).read_text(encoding="utf-8", errors="replace"))
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if count == 0:
        print(f"{path}: expected what -Xptxas -v prints, found no kernel", file=sys.stderr)
    print(f"{count} kernels, {len(complaints)} spill")
    return 1 if complaints or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
