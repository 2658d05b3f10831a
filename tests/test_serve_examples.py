"""The examples of a prompter in other people's servers, with the real packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from native_runs import save_run

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "serve"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the heron"}]


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("examples") / "run", tiny_model_dir("llama"), 4)


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
