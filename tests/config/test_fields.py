"""Every field of every dataclass is checked where one is made, in the words of YAML."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
import typing
from pathlib import Path

import numpy as np
import pytest

import alignpro.config
from alignpro.config import Labelled, LoraConfig, Prompting, TrainConfig, from_mapping


def dataclasses_of_config():
    """Every dataclass that a module of alignpro.config defines."""
    for module in pkgutil.iter_modules(alignpro.config.__path__, "alignpro.config."):
        for value in vars(importlib.import_module(module.name)).values():
            ours = isinstance(value, type) and value.__module__ == module.name
            if ours and dataclasses.is_dataclass(value):
                yield value


def literals(hint):
    """The Literals of an annotation, those of its union and of its tuple included."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return [hint]
    if origin in (typing.Union, types.UnionType, tuple):
        return [found for a in typing.get_args(hint) for found in literals(a)]
    return []


def fields_of_config():
    for cls in dataclasses_of_config():
        hints = typing.get_type_hints(cls, include_extras=True)
        for f in dataclasses.fields(cls):
            yield pytest.param(cls, f.name, hints[f.name], id=f"{cls.__name__}.{f.name}")


FIELDS = list(fields_of_config())
LITERALS = [f for f in FIELDS if literals(f.values[2])]


def test_the_walk_finds_them():
    names = {f.id for f in LITERALS}
    assert {"TrainConfig.algorithm", "TrainConfig.track", "LoraConfig.target_modules"} <= names
    assert {"TrainConfig.num_responses", "Prompting.mode", "SftConfig.lr_schedule"} <= names
    assert len(FIELDS) > 100


def test_a_mapping_is_read_by_its_keys_and_values():
    labelled = from_mapping(Labelled, {"instructions": {"fact": "Be brief.", "left alone": ""}})
    assert labelled.instructions == {"fact": "Be brief.", "left alone": ""}
    assert from_mapping(Labelled, {"instructions": None}).instructions is None
    line = "instructions: key: expected text, got True"  # YAML 1.1 reads yes as true
    assert line in refusal(Labelled, instructions={True: "Be brief."})
    assert "instructions.fact: expected text, got 3" in refusal(Labelled, instructions={"fact": 3})
    assert "instructions: expected a mapping or null, got 3" in refusal(Labelled, instructions=3)


def refusal(make, *arguments, **keywords):
    with pytest.raises(ValueError) as caught:
        make(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("cls", "name", "hint"), LITERALS)
def test_python_checks_every_literal_in_the_words_of_yaml(cls, name, hint):
    wrong = ("No such choice",) if typing.get_origin(hint) is tuple else "No such choice"
    line = refusal(cls, **{name: wrong})
    assert line.startswith(name) and "No such choice" in line
    assert "expected" in line and repr(typing.get_args(literals(hint)[0])[0]) in line
    assert line == refusal(from_mapping, cls, {name: wrong})


@pytest.mark.parametrize(("cls", "name", "hint"), FIELDS)
def test_python_checks_every_type_in_the_words_of_yaml(cls, name, hint):
    wrong = object()
    line = refusal(cls, **{name: wrong})
    assert line.startswith(f"{name}: expected") and line.endswith(f"got {wrong!r}")
    assert line == refusal(from_mapping, cls, {name: wrong})


@pytest.mark.parametrize(
    ("cls", "name", "value", "line"),
    [
        (TrainConfig, "algorithm", "RLOO", "algorithm: expected one of 'rloo', "),
        (TrainConfig, "lr_schedule", "cosine", "lr_schedule: expected one of 'constant', 'linear'"),
        (
            Prompting,
            "mode",
            "Rewrite",
            "mode: expected one of 'append', 'rewrite', got 'Rewrite'",
        ),
        (TrainConfig, "steps", "10", "steps: expected an integer, got '10'"),
        (TrainConfig, "threads", 2.0, "threads: expected an integer or null, got 2.0"),
        (TrainConfig, "track", "wandb", "track: expected a list such as [...], got 'wandb'"),
        (
            TrainConfig,
            "track",
            ["tensorboard"],
            "track[0]: expected one of 'wandb', 'trackio', got 'tensorboard'; TensorBoard is writ",
        ),
        (
            TrainConfig,
            "lora",
            {"rnk": 3},
            'unknown configuration key "lora.rnk"; did you mean "lora.ra',
        ),
    ],
)
def test_a_typo_in_python_is_refused(cls, name, value, line):
    assert refusal(cls, **{name: value}).startswith(line)
    assert refusal(dataclasses.replace, cls(), **{name: value}).startswith(line)


def test_python_may_say_what_yaml_says():
    config = TrainConfig(
        steps=np.int64(3), kl_coef=1, track=["wandb"], run_dir=Path("runs") / "a", lora={"rank": 2}
    )
    assert (config.steps, type(config.steps)) == (3, int)
    assert (config.kl_coef, type(config.kl_coef)) == (1.0, float)
    assert config.track == ("wandb",) and config.run_dir == "runs/a"
    assert config.lora == LoraConfig(rank=2)
    assert TrainConfig(memory_limit="1GiB").memory_limit == 2**30
