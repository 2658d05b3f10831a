"""The examples of a prompter in other people's servers, with the real packages."""

from __future__ import annotations

import asyncio
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

import alignpro
from alignpro.config import REWRITE
from chat_server import ChatServer
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


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USED = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "12 C"},
    CHAT[1],
]


def test_litellm(run, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # not from the net
    litellm = pytest.importorskip(
        "litellm",
        reason="LiteLLM is not installed; 350 MB, so in no extra: pip install litellm",
    )
    module = example("litellm_callback", run, monkeypatch)
    assert isinstance(module.rewriting.prompter.guards, alignpro.GuardConfig)
    module.rewriting.prompter.close()
    params = replace(REWRITE, max_new_tokens=4, ignore_eos=True, temperature=0.0)
    prompting = alignpro.Prompting(template="{prompt}", separator=" | ")
    model = module.rewriting.prompter.model
    prompter = alignpro.Prompter(model, prompting=prompting, params=params)
    monkeypatch.setattr(litellm, "callbacks", [module.Rewriting(prompter, deadline=30.0)])

    with ChatServer(lambda asked: "twelve") as server:
        at = {"model": "openai/m", "api_base": server.url, "api_key": "sk-none"}
        entry = {"model_name": "birds", "litellm_params": at}

        async def ask():
            router = litellm.Router(model_list=[entry], num_retries=0)
            asked = [
                await litellm.acompletion(messages=CHAT, **at),
                await litellm.acompletion(messages=USED, tools=TOOLS, **at),
                await router.acompletion(model="birds", messages=CHAT),
            ]
            prompter.close()  # now it fails, and requests go out as they come
            asked.append(await litellm.acompletion(messages=CHAT, **at))
            return asked

        answers = asyncio.run(ask())
        turn = {"role": "user", "content": rewritten_of(model, prompting, params)}
        sent = [asked.body["messages"] for asked in server.asked]
    assert [a.choices[0].message.content for a in answers] == ["twelve"] * 4
    assert turn != CHAT[1] and turn["content"].startswith("the heron | ")
    assert sent[0] == sent[2] == [CHAT[0], turn] and sent[3] == CHAT
    assert sent[1][:-1] == USED[:-1] and sent[1][-1]["content"].startswith("the heron | ")
    assert server.asked[1].body["tools"] == TOOLS


def rewritten_of(model, prompting, params):
    with alignpro.Prompter(model, prompting=prompting, params=params) as prompter:
        return prompter.rewrite(CHAT).messages[-1]["content"]
