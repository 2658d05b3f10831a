"""Run directories: a run's files go when they may, and nobody else's ever do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

from alignpro.files import append_line, being_written, whole_file, write_file, write_json
from alignpro.run_directory import (
    CONFIG,
    ERROR_LOG,
    LOCK,
    MARKER,
    check_run_dir,
    error_notes,
    is_free,
    open_free_run_dir,
    open_run_dir,
    remove_run_files,
    run_of_config,
)

OURS = [
    "config.json",
    "metrics.jsonl",
    "sft-metrics.jsonl",
    "rollouts.jsonl",
    "report.json",
    "report.html",
    "reward.png",
    "evaluation.json",
    "error.log",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "reference/adapter_config.json",
    "fingerprints.json",
    "evaluation.json.arms.jsonl",
    "reference/base_model.json",
    "adapter/prompter.json",
    "safety.json",
    "safety.json.arms.jsonl",
    "checkpoints/step-000010/state.json",
    "checkpoints/step-000010/optimizer.pt",
    "checkpoints/step-000010/critic.pt",
    "checkpoints/step-000010/adapter/adapter_model.safetensors",
    "checkpoints/step-000012.partial/optimizer.pt.partial",
    "metrics.jsonl.partial",
    "tensorboard/events.out.tfevents.17.host.1.0",
    "wandb/offline-run-1/run-1.wandb",
    "wandb.json",
]


def make_run(path, files=OURS):
    open_run_dir(path)
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")
    return path


def listing(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def refused(path, error, match, **options):
    before = listing(path.parent)
    for use in (check_run_dir, open_run_dir):
        with pytest.raises(error, match=match) as caught:
            use(path, **options)
        assert "\n" not in str(caught.value)
    assert listing(path.parent) == before


def test_a_new_directory_is_marked(tmp_path):
    new = tmp_path / "a" / "run"
    assert open_run_dir(new).path == new
    assert listing(new) == [LOCK, MARKER]
    open_run_dir(new)  # nothing of a run in it yet
    refused(new, FileNotFoundError, "no run to resume there .no config.json", resume=True)
    write_json(new / "config.json", {"a": 1})
    append_line(new / "metrics.jsonl", "{}")
    refused(new, FileExistsError, "--resume goes on with it, --overwrite deletes it")
    refused(new, ValueError, "exclude each other", resume=True, overwrite=True)
    open_run_dir(new, resume=True)
    assert (new / "config.json").is_file()


def test_overwrite_empties_a_run(tmp_path):
    run = make_run(tmp_path / "run")
    check_run_dir(run, overwrite=True)
    assert (run / "config.json").is_file()
    open_run_dir(run, overwrite=True)
    assert listing(run) == [LOCK, MARKER]


def test_overwrite_of_what_is_missing_or_empty(tmp_path):
    open_run_dir(tmp_path / "missing", overwrite=True)
    (tmp_path / "empty").mkdir()
    open_run_dir(tmp_path / "empty", overwrite=True)
    assert listing(tmp_path / "empty") == listing(tmp_path / "missing") == [LOCK, MARKER]


@pytest.mark.parametrize(
    "files",
    [
        ["config.json", "model.safetensors", "tokenizer.json"],  # a model's folder
        ["config.json", "src/main.py", ".git/config"],  # a project's
        ["config.json", "metrics.jsonl", "adapter/adapter_config.json"],  # like a run, unmarked
        [f"{MARKER}.txt", "config.json"],
    ],
)
def test_a_folder_without_the_marker_is_nobodys_run(tmp_path, files):
    for name in files:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text("mine")
    refused(tmp_path / "folder", ValueError, "not one of alignpro's", overwrite=True)
    refused(tmp_path / "folder", FileNotFoundError, "no run to resume there", resume=True)


def test_a_marker_is_what_it_says(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / MARKER).write_text("a note of mine")
    refused(folder, ValueError, "not one of alignpro's", overwrite=True)


@pytest.mark.parametrize(
    "extra",
    [
        "notes.md",
        "model.safetensors",
        "adapter/README.md",
        "checkpoints/best/state.json",
        "checkpoints/step-000010/notes.txt",
        "second/config.json",  # another run inside
        "tensorboard/notes.txt",
        "mine.json.judge.jsonl",
        "wandb2/x",
        "metrics.jsonl.old",
    ],
)
def test_a_file_that_no_run_writes_keeps_the_run(tmp_path, extra):
    run = make_run(tmp_path / "run")
    (run / extra).parent.mkdir(parents=True, exist_ok=True)
    (run / extra).write_text("mine")
    named = extra.split("/")[0] if extra.startswith(("second", "wandb2")) else extra
    named = "checkpoints/best" if "best" in extra else named
    refused(run, ValueError, f"{named} is not a run's; not overwriting", overwrite=True)
    open_run_dir(run, resume=True)


def test_an_empty_folder_of_somebody_keeps_the_run_too(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "plots").mkdir()
    refused(run, ValueError, "plots is not a run's", overwrite=True)


def test_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "adapter_config.json").write_text("mine")
    run = make_run(tmp_path / "run", ["config.json", "report.json", "wandb/offline-run-1/x"])
    (run / "wandb" / "latest-run").symlink_to("offline-run-1")  # as W&B makes it
    (run / "wandb" / "far").symlink_to(outside)
    (run / "adapter").symlink_to(outside)
    refused(run, ValueError, "adapter is not a run's", overwrite=True)
    (run / "adapter").unlink()
    link = tmp_path / "link"
    link.symlink_to(run)
    refused(link, ValueError, "a link to .*run; to overwrite that, name it itself", overwrite=True)
    open_run_dir(link, resume=True)
    open_run_dir(run, overwrite=True)
    assert listing(run) == [LOCK, MARKER] and listing(outside) == ["adapter_config.json"]
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    refused(tmp_path / "broken", FileExistsError, "a link to nothing of that name")


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        refused(tmp_path / "thesis.txt", FileExistsError, "a file of that name", **options)


def test_removing_leaves_what_is_not_a_runs(tmp_path):
    run = make_run(tmp_path / "run")
    folder = run / "checkpoints" / "step-000010"
    (folder / "notes.txt").write_text("mine")
    remove_run_files(run, folder)
    assert listing(folder) == ["notes.txt"]
    (folder / "notes.txt").unlink()
    remove_run_files(run, folder)
    assert not folder.exists()


HOLD = """
import sys, time
from alignpro.run_directory import open_run_dir
directory = open_run_dir(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_dead_one_is_not(tmp_path):
    run = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        write_json(run / "config.json", {})
        for use in (check_run_dir, open_run_dir):
            with pytest.raises(FileExistsError, match=f"in use by process {child.pid} on "):
                use(run)  # no step is done in it, and it is somebody's
        for options in ({"resume": True}, {"overwrite": True}):
            for use in (check_run_dir, open_run_dir):
                with pytest.raises(FileExistsError, match=f"in use by process {child.pid} on "):
                    use(run, **options)
        assert (run / "config.json").is_file()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    open_run_dir(run, resume=True)  # its lock is there, and stale
    assert f"process {os.getpid()} on " in (run / LOCK).read_text()


def test_one_process_makes_way_for_itself_but_not_for_what_runs(tmp_path):
    first = open_run_dir(tmp_path / "run")
    with first:
        with first:  # a stage within the run
            pass
        with pytest.raises(FileExistsError, match="in use by this process"):
            open_run_dir(tmp_path / "run")
    first = open_run_dir(tmp_path / "run")
    second = open_run_dir(tmp_path / "run")
    with second, pytest.raises(FileExistsError, match="in use by this process"), first:
        pass


def test_an_error_that_ends_a_run_keeps_its_traceback(tmp_path):
    with pytest.raises(KeyError) as caught, open_run_dir(tmp_path / "run"):
        {}["a defect"]
    log = (tmp_path / "run" / ERROR_LOG).read_text()
    assert "Traceback" in log and "test_run_directory.py" in log and "KeyError: 'a defect'" in log
    assert error_notes(caught.value) == [f"traceback: {tmp_path / 'run' / ERROR_LOG}"]


def test_the_first_error_is_the_one_that_is_raised(tmp_path):
    with (
        pytest.raises(ValueError, match="the first") as caught,
        open_run_dir(tmp_path / "run") as directory,
    ):
        error = ValueError("the first")
        with directory.after(error, "writing the checkpoint"):
            raise OSError("disk full")
        raise error
    assert error_notes(caught.value)[0] == "then writing the checkpoint failed: disk full"
    log = (tmp_path / "run" / ERROR_LOG).read_text()
    assert "OSError: disk full" in log and "ValueError: the first" in log


def test_an_error_log_that_cannot_be_written_hides_nothing(tmp_path):
    directory = open_run_dir(tmp_path / "run")
    (tmp_path / "run" / ERROR_LOG).mkdir()
    with pytest.raises(KeyError) as caught, directory:
        {}["a defect"]
    assert "error.log could not be written" in error_notes(caught.value)[0]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_file(path, "before")
    with pytest.raises(OSError, match="disk full"), whole_file(path) as file:
        file.write(b"aft")
        raise OSError("disk full")
    assert path.read_text() == "before" and listing(tmp_path) == ["a.json"]
    write_json(path, {"a": [1]})
    assert path.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'


BEGUN = ["config.json", "fingerprints.json", "error.log", "reference/adapter_config.json",
         "sft-metrics.jsonl", "tensorboard/events.out.tfevents.17.host.1.0",
         "checkpoints/step-000001.partial/adapter/adapter_model.safetensors"]  # fmt: skip


def test_a_run_without_a_step_is_in_nobodys_way(tmp_path):
    run = make_run(tmp_path / "run", BEGUN)
    (run / "metrics.jsonl").write_text('{"step": 0, "cut by a ki')
    (run / "calls.jsonl").write_text("paid for")
    assert is_free(run)
    open_run_dir(run, resume=True)  # and may be gone on with
    assert (run / CONFIG).is_file()
    open_run_dir(run)
    assert listing(run) == [LOCK, MARKER, "calls.jsonl"]


def test_what_was_paid_for_stays(tmp_path):
    paid = ["bound.json.calls.jsonl", "calls.jsonl", "evaluation.json.judge.calls.jsonl"]
    paid.append("evaluation.json.judge.jsonl")
    run = make_run(tmp_path / "run", [*OURS, *paid])
    open_run_dir(run, overwrite=True)
    assert listing(run) == [LOCK, MARKER, *paid]


@pytest.mark.parametrize(
    "work", ["checkpoints/step-000001/state.json", "adapter/adapter_config.json", "rollouts.jsonl",
             "metrics.jsonl", "notes.md", "reference/notes.md"]
)  # fmt: skip
def test_what_is_somebodys_work_is_in_the_way(tmp_path, work):
    run = make_run(tmp_path / "run", [*BEGUN, work])
    (run / work).write_text("{}\n")
    assert not is_free(run)
    refused(run, FileExistsError, "is not empty: --resume")


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    name = str(tmp_path / "run")
    first = open_free_run_dir(name)
    with first:
        second = open_free_run_dir(name)
    make_run(tmp_path / "run-3", ["metrics.jsonl"])
    (tmp_path / "run-3" / "metrics.jsonl").write_text("{}\n")
    with first, second:
        paths = [first.path, second.path, open_free_run_dir(name).path]
    assert [path.name for path in paths] == ["run", "run-2", "run-4"]


def test_a_copy_of_a_run_is_a_run_of_its_own(tmp_path):
    make_run(tmp_path / "run", [CONFIG])
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert run_of_config(tmp_path / "copy" / CONFIG) == tmp_path / "copy"
    assert run_of_config(tmp_path / "copy" / "other.json") is run_of_config(None) is None
    (tmp_path / "plain").mkdir()
    write_json(tmp_path / "plain" / CONFIG, {})
    assert run_of_config(tmp_path / "plain" / CONFIG) is None


@pytest.mark.parametrize("marker", [None, "This directory"])
def test_a_copy_without_its_marker_is_not_the_original(tmp_path, marker):
    """As `cp run/* copy` leaves it, or a copy that was cut short."""
    make_run(tmp_path / "copy", [CONFIG, "fingerprints.json"])
    (tmp_path / "copy" / MARKER).unlink()
    if marker is not None:
        (tmp_path / "copy" / MARKER).write_text(marker)
    assert run_of_config(tmp_path / "copy" / CONFIG) == tmp_path / "copy"
    with pytest.raises(FileNotFoundError, match=r"no whole \.alignpro-run in it.*hidden files"):
        check_run_dir(tmp_path / "copy", resume=True)


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    """A file may not grow beyond 4096 bytes, as on a disk that is full."""
    code = """
import resource, sys
from alignpro.files import append_line
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
append_line(sys.argv[1], "a" * 3000)
try:
    append_line(sys.argv[1], "b" * 3000)
except OSError as error:
    print(error.strerror)
append_line(sys.argv[1], "c")
"""
    path = tmp_path / "log.jsonl"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout == "File too large\n", done.stderr
    assert path.read_text() == "a" * 3000 + "\nc\n"


WRITE = """
import sys, time
from pathlib import Path
from alignpro.files import being_written
with being_written(Path(sys.argv[1])):
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_file_has_one_writer(tmp_path):
    path = tmp_path / "out.json"
    child = subprocess.Popen([sys.executable, "-c", WRITE, path], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "writing\n"
        with (
            pytest.raises(FileExistsError, match=f"process {child.pid} on .* is writing it"),
            being_written(path),
        ):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with being_written(None, path):
        assert listing(tmp_path) == ["out.json.lock"]
    assert listing(tmp_path) == []
