"""The C++ prompter reads, writes and uses what Python's does: conversations, and guards."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alignpro
from alignpro.config import REWRITE, GuardConfig, ModelConfig, Prompting
from alignpro.models.native_model import load_model
from alignpro.models.prompter_file import save_prompter
from alignpro.native import ModelFileError
from alignpro.types import ROLES, Conversation
from native_runs import lora
from testing_extension import load_testing

SETTINGS = [
    Prompting(),
    Prompting(mode="rewrite", template="{prompt}", history="turns", history_cut="nothing"),
    Prompting(history="none", separator=" | "),
    Prompting(template="Q: {prompt} {history}", history_template="{history}", history="turns"),
    Prompting(history_template="<{prompt}{history}>", history_cut="nothing"),
]
PARTS = st.sampled_from([*"aZ {}\n\t:é🙂", "User: ", "{prompt}", "<|im_end|>"])
TEXT = st.lists(PARTS, max_size=9).map("".join)
MESSAGES = st.lists(st.tuples(st.sampled_from(ROLES), TEXT), max_size=6)
SYSTEM, *TURNS = [
    ("system", "Be kind."),
    ("user", "How do bees find home? " * 9),
    ("assistant", "By the sun, ünï 🙂\n\nUser: no"),
    ("user", "And in the rain? <|im_end|>"),
    ("assistant", "They wait."),
]


@pytest.fixture(scope="module")
def save(smollm2, tmp_path_factory):
    """Writes the folder of an adapter that changes what is written."""
    weights = lora(smollm2)
    weights.alpha = 0.2

    def made(prompting: Prompting, params=REWRITE):
        folder = tmp_path_factory.mktemp("run") / "adapter"
        save_prompter(folder, weights, smollm2.tokenizer, prompting, params)
        return folder

    return made


@pytest.mark.parametrize("prompting", SETTINGS)
def test_what_it_reads_of_a_conversation(save, prompting):
    folder, turns_of = save(prompting), load_testing().prompter_turns

    @settings(max_examples=200, deadline=None)
    @given(history=MESSAGES, last=TEXT.filter(str.strip))
    def check(history, last):
        expected = list(prompting.prompter_turns(Conversation(tuple(history), last)))
        assert turns_of(str(folder), history, last) == expected

    check()


@pytest.mark.parametrize("prompting", SETTINGS[:2])
def test_it_writes_behind_a_conversation_what_python_writes(smollm2, save, prompting):
    params = replace(REWRITE, stop=(" of",), top_p=0.95)
    folder = save(prompting, params)
    ours = load_testing().Prompter(str(smollm2.path), str(folder))
    texts = set()
    with alignpro.Prompter(smollm2, folder, prompting=prompting, params=params) as prompter:
        for history in ((), (SYSTEM,), (SYSTEM, *TURNS), TURNS[:2]):
            conversation = Conversation(tuple(history), "  And then? ")
            expected = prompter.rewrite(conversation, seed=3)
            prompt, text, applied, reason, tokens = ours.rewrite(history, "  And then? ", 3)
            assert text == expected.text and tokens == expected.tokens
            assert (applied, reason) == (expected.applied, expected.reason)
            assert prompt == expected.messages[-1]["content"]
            texts.add(text)
    assert len(texts) > 1  # the history is read


def test_a_history_is_cut_to_the_context(smollm2_path, save):
    context = 80
    folder, short = (
        save(Prompting()),
        load_model(ModelConfig(str(smollm2_path), context_length=context)),
    )
    ours = load_testing().Prompter(str(smollm2_path), str(folder), context)
    with alignpro.Prompter(short, folder) as prompter:
        read = set()
        for number in range(1, len(TURNS) + 1):
            history = [SYSTEM, *TURNS[:number]]
            conversation = Conversation(tuple(history), "And then?")
            expected = prompter.rewrite(conversation, seed=number)
            assert ours.rewrite(history, "And then?", number)[1] == expected.text
            (written,) = prompter.rewrites([conversation])[0]
            read.add(short.tokenizer.decode(written.prompter_tokens))
        assert any("Be kind" in text and "bees" not in text for text in read)
    uncut = load_testing().Prompter(str(smollm2_path), str(save(SETTINGS[4])), context)
    for prompter, history in ((ours, []), (uncut, [SYSTEM, *TURNS])):
        last = "And then? " * 30 if prompter is ours else "And then?"
        with pytest.raises(ValueError, match=rf"prompt: .* exceed the context of {context} tokens"):
            prompter.rewrite(history, last, 0)


def test_a_long_history_is_read_no_further_than_it_shows(smollm2_path, save):
    folder, history = save(Prompting()), [("user", "a bird"), ("assistant", "b")] * 50_000
    ours = load_testing().Prompter(str(smollm2_path), str(folder), 400)
    began = time.monotonic()
    assert ours.rewrite(history, "Why?", 0, 50)[3] == "deadline"
    assert time.monotonic() - began < 0.6  # 0.07 s; to encode it once in whole takes 0.52
    assert ours.rewrite([], "Why?", 0, 2**63 // 10**6)[3] != "deadline"  # in 292 years
    with pytest.raises(ValueError, match="prompt: more than 800 tokens and 12 new ones exceed"):
        ours.rewrite([], "why " * 200_000, 0)
    short = load_model(ModelConfig(str(smollm2_path), context_length=400))
    with alignpro.Prompter(short, folder) as prompter:
        expected = prompter.rewrite(Conversation(tuple(history), "Why?"), seed=3)
    assert ours.rewrite(history, "Why?", 3)[1] == expected.text


def test_what_is_reasoning_alone_is_no_rewrite(smollm2, smollm2_path, tmp_path):
    template = smollm2.tokenizer.chat_templates["default"] + "<think>\n"
    thinker = load_model(ModelConfig(str(smollm2_path), chat_template=template))
    save_prompter(tmp_path, lora(thinker), thinker.tokenizer, Prompting(), REWRITE)
    with alignpro.Prompter(thinker, tmp_path) as prompter:
        expected = prompter.rewrite("Why?", seed=0)
    assert (expected.reason, expected.tokens > 0) == ("empty", True)
    got = load_testing().Prompter(str(smollm2_path), str(tmp_path)).rewrite([], "Why?", 0)
    assert got == ("Why?", "", False, "empty", expected.tokens)


def test_guards_decide_what_is_used(smollm2, save):
    prompting = Prompting(mode="rewrite", template="Say it otherwise: {prompt}")
    params = replace(REWRITE, max_new_tokens=6)
    folder, testing, reasons = save(prompting, params), load_testing(), []
    for changes in ({}, {"cut": False}, {"cut": False, "spans": False, "max_growth": 0.1}):
        guards = GuardConfig(free_characters=9, **changes)
        settings = testing.Guards(**vars(guards))
        ours = testing.Prompter(str(smollm2.path), str(folder), guards=settings)
        options = {"prompting": prompting, "params": params, "guards": guards}
        with alignpro.Prompter(smollm2, folder, **options) as prompter:
            for prompt in ("What is 12 times 7?", "Why?"):
                expected = prompter.rewrite(prompt, seed=5)
                got = ours.rewrite([], prompt, 5)
                assert got[:2] == (expected.prompt, expected.text)
                assert got[2:4] == (expected.applied, expected.reason)
                reasons.append(expected.reason)
    assert {"guard_cut", "guard_spans", "guard_length"} <= set(reasons)


def test_what_is_no_conversation_is_refused(smollm2, save, tmp_path):
    folder = save(Prompting())
    ours = load_testing().Prompter(str(smollm2.path), str(folder))
    with pytest.raises(ValueError, match=r"message 1: expected one of the roles .*, got tool"):
        ours.rewrite([SYSTEM, ("tool", "x")], "Why?", 0)
    with pytest.raises(ValueError, match="prompt: expected text, got none"):
        ours.rewrite([SYSTEM], " \n", 0)
    with pytest.raises(ValueError, match="prompt: expected UTF-8"):
        ours.rewrite([("user", b"\xff")], "Why?", 0)
    written = json.loads((folder / "prompter.json").read_text("utf-8"))

    def refused(message, **changes):
        file = written | {"prompting": written["prompting"] | changes}
        (tmp_path / "prompter.json").write_text(json.dumps(file))
        with pytest.raises(ModelFileError, match=message):
            load_testing().prompter_turns(str(tmp_path), [], "Why?")

    refused("prompting: history: expected one of none, turns, all, got most", history="most")
    refused("prompting: history_template: expected {history} in it", history_template="x")
    refused("prompting: template: expected {prompt} in it, exactly once", template="{prompt}" * 2)
    del written["prompting"]["history_cut"]
    refused('no "history_cut"; expected what train writes, which `alignpro train .* --resume`')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": [1]}, "sampling: stop: expected texts"),
        ({"stop_token_ids": ["</s>"]}, "sampling: stop_token_ids: expected ids of tokens"),
        ({"stop_token_ids": [2**31]}, "sampling: stop_token_ids: expected ids of tokens"),
        ({"stop_token_ids": [49_152]}, "stop_token_ids: expected ids below 49152, got 49152"),
        ({"temperature": -1.0}, r"temperature: expected 0 \(greedy\) or a finite number"),
        ({"max_new_tokens": 10**12}, "max_new_tokens: expected fewer than the context of 8192"),
    ],
)
def test_sampling_that_no_prompt_could_have_is_refused_at_once(smollm2, save, changes, message):
    folder = save(Prompting())
    written = json.loads((folder / "prompter.json").read_text("utf-8"))
    file = written | {"sampling": written["sampling"] | changes}
    (folder / "prompter.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=message):
        load_testing().Prompter(str(smollm2.path), str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rslora": "true"}, "use_rslora: expected true or false"),
        ({"use_dora": True}, "use_dora is set, which is not supported here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa may change the base weights"),
    ],
)
def test_options_of_an_adapter_that_change_it_are_refused(smollm2, save, changes, message):
    folder = save(Prompting())
    config = json.loads((folder / "adapter_config.json").read_text("utf-8")) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=message):
        load_testing().Prompter(str(smollm2.path), str(folder))
