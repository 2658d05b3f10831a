"""A trained prompter by itself, and the names that the package exports beside it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import alignpro
from alignpro.config import REWRITE, to_mapping

TRAIN = alignpro.TrainConfig(
    steps=1,
    prompts_per_step=2,
    num_rewrites=2,
    reward="topic",
    threads=1,
    rewrite=replace(REWRITE, max_new_tokens=5),
    response=replace(REWRITE, max_new_tokens=2),
    lora=alignpro.LoraConfig(rank=2),
    prompting=alignpro.Prompting(template="Say how: {prompt}", separator=" | "),
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
]


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompter") / "run"
    model = alignpro.ModelConfig(str(tiny_model_dir("llama")))
    trainer = alignpro.run_train(replace(TRAIN, prompter=model, run_dir=str(folder)))
    assert trainer.run_dir == folder and trainer.step == 1
    return folder


@pytest.fixture(scope="module")
def prompter(run):
    return alignpro.Prompter.from_run(run, threads=1)


def test_it_writes_what_the_pipeline_of_the_run_writes(run, prompter):
    rewrites = prompter.rewrites(["the heron"], num_rewrites=2, seed=3)
    pipeline = alignpro.Pipeline(
        prompter.model,
        prompter.model,
        None,
        prompting=TRAIN.prompting,
        prompter_adapter=prompter.model.make_adapter(run / "adapter"),
        rewrite_params=TRAIN.rewrite,
    )
    expected = pipeline.rewrite(["the heron"], num_rewrites=2, seed=3)
    assert [(w.tokens, w.logprobs) for w in rewrites[0]] == [
        (w.tokens, w.logprobs) for w in expected[0]
    ]
    assert rewrites[0][0].target_tokens == []  # there is no target


def test_text_stays_text_and_messages_stay_messages(prompter):
    (written,) = prompter.rewrites(["the heron"], seed=3)[0]
    one = prompter.rewrite("the heron", seed=3)
    assert one.prompt == f"the heron | {written.text}" and one.text == written.text
    assert one.applied and one.reason == "rewritten" and one.milliseconds > 0
    assert one.messages == [{"role": "user", "content": one.prompt}]
    text, chat = (result.prompt for result in prompter.rewrite_batch(["the heron", CHAT], seed=3))
    assert text == f"the heron | {written.text}"
    assert chat[0] == CHAT[0] and chat[1]["content"].startswith("Why is the sky blue? | ")
    assert prompter.rewrite(CHAT[1:], seed=3).prompt[0]["role"] == "user"
    assert CHAT[1]["content"] == "Why is the sky blue?"


def test_an_adapter_and_a_model_are_enough(run, prompter):
    options = {"prompting": TRAIN.prompting, "params": TRAIN.rewrite}
    by_hand = alignpro.Prompter(prompter.model, run / "adapter", **options)
    assert by_hand.rewrite("the heron", seed=3).text == prompter.rewrite("the heron", seed=3).text
    untuned = alignpro.Prompter(prompter.model.path, threads=1, **options)
    assert untuned.rewrites(["the heron"], seed=3)[0][0].text


def test_rewrites_are_drawn_otherwise_than_in_training(run, prompter):
    greedy = alignpro.Prompter.from_run(run, sampling={"temperature": 0}, model=prompter.model)
    texts = {greedy.rewrite("the heron", seed=seed).text for seed in range(4)}
    assert texts == {greedy.rewrite("the heron", seed=9).text}
    assert len({prompter.rewrite("the heron", seed=seed).text for seed in range(4)}) > 1
    refused = {
        "temprature": "sampling.temprature.*did you mean",
        "n": "rewrite.n",
        "top_p": "top_p",
    }
    for key, said in refused.items():
        with pytest.raises(ValueError, match=said):
            alignpro.Prompter.from_run(run, sampling={key: 3}, model=prompter.model)


def test_a_model_that_is_loaded_is_read_with_the_runs_chat_template(run, prompter):
    other = prompter.model.with_template("{{ messages[0].content }}!", date="2000-01-01")
    made = alignpro.Prompter.from_run(run, model=other)
    assert made.model.tokenizer.template_settings == prompter.model.tokenizer.template_settings
    assert made.rewrite("the heron", seed=3).text == prompter.rewrite("the heron", seed=3).text
    with pytest.raises(ValueError, match="device: expected none beside a model that is loaded"):
        alignpro.Prompter.from_run(run, model=other, device="cpu")


def test_a_warm_start_is_a_prompter_too(tiny_model_dir, tmp_path):
    folder = tmp_path / "sft"
    model = alignpro.ModelConfig(str(tiny_model_dir("llama")))
    config = alignpro.SftConfig(
        prompter=model, run_dir=str(folder), steps=1, batch_size=2, threads=1, lora=TRAIN.lora
    )
    alignpro.run_sft(config)
    assert alignpro.Prompter.from_run(folder, threads=1).rewrite("the heron", seed=3).text


def test_what_is_no_run_is_said(run, tmp_path):
    from_run = alignpro.Prompter.from_run
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "mixture.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="alignpro mix --distill makes it one"):
        from_run(tmp_path / "mixed")
    with pytest.raises(FileNotFoundError, match="expected the directory of a run"):
        from_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Prompter\(model, adapter\) takes a PEFT folder"):
        from_run(run / "adapter")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"not there yet.*--resume"):
        from_run(unfinished)
    (unfinished / "adapter").mkdir()
    config = json.loads((run / "config.json").read_text()) | {"policy": "target"}
    (unfinished / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="this one tuned the target"):
        from_run(unfinished)
    for damaged, part in (("{", "not JSON"), ("[]", "a JSON object"), ('{"step": 1}', "step")):
        (unfinished / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=rf"unfinished/config\.json: .*{part}"):
            from_run(unfinished)


def test_prompts_are_checked(prompter):
    with pytest.raises(ValueError, match=r"got text; rewrite\(prompt\) takes it"):
        prompter.rewrites("the heron")
    with pytest.raises(ValueError, match="prompt 1"):
        prompter.rewrite_batch(["the heron", ""])


def test_a_pipeline_without_a_target_answers_nothing(prompter):
    with pytest.raises(ValueError, match="target: expected a model that answers"):
        alignpro.Pipeline(prompter.model, None, None).rollout(["the heron"])


MADE = alignpro.TrainConfig()


@pytest.mark.parametrize(
    ("call", "helper"),
    [
        (lambda: alignpro.make_trainer("train.yaml"), "alignpro.load_yaml(alignpro.TrainConfig"),
        (lambda: alignpro.run_train(to_mapping(MADE)), "from_mapping(alignpro.TrainConfig"),
        (lambda: alignpro.run_sft("sft.yaml"), "alignpro.load_yaml(alignpro.SftConfig"),
        (lambda: alignpro.run_sft(MADE), "config: expected SftConfig, got TrainConfig"),
        (lambda: alignpro.run_evaluate("e.yaml"), "alignpro.load_yaml(alignpro.EvalConfig"),
        (lambda: alignpro.run_headroom("h.yaml"), "alignpro.load_yaml(alignpro.HeadroomConfig"),
        (lambda: alignpro.Pipeline("smollm2", "smollm2", None), "alignpro.load_model loads one"),
        (lambda: alignpro.Trainer(MADE, "smollm2", None, ["x"]), "alignpro.make_trainer(config)"),
    ],
)
def test_errors_point_to_what_would_have_worked(call, helper):
    with pytest.raises(ValueError) as error:
        call()
    assert helper in str(error.value)


def test_pieces_that_are_taken_for_others(prompter):
    pipeline = alignpro.Pipeline(prompter.model, prompter.model, lambda **columns: [])
    with pytest.raises(ValueError, match=r"LoraPolicy.fresh\(model, config.lora, seed=0\)"):
        alignpro.Trainer(MADE, pipeline, prompter.model, ["x"])
    with pytest.raises(ValueError, match=r"alignpro\.build_reward makes one"):
        alignpro.Pipeline(prompter.model, prompter.model, "vader")


def test_every_public_name_is_there_and_documented():
    for name in alignpro.__all__:
        value = getattr(alignpro, name)
        of_the_engine = getattr(value, "__module__", "").endswith("_core")  # its errors
        documented = of_the_engine or name == "__version__" or (value.__doc__ or "").strip()
        assert documented, name
    wanted = {"run_sft", "run_train", "run_evaluate", "run_headroom", "make_trainer"}
    assert wanted | {"LoraPolicy", "from_callable", "Prompter", "load_yaml"} <= set(dir(alignpro))
