"""A block of reasoning is no part of an answer: whole, in pieces, and from the engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignpro.models.in_flight import FailedRowsError
from alignpro.models.native_model import NativeModel, load_model
from alignpro.models.reasoning import AnswerStream, no_answer, open_block, split_reasoning
from alignpro.pipeline import Pipeline
from alignpro.types import SamplingParams
from scripted_model import scripted_model
from testing_extension import load_testing

OPENED = "<|assistant|>\n<think>\n"


@pytest.mark.parametrize(
    ("text", "prompt", "answer", "reasoning"),
    [
        ("<think>\na\n</think>\n\nb ", "user", "b ", "a"),
        ("[THINK]a[/THINK]b", "user", "b", "a"),
        ("<seed:think>a</seed:think>b", None, "b", "a"),
        ("a\n</think>\n\nb", OPENED, "b", "a"),
        ("a and so", OPENED, None, "a and so"),
        ("<think>a", "user", None, "a"),
        ("<think>a</think> and </think> b", "user", "b", "a</think> and"),
        # The model read no open block: what it wrote is its answer.
        ("a</think>b", "user", "a</think>b", ""),
        ("b", "<think>\n\n</think>\n\n", "b", ""),
        ("say <think> b", "user", "say <think> b", ""),
        # Nobody knows what it read.
        ("a</think>b", None, "b", "a"),
    ],
)
def test_the_answer_is_what_follows_the_block(text, prompt, answer, reasoning):
    assert split_reasoning(text, prompt) == (answer, reasoning)


def test_which_end_of_a_prompt_opens_a_block():
    assert open_block(OPENED) == "</think>" and open_block("x[THINK]") == "[/THINK]"
    assert open_block("<think>\n\n</think>\n\n") is None and open_block("") is None


def test_what_is_no_answer():
    assert no_answer("", "", "stop") is None and no_answer("b", "a", "length") is None
    assert all("was cut" in str(no_answer(text, "", "length")) for text in ("", None))
    assert "reasoning alone" in str(no_answer("", "a", "stop"))
    assert "reasoning alone" in str(no_answer(None, "", "stop"))


PIECES = ["<think>", "<thi", "nk>", "</think>", "</th", "ink>", "a", " ", "\n", "<", "[THINK]"]


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=9), prompt=st.sampled_from(["user", OPENED])
)
def test_in_pieces_it_is_the_same_answer(pieces, prompt):
    stream = AnswerStream(prompt)
    sent = "".join(stream.push(piece) or "" for piece in pieces)
    text = "".join(pieces)
    answer, reasoning = split_reasoning(text, prompt)
    if "</think>" in reasoning:  # closed twice, which no stream can know
        return
    # What is held back at the end may still become a tag.
    assert sent == (answer or "") or (not sent and "<think>".startswith(text.strip()))


@given(
    pieces=st.lists(st.sampled_from([*PIECES, "[/THINK]", "\x1c", "<seed:think>"]), max_size=9),
    prompt=st.sampled_from(["user", OPENED, "a[THINK] \n", "", "<think>\n\n</think>\n\n"]),
)
def test_cpp_finds_the_same_answer(pieces, prompt):
    text = "".join(pieces)
    assert load_testing().answer_of(text, prompt) == (split_reasoning(text, prompt)[0] or "")


# --- a model that thinks ---


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, tiny_model_dir) -> NativeModel:
    chains = [
        ["<|assistant|>", "<think>", "h", "m", "</think>", "B", "e", "</s>"],
        [":", "S", "o", "</s>"],
    ]
    folder = tmp_path_factory.mktemp("thinker") / "model"
    return load_model(scripted_model(folder, tiny_model_dir("llama"), chains), threads=1)


PARAMS = SamplingParams(max_new_tokens=12, seed=1)


def test_a_finished_block_is_kept_apart(thinker):
    (done,) = thinker.generate(["hi"], PARAMS)
    assert (done.text, done.reasoning, done.finish_reason) == ("Be", "hm", "stop")
    written = thinker.tokenizer.decode(done.tokens, skip_special=False)
    assert written == "<think>hm</think>Be</s>" and len(done.logprobs) == len(done.tokens)
    streamed = list(thinker.stream("hi", PARAMS))
    assert [token for token, _, _ in streamed] == done.tokens
    assert "".join(text for _, text, _ in streamed) == "Be"


def test_a_block_that_the_template_opens(thinker):
    forced = thinker.with_template(variables={"force_thinking": True})
    (done,) = forced.generate(["hi"], PARAMS)
    assert forced.tokenizer.decode(done.prompt_tokens, skip_special=False).endswith("<think>")
    assert (done.text, done.reasoning) == ("Be", "hm") and len(done.tokens) == 6
    assert "".join(text for _, text, _ in forced.stream("hi", PARAMS)) == "Be"


@pytest.mark.parametrize(("limit", "text"), [(1, ""), (2, ""), (4, ""), (5, "B"), (6, "Be")])
def test_a_cut_block_is_no_answer(thinker, limit, text):
    params = SamplingParams(max_new_tokens=limit, seed=1)
    (done,) = thinker.generate(["hi"], params)
    assert (done.text, done.finish_reason) == (text, "length")
    assert len(done.tokens) == limit and done.answered == bool(text)
    assert "".join(piece for _, piece, _ in thinker.stream("hi", params)) == text


def test_variables_of_the_template_turn_reasoning_off(thinker):
    quick = thinker.with_template(variables={"enable_thinking": False})
    (done,) = quick.generate(["hi"], PARAMS)
    assert (done.text, done.reasoning) == ("So", "")
    assert quick.core_model is thinker.core_model and thinker.with_template() is thinker


def test_a_rewrite_is_handed_on_without_its_reasoning(thinker):
    pipeline = Pipeline(thinker, thinker, None, rewrite_params=SamplingParams(max_new_tokens=12))
    ((rewrite,),) = pipeline.rewrite(["Why?"], seed=0)
    assert (rewrite.text, rewrite.reasoning) == ("Be", "hm")
    assert rewrite.target_prompt == "Why?\n\nBe" and len(rewrite.tokens) == 7
    # What was sampled is what is scored: the block with it.
    scored = thinker.score([rewrite.prompter_tokens + rewrite.tokens])[0][-7:]
    assert list(scored) == rewrite.logprobs
    cut = Pipeline(thinker, thinker, None, rewrite_params=SamplingParams(max_new_tokens=3))
    ((rewrite,),) = cut.rewrite(["Why?"], seed=0)
    assert (rewrite.text, rewrite.reasoning, rewrite.target_prompt) == ("", "hm", "Why?")


def test_a_response_that_is_cut_in_its_reasoning_is_left_out(thinker):
    whole = Pipeline(None, thinker, None, response_params=SamplingParams(max_new_tokens=12))
    rollout = whole.respond(["Why?", "How?"], seed=0)
    assert [g[0].responses[0].text for g in rollout.rewrites] == ["Be", "Be"] and not rollout.failed
    short = Pipeline(None, thinker, None, response_params=SamplingParams(max_new_tokens=3))
    with pytest.raises(FailedRowsError, match="no answer: the reply was cut"):
        short.respond(["Why?", "How?", "Who?"], seed=0)


def test_history_is_what_the_template_makes_of_it(thinker):
    def ids(answer: str) -> list[int]:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        return thinker.tokenizer.encode_chat([*chat, {"role": "user", "content": "b"}])

    assert ids("<think>hm</think>yes") == ids("yes")
    assert len(set(thinker.tokenizer.encode("<think>")) & set(ids("<think>hm"))) == 1
