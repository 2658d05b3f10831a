"""Before a real server on loopback: llama.cpp's, with the default model."""

from __future__ import annotations

import numpy as np
import pytest

from alignpro.config import ClientConfig, ModelConfig, TrainConfig
from alignpro.models.answer_scores import token_logprobs
from alignpro.models.endpoint import EndpointModel
from alignpro.pipeline import Pipeline
from alignpro.train.metrics import read_metrics
from alignpro.train.run import make_trainer
from alignpro.types import SamplingParams
from llama_server import llama_server
from loopback import free_port

CHAT = [
    {"role": "system", "content": "Be kind.  "},
    {"role": "user", "content": "Hi\n\n"},
    {"role": "assistant", "content": "Hello! ünï 🙂"},
    {"role": "user", "content": "How do bees find home?"},
]
PROMPTS = ["How do bees find home?", "Why is the sky blue?\n\nIn one line. ünï 🙂", CHAT, CHAT[1:]]


@pytest.fixture(scope="module")
def port():
    return free_port()


@pytest.fixture(scope="module")
def url(smollm2_path, port):
    with llama_server(smollm2_path, port) as address:
        yield address


def test_the_target_reads_what_the_one_in_process_reads(url, smollm2):
    target = EndpointModel(ModelConfig("smollm2", endpoint=url))
    params = SamplingParams(max_new_tokens=6, temperature=1.5)
    here = Pipeline(None, smollm2, None, response_params=params)
    there = Pipeline(None, target, None, response_params=params)
    ours = here.respond(PROMPTS, num_responses=1, seed=1)
    theirs = there.respond(PROMPTS, num_responses=3, seed=1)
    assert theirs.failed == []
    for (read,), (answered,) in zip(ours.rewrites, theirs.rewrites, strict=True):
        assert len({response.text for response in answered.responses}) > 1  # draws of their own
        for response in answered.responses:
            assert response.usage is not None and response.tokens == []
            assert response.usage.input_tokens == len(read.target_tokens)
            assert 1 <= response.num_tokens <= 6
    written = [r.num_tokens for (w,) in theirs.rewrites for r in w.responses]
    assert theirs.generated_tokens == sum(written)


def test_log_probabilities_are_those_of_the_model_in_process(url, smollm2):
    """Its end of text among them, and at temperature 1 whatever is sampled at."""
    target = EndpointModel(ModelConfig("smollm2", endpoint=url, client=ClientConfig(logprobs=True)))
    client, read = target.client(), smollm2.tokenizer.encode_chat(CHAT)
    for seed, temperature in ((1, 1.0), (2, 0.7), (3, 0.0)):
        params = SamplingParams(max_new_tokens=12, temperature=temperature, seed=seed)
        handle = client.submit(CHAT, params)
        client.step()
        done = handle.completion()
        assert len(done.tokens) == len(done.logprobs) == done.num_tokens
        (ours,) = token_logprobs(smollm2, [read], [done.tokens], 1.0)
        # Its products round activations to eight bits: 0.34 nats were seen on an unlikely token.
        assert np.abs(ours - done.logprobs).max() < 1.0
        assert np.abs(ours - done.logprobs).mean() < 0.2
    with pytest.raises(ValueError, match="does not tell the tokens that it reads and writes"):
        target.check_logprobs()


def test_a_training_run_before_the_server_is_replayed_without_it(url, port, tmp_path, smollm2_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How do bees fly?"}\n' * 4)

    def config(run):
        return TrainConfig(
            target=ModelConfig("smollm2", endpoint=url),
            data=str(tmp_path / "prompts.jsonl"),
            steps=2,
            prompts_per_step=2,
            num_rewrites=2,
            rewrite=SamplingParams(max_new_tokens=4),
            response=SamplingParams(max_new_tokens=6, temperature=0.7),
            reward="vader",
            run_dir=str(tmp_path / run),
        )

    first = make_trainer(config("first"))
    first.train()
    (tmp_path / "again").mkdir()
    (tmp_path / "again/calls.jsonl").write_bytes((tmp_path / "first/calls.jsonl").read_bytes())
    again = make_trainer(config("again"))
    again.pipeline.target._http.start = None  # no call is made
    again.train()
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("first", "again")]
    for row in (*rows[0], *rows[1]):
        del row["seconds"], row["tokens_per_second"]
    assert rows[0] == rows[1] and rows[0][0]["failed_responses"] == 0
    weights = [trainer.policy.weights().matrices for trainer in (first, again)]
    for name, (a, b) in weights[0].items():
        assert np.array_equal(a, weights[1][name][0]) and np.array_equal(b, weights[1][name][1])
