"""Checkpoints: nothing is lost by accident, nothing torn is trusted."""

from __future__ import annotations

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignpro.config import LoraConfig
from alignpro.train.checkpoint import (
    Checkpoint,
    check_same_run,
    load_checkpoint,
    save_checkpoint,
)
from alignpro.train.policy import initial_weights
from train.toy_model import MODULE, ToyModel


def checkpoint(step, *, value=1.0):
    weights = initial_weights(ToyModel(), LoraConfig(rank=2, alpha=3.0), seed=step)
    weights.matrices[MODULE][1][:] = value
    state = {"state": {0: {"exp_avg": torch.full((2,), value)}}, "param_groups": [{"lr": 0.1}]}
    return Checkpoint(step, 8 * step, {"kl_coef": 0.1}, weights, state, {"kl_coef": 0.1})


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path, checkpoint(3))
    back = load_checkpoint(tmp_path, ToyModel.lora_modules)
    assert (back.step, back.cursor, back.config) == (3, 24, {"kl_coef": 0.1})
    assert (back.weights.rank, back.weights.alpha, back.weights.rslora) == (2, 3.0, False)
    for mine, theirs in zip(
        back.weights.matrices[MODULE], checkpoint(3).weights.matrices[MODULE], strict=True
    ):
        assert np.array_equal(mine, theirs)
    assert torch.equal(back.optimizer["state"][0]["exp_avg"], torch.ones(2))


def test_the_last_is_taken_and_old_ones_go(tmp_path):
    assert load_checkpoint(tmp_path, ToyModel.lora_modules) is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, checkpoint(step))
    assert load_checkpoint(tmp_path, ToyModel.lora_modules).step == 3
    assert not (tmp_path / "checkpoints" / "step-000001").exists()
    save_checkpoint(tmp_path, checkpoint(3, value=2.0))  # again: replaced whole
    back = load_checkpoint(tmp_path, ToyModel.lora_modules)
    assert (back.weights.matrices[MODULE][1] == 2.0).all()


def test_a_write_that_was_cut_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1))
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, checkpoint(2))
    monkeypatch.undo()
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert load_checkpoint(tmp_path, ToyModel.lora_modules).step == 1
    save_checkpoint(tmp_path, checkpoint(2))
    assert load_checkpoint(tmp_path, ToyModel.lora_modules).step == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def lose(path):
    """Of the right size, as a file system leaves it that wrote down the size alone."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-300] + bytes(300))


def spoil(path):
    torch.save({"state": pytest.raises}, path)  # a pickled function: not to be run


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", cut),
        ("optimizer.pt", lose),
        ("optimizer.pt", spoil),
        ("optimizer.pt", lambda path: path.unlink()),
        ("state.json", cut),
        ("state.json", lambda path: path.write_text("")),
        ("state.json", lambda path: path.unlink()),
        ("adapter/adapter_model.safetensors", cut),
        ("adapter/adapter_model.safetensors", lose),
        ("adapter/adapter_config.json", lambda path: path.unlink()),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, caplog, name, damage):
    save_checkpoint(tmp_path, checkpoint(1))
    damage(save_checkpoint(tmp_path, checkpoint(2)) / name)
    assert load_checkpoint(tmp_path, ToyModel.lora_modules).step == 1
    (said,) = caplog.messages
    assert "step-000002: damaged (" in said and "\n" not in said
    damage(tmp_path / "checkpoints" / "step-000001" / name)
    assert load_checkpoint(tmp_path, ToyModel.lora_modules) is None


def test_steps_after_the_one_gone_back_to_are_gone(tmp_path):
    for step in (5, 6):
        save_checkpoint(tmp_path, checkpoint(step))
    cut(tmp_path / "checkpoints" / "step-000006" / "optimizer.pt")
    save_checkpoint(tmp_path, checkpoint(1_000_000))  # by number, and not by name
    save_checkpoint(tmp_path, checkpoint(3))
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_checkpoint_that_may_not_be_read_is_no_damaged_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1))

    def refuse(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(PermissionError):
        load_checkpoint(tmp_path, ToyModel.lora_modules)


def test_what_a_resume_may_change():
    saved = {"kl_coef": 0.1, "steps": 10, "lr_schedule": "constant", "threads": None}
    check_same_run(saved, {**saved, "steps": 20, "threads": 4})
    check_same_run(saved, {**saved, "memory_limit": 2**20, "activations": "keep"})
    with pytest.raises(ValueError, match="steps was 10, is 20"):
        check_same_run(
            {**saved, "lr_schedule": "linear"}, {**saved, "steps": 20, "lr_schedule": "linear"}
        )
    with pytest.raises(ValueError, match="new_field was None, is 1"):
        check_same_run(saved, {**saved, "new_field": 1})
    group = {"model": "p", "device": "cpu", "max_batch_rows": 256}
    saved = {**saved, "prompter": group, "target": None}
    check_same_run(saved, {**saved, "prompter": {**group, "max_batch_rows": 8}})
    with pytest.raises(ValueError, match=r"configuration: prompter\.device was 'cpu', is 'cuda'$"):
        check_same_run(saved, {**saved, "prompter": {**group, "device": "cuda"}})
    with pytest.raises(ValueError, match=r"configuration: target\.model was None, is 't'$"):
        check_same_run(saved, {**saved, "target": {"model": "t", "adapter": None}})


def test_a_disk_that_is_full_in_the_middle_of_the_optimizer_is_said_so(tmp_path):
    """torch says at which position it is instead."""
    state = {"state": {0: {"exp_avg": torch.zeros(100_000)}}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, replace(checkpoint(3), optimizer=state))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path, ToyModel.lora_modules) is None
