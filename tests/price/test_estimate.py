"""Hours and memory: what is claimed, and what is not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config import DataConfig, ModelConfig, Prompting, TrainConfig
from alignpro.price.devices import CPU_RATES, Rates, gpu, read_rates
from alignpro.price.estimate import price_train
from alignpro.price.lengths import find_lengths, local_prompts
from alignpro.price.tables import hours_line
from alignpro.types import SamplingParams

KNOWN = replace(CPU_RATES, gflops=100.0, gbps=10.0, source="a test")
LARGE = {
    "prompter": "Qwen/Qwen2.5-1.5B-Instruct",
    "target": "meta-llama/Llama-3.1-8B-Instruct",
    "data": "owner/prompts",
    "memory_limit": "8GiB",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def large(**changes):
    from alignpro.config import from_mapping

    return from_mapping(TrainConfig, {**LARGE, **changes})


def test_a_card_that_nobody_measured_gets_a_lower_bound_alone():
    report = price_train(large(steps=10), gpu_name="h200")
    assert report["hours"] is None and report["rates"] is None
    limits = report["device"]
    assert (limits["name"], limits["gflops"], limits["gbps"]) == ("H200", 989e3, 4800.0)
    # No phase is faster than its operations, or than its bytes.
    assert report["least_seconds_per_step"] >= sum(report["flops_per_step"].values()) / 989e12
    assert report["least_hours"] == pytest.approx(report["least_seconds_per_step"] / 360)
    line = hours_line(report)
    assert "at least" in line and "no rate has been measured on this device yet" in line
    assert "measured now" not in line


def test_rates_that_were_measured_give_hours_above_the_bound():
    report = price_train(large(), gpu_name="H100", rates=Rates(0.4, 0.3, 0.6, source="h100.json"))
    assert report["seconds_per_step"] > 2 * report["least_seconds_per_step"]
    assert "shares from h100.json" in hours_line(report)
    full = Rates(1.0, 1.0, 1.0, source="")
    half = Rates(0.5, 0.5, 0.5, source="")
    at = [price_train(large(), gpu_name="H100", rates=r)["seconds_per_step"] for r in (full, half)]
    assert at[1] == pytest.approx(2 * at[0])


def test_the_named_rates_take_the_devices_limits_over():
    slow = price_train(TrainConfig(), rates=KNOWN)
    fast = price_train(TrainConfig(), rates=replace(KNOWN, gflops=200.0, gbps=20.0))
    assert slow["device"]["source"] == "a test"
    assert slow["seconds_per_step"] == pytest.approx(2 * fast["seconds_per_step"])
    assert slow["hours"] == pytest.approx(slow["seconds_per_step"] * 20 / 3600)


def test_int8_answers_faster():
    plain = price_train(TrainConfig(), rates=KNOWN)
    int8 = price_train(TrainConfig(target=ModelConfig(compute="int8")), rates=KNOWN)
    assert int8["seconds_per_step"] < 0.9 * plain["seconds_per_step"]
    # The two arithmetics do not share their weights.
    assert plain["memory"]["target weights"] == 0
    assert int8["memory"]["target weights"] == int8["memory"]["prompter weights"]


def test_memory_by_what_holds_it():
    report = price_train(large(lora={"rank": 8}), gpu_name="A100")
    memory, prompter, target = report["memory"], *report["models"].values()
    assert memory["prompter weights"] == 2 * prompter["parameters"]
    assert memory["target weights"] == 2 * target["parameters"]
    lora = report["lora_parameters"]
    # 8 ranks of (in + out) of q, k, v, o, gate, up and down, 28 layers
    a_layer = 3072 + 2 * (1536 + 256) + 3072 + 3 * (1536 + 8960)
    assert lora == 8 * 28 * a_layer
    assert memory["LoRA AdamW"] == 8 * lora
    assert memory["scoring (memory_limit bounds it)"] <= 8 * 2**30
    assert report["memory_bytes"] == sum(memory.values())
    kv = "keys and values, all at once"
    assert price_train(large(), rates=KNOWN)["memory"][kv] == 2 * memory[kv]
    assert report["fits"] == "yes"
    fewer = price_train(large(prompts_per_step=400), gpu_name="L40S")
    assert fewer["fits"] == "with fewer sequences at once"
    assert "only with fewer sequences at once" in hours_line(fewer)
    small = price_train(large(memory_limit="16GiB", prompts_per_step=64), gpu_name="L4")
    assert small["fits"] == "no" and "Does not fit: " in hours_line(small)


def test_lengths_of_data_that_is_not_here_are_called_assumed():
    assert local_prompts(DataConfig("owner/prompts")) is None
    report = price_train(large(), gpu_name="H100")
    assert report["lengths"]["source"] == "256 tokens a prompt, assumed"
    given = price_train(large(), gpu_name="H100", prompt_tokens=1000)
    assert given["lengths"]["source"] == "1000 tokens a prompt, as given"
    assert given["lengths"]["target"] - report["lengths"]["target"] == 744


def test_lengths_are_what_the_models_read(smollm2):
    prompts, prompting, tokenizer = local_prompts(DataConfig("everyday")), Prompting(), None
    tokenizer = smollm2.tokenizer

    def mean(texts):
        counts = [len(tokenizer.encode_chat([{"role": "user", "content": t}])) for t in texts]
        return sum(counts) / len(counts)

    for mode in ("append", "rewrite"):
        prompting = Prompting(mode=mode)
        rewrite = " ".join(["one"] * 12)
        assert len(tokenizer.encode(rewrite)) == 12
        found = find_lengths(prompts, prompting, 12, tokenizer, tokenizer)
        reads = mean([prompting.prompter_turns(text)[0] for text in prompts])
        hears = mean([prompting.target_prompt(text, rewrite) for text in prompts])
        assert found.prompter == pytest.approx(reads, abs=1)
        assert found.target == pytest.approx(hears, abs=1.5)
        assert found.target_shared <= found.target_head <= found.target
        assert found.prompter_shared < found.prompter


def test_guessed_lengths_are_near(smollm2):
    prompts, tokenizer = local_prompts(DataConfig("everyday")), smollm2.tokenizer
    known = find_lengths(prompts, Prompting(), 12, tokenizer, tokenizer)
    guessed = find_lengths(prompts, Prompting(), 12, None, None)
    assert "4 bytes a token where the tokenizer is not here" in guessed.source
    assert guessed.prompter == pytest.approx(known.prompter, rel=0.5)


def test_of_an_endpoint_what_it_is_asked_is_counted_and_nothing_is_held():
    from alignpro.price.tables import asked_line

    there = {"model": "big", "endpoint": "http://127.0.0.1:9/v1"}
    client = {"input_price": 2.0, "output_price": 10.0, "budget": {"calls": 100, "cost": 1e6}}
    shape = {"steps": 5, "prompts_per_step": 4, "num_rewrites": 3, "num_responses": 2}
    asks = {"response": {"max_new_tokens": 7}, **shape}
    report = price_train(large(target={**there, "client": client}, **asks), gpu_name="H100")
    asked, lengths = report["endpoint"], report["lengths"]
    assert asked["name"] == "big" and asked["calls"] == 5 * 4 * 3 * 2 == 120
    assert asked["input_tokens"] == 120 * lengths["target"]
    assert asked["output_tokens"] == 120 * 7
    assert asked["cost"] == pytest.approx((120 * lengths["target"] * 2 + 120 * 7 * 10) / 1e6)
    assert asked["budgets_too_small"] == ["calls"]
    assert "120 calls" in asked_line(asked) and "client.budget.calls may end" in asked_line(asked)
    assert "target" not in report["models"] and report["memory"]["target weights"] == 0
    assert "target writes" not in report["flops_per_step"]
    assert report["left_out"][0] == "the endpoint's time"
    # The prompter's part is what it is before a target that is here.
    with_target = price_train(large(**asks), gpu_name="H100")
    assert with_target["endpoint"] is None
    for part in ("prompter reads", "prompter writes", "score backward"):
        assert report["flops_per_step"][part] == with_target["flops_per_step"][part] > 0

    free = price_train(large(target=there, **asks), gpu_name="H100")["endpoint"]
    assert free["cost"] is None and "would say the cost" in asked_line(free)


def test_unknown_models_and_cards_are_refused():
    with pytest.raises(FileNotFoundError, match=r"owner/else.*not among those whose sizes are"):
        price_train(large(prompter="owner/else"), gpu_name="H100")
    with pytest.raises(ValueError, match=r"--gpu: expected one of H200, H100, .*, got 'H900'"):
        gpu("H900")
    with pytest.raises(ValueError, match=r'target\.device: expected "cpu" in a price for this CPU'):
        price_train(large(target=ModelConfig(LARGE["target"], device="cuda")))
    with pytest.raises(ValueError, match=r'prompter\.device: expected "cpu" in a price'):
        price_train(large(prompter=ModelConfig(LARGE["prompter"], device="cuda")))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object with generate, score and bytes"),
        ('{"generate": 1, "score": 1}', "expected an object with generate, score and bytes"),
        ('{"generate": 1.5, "score": 1, "bytes": 1}', r"generate: expected a share in \(0, 1\]"),
        ('{"generate": "x", "score": 1, "bytes": 1}', "generate: expected a finite number"),
        ('{"generate": 1, "score": 1, "bytes": 1, "zzz": 3}', 'key "zzz"; known: generate'),
        ('{"generate": 1, "score": 1, "bytes": 1, "gbps": 0}', "gbps: expected above 0"),
    ],
)
def test_rates_are_checked(tmp_path, text, match):
    file = tmp_path / "rates.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_rates(file)


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_the_command_loads_no_weights_and_writes_nothing_but_its_report(tmp_path, monkeypatch):
    import alignpro.train.run as training
    from alignpro.native import core

    def refuse(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(core.Model, "load", refuse)
    monkeypatch.setattr(training, "make_trainer", refuse)
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"run_dir: {tmp_path / 'run'}\nprompter: {{adapter: not/there}}\nsteps: 7\n"
    )
    rates, out = tmp_path / "rates.json", tmp_path / "price.json"
    rates.write_text('{"generate": 0.7, "score": 0.6, "bytes": 0.5, "gflops": 90, "gbps": 9}')
    result = run(settings, "--dry-run", "--rates", rates, "--output", out)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["steps"] == 7 and report["tokens"]["generated"] == 7 * 64 * 44
    assert report["hours"] > 0 and report["rates"]["source"] == "rates.json"
    for words in ("prompter writes", "keys and values", "a step", "Left out: reward, loading"):
        assert words in result.output
    assert not (tmp_path / "run").exists()
    assert run(settings, "--dry-run", "--gpu", "H900").exit_code == 2


def test_options_of_a_dry_run_need_one(tmp_path):
    settings = tmp_path / "run.yaml"
    settings.write_text(f"run_dir: {tmp_path / 'run'}\n")
    result = run(settings, "--gpu", "H100")
    assert result.exit_code == 2 and "--gpu: says how --dry-run prices a run" in result.output


def test_what_a_step_measured_on_this_machine_is_of_the_predictions_size():
    # docs/notes/performance.md: 4 prompts x 4 rewrites of 48 tokens and a response of 64, 9.7 s on
    # a machine with 230 GFLOP/s and 34 GB/s; by count about 1.5 TFLOP.
    work = TrainConfig(
        prompts_per_step=4,
        num_rewrites=4,
        rewrite=SamplingParams(max_new_tokens=48),
        response=SamplingParams(max_new_tokens=64),
        threads=2,
    )
    report = price_train(work, rates=replace(CPU_RATES, gflops=230.0, gbps=34.0))
    assert sum(report["flops_per_step"].values()) == pytest.approx(1.5e12, rel=0.1)
    assert 9.7 / 1.5 < report["seconds_per_step"] < 9.7 * 1.5
