"""What only shows after a while, or at the wrong moment: memory, many callers, fork, exit."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from alignpro import SamplingParams
from alignpro.models.native_model import NativeModel


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def test_ten_thousand_requests_leave_memory_flat(tiny: NativeModel) -> None:
    params = SamplingParams(max_new_tokens=2, seed=0, ignore_eos=True)

    def serve(thousand: int) -> None:
        prompts = [[(thousand * 7 + i * j) % 100 + 5 for j in range(1, 20)] for i in range(1000)]
        tiny.generate(prompts, params)

    for thousand in range(4):  # the cache of prefixes fills once
        serve(thousand)
    before = resident_bytes()
    for thousand in range(4, 10):
        serve(thousand)
    # A kilobyte lost by a request would be 6 MB.
    assert resident_bytes() - before < 4 * 2**20


def test_thirty_two_threads_share_one_engine(tiny: NativeModel) -> None:
    prompts = [[5 + i, 6, 7 + i % 3] for i in range(32)]
    params = [SamplingParams(max_new_tokens=6, seed=i) for i in range(32)]
    alone = [tiny.generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    found: list[object] = [None] * 32

    def ask(i: int) -> None:
        found[i] = tiny.generate([prompts[i]], params[i])[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


PRELUDE = """
import os, sys, threading, time
from alignpro import SamplingParams, load_model
model = load_model(sys.argv[1], threads=2)
params = SamplingParams(max_new_tokens=20, seed=1, ignore_eos=True)
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_leaving_the_interpreter_while_a_thread_generates(
    tiny_model_dir: Callable[..., Path],
) -> None:
    done = run(
        """
def forever():
    while True:
        model.generate([[5, 6, 7]] * 8, params)
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.3)
print("leaving")
""",
        tiny_model_dir("llama"),
    )
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr


def test_a_forked_child_generates_the_same(tiny_model_dir: Callable[..., Path]) -> None:
    done = run(
        """
here = model.generate([[5, 6, 7]], params)[0].tokens
child = os.fork()
if child == 0:
    same = model.generate([[5, 6, 7]], params)[0].tokens == here
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
        tiny_model_dir("llama"),
    )
    assert done.returncode == 0, done.stderr
