"""A prompt that is a conversation: to the prompter, the target, the reward, and TRL."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest

from alignpro.config import (
    DataConfig,
    EvalConfig,
    HeadroomConfig,
    ModelConfig,
    Prompting,
    TrainConfig,
    from_mapping,
)
from alignpro.data.load import load_prompts
from alignpro.evaluate.headroom import run_headroom
from alignpro.evaluate.run import run_evaluate
from alignpro.models.endpoint import EndpointModel
from alignpro.pipeline import Pipeline
from alignpro.price.lengths import find_lengths
from alignpro.rewards.check import score_checked
from alignpro.rewards.combine import WeightedSum, score_components
from alignpro.rewards.function import from_callable
from alignpro.train.metrics import read_metrics
from alignpro.train.run import make_trainer
from alignpro.train.sft import encode_pairs
from alignpro.trl import prompter_rows, rewrite_reward
from alignpro.types import Conversation, SamplingParams
from chat_server import ChatServer
from fake_model import FakeModel, FakeTokenizer

DIALOGUES = Path(__file__).parents[2] / "shared/data/hh_harmless_test.jsonl.gz"

CHAT = [
    {"role": "system", "content": "Be kind.  \n"},
    {"role": "user", "content": "Why {x}?"},
    {"role": "assistant", "content": "ünï 🙂\n\nUser: no"},
    {"role": "user", "content": " And  then? "},
]
WHOLE = Conversation.of(CHAT)


@pytest.fixture
def server():
    with ChatServer(lambda asked: f"heard {asked.turn}") as running:
        yield running


def target_of(server):
    return EndpointModel(ModelConfig("big", endpoint=server.url))


def test_one_prompt_in_all_its_forms():
    assert Conversation.of(WHOLE) is WHOLE
    assert WHOLE.messages == CHAT == WHOLE.plain
    assert WHOLE.last_turn == " And  then? " and WHOLE.short is WHOLE
    assert {WHOLE: 1}[Conversation.of([dict(message) for message in CHAT])] == 1
    assert Conversation.of(CHAT[1:]) != WHOLE
    assert (
        Conversation([[m["role"], m["content"]] for m in CHAT[:-1]], CHAT[-1]["content"]) == WHOLE
    )
    with pytest.raises(ValueError, match="message 0: expected one of the roles"):
        Conversation((("tool", "x"),), "last")
    for history in ("ab", ["ab"], CHAT):
        with pytest.raises(ValueError, match="history: expected pairs of role and content, got"):
            Conversation(history, "last")
    with pytest.raises(ValueError, match=r"last_turn: expected text, got nothing \(null\)"):
        Conversation((), None)
    lone = Conversation.of([{"role": "user", "content": "Why?"}])
    assert lone == Conversation.of("Why?")
    assert lone.short == lone.plain == lone.text == "Why?"
    assert WHOLE.text.startswith("System: Be kind.  \n\n\nUser: Why {x}?\n\nAssistant: ")
    assert WHOLE.text.endswith("\n\nUser:  And  then? ")


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        (CHAT[:3], "expected a chat that ends in a user turn, got the roles"),
        ([], "expected a chat that ends in a user turn"),
        ("", "expected text or a chat, got an empty string"),
        (
            [{"role": "user", "content": " "}],
            "expected text or a chat, got an empty string as last",
        ),
        (["Why?"], "message 0: expected 'role' and 'content', got str"),
        ({"role": "user", "content": "Why?"}, "expected text or a chat, got dict"),
        ([{"role": "tool", "content": "x"}, CHAT[1]], "message 0: expected one of the roles"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt, line):
    pipeline = Pipeline(FakeModel(), FakeModel(), None)
    with pytest.raises(ValueError) as caught:
        pipeline.rollout(["fine", prompt], seed=0)
    assert str(caught.value).startswith(f"prompt 1: {line}")


def test_a_text_where_a_list_is_wanted_is_refused():
    pipeline = Pipeline(FakeModel(), FakeModel(), None)
    with pytest.raises(ValueError, match="prompts: expected a list of prompts, got str"):
        pipeline.rollout("Why?")
    with pytest.raises(ValueError, match=r"prompts: expected a list .* got one chat; put it into"):
        pipeline.respond(CHAT)
    with pytest.raises(ValueError, match=r"got rows with \['messages'\]; give the column"):
        pipeline.respond([{"messages": CHAT}])
    with pytest.raises(ValueError, match="expected a list of rewrites of prompt 0, got text"):
        pipeline.answer(["Why?"], ["briefly"])
    with pytest.raises(ValueError, match="texts: expected 2 lists, got text"):
        pipeline.answer(["Why?", "How?"], "ab")
    for texts in (("ab", ["", ""], ["x", "y"]), (["a", "b"], ["", ""], "xy")):
        with pytest.raises(ValueError, match=r"reward input '.*': expected a list, got text"):
            score_checked(Catching(), *texts)
    with pytest.raises(ValueError, match="column kind: expected a list of 2 values, got text"):
        pipeline.rollout(["Why?", "How?"], columns={"kind": "ab"})


def test_a_system_message_beside_the_chat_belongs_to_it(tmp_path):
    lone = [{"role": "user", "content": "Why?"}]
    share = {"conversations": [{"from": "human", "value": "Why?"}]}
    rows = [
        {"system": "Be kind.", "messages": lone},
        {"system": "Be kind.", **share},
        {"system": "", **share},
        {"system": "mine", "messages": [{"role": "system", "content": "Be kind."}, *lone]},
        {"system": "mine", "prompt": "Why?"},
    ]
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(row) + "\n")
    read = [load_prompts(tmp_path / f"{i}.jsonl")[0] for i in range(len(rows))]
    whole = Conversation((("system", "Be kind."),), "Why?")
    assert [row.prompt for row in read] == [whole, whole, "Why?", whole, "Why?"]
    assert [row.columns.get("system") for row in read] == [None, None, "", "mine", "mine"]
    dropped = DataConfig(str(tmp_path / "1.jsonl"), split=None, system="drop")
    assert load_prompts(dropped)[0].prompt == "Why?"


@pytest.mark.parametrize("mode", ["append", "rewrite"])
def test_only_the_last_turn_that_the_target_reads_is_another(server, mode):
    prompting = Prompting(mode=mode, separator=" / ")
    texts = [["briefly", ""], ["in verse"]]
    here = Pipeline(None, FakeModel(), None, prompting=prompting)
    there = Pipeline(None, target_of(server), None, prompting=prompting)
    rollout = here.answer([CHAT, "Why?"], texts, seed=1)
    assert rollout.prompts == [WHOLE, "Why?"]
    turn = "briefly" if mode == "rewrite" else " And  then?  / briefly"
    read = [[*CHAT[:-1], {"role": "user", "content": turn}], CHAT]
    first, second = rollout.rewrites[0]
    assert [Conversation.of(w.target_prompt).messages for w in (first, second)] == read
    tokens = FakeModel().tokenizer.encode_chat
    assert [w.target_tokens for w in (first, second)] == [tokens(messages) for messages in read]
    assert [handle.prompt_tokens for handle in here.target.handles[:2]] == [
        tokens(messages) for messages in read
    ]
    there.answer([CHAT, "Why?"], texts, seed=1)
    asked = [asked.body["messages"] for asked in server.asked]
    assert len(asked) == 3 and all(messages in asked for messages in read)


def test_roles_that_a_template_refuses_are_named_before_anything_is_written():
    class NoSystem(FakeTokenizer):
        def encode_chat(self, messages, **options):
            if messages[0]["role"] == "system":
                raise ValueError("the chat template: System role not supported")
            return super().encode_chat(messages, **options)

    prompter = FakeModel()
    pipeline = Pipeline(prompter, FakeModel(tokenizer=NoSystem()), None)
    for start in (pipeline.rollout, pipeline.respond):
        with pytest.raises(ValueError, match=r"^prompt 2: the chat template: System role"):
            start(["Why?", CHAT[1:], CHAT])
    assert prompter.handles == []


def test_the_history_is_cut_to_what_the_prompter_holds():
    def read(context, **settings):
        prompter = FakeModel(context_length=context)
        prompting = Prompting(template="Q: {prompt}", history_template="<{history}>", **settings)
        pipeline = Pipeline(
            prompter, FakeModel(), None, prompting=prompting, rewrite_params=SamplingParams()
        )
        (group,) = pipeline.rewrite([chat], seed=1)
        return prompter.tokenizer.decode(group[0].prompter_tokens)

    turns = [("user", "a" * 99), ("assistant", "b" * 99), ("user", "c" * 20), ("assistant", "d")]
    chat = Conversation((("system", "S"), *turns), "last")
    assert read(2000).endswith("Assistant: d>Q: last") and "aaa" in read(2000)
    assert read(200) == f"<System: S\n\nUser: {'c' * 20}\n\nAssistant: d>Q: last"
    assert read(100, history="turns") == "<Assistant: d>Q: last"
    assert read(80) == "Q: last"
    with pytest.raises(ValueError, match=r"prompt 0 in its template: .* exceed the context"):
        read(200, history_cut="nothing")
    with pytest.raises(ValueError, match=r"prompt 0 in its template: .* exceed the context"):
        read(64)


def test_the_warm_start_reads_what_the_prompter_reads():
    model = FakeModel(context_length=68)
    prompting = Prompting(template="Q: {prompt}", history_template="<{history}>", history="turns")
    pairs = [(WHOLE, "Be brief."), ("Why?", "x")]
    examples = encode_pairs(model.tokenizer, pairs, prompting, model.context_length)
    params = SamplingParams(max_new_tokens=len("Be brief.") + 1)
    pipeline = Pipeline(model, FakeModel(), None, prompting=prompting, rewrite_params=params)
    for example, (rewrite,) in zip(examples, pipeline.rewrite([WHOLE, "Why?"]), strict=True):
        assert example.tokens[: example.start] == rewrite.prompter_tokens
    assert len(examples[0].tokens) <= 68
    read = model.tokenizer.decode(examples[0].tokens)
    assert read == "<Assistant: ünï 🙂\n\nUser: no>Q:  And  then? Be brief."


class Catching:
    name = "catching"

    def __init__(self):
        self.columns = []

    def __call__(self, prompts, rewrites, responses, **columns):
        self.columns.append(columns)
        return [float(len(prompt)) for prompt in prompts]


def test_the_reward_sees_the_last_turn_and_the_conversation_by_name():
    seen = []

    def named(prompts, completions, conversations):
        seen.append(conversations)
        return [float(len(messages)) for messages in conversations]

    def plain(prompts, responses):
        return [float(len(prompt)) for prompt in prompts]

    lone = [{"role": "user", "content": "Why?"}]
    args = ([WHOLE, "Why?"], ["", ""], ["x", "y"])
    reward, catching = from_callable(named), Catching()
    assert score_checked(reward, *args) == [4.0, 1.0]
    assert score_checked(reward, ["Why?"], [""], ["y"]) == [1.0]
    assert seen == [[CHAT, lone], [lone]]
    assert score_checked(from_callable(plain), *args) == [12.0, 4.0]
    bare = lambda prompts, rewrites, responses: [0.0] * len(prompts)  # noqa: E731
    assert score_checked(bare, *args) == [0.0, 0.0]
    both = WeightedSum({"named": (1.0, reward), "catching": (1.0, catching)})
    assert score_checked(both, *args) == [16.0, 5.0]
    scores, parts = score_components(both, *args)
    assert scores == [16.0, 5.0] and parts["named"] == [4.0, 1.0]
    assert catching.columns == [{"conversations": [CHAT, lone]}] * 2
    assert score_checked(catching, ["Why?"], [""], ["y"]) == [4.0]
    assert catching.columns[-1] == {}  # text alone needs no second form
    with pytest.raises(ValueError, match="'conversations' collides"):
        score_checked(catching, *args, {"conversations": ["a", "b"]})
    assert score_checked(catching, ["Why?"], [""], ["y"], {"conversations": ["a"]}) == [4.0]


def test_conversations_in_trls_rows_and_rewards(server):
    prompting = Prompting(template="Q: {prompt}", history_template="<{history}>", separator=" / ")
    rows = prompter_rows([CHAT, "Why?"], prompting)
    assert rows[0]["prompt"][0]["content"].startswith("<System: Be kind.  \n")
    assert rows[0]["prompt"][0]["content"].endswith("User: no>Q:  And  then? ")
    assert rows[1]["prompt"] == [{"role": "user", "content": "Q: Why?"}]
    # One type in the column of a table.
    originals = [row["original_prompt"] for row in rows]
    assert originals == [CHAT, [{"role": "user", "content": "Why?"}]]
    catching = Catching()
    score = rewrite_reward(target_of(server), catching, prompting=prompting)
    completions = [[{"role": "assistant", "content": text}] for text in ("briefly", "in verse")]
    prompts = [row["prompt"] for row in rows]
    scores = score(prompts=prompts, completions=completions, original_prompt=originals)
    assert scores == [12.0, 4.0]
    assert catching.columns == [{"conversations": originals}]
    last = {"role": "user", "content": " And  then?  / briefly"}
    assert [*CHAT[:-1], last] in [asked.body["messages"] for asked in server.asked]


def test_trls_rows_come_back_from_a_table(server):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    table = datasets.Dataset.from_list(prompter_rows([CHAT, "Why?"]))
    score = rewrite_reward(target_of(server), Catching())
    columns = {name: list(table[name]) for name in table.column_names}
    prompts, originals = columns["prompt"], columns["original_prompt"]
    score(prompts=prompts, completions=["", ""], original_prompt=originals)
    asked = [asked.body["messages"] for asked in server.asked]
    assert len(asked) == 2 and CHAT in asked


def test_common_beginnings_are_computed_once(smollm2):
    history = [
        {"role": "system", "content": "You are a careful assistant. " * 12},
        {"role": "user", "content": "How do bees find home? " * 12},
        {"role": "assistant", "content": "By the sun. " * 24},
    ]
    first, second = ([*history, {"role": "user", "content": turn}] for turn in ("Ants?", "Why?"))
    pipeline = Pipeline(None, smollm2, None, response_params=SamplingParams(max_new_tokens=1))
    (group,) = pipeline.respond([first], seed=1).rewrites
    read = group[0].target_tokens
    assert read == smollm2.tokenizer.encode_chat(first)
    before = smollm2.stats()["prefill_tokens"]
    pipeline.answer([second], [["briefly", "in verse", "as a list"]], seed=1)
    spent = smollm2.stats()["prefill_tokens"] - before
    assert spent < len(read) / 2  # of three requests, each of that length


def test_lengths_of_conversations_are_what_the_models_read(smollm2):
    prompts, prompting, tokenizer = [WHOLE, "Why?"], Prompting(), smollm2.tokenizer
    found = find_lengths(prompts, prompting, 12, tokenizer, tokenizer)
    turns = [prompting.prompter_turns(prompt)[0] for prompt in prompts]
    reads = [len(tokenizer.encode_chat([{"role": "user", "content": turn}])) for turn in turns]
    assert found.prompter == pytest.approx(sum(reads) / 2, abs=3)
    raw = [len(tokenizer.encode_chat(Conversation.of(prompt).messages)) for prompt in prompts]
    assert found.target_raw == pytest.approx(sum(raw) / 2, abs=1)
    guessed = find_lengths(prompts, prompting, 12, None, None)
    assert guessed.target_raw == pytest.approx(found.target_raw, rel=0.5)


def test_samples_of_headroom_hold_the_conversation(server, tiny_model_dir, tmp_path):
    data = tmp_path / "data.jsonl"
    ascii_chat = [{**message, "content": "Why?"} for message in CHAT]
    rows = [{"messages": ascii_chat}, {"prompt": "How?"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "prompter": str(tiny_model_dir("llama")),
        "target": {"endpoint": server.url, "model": "big"},
        "data": {"path": str(data), "split": None},
        "reward": "vader",
        "num_prompts": 2,
        "num_rewrites": 2,
        "num_responses": 2,
        "rewrite": {"max_new_tokens": 2},
        "prompting": {"template": "{prompt}", "history_template": "{history}\n"},
        "threads": 1,
    }
    run_headroom(from_mapping(HeadroomConfig, config), samples=tmp_path / "samples.jsonl")
    _, *samples = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert [sample["prompt"] for sample in samples] == [ascii_chat] * 2 + ["How?"] * 2


@pytest.fixture(scope="module")
def dialogues():
    """Of 500 rows of HH-RLHF: the messages, which end in the answer to the last user turn."""
    if not DIALOGUES.is_file():
        pytest.skip("shared/data/hh_harmless_test.jsonl.gz is not there")
    chats = []
    with gzip.open(DIALOGUES, "rt", encoding="utf-8") as file:
        for line in itertools.islice(file, 500):
            _, *parts = re.split(r"\n\n(Human|Assistant): ", json.loads(line)["chosen"])
            roles = {"Human": "user", "Assistant": "assistant"}
            turns = zip(parts[::2], parts[1::2], strict=True)
            chats.append([{"role": roles[who], "content": text} for who, text in turns])
            assert [message["role"] for message in chats[-1][-2:]] == ["user", "assistant"]
    assert sum(len(chat) > 2 for chat in chats) > 300
    return chats


REWARD = """
SEEN = []
def score(prompts, responses, conversations, reference):
    SEEN.extend(zip(prompts, conversations, reference))
    return [len(response) / 100 for response in responses]
"""


@pytest.fixture
def stage(server, dialogues, tiny_model_dir, tmp_path, monkeypatch):
    """Their configuration; half of the rows are in ShareGPT's form."""
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 430}))
    says = {"user": "human", "assistant": "gpt"}
    with (tmp_path / "data.jsonl").open("w") as data:
        for index, chat in enumerate(dialogues):
            share = [{"from": says[m["role"]], "value": m["content"]} for m in chat]
            row = {"conversations": share} if index % 2 else {"messages": chat}
            data.write(json.dumps(row) + "\n")
    (tmp_path / "turns_seen.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {
        "prompter": str(folder),
        "target": {"endpoint": server.url, "model": "big"},
        "data": {"path": "data.jsonl", "split": None},
        "reward": "turns_seen:score",
        "num_responses": 1,
        "rewrite": {"max_new_tokens": 3},
        "prompting": {"separator": " / ", "template": "{prompt}"},
        "threads": 1,
    }


def test_500_conversations_through_training_and_evaluation(server, dialogues, stage):
    prompts = [chat[:-1] for chat in dialogues]
    references = {json.dumps(chat[:-1]): chat[-1]["content"] for chat in dialogues}
    known = {}  # last turns by what is before
    for chat in prompts:
        known.setdefault(json.dumps(chat[:-1]), []).append(chat[-1]["content"])

    def check():
        """Every request is a conversation of the data with something behind its last turn, or
        nothing, and every conversation was asked; the reward saw it as it is in the data."""
        asked = [asked.body["messages"] for asked in server.asked]
        for *history, last in asked:
            turns = known[json.dumps(history)]
            assert any(re.match(re.escape(t) + r"($| / )", last["content"]) for t in turns)
            assert last.keys() == {"role", "content"} and last["role"] == "user"
        assert {json.dumps(history) for *history, _ in asked} == known.keys()
        server.asked.clear()
        import turns_seen

        assert all(turn == chat[-1]["content"] for turn, chat, _ in turns_seen.SEEN)
        assert {json.dumps(chat): ref for _, chat, ref in turns_seen.SEEN} == references
        turns_seen.SEEN.clear()
        return asked

    options = {"steps": 2, "prompts_per_step": 250, "num_rewrites": 2, "run_dir": "run"}
    make_trainer(from_mapping(TrainConfig, stage | options)).train()
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 2
    check()
    options = {"num_rewrites": 1, "static": "Be brief.", "trained": "run/adapter"}
    report = run_evaluate(from_mapping(EvalConfig, stage | options))
    assert set(report.arms) == {"raw", "static", "untuned", "trained"}
    assert {arm.n for arm in report.arms.values()} == {500}
    assert report.samples[1].prompt == Conversation.of(prompts[1]).text
    asked = {json.dumps(messages) for messages in check()}
    for chat in prompts:
        turn = {"role": "user", "content": chat[-1]["content"] + " / Be brief."}
        assert {json.dumps(chat), json.dumps([*chat[:-1], turn])} <= asked
