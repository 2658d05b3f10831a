"""The examples of a prompter in other people's servers, with the real packages."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

import alignpro
from alignpro.config import REWRITE, to_mapping
from alignpro.models.adapter import save_peft
from alignpro.models.native_model import load_model
from native_runs import lora

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "serve"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the heron"}]


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    """The directory of a run, as training leaves it behind."""
    folder = tmp_path_factory.mktemp("examples") / "run"
    folder.mkdir()
    base = tiny_model_dir("llama")
    config = alignpro.TrainConfig(
        prompter=alignpro.ModelConfig(str(base)),
        run_dir=str(folder),
        rewrite=replace(REWRITE, max_new_tokens=4),
        prompting=alignpro.Prompting(template="{prompt}", separator=" | "),
    )
    (folder / "config.json").write_text(json.dumps(to_mapping(config)))
    save_peft(folder / "adapter", lora(load_model(base, threads=1)))
    return folder


def example(name, run, monkeypatch):
    monkeypatch.setenv("RUN", str(run))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fastapi(run, monkeypatch):
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    import asyncio

    import httpx2

    app = example("fastapi_app", run, monkeypatch).app

    async def ask():
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
            return (await client.post("/rewrite", json=CHAT)).json()

    said = asyncio.run(ask())
    assert said["messages"][0] == CHAT[0] and said["messages"][1]["role"] == "user"
    assert said["messages"][1]["content"].startswith("the heron")
    assert said["applied"] == (said["reason"] == "rewritten")
