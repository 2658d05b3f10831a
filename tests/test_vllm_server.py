"""Before a real server on loopback: vLLM's, with a tiny random model. `vllm_server` says how."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from alignpro.config import BoundConfig, ClientConfig, ModelConfig, from_mapping
from alignpro.evaluate.bound import run_bound
from alignpro.models.answer_scores import token_logprobs
from alignpro.models.endpoint import EndpointModel
from alignpro.models.native_model import load_model
from alignpro.train.metrics import read_metrics
from alignpro.types import SamplingParams
from conftest import randomise, save_tiny_tokenizer
from loopback import stop
from vllm_server import CONTEXT, vllm_server

STEPS = 12
EXACT = 1e-4  # nats of a token, in float32 on both sides; 4e-6 were seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Heads of 64, for which its attention on CPUs is written."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("vllm-model")
    config = transformers.LlamaConfig(
        vocab_size=111,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, tied=False)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with vllm_server(folder, "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, threads=1)


@pytest.fixture
def place(folder, server, tmp_path, monkeypatch):
    """A folder with a file of settings for every command."""
    rows = [{"prompt": f"how do {animal} fly"} for animal in ("bees", "rats", "geese", "cats")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(tmp_path)  # where the reward's module is looked for
    score = "def score(responses):\n    return [len(set(r)) / 40 for r in responses]\n"
    (tmp_path / "letters_of_vllm.py").write_text(score)
    prices = {"input_price": 1.0, "output_price": 2.0}
    common = {
        "prompter": str(folder),
        "target": {"endpoint": server[0], "model": "tiny", "client": prices},
        "data": {"path": str(tmp_path / "prompts.jsonl"), "split": None},
        "reward": "letters_of_vllm:score",
        "num_rewrites": 2,
        "rewrite": {"max_new_tokens": 4},
        "response": {"max_new_tokens": 12, "temperature": 0.7},
        "threads": 1,
    }
    held_out = {**common, "num_prompts": 4, "num_responses": 2}
    training = {**common, "steps": STEPS, "prompts_per_step": 2, "checkpoint_every": 3}
    likely = {"response": {"max_new_tokens": 12, "temperature": 1.0}, "reward_range": [0, 1]}
    for name, settings in {
        "train": {**training, "lora": {"rank": 2}},
        "headroom": held_out,
        "evaluate": held_out,
        "bound": {**held_out, **likely},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings))
    return tmp_path


def start(place, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "alignpro", *map(str, arguments)],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(place, *arguments):
    process = start(place, *arguments)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def test_log_probabilities_are_this_engines(server, model):
    config = ModelConfig("tiny", endpoint=server[0], client=ClientConfig(logprobs=True))
    target = EndpointModel(config)
    target.check_logprobs()
    client, chat = target.client(), [{"role": "user", "content": "Hi there"}]
    read = model.tokenizer.encode_chat(chat)
    handles = []
    for seed in range(6):
        for temperature in (1.0, 0.7):
            params = SamplingParams(max_new_tokens=100, temperature=temperature, seed=seed)
            handles.append(client.submit(chat, params))
    while not client.idle():
        client.step()
    drawn = [handle.completion() for handle in handles]
    reads, tokens = [read] * len(drawn), [done.tokens for done in drawn]
    ours = token_logprobs(model, reads, tokens, 1.0)
    scored = target.token_logprobs(reads, tokens)
    for done, here, given in zip(drawn, ours, scored, strict=True):
        assert done.prompt_tokens == read
        assert len(done.tokens) == len(done.logprobs) == done.num_tokens
        assert here == pytest.approx(done.logprobs, abs=EXACT)
        assert here == pytest.approx(given, abs=EXACT)
    # The end of text is told as well.
    assert {done.tokens[-1] for done in drawn if done.finish_reason == "stop"} == {2}


def test_the_bound_is_the_one_in_process(server, model, place, folder):
    settings = json.loads((place / "bound.yaml").read_text()) | {"num_responses": 12}
    there = run_bound(from_mapping(BoundConfig, settings), output=place / "bound.json")
    here = run_bound(from_mapping(BoundConfig, {**settings, "target": None}))
    assert there.parity_max_abs < EXACT
    # 96 draws in [0, 1] of the same rewrites on either side.
    tv = there.terms["tv_rewrites"].mean
    assert tv == pytest.approx(here.terms["tv_rewrites"].mean, abs=0.25)
    assert 0.05 < tv < 0.99


def test_a_run_is_killed_resumed_and_replayed_without_the_server(server, place):
    """Last: it stops the server."""
    outputs = {"headroom": "headroom.json", "evaluate": "evaluation.json", "bound": "bound.json"}
    process = start(place, "train", "train.yaml", "run_dir=run")
    metrics = place / "run/metrics.jsonl"
    begin = time.monotonic()
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 4):
            assert process.poll() is None and time.monotonic() - begin < 240
            time.sleep(0.01)
    finally:
        process.kill()
        said, _ = process.communicate()
    assert 4 <= len(read_metrics(metrics)) < STEPS, said
    said = run(place, "train", "train.yaml", "run_dir=run", "--resume")
    assert "tokens read" in said and "cost" in said
    for command, output in outputs.items():
        run(place, command, f"{command}.yaml", "--output", output)

    stop(server[1])
    again = place / "again"
    (again / "run").mkdir(parents=True)
    answered = [*place.glob("*.calls.jsonl"), place / "run/calls.jsonl"]
    assert len(answered) == 4
    for source in answered:
        (again / source.relative_to(place)).write_bytes(source.read_bytes())
    run(place, "train", "train.yaml", "run_dir=again/run")
    for command, output in outputs.items():
        run(place, command, f"{command}.yaml", "--output", again / output)
        first, second = (json.loads((at / output).read_text()) for at in (place, again))
        for report in (first, second):
            report.pop("tokens_per_second", None)
        assert first == second and first["target_usage"]["cost"] > 0
    for source in answered:  # no call was made
        assert (again / source.relative_to(place)).read_bytes() == source.read_bytes()
    rows = [read_metrics(at / "run/metrics.jsonl") for at in (place, again)]
    for row in (*rows[0], *rows[1]):
        del row["seconds"], row["tokens_per_second"]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
    weights = [load_file(at / "run/adapter/adapter_model.safetensors") for at in (place, again)]
    assert weights[0].keys() == weights[1].keys()
    for name, matrix in weights[0].items():
        assert np.array_equal(matrix, weights[1][name])
