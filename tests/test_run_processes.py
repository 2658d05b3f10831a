"""Runs as real processes: killed, told to end, several at once, on a full disk, copied."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignpro.train.metrics import read_metrics

REWARD = """
import os, time
def f(prompts, responses, **columns):
    with open("seen", "a") as file:
        file.write("x")
    time.sleep(float(os.environ.get("PAUSE", "0")))
    if os.environ.get("FAIL"):
        raise KeyError("a typo")
    return [float(sum(map(ord, r)) % 7) for r in responses]
"""


@pytest.fixture
def place(tmp_path, tiny_model_dir):
    rows = [{"prompt": f"how do {x} fly", "instruction": "be kind"} for x in "abcdefgh"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text(REWARD)
    answers, lora = {"max_new_tokens": 3}, {"lora": {"rank": 2}}
    common = {"prompter": str(tiny_model_dir("llama")), "threads": 1}
    common["data"] = {"path": "p.jsonl", "split": None}
    stage = {**common, "reward": "r:f", "num_rewrites": 2}
    stage |= {"rewrite": answers, "response": answers}
    files = {
        "sft": {**common, **lora},
        "evaluate": stage,
        "train": {**stage, **lora, "prompts_per_step": 2, "checkpoint_every": 3},
    }
    for name, settings in files.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings))
    return tmp_path


def start(place, *arguments, before=(), **environment):
    return subprocess.Popen(
        [*before, sys.executable, "-m", "alignpro", *map(str, arguments)],
        cwd=place,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process) -> tuple[int, str]:
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def run(place, *arguments, **environment):
    return ended(start(place, *arguments, **environment))


def wait_for_calls(place, process, count):
    """Until the reward was called so often."""
    for _ in range(2400):
        seen = place / "seen"
        if seen.exists() and len(seen.read_text()) >= count:
            return
        assert process.poll() is None, ended(process)
        time.sleep(0.05)
    raise AssertionError("the run does not come to its reward")


def log(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in rows]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_that_is_ended_in_any_way_goes_on_to_the_bit(place):
    assert run(place, "train", "train.yaml", "steps=8", "run_dir=whole")[0] == 0
    (place / "seen").unlink()
    process = start(place, "train", "train.yaml", "steps=8", "run_dir=run", PAUSE="0.4")
    wait_for_calls(place, process, 5)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 143 and "interrupted after step " in said, said
    assert "go on with: alignpro train run/config.json --resume" in said
    newest = max((place / "run" / "checkpoints").iterdir())
    assert newest.name == f"step-{len(log(place / 'run')):06d}"

    (place / "seen").unlink()
    process = start(place, "train", "run/config.json", "--resume", PAUSE="0.4")
    wait_for_calls(place, process, 1)
    process.kill()
    ended(process)
    shutil.move(place / "run", place / "moved")  # and it is the run of where it lies now
    newest = max((place / "moved" / "checkpoints").iterdir())
    torn = newest / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    code, said = run(place, "train", "moved/config.json", "--resume")
    assert code == 0 and f"{newest.name}: damaged" in said, said
    assert not (place / "run").exists()
    assert log(place / "moved") == log(place / "whole")
    assert adapter(place / "moved") == adapter(place / "whole")


def test_nohup_stays_nohup(place):
    script = 'trap "" HUP; exec "$@"'
    process = start(
        *(place, "train", "train.yaml", "steps=2", "run_dir=run"),
        before=("sh", "-c", script, "sh"),
        PAUSE="1",
    )
    wait_for_calls(place, process, 1)
    process.send_signal(signal.SIGHUP)
    code, said = ended(process)
    assert code == 0, said


@pytest.mark.parametrize("command", ["train", "sft"])
def test_of_three_processes_one_has_the_directory(place, command):
    arguments = (place, command, f"{command}.yaml", "steps=4", "run_dir=run")
    processes = [start(*arguments, PAUSE="1") for _ in range(3)]
    codes, said = zip(*map(ended, processes), strict=True)
    assert sorted(codes) == [0, 2, 2], said
    refused = [text for code, text in zip(codes, said, strict=True) if code]
    # Whoever is late finds the run, or finds it done.
    assert all("in use by" in text or "is not empty" in text for text in refused), said
    assert [row["step"] for row in log(place / "run")] == [0, 1, 2, 3]


OPEN = """
import sys, time
from alignpro.run_directory import open_run_dir
time.sleep(max(0, float(sys.argv[1]) - time.time()))
try:
    directory = open_run_dir("run")
except FileExistsError:
    sys.exit(2)
time.sleep(0.5)
"""


@pytest.mark.parametrize("attempt", range(4))
def test_of_processes_that_make_a_directory_at_once_one_has_it(tmp_path, attempt):
    at = str(time.time() + 1.5)
    command = [sys.executable, "-c", OPEN, at]
    processes = [subprocess.Popen(command, cwd=tmp_path) for _ in range(4)]
    assert sorted(process.wait(60) for process in processes) == [0, 2, 2, 2]


def test_of_three_evaluations_one_writes_the_file(place):
    arguments = (place, "evaluate", "evaluate.yaml", "num_prompts=2", "--output", "out.json")
    processes = [start(*arguments, PAUSE="1") for _ in range(3)]
    codes, said = zip(*map(ended, processes), strict=True)
    assert sorted(codes) == [0, 2, 2], said
    refused = [text for code, text in zip(codes, said, strict=True) if code]
    assert all("is writing it" in text or "is there already" in text for text in refused), said
    assert list(json.loads((place / "out.json").read_text())["arms"]) == ["raw", "untuned"]
    assert not (place / "out.json.lock").exists()


def test_a_first_step_that_fails_leaves_room_for_the_corrected_command(place):
    code, said = run(place, "train", "train.yaml", "steps=1", "run_dir=run", FAIL="1")
    assert code == 2 and "a typo" in said, said
    code, said = run(place, "train", "train.yaml", "steps=1", "run_dir=run", "kl_coef=0.2")
    assert code == 0, said


FULL = """
import resource, sys
from pathlib import Path
from alignpro.cli import main
from alignpro.train import trainer
plain = trainer.save_checkpoint
def on_a_full_disk(run_dir, checkpoint):
    if checkpoint.step == 6:  # from here on no file may hold more than a few bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    return plain(run_dir, checkpoint)
trainer.save_checkpoint = on_a_full_disk
main()
"""


def test_a_full_disk_costs_no_checkpoint_that_was_there(place):
    arguments = ["train", "train.yaml", "steps=8", "run_dir=run"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *arguments], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 2 and "File too large; after step 6; go on with" in done.stderr
    assert "alignpro: run/checkpoints/step-000006.partial/" in done.stderr  # what did not fit
    assert [f.name for f in (place / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert run(place, "train", "run/config.json", "--resume")[0] == 0
    assert run(place, "train", "train.yaml", "steps=8", "run_dir=whole")[0] == 0
    assert log(place / "run") == log(place / "whole")
    assert adapter(place / "run") == adapter(place / "whole")


def test_an_evaluation_that_was_killed_goes_on_with_its_arms(place):
    arguments = (
        place,
        "evaluate",
        "evaluate.yaml",
        "policy_text=be wet",
        "labelled.column=instruction",
    )
    assert run(*arguments, "--output", "whole.json")[0] == 0
    (place / "seen").unlink()
    process = start(*arguments, "--output", "out.json", PAUSE="2")
    wait_for_calls(place, process, 3)
    process.kill()
    ended(process)
    (place / "seen").unlink()
    code, said = run(*arguments, "--output", "out.json")
    assert code == 0, said
    assert len((place / "seen").read_text()) == 2  # of four arms, two were kept
    parts, whole = (json.loads(Path(place / f).read_text()) for f in ("out.json", "whole.json"))
    for report in (parts, whole):
        del report["tokens_per_second"]
    assert parts == whole
