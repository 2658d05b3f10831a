"""Callbacks and trackers: what they are told and when, and what the real packages hold after."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignpro.config import TrainConfig, from_mapping
from alignpro.train import trackers
from alignpro.train.callbacks import TrainCallback
from alignpro.train.checkpoint import load_checkpoint
from alignpro.train.metrics import METRICS, read_metrics
from alignpro.train.run import make_trainer
from alignpro.train.trackers import Service, TensorBoard, flatten, make_trackers, tagged
from train.test_trainer import config, log, make
from train.toy_model import ToyModel


def needs(package):
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is not installed")


class Recorder(TrainCallback):
    """Notes every call."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    def _note(self, *call):
        self.calls.append(call)
        if self.fail_at == call[:2]:
            raise OSError("the disk is full")

    def on_start(self, run_dir, config, step):
        self._note("start", step, run_dir, config["steps"])

    def on_step(self, row):
        self._note("step", row["step"])

    def on_checkpoint(self, path, step):
        self._note("checkpoint", step, path.name)

    def on_end(self, run_dir):
        self._note("end", run_dir)


def test_callbacks_are_told_in_order(tmp_path):
    trainer = make(config(tmp_path, steps=3, checkpoint_every=2))
    seen = Recorder()
    trainer.train([seen])
    assert seen.calls == [
        ("start", 0, trainer.run_dir, 3),
        ("step", 0),
        ("step", 1),
        ("checkpoint", 2, "step-000002"),
        ("step", 2),
        ("checkpoint", 3, "step-000003"),
        ("end", trainer.run_dir),
    ]


def test_a_resumed_run_says_where_it_goes_on(tmp_path):
    make(config(tmp_path, steps=2)).train()
    seen = Recorder()
    make(config(tmp_path, steps=3), resume=True).train([seen])
    assert [call[:2] for call in seen.calls[:2]] == [("start", 2), ("step", 2)]


def test_an_error_in_a_callback_is_raised_after_the_checkpoint(tmp_path):
    trainer = make(config(tmp_path))
    bad, other = Recorder(fail_at=("step", 2)), Recorder()
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train([other, bad])
    assert load_checkpoint(trainer.run_dir, ToyModel.lora_modules).step == 3
    for seen in (bad, other):
        assert seen.calls[-2:] == [("checkpoint", 3, "step-000003"), ("end", trainer.run_dir)]
    assert not (trainer.run_dir / "adapter").exists()


def test_one_that_cannot_start_ends_those_that_did(tmp_path):
    trainer = make(config(tmp_path))
    first, bad = Recorder(), Recorder(fail_at=("start", 0))
    with pytest.raises(OSError):
        trainer.train([first, bad])
    assert [call[0] for call in first.calls] == ["start", "end"]
    assert [call[0] for call in bad.calls] == ["start"]
    assert trainer.step == 0


def test_flatten_names_nested_values_and_leaves_the_unknown_out():
    row = {"step": 3, "a": 1, "b": None, "s": "text", "seconds": {"step": 2.5, "x": {"y": True}}}
    assert dict(flatten(row)) == {"a": 1.0, "s": "text", "seconds/step": 2.5, "seconds/x/y": 1.0}


def test_every_number_of_a_run_has_a_group_and_a_sentence(tmp_path):
    for text in METRICS.values():
        assert text.text[0].isupper() and text.text.endswith("."), text
    rows = read_metrics(crashed_and_resumed(tmp_path).log.path)
    tags = [tag for row in rows for tag, _ in tagged(row)]
    groups = {"reward", "kl", "tokens", "time", "loss", "rewrites"}
    assert {tag.split("/")[0] for tag in tags} - {"sample"} == groups


def test_tags_of_what_is_watched_and_of_what_nobody_knows():
    row = {
        "heldout": {"reward_mean": 0.5, "components": {"vader": 0.2}, "seconds": 2.0, "copies": 0},
        "target_usage": {"cost": 3.0},
        "mine": 1,
    }
    assert dict(tagged(row)) == {
        "reward/heldout": 0.5,
        "reward/heldout/vader": 0.2,
        "time/heldout": 2.0,
        "heldout/copies": 0.0,
        "tokens/usage/cost": 3.0,
        "other/mine": 1.0,
    }


def test_the_configuration_names_trackers():
    assert from_mapping(TrainConfig, {"track": ["wandb"]}).track == ("wandb",)
    with pytest.raises(ValueError, match=r"track\[0\]: expected one of 'wandb', 'trackio'"):
        from_mapping(TrainConfig, {"track": ["wand"]})
    with pytest.raises(ValueError, match=r"^track: expected every tracker once"):
        TrainConfig(track=("wandb", "wandb"))


def test_a_tracker_that_is_missing_is_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "is_installed", lambda name: False)
    settings = config(
        tmp_path, track=("trackio",), prompter="no-such-model", reward="no-such-reward"
    )
    for start in (make, make_trainer):
        with pytest.raises(ImportError, match=r"track: trackio is not installed: pip install 'ali"):
            start(settings)
    assert not (tmp_path / "run").exists()
    assert make_trackers(()) == []


def crashed_and_resumed(tmp_path, **changes):
    """A run whose second half was done twice: five steps, gone back to the third, then six."""
    settings = config(tmp_path, steps=5, checkpoint_every=3, **changes)
    trainer = make(settings)
    trainer.train()
    # As a crash leaves it: rows and events of steps 3 and 4, and the checkpoint before them.
    shutil.rmtree(trainer.run_dir / "checkpoints" / "step-000005")
    again = make(config(tmp_path, steps=6, checkpoint_every=3, **changes), resume=True)
    assert again.step == 3
    again.train()
    assert [row["step"] for row in log(again)] == list(range(6))
    return again


@needs("tensorboard")
def test_tensorboard_holds_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = crashed_and_resumed(tmp_path)
    assert isinstance(trainer.trackers[0], TensorBoard)
    events = EventAccumulator(str(trainer.run_dir / "tensorboard"))
    events.Reload()
    rows = log(trainer)
    names = events.Tags()["scalars"]
    assert {"reward/mean", "kl/per_rewrite", "time/generate", "time/step"} <= set(names)
    for name in ("reward_mean", "kl_per_rewrite", "grad_norm"):
        scalars = events.Scalars(METRICS[name].tag)
        assert [event.step for event in scalars] == list(range(6))
        assert [e.value for e in scalars] == pytest.approx([r[name] for r in rows], rel=1e-6)
    samples = events.Tensors("sample/text_summary")
    # Texts cannot be purged: those of the steps that were done twice are there twice, and equal.
    assert [s.step for s in samples] == [0, 1, 2, 3, 4, 3, 4, 5]
    for sample in samples:
        assert sample.tensor_proto.string_val[0].decode() == rows[sample.step]["sample"]


@needs("wandb")
def test_wandb_holds_every_step_once(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = crashed_and_resumed(tmp_path, track=("wandb",))
    rows = log(trainer)
    files = sorted((trainer.run_dir / "wandb").glob("offline-run-*/*.wandb"))
    run_id = json.loads((trainer.run_dir / "wandb.json").read_text())["id"]
    assert len(files) == 2 and all(run_id in file.name for file in files)
    history = [row for file in files for row in finished_wandb(file)]
    assert [row["_step"] for row in history] == list(range(6))
    for name, tag in (("reward_mean", "reward/mean"), ("sample", "sample")):
        assert [row[tag] for row in history] == [row[name] for row in rows]
    assert all(row["time/step"] > 0 for row in history)


def test_a_copy_of_a_run_is_a_run_of_its_own_at_a_tracker(tmp_path, caplog):
    class Kept:
        def __init__(self, run_dir, config, run_id):
            self.id = run_id
            begun.append(run_id)

        def log(self, metrics, step):
            logged.append((self.id, step))

        def finish(self):
            pass

    begun, logged = [], []

    def steps(run_dir, *numbers):
        service = Service("wandb", Kept)
        service.on_start(run_dir, {}, numbers[0])
        for number in numbers:
            service.on_step({"step": number, "reward_mean": 1.0})
        service.on_end(run_dir)

    (tmp_path / "run").mkdir()
    steps(tmp_path / "run", 0, 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    steps(tmp_path / "copy", 1, 2)
    steps(tmp_path / "run", 1, 2)
    first, second, third = begun
    assert third == first != second
    assert logged == [(first, 0), (first, 1), (second, 1), (second, 2), (first, 2)]
    (said,) = caplog.messages
    assert f"a copy of {tmp_path / 'run'}, whose run at wandb is {first}; this" in said
    shutil.move(tmp_path / "copy", tmp_path / "moved")
    steps(tmp_path / "moved", 3)
    assert begun[-1] == second and len(caplog.messages) == 1


def finished_wandb(file: Path):
    """Its history. The package's own process writes the end of a run a moment after finish()."""
    deadline = time.monotonic() + 60
    while True:
        records = list(read_wandb(file))
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.1)
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            yield row | {"_step": record.history.step.num}


def read_wandb(file: Path):
    """The whole records of an offline run's file.

    Its bytes are a header of 7 and then LevelDB's log format: blocks of 32 KiB that hold pieces of
    records, each after a checksum (4 bytes), its length (2) and its kind (1: whole, first, middle,
    last).
    """
    from wandb.proto import wandb_internal_pb2

    block, data, at, pieces = 1 << 15, file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # too little left for a piece: padding
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):  # still being written
            return
        pieces = data[at + 7 : at + 7 + size] if kind in (1, 2) else pieces + data[at + 7 :][:size]
        at += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            yield record


@needs("trackio")
def test_trackio_holds_every_step_once(tmp_path, monkeypatch):
    # It reads its folder's name when it is imported, so it is asked in a process of its own.
    code = f"""
import json, pathlib
import trackio
from train.test_trainer import log
from train.test_watching import crashed_and_resumed
from trackio.sqlite_storage import SQLiteStorage

trainer = crashed_and_resumed(pathlib.Path({str(tmp_path)!r}), track=("trackio",))
(run,) = trackio.Api().runs("alignpro")
held = SQLiteStorage.get_logs("alignpro", run.name, run_id=run.id)
found = json.dumps([run.name, held, log(trainer)])
pathlib.Path({str(tmp_path / "found.json")!r}).write_text(found)
"""
    tests = Path(__file__).resolve().parents[1]
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tests), *sys.path]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, held, rows = json.loads((tmp_path / "found.json").read_text())
    assert name.startswith("run-")
    assert [row["step"] for row in held] == list(range(6))
    for key, tag in (("reward_mean", "reward/mean"), ("sample", "sample")):
        assert [row[tag] for row in held] == [row[key] for row in rows]
