"""What only shows after a while, or at the wrong moment: memory, many callers, fork, exit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignpro import SamplingParams
from alignpro.models.native_model import NativeModel
from native_runs import ENDLESS, lora


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


FORKS = """
import signal

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        sys.exit(0)  # by way of what runs at exit
    ended = time.time() + 20
    while time.time() < ended:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("hangs", flush=True)

stop = False
def beside(work):
    def repeat():
        while not stop:
            work()
    thread = threading.Thread(target=repeat)
    thread.start()
    time.sleep(0.2)
    return thread

def ask():
    print(len(model.generate([[5, 6, 7]], params)[0].tokens), flush=True)
"""


@pytest.mark.parametrize(
    ("busy", "asked"),
    [
        ("model.generate([[5] * 99] * 8, params)", "ask()"),
        ("model.score([[5] * 200] * 8)", "ask()"),
        ("load_model(sys.argv[1])", "ask()"),
        ("model.generate([[5] * 99] * 8, params)", "model.score([[5, 6]])"),
        ("model.generate([[5] * 99] * 8, params)", "next(model.stream([5], params))"),
        ("model.generate([[5] * 99] * 8, params)", "load_model(sys.argv[1])"),
    ],
)
def test_a_child_forked_beside_a_call_is_refused_by_name(
    tiny_model_dir: Callable[..., Path], busy: str, asked: str
) -> None:
    """Or answers, where the fork came between two calls; it never hangs, and leaves cleanly."""
    code = (
        f"thread = beside(lambda: {busy})\n"
        f"for _ in range(4): child(lambda: {asked})\n"
        "stop = True\nthread.join()\nask()\nchild(ask)\n"
    )
    done = run(FORKS + code, tiny_model_dir("llama"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["20", "20"], done.stdout + done.stderr
    for line in lines[:-2]:
        assert line == "20" or line.startswith("UnavailableError this process was forked while")


def test_a_hostile_thread_changes_nobody(tiny: NativeModel) -> None:
    """ALIGNPRO_HOSTILE_SECONDS says for how long; 5 by default."""
    ends = time.monotonic() + float(os.environ.get("ALIGNPRO_HOSTILE_SECONDS", "5"))
    params = [SamplingParams(max_new_tokens=8, seed=i, top_k=3 * (i % 2)) for i in range(6)]
    prompts = [[5 + i] * (10 + 20 * i) for i in range(6)]
    want = tiny.generate(prompts, params)
    weights = lora(tiny)
    broken = [
        replace(weights, matrices={n: (a * value, b) for n, (a, b) in weights.matrices.items()})
        for value in (np.float32("inf"), np.float32("nan"), np.float32(1e38))
    ]

    class Enough(Exception):
        pass

    def enough(*_: object) -> None:
        raise Enough

    acts: list[Callable[[int], object]] = [
        lambda i: tiny.generate([[5, 6]] * 3, replace(params[0], temperature=1e-38 * (i % 3))),
        lambda i: tiny.generate([[5, 6, 7]] * 4, ENDLESS, adapter=broken[i % 3]),
        lambda i: tiny.generate([[5 + i % 50] * 190] * 40, replace(ENDLESS, max_new_tokens=60)),
        lambda i: tiny.generate([[5, 6]] * 9, replace(ENDLESS, deadline_seconds=1e-6)),
        lambda i: tiny.generate([[5]], replace(ENDLESS, stop=("",))),
        lambda i: tiny.generate([[5]], replace(ENDLESS, stop=("a" * 4096,) * 256)),
        lambda i: tiny.generate([[5]], replace(ENDLESS, stop_token_ids=tuple(range(111)))),
        lambda i: tiny.generate([[5], [], [6]], ENDLESS, on_token=enough),
        lambda i: tiny.stream([5] * 100, ENDLESS),
        lambda i: next(iter(tiny.stream([5] * 100, ENDLESS))),
        lambda i: [tiny.client().submit([5] * 100, ENDLESS) for _ in range(5)],
        lambda i: tiny.generate([[5] * 10**4, [10**9], [-1]], ENDLESS, errors="return"),
        lambda i: tiny.score([[5, 6, 7]], adapter=broken[i % 3]),
    ]
    stop = threading.Event()
    unexpected: list[BaseException] = []

    def hostile() -> None:
        count = 0
        while not stop.is_set():
            try:
                acts[count % len(acts)](count)
            except (ValueError, ArithmeticError, Enough):
                pass
            except BaseException as error:
                unexpected.append(error)
            count += 1

    thread = threading.Thread(target=hostile)
    thread.start()
    rounds = 0
    try:
        while time.monotonic() < ends:
            assert tiny.generate(prompts, params) == want
            assert [p[0] for p in tiny.stream(prompts[1], params[1])] == want[1].tokens
            rounds += 1
    finally:
        stop.set()
        thread.join()
    assert rounds > 3 and not unexpected
    while not tiny._engine.idle():
        tiny._engine.step()
    assert tiny.stats()["kv_blocks_in_use"] == 0
