"""Log-probabilities that an endpoint tells: of what it wrote, of given tokens, and the bound from
them; an endpoint that does not tell them says so before anything is sampled."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from alignpro.config import BoundConfig, ModelConfig, from_mapping
from alignpro.evaluate.bound import run_bound
from alignpro.evaluate.results import to_json
from alignpro.models.answer_scores import token_logprobs
from alignpro.models.endpoint import EndpointModel
from alignpro.models.native_model import load_model
from alignpro.models.reply import read_reply, read_scores
from alignpro.types import SamplingParams
from chat_server import ChatServer, Fault

REFUSED = "target.endpoint: big at http://127.0.0.1"


class Tells:
    """A model here, as vLLM serves one: tokens and their log-probabilities."""

    def __init__(self, model):
        self.model = model
        self.hidden = set()  # fields that are left out
        self.echoes = True

    def __call__(self, asked):
        reply = self.chat(asked.body) if asked.path.endswith("chat/completions") else None
        if reply is None and not self.echoes:
            return Fault.error(400, "Only no echo is supported")
        return Fault(body=json.dumps(reply or self.scores(asked.body)))

    def chat(self, body):
        params = SamplingParams(max_new_tokens=body["max_tokens"], seed=body["seed"])
        (done,) = self.model.generate([body["messages"]], params)
        entries = [{"token": "", "logprob": value} for value in done.logprobs]
        told = {"token_ids": done.tokens, "logprobs": {"content": entries}}
        choice = {"message": {"content": done.text}, "finish_reason": done.finish_reason, **told}
        usage = {"prompt_tokens": len(done.prompt_tokens), "completion_tokens": len(done.tokens)}
        reply = {"choices": [choice], "usage": usage, "prompt_token_ids": done.prompt_tokens}
        for name in self.hidden:
            reply.pop(name, None)
            choice.pop(name, None)
        return reply

    def scores(self, body):
        assert (body["echo"], body["logprobs"], body["max_tokens"]) == (True, 1, 1)
        (own,) = self.model.score([body["prompt"]])
        values = [None, *map(float, own), -1.0]  # and what was written
        choice = {"text": "", "finish_reason": "length", "logprobs": {"token_logprobs": values}}
        return {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir("llama"), threads=1)


@pytest.fixture
def tells(model):
    return Tells(model)


@pytest.fixture
def server(tells):
    with ChatServer(tells) as running:
        yield running


@pytest.fixture
def config(server, tiny_model_dir, tmp_path, monkeypatch):
    module = "def score(responses):\n    return [len(set(r)) / 20 for r in responses]\n"
    (tmp_path / "letters_of_responses.py").write_text(module)
    monkeypatch.chdir(tmp_path)  # where the reward's module is looked for
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    return {
        "prompter": str(tiny_model_dir("llama")),
        "target": {"endpoint": server.url, "model": "big"},
        "data": {"path": str(tmp_path / "prompts.jsonl"), "split": None},
        "reward": "letters_of_responses:score",
        "reward_range": [0, 1],
        "num_prompts": 2,
        "num_rewrites": 4,
        "num_responses": 20,
        "rewrite": {"max_new_tokens": 4},
        "response": {"max_new_tokens": 3, "temperature": 1.0},
        "threads": 1,
    }


def test_the_bound_before_an_endpoint_is_the_one_in_process(config, server, model, tmp_path):
    there = run_bound(from_mapping(BoundConfig, config), output=tmp_path / "bound.json")
    here = run_bound(from_mapping(BoundConfig, {**config, "target": None}))
    assert 0.1 < here.terms["tv_rewrites"].mean < 0.95
    # 160 draws in [0, 1] of the same rewrites: a standard error of at most 0.04 on either side.
    tv = there.terms["tv_rewrites"].mean
    assert tv == pytest.approx(here.terms["tv_rewrites"].mean, abs=0.2)
    assert there.parity_max_abs < 1e-5 and here.parity_max_abs is None
    # Exactly: from the tokens that were told, by the model itself.
    arms = [json.loads(line) for line in (tmp_path / "bound.json.arms.jsonl").open()]
    untuned, raw = ([w for group in a["value"]["rewrites"] for w in group] for a in arms[1:])
    samples = []
    for w in untuned:
        asked = raw[w["prompt_index"]]["target_tokens"]
        given = [r["tokens"] for r in w["responses"]]
        other = token_logprobs(model, [asked] * len(given), given, 1.0)
        for response, scored in zip(w["responses"], other, strict=True):
            ratio = math.fsum(scored) - math.fsum(response["logprobs"])
            samples.append(-math.expm1(min(ratio, 0.0)))
    assert tv == pytest.approx(np.mean(samples), abs=1e-5)
    usage = to_json(there)["target_usage"]
    assert usage["output_tokens"] > 300 and usage["input_tokens"] > usage["output_tokens"]
    server.kill()
    again = run_bound(from_mapping(BoundConfig, config), output=tmp_path / "bound.json")
    assert to_json(again) == to_json(there)


@pytest.mark.parametrize(
    ("hidden", "echoes", "missing"),
    [
        ({"logprobs"}, True, "log-probabilities of what it writes (logprobs)"),
        ({"token_ids"}, True, "the tokens that it reads and writes (return_token_ids)"),
        ({"prompt_token_ids"}, True, "the tokens that it reads and writes (return_token_ids)"),
        (set(), False, "log-probabilities of given tokens (echo): "),
    ],
)
def test_an_endpoint_that_does_not_tell_them(config, tells, server, hidden, echoes, missing):
    tells.hidden, tells.echoes = hidden, echoes
    with pytest.raises(ValueError) as caught:
        run_bound(from_mapping(BoundConfig, config))
    line = str(caught.value)
    assert line.startswith(REFUSED) and f" does not tell {missing}" in line and "\n" not in line
    assert len(server.asked) <= 3


def test_an_endpoint_that_does_not_answer_is_one_line(config, server):
    server.always = Fault.error(400, "too busy")
    with pytest.raises(ValueError, match=r"^target\.endpoint: big at http.*: HTTP 400: too busy$"):
        run_bound(from_mapping(BoundConfig, config))


def test_a_response_of_which_a_token_is_not_told_is_refused(config, tells, monkeypatch):
    whole = tells.chat

    def without_the_end(body):
        reply = whole(body)
        (choice,) = reply["choices"]
        if body["max_tokens"] > 1:
            choice["token_ids"].pop()
            choice["logprobs"]["content"].pop()
        return reply

    monkeypatch.setattr(tells, "chat", without_the_end)
    with pytest.raises(ValueError, match=r"of a response of \d tokens the endpoint told \d, and"):
        run_bound(from_mapping(BoundConfig, config))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"response": {"temperature": 0.7}}, "response.temperature: expected 1 before an endpoint"),
        ({"response": {"top_p": 0.9}}, "response.top_p: expected 1.0"),
        ({"tuned": "a"}, "target.endpoint: expected null: an adapter of the target"),
    ],
)
def test_what_is_not_comparable_is_refused(config, changes, line):
    with pytest.raises(ValueError) as caught:
        from_mapping(BoundConfig, {**config, **changes})
    assert str(caught.value).startswith(line)


def test_answers_come_with_log_probabilities_where_they_are_asked_for(server, model):
    settings = {"endpoint": server.url, "model": "big", "client": {"logprobs": True}}
    for config, wanted in ((settings, True), ({**settings, "client": {}}, False)):
        client = EndpointModel(from_mapping(ModelConfig, config)).client()
        handle = client.submit([{"role": "user", "content": "one"}], SamplingParams(seed=1))
        client.step()
        done = handle.completion()
        assert server.asked[-1].body.get("logprobs", False) is wanted
        (scored,) = token_logprobs(model, [done.prompt_tokens], [done.tokens], 1.0)
        assert done.logprobs == pytest.approx(list(scored), abs=1e-5)
        assert len(done.tokens) == done.num_tokens


def reply_with(content, **more):
    choice = {"message": {"content": "Yes."}, "finish_reason": "stop", **more}
    return {"choices": [{**choice, "logprobs": {"content": content}}]}


@pytest.mark.parametrize(
    ("content", "logprobs", "tokens"),
    [
        ([{"id": 5, "logprob": -0.5}, {"id": 2, "logprob": 0}], [-0.5, 0.0], [5, 2]),  # llama.cpp
        ([{"token": "Yes", "logprob": -0.5}], [-0.5], []),  # OpenAI
        ([{"token": "Yes", "logprob": float("nan")}], [], []),
        ([{"token": "Yes", "logprob": None}], [], []),
        (None, [], []),
    ],
)
def test_what_a_reply_tells_of_its_tokens(content, logprobs, tokens):
    answer = read_reply(reply_with(content))
    assert (answer.logprobs, answer.tokens, answer.prompt_tokens) == (logprobs, tokens, [])


def test_scores_are_of_the_tokens_that_were_given():
    def reply(values, read=3):
        choices = [{"text": "", "logprobs": {"token_logprobs": values}}]
        return {"choices": choices, "usage": {"prompt_tokens": read}}

    assert read_scores(reply([None, -1.0, -2.0, -3.0]), 3).logprobs == [-1.0, -2.0]
    for values in ([-1.0], [None, -1.0, None, -3.0], [None, -1.0, 0.5, -3.0], None):
        with pytest.raises(RuntimeError, match="tells no log-probabilities of given tokens"):
            read_scores(reply(values), 3)
    with pytest.raises(RuntimeError, match="read 4 tokens of the 3"):  # it added one of its own
        read_scores(reply([None, -1.0, -2.0, -3.0], read=4), 3)
    with pytest.raises(ValueError, match="expected choices"):
        read_scores({}, 3)
