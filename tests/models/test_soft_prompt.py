"""Soft prompts outside of the engine: PEFT's files, and where rows stand in what a model reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from alignpro import fingerprints
from alignpro.config import Prompting
from alignpro.data.load import PromptRow
from alignpro.lengths import unread_by
from alignpro.models.adapter import load_peft, require_lora, save_peft
from alignpro.models.mixture import Mixture, soft_rows
from alignpro.models.native_model import NativeModel, load_model
from alignpro.models.prompter_file import save_prompter
from alignpro.models.reading import prompter_tokens, target_tokens
from alignpro.models.soft_prompt import SoftPrompt, SoftRows, chat_tokens
from alignpro.pipeline import Pipeline
from alignpro.types import Conversation, SamplingParams
from native_runs import CHAT, SHORT, lora

TEXT = "in the rain"


def soft(model: NativeModel, *, count: int = 3, seed: int = 0, **place: Any) -> SoftPrompt:
    table = model.base_table("embed_tokens")
    rows = np.random.default_rng(seed).normal(size=(count, table.shape[1])) * table.std()
    return SoftPrompt(rows.astype(np.float32), **place)


def instruction(model: NativeModel, text: str = TEXT) -> SoftPrompt:
    """The embeddings of a text, where it stands behind a prompt."""
    table = model.base_table("embed_tokens")
    return SoftPrompt(table[model.tokenizer.encode(text)], "instruction", "\n")


# --- files ---


@pytest.mark.parametrize("place", [{}, {"place": "instruction", "separator": "\n\n"}])
def test_round_trip(tiny: NativeModel, tmp_path: Path, place: dict[str, Any]) -> None:
    weights = soft(tiny, **place, base_model_name="some/base", base_fingerprint="ab12")
    save_peft(tmp_path / "soft", weights)
    again = load_peft(tmp_path / "soft", tiny.lora_modules)
    assert isinstance(again, SoftPrompt)
    np.testing.assert_array_equal(again.rows, weights.rows)
    assert vars(again) | {"rows": 0} == vars(weights) | {"rows": 0}
    config = json.loads((tmp_path / "soft" / "adapter_config.json").read_text())
    assert {"place", "separator"} <= set(config) if place else not {"place"} & set(config)
    of = fingerprints.of_adapter
    assert of(again) == of(weights) != of(soft(tiny, seed=1, **place))
    assert of(weights) != of(SoftPrompt(weights.rows, "instruction", "another"))


def test_peft_loads_what_we_save(
    tiny_model_dir: Callable[..., Path], tiny: NativeModel, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    weights = soft(tiny)
    save_peft(tmp_path, weights)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    read = chat_tokens(tiny.tokenizer, CHAT, soft_rows(weights))
    (ours,) = tiny.score([read], adapter=weights)
    tokens = [token for token in read if token >= 0]
    assert read == [-1, -2, -3, *tokens]
    with torch.no_grad():
        theirs = loaded(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    # Scored from the token behind the rows on: the first is told by the last row.
    expected = theirs[2:-1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-4)


def test_we_load_what_peft_saves(
    tiny_model_dir: Callable[..., Path], tiny: NativeModel, tmp_path: Path
) -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.float32)
    options = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    made = get_peft_model(base, options)
    made.save_pretrained(tmp_path)
    weights = tiny.load_adapter(tmp_path)
    assert isinstance(weights, SoftPrompt) and weights.placed == SoftRows(5, "start")
    embedding = made.prompt_encoder["default"].embedding.weight
    np.testing.assert_array_equal(weights.rows, embedding.detach().numpy())


def changed(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "P_TUNING"}, "expected LORA or PROMPT_TUNING, got P_TUNING: its rows"),
        ({"peft_type": "PREFIX_TUNING"}, "got PREFIX_TUNING: it holds keys and values"),
        ({"num_virtual_tokens": 4}, r"expected shape \(4, 48\), got \(3, 48\)"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens: expected 1 or more, got None"),
        ({"token_dim": 47}, r"expected shape \(3, 47\)"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules: expected 1, got 2"),
        ({"place": "end"}, "place: expected start or instruction, got 'end'"),
        ({"separator": 3}, "separator: expected text, got 3"),
        ({"separator": "\ud800"}, r"separator: lone surrogate U\+D800"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: expected text, got 3"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type: expected CAUSAL_LM, got SEQ_CLS"),
    ],
)
def test_what_is_not_read(
    tiny: NativeModel, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    save_peft(tmp_path, soft(tiny))
    with pytest.raises(ValueError, match=said) as caught:
        tiny.load_adapter(changed(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_are_not_read(tiny: NativeModel, tmp_path: Path) -> None:
    save_peft(tmp_path, soft(tiny))
    path = tmp_path / "adapter_model.safetensors"
    rows = load_file(path)["prompt_embeddings"]
    broken = rows.copy()
    broken[1, 2] = np.nan
    for tensors, said in (
        ({"prompt_embeddings": broken}, "prompt_embeddings: holds NaN or infinity"),
        ({"rows": rows}, "expected prompt_embeddings alone, got rows"),
        ({"prompt_embeddings": rows[0]}, r"got \(48,\)"),
        ({"prompt_embeddings": np.array(1.0, np.float32)}, r"expected shape \(3, 48\), got \(\)"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=said):
            tiny.load_adapter(tmp_path)
    save_peft(tmp_path, SoftPrompt(np.ascontiguousarray(rows[:, :40])))
    with pytest.raises(ValueError, match=r"rows of 40 numbers; .* has 48"):
        tiny.load_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"soft prompt: expected rows \[m, hidden\], got \(48,\)"):
        save_peft(tmp_path, SoftPrompt(rows[0]))
    with pytest.raises(ValueError, match="runs: expected LoRA matrices, got a soft prompt"):
        require_lora(soft(tiny), "runs")


def test_no_file_for_the_cpp_prompter(
    tiny: NativeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_prompter(tmp_path, soft(tiny), tiny.tokenizer, Prompting(), SHORT)
    assert not (tmp_path / "prompter.json").exists()
    assert "it reads LoRA adapters, and this one is a soft prompt" in caplog.text
    assert isinstance(tiny.load_adapter(tmp_path), SoftPrompt)


# --- what is read ---


def test_where_rows_stand(tiny: NativeModel) -> None:
    tokenizer = tiny.tokenizer
    plain = tokenizer.encode_chat(CHAT)
    assert chat_tokens(tokenizer, CHAT) == plain
    assert chat_tokens(tokenizer, CHAT, SoftRows(2)) == [-1, -2, *plain]
    rows = SoftRows(2, "instruction", "\n")
    turns = [*CHAT, {"role": "assistant", "content": "hi"}, *CHAT]
    for chat in (CHAT, turns):
        read = chat_tokens(tokenizer, chat, rows)
        at = read.index(-1)
        assert read[at : at + 2] == [-1, -2] and min(read[:at] + read[at + 2 :]) >= 0
        longer = [*chat[:-1], {"role": "user", "content": chat[-1]["content"] + "\n"}]
        assert read[:at] + read[at + 2 :] == tokenizer.encode_chat(longer)
        assert read[at + 2 :] == plain[-2:]  # the turn's end, and the assistant's beginning
    prompting = Prompting(template="say {prompt}")
    words = prompter_tokens(tokenizer, prompting, "a", 99, 0, rows)
    assert words == chat_tokens(tokenizer, [{"role": "user", "content": "say a"}], rows)
    assert target_tokens(tokenizer, "a", rows) == target_tokens(
        tokenizer, Conversation.of([{"role": "user", "content": "a"}]), rows
    )
    with pytest.raises(ValueError, match="place: expected start or instruction, got 'end'"):
        soft(tiny, place="end")
    with pytest.raises(ValueError, match="expected a turn of the user"):
        chat_tokens(tokenizer, [{"role": "assistant", "content": "hi"}], rows)


def test_text_of_a_user_stays_text_beside_rows(tiny: NativeModel) -> None:
    """Control tokens, private characters: as without rows (contract 7)."""
    tokenizer, end = tiny.tokenizer, tiny.tokenizer.eos_ids[0]
    chat = [{"role": "user", "content": "a </s><|assistant|> \ue000\ue001 b"}]
    read = chat_tokens(tokenizer, chat, SoftRows(1, "instruction", " "))
    longer = [{"role": "user", "content": chat[0]["content"] + " "}]
    assert [token for token in read if token != -1] == tokenizer.encode_chat(longer)
    assert read.count(end) == 1


def test_embeddings_of_an_instruction_are_the_instruction(
    tiny: NativeModel, tmp_path: Path
) -> None:
    """To the bit, from everything that a soft prompt may be given as."""
    weights = instruction(tiny)
    (said,) = CHAT
    static = [{"role": "user", "content": f"{said['content']}\n{TEXT}"}]
    (plain,) = tiny.generate([static], SHORT)
    save_peft(tmp_path, weights)
    read = chat_tokens(tiny.tokenizer, CHAT, soft_rows(weights))
    for adapter in (weights, tmp_path, str(tmp_path), tiny.prepare(weights)):
        (drawn,) = tiny.generate([CHAT], SHORT, adapter=adapter)
        assert (drawn.tokens, drawn.logprobs) == (plain.tokens, plain.logprobs)
        assert drawn.prompt_tokens == read
    (of_ids,) = tiny.generate([read], SHORT, adapter=weights)
    assert of_ids.tokens == plain.tokens
    pieces = tiny.stream(CHAT, SHORT, adapter=weights)
    assert [token for token, _, _ in pieces] == plain.tokens
    (scored,) = tiny.score([read + plain.tokens], adapter=weights)
    assert scored[-len(plain.tokens) :].tolist() == plain.logprobs
    with pytest.raises(ValueError, match=r"expected -1 to -3 among them.* got none"):
        tiny.generate([[1, 40, 41]], SHORT, adapter=SoftPrompt(weights.rows[:3]))
    with pytest.raises(ValueError, match=r"^sequence 1: .*expected -1 to -3 among them.* got none"):
        tiny.score([[-1, -2, -3, 5], [5, 6]], adapter=SoftPrompt(weights.rows[:3]))


def test_a_pipeline_reads_with_both_models_rows(tiny: NativeModel) -> None:
    """What the target answers to a raw prompt is what it answers to the instruction; sampled is
    scored to the bit for the prompter."""
    own = soft(tiny, count=2)
    pipeline = Pipeline(
        tiny,
        tiny,
        None,
        prompting=Prompting(template="say {prompt}", separator="\n"),
        prompter_adapter=own,
        target_adapter=instruction(tiny),
        rewrite_params=SamplingParams(max_new_tokens=4),
        response_params=SamplingParams(max_new_tokens=6),
    )
    before = pipeline.with_target_adapter(None)
    raw = pipeline.respond(["the heron"], num_responses=2, seed=5).rewrites[0][0]
    static = before.answer(["the heron"], [[TEXT]], num_responses=2, seed=5).rewrites[0][0]
    assert [r.tokens for r in raw.responses] == [r.tokens for r in static.responses]
    assert [r.logprobs for r in raw.responses] == [r.logprobs for r in static.responses]
    (group,) = pipeline.rollout(["the heron"], num_rewrites=2, seed=5).rewrites
    for w in group:
        assert w.prompter_tokens[:2] == [-1, -2] and -1 in w.target_tokens
        (scored,) = tiny.score([w.prompter_tokens + w.tokens], adapter=own)
        assert scored[-len(w.tokens) :].tolist() == w.logprobs


def test_a_pipeline_reads_an_adapters_folder_once(tiny, tmp_path: Path) -> None:
    """Its rows and its numbers are of one reading, whatever comes to stand there later."""
    save_peft(tmp_path, instruction(tiny))
    params = SamplingParams(max_new_tokens=4)
    adapters = {"prompter_adapter": tmp_path, "target_adapter": str(tmp_path)}
    given = {"rewrite_params": params, "response_params": params}
    pipeline = Pipeline(tiny, tiny, None, **adapters, **given)
    before = pipeline.rollout(["the heron"], num_rewrites=2, seed=5)
    assert before.rewrites[0][0].prompter_tokens.count(-1) == 1
    save_peft(tmp_path, soft(tiny, count=2))
    assert pipeline.rollout(["the heron"], num_rewrites=2, seed=5).rewrites == before.rewrites
    shutil.rmtree(tmp_path)
    assert pipeline.rollout(["the heron"], num_rewrites=2, seed=5).rewrites == before.rewrites
    for adapters in ({"prompter_adapter": tmp_path}, {"target_adapter": tmp_path}):
        with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json there"):
            Pipeline(tiny, tiny, None, **adapters, **given)


def test_rows_count_in_the_context(tiny_model_dir: Callable[..., Path]) -> None:
    model = load_model(tiny_model_dir("llama"), threads=1, context_length=40)
    fits = "a" * (40 - 6 - len(model.tokenizer.encode_chat([{"role": "user", "content": ""}])))
    params = SamplingParams(max_new_tokens=6)
    for rows, unfit in ((None, False), (soft(model, count=1), True)):
        pipeline = Pipeline(model, model, None, target_adapter=rows, response_params=params)
        reason = unread_by(pipeline, rewrites=False)(PromptRow(fits))
        assert (reason is not None) == unfit
    long = fits + "a" * 5
    assert model.generate([long], SHORT)
    with pytest.raises(ValueError, match="fewer tokens than the context of 40, got 40"):
        model.generate([long], SHORT, adapter=soft(model, count=1))


# --- mixtures ---


def test_soft_prompts_that_read_alike_are_mixed(tiny: NativeModel, tmp_path: Path) -> None:
    one, other = soft(tiny), soft(tiny, seed=1)
    save_peft(tmp_path, other)
    (alone,) = tiny.generate([CHAT], SHORT, adapter=one)
    (mixed,) = tiny.generate([CHAT], SHORT, adapter=Mixture(((one, 1.0), (tmp_path, 0.0))))
    assert (mixed.tokens, mixed.logprobs) == (alone.tokens, alone.logprobs)
    mixture = Mixture(((one, 0.5), (tmp_path, 0.5)))
    (drawn,) = tiny.generate([CHAT], SHORT, adapter=mixture)
    assert drawn.logprobs != alone.logprobs
    (scored,) = tiny.score([drawn.prompt_tokens + drawn.tokens], adapter=mixture)
    np.testing.assert_allclose(scored[-len(drawn.tokens) :], drawn.logprobs, atol=1e-5)
    for unlike in (lora(tiny), "base", soft(tiny, count=2), soft(tiny, place="instruction")):
        with pytest.raises(ValueError, match="mixture: expected members that read the same tokens"):
            tiny.prepare(Mixture(((one, 0.5), (unlike, 0.5))))


def test_peft_leaves_out_a_place_that_it_does_not_know(tiny: NativeModel, tmp_path: Path) -> None:
    from peft import PeftConfig

    save_peft(tmp_path, soft(tiny, place="instruction", separator="\n"))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['place', 'separator'\]"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert (config.peft_type, config.num_virtual_tokens) == ("PROMPT_TUNING", 3)
    save_peft(tmp_path, soft(tiny))
    PeftConfig.from_pretrained(tmp_path)
