"""The Python tree obeys its arrows, and each rule fails on a made-up violation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from structure import python_rules

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "alignpro"

# What `import alignpro` must leave alone: each costs 10 ms to seconds.
HEAVY = {
    "torch", "transformers", "peft", "matplotlib", "scipy", "pyarrow", "numpy", "tokenizers",
    "safetensors", "huggingface_hub", "jinja2", "typer", "click", "rich", "yaml", "asyncio",
    "alignpro._core", "alignpro.native", "alignpro.models", "alignpro.train",
}  # fmt: skip


def package_files() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def test_imports_follow_the_arrows():
    files = package_files()
    assert len(files) > 20
    complaints = [
        c for path, text in files.items() for c in python_rules.import_complaints(path, text)
    ]
    assert complaints == []


def test_long_files_give_a_reason():
    sources = package_files()
    for folder in ("src", "csrc", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cc", ".cu"):
                sources[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    complaints = [c for p, text in sources.items() for c in python_rules.length_complaints(p, text)]
    assert complaints == []


def test_every_room_with_files_is_known_and_every_known_room_exists():
    there = {python_rules.module_of(path).split(".")[0] for path in package_files()}
    assert there == set(python_rules.ROOMS)


@pytest.mark.parametrize(
    ("path", "text", "part"),
    [
        ("types.py", "import numpy", "standard library only"),
        ("config.py", "def f():\n    import numpy", "standard library only"),
        ("config.py", "from alignpro.native import core", "may not import native"),
        ("models/native_model.py", "from alignpro import _core", "may import alignpro._core"),
        ("pipeline.py", "import alignpro._core as c", "may import alignpro._core"),
        ("models/resolve.py", "from ..pipeline import Pipeline", "may not import pipeline"),
        ("models/tokenizer.py", "import transformers", "may import transformers"),
        ("train/sft.py", "def f():\n    from transformers import AutoModel", "transformers"),
        ("pipeline.py", "import torch.nn", "may import torch"),
        ("pipeline.py", "from alignpro.rewards import vader", "may not import rewards.vader"),
        ("rewards/vader.py", "from alignpro.config import X", "may not import config"),
        ("objective/loss.py", "from alignpro.config import X", "may not import config"),
        ("objective/kl.py", "from alignpro.data.load import x", "may not import data.load"),
        ("data/load.py", "from alignpro import pipeline", "may not import pipeline"),
        ("train/trainer.py", "from alignpro.evaluate import arms", "may not import evaluate"),
        ("evaluate/arms.py", "import alignpro.train", "may not import train"),
        ("report/html.py", "from alignpro import cli", "may not import cli"),
        ("train/sft.py", "from alignpro import Pipeline", "may not import Pipeline"),
        ("models/endpoint.py", "import http.server", "may import http.server"),
        ("prompter.py", "from starlette.routing import Route", "may import starlette"),
        ("prompter.py", "from alignpro.serve import app", "may not import serve.app"),
        (
            "models/resolve.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import alignpro.train.sft",
            "may not import train.sft",
        ),
        (
            "models/resolve.py",
            "import importlib\nx = importlib.import_module('alignpro.cli')",
            "may not import cli",
        ),
        (
            "models/__init__.py",
            "import importlib\nx = importlib.import_module('..cli', __name__)",
            "may not import cli",
        ),
        ("helpers/misc.py", "", "is no room"),
    ],
)
def test_a_wrong_import_is_seen(path, text, part):
    complaints = python_rules.import_complaints(f"python/alignpro/{path}", text)
    assert len(complaints) == 1 and part in complaints[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("types.py", "from __future__ import annotations\nimport dataclasses"),
        ("config.py", "from alignpro.types import SamplingParams\ndef f():\n    import yaml"),
        ("native.py", "from alignpro import _core"),
        ("pipeline.py", "from alignpro.rewards.check import score_checked"),
        ("rewards/classifier.py", "def f():\n    import torch, transformers"),
        ("rewards/combine.py", "from . import check\nfrom .check import score_checked"),
        ("train/trainer.py", "from alignpro.objective.loss import policy_loss\nimport torch"),
        ("cli/stages.py", "from alignpro.report import html\nfrom alignpro.quickstart import run"),
        ("__init__.py", "from alignpro.pipeline import Pipeline"),
    ],
)
def test_right_imports_pass(path, text):
    assert python_rules.import_complaints(f"python/alignpro/{path}", text) == []


def test_a_long_file_without_a_reason_is_seen():
    long = "x = 1\n" * 501
    assert len(python_rules.length_complaints("a.py", long)) == 1
    assert python_rules.length_complaints("a.py", "# Long because it is a table.\n" + long) == []
    assert python_rules.length_complaints("a.py", "x = 1\n" * 500) == []


def loaded_by(statement: str) -> set[str]:
    """Modules that a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout))


def test_import_alignpro_loads_nothing_heavy():
    loaded = loaded_by("import alignpro")
    assert "alignpro" in loaded
    assert sorted(loaded & HEAVY) == []


def test_import_alignpro_loads_little_beyond_the_bare_interpreter():
    # The deterministic form of "well under 100 ms": a standard module costs about 0.3 ms, and
    # dataclasses with typing and what they load are about 60 of them.
    extra = loaded_by("import alignpro") - loaded_by("pass")
    foreign = {m.split(".")[0] for m in extra} - set(sys.stdlib_module_names) - {"alignpro"}
    assert foreign == set()
    assert len(extra) < 120


def test_heavy_modules_would_be_seen():
    assert "asyncio" in loaded_by("import asyncio") & HEAVY
