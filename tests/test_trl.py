"""Rewrites of another trainer's policy, answered and scored: by hand, and in TRL's own trainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from alignpro.config import ModelConfig, Prompting
from alignpro.models.endpoint import EndpointModel
from alignpro.models.in_flight import FailedRowsError
from alignpro.trl import prompter_rows, rewrite_reward
from alignpro.types import SamplingParams
from chat_server import ChatServer, Fault
from fake_model import FakeModel


@pytest.fixture
def server():
    with ChatServer(lambda asked: f"heard {asked.turn}") as running:
        yield running


def target_of(server):
    return EndpointModel(ModelConfig("big", endpoint=server.url))


class Reward:
    """Records what it saw; the length of the response."""

    def __init__(self):
        self.rows = []

    def __call__(self, prompts, rewrites, responses, **columns):
        self.rows += zip(prompts, rewrites, responses, *columns.values(), strict=True)
        return [float(len(response)) for response in responses]


def chat(text):
    return [{"role": "assistant", "content": text}]


def test_rows_hold_what_the_prompter_reads_and_the_prompt():
    rows = prompter_rows(["Why {x}?"], Prompting(template="Help: {prompt}!"))
    turn = {"role": "user", "content": "Help: Why {x}?!"}
    assert rows == [{"prompt": [turn], "original_prompt": "Why {x}?"}]


@pytest.mark.parametrize("form", [str, chat])
def test_completions_are_answered_and_scored_against_the_original_prompt(server, form):
    reward = Reward()
    score = rewrite_reward(target_of(server), reward, prompting=Prompting(separator=" / "))
    scores = score(
        prompts=["not seen"] * 3,
        completions=[form(" briefly "), form(""), form("in verse")],
        original_prompt=["Why?", "Why?", "How?"],
        task=["a", "b", "c"],
        completion_ids=[[1], [2], [3]],
        trainer_state=object(),
    )
    answers = ["heard Why? / briefly", "heard Why?", "heard How? / in verse"]
    assert scores == [float(len(answer)) for answer in answers]
    assert reward.rows == [
        ("Why?", "briefly", answers[0], "a"),
        ("Why?", "", answers[1], "b"),
        ("How?", "in verse", answers[2], "c"),
    ]


def test_a_block_of_reasoning_is_no_part_of_a_rewrite(server):
    reward = Reward()
    rewrite_reward(target_of(server), reward)(
        prompts=[""] * 3,
        completions=["<think>\nhm\n</think>\n\nbriefly", "hm</think> in verse", "<think>hm"],
        original_prompt=["Why?", "How?", "Who?"],
    )
    assert [rewrite for _, rewrite, _ in reward.rows] == ["briefly", "in verse", ""]


def test_a_rewrite_is_the_text_of_what_was_written_last(server):
    reward = Reward()
    parts = [{"type": "text", "text": "briefly"}]
    tool = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    completions = [chat(parts), [tool], [], [{"role": "tool", "content": "3"}, *chat("in verse")]]
    rewrite_reward(target_of(server), reward)(
        prompts=[""] * 4, completions=completions, original_prompt=["Why?"] * 4
    )
    assert [rewrite for _, rewrite, _ in reward.rows] == ["briefly", "", "", "in verse"]


def test_a_rewrite_without_an_answer_has_no_reward(server):
    def answer(asked):
        return Fault.error(400, "no") if "bad" in asked.turn else "x"

    server.answer = answer
    score = rewrite_reward(target_of(server), Reward(), num_responses=2, max_failed=0.5)
    options = {"prompts": [""] * 2, "original_prompt": ["Why?", "How?"]}
    assert score(completions=["bad", "good"], **options) == [None, 1.0]
    with pytest.raises(FailedRowsError, match="3 of 4 responses failed"):
        score(completions=["bad", "bad"], **options)


def test_a_model_in_this_process_answers_as_well():
    model = FakeModel()
    score = rewrite_reward(model, Reward(), params=SamplingParams(max_new_tokens=20))
    options = {"prompts": [""], "completions": ["briefly"], "original_prompt": ["Why?"]}
    assert score(**options)[0] >= 0
    assert model.tokenizer.decode(model.handles[0].prompt_tokens) == "Why?\n\nbriefly"
    score(**options)
    seeds = {handle.params.seed for handle in model.handles}
    assert len(seeds) == 2  # another step draws anew


def test_a_trainer_that_resumes_draws_what_it_would_have():
    def seeds(*steps):
        model = FakeModel()
        score = rewrite_reward(model, Reward(), params=SamplingParams(max_new_tokens=20))
        options = {"prompts": [""], "completions": ["briefly"], "original_prompt": ["Why?"]}
        for step in steps:
            score(**options, trainer_state=SimpleNamespace(global_step=step))
        return [handle.params.seed for handle in model.handles]

    whole = seeds(0, 0, 1, 1, 2, 2)
    assert len(set(whole)) == 6 and seeds(1, 1, 2, 2) == whole[2:]


def test_data_without_the_prompts_is_refused(server):
    with pytest.raises(ValueError, match="no column original_prompt"):
        rewrite_reward(target_of(server), Reward())(prompts=["x"], completions=["y"])


def test_in_trls_own_trainer(server, tmp_path, tiny_model_dir):
    pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    folder = tiny_model_dir("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "</s>"
    reward = Reward()
    prompting = Prompting(template="{prompt}", separator=" ")
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=rewrite_reward(target_of(server), reward, prompting=prompting),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=4,
            max_steps=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(prompter_rows(["Why?", "How?"] * 4, prompting)),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(reward.rows) == 2 * 4 == len(server.asked)
    assert {prompt for prompt, _, _ in reward.rows} == {"Why?", "How?"}
    for prompt, rewrite, response in reward.rows:
        assert response == (f"heard {prompt} {rewrite}" if rewrite else f"heard {prompt}")
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    lengths = [float(len(response)) for *_, response in reward.rows]
    assert logged == pytest.approx([sum(lengths[:4]) / 4, sum(lengths[4:]) / 4])
