"""Configurations: what is accepted, and the line that refuses the rest."""

from __future__ import annotations

import dataclasses
import json

import pytest

from alignpro.config import (
    RESPONSE,
    BoundConfig,
    DataConfig,
    EvalConfig,
    HeadroomConfig,
    LoraConfig,
    ModelConfig,
    PreferConfig,
    QuickstartConfig,
    SelfImproveConfig,
    SftConfig,
    StaticSearch,
    TrainConfig,
    apply_overrides,
    from_mapping,
    load_yaml,
    to_mapping,
)


@pytest.mark.parametrize(
    "cls",
    [
        PreferConfig,
        SelfImproveConfig,
        SftConfig,
        TrainConfig,
        EvalConfig,
        QuickstartConfig,
        HeadroomConfig,
        BoundConfig,
    ],
)
def test_every_config_survives_json(cls):
    config = cls()
    assert from_mapping(cls, json.loads(json.dumps(to_mapping(config)))) == config


def test_nested_groups_lists_and_nulls():
    config = from_mapping(
        TrainConfig,
        {
            "kl_coef": 1,
            "target": None,
            "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
            "response": {"stop": ["\n"], "max_new_tokens": 5},
        },
    )
    assert config.kl_coef == 1.0 and isinstance(config.kl_coef, float)
    assert config.lora == LoraConfig(rank=4, target_modules=("q_proj", "v_proj"))
    assert config.response == dataclasses.replace(RESPONSE, max_new_tokens=5, stop=("\n",))


def test_a_partial_group_keeps_the_outer_defaults():
    # SamplingParams alone would say 64 tokens.
    config = from_mapping(TrainConfig, {"rewrite": {"temperature": 0.5}})
    assert config.rewrite == dataclasses.replace(TrainConfig().rewrite, temperature=0.5)
    assert config.rewrite.max_new_tokens == 12
    nested = from_mapping(QuickstartConfig, {"train": {"response": {"top_k": 3}}})
    assert nested.train.response == dataclasses.replace(RESPONSE, top_k=3)


@pytest.mark.parametrize(
    ("mapping", "line"),
    [
        ({"lerning_rate": 1}, 'unknown configuration key "lerning_rate"; did you mean "learning_'),
        ({"rank": 1}, 'unknown configuration key "rank"; did you mean "lora.rank"?'),
        ({"temperature": 1}, 'did you mean "rewrite.temperature" or "response.temperature"?'),
        ({"max_new_token": 1}, 'mean "rewrite.max_new_tokens" or "response.max_new_tokens"?'),
        ({"chat_template": "x"}, 'mean "prompter.chat_template" or "target.chat_template"?'),
        ({"lora.rank": 1}, "in a file its groups are nested, lora: {rank: ...}"),
        ({"run_dir": ""}, "run_dir: expected a path or a name, got ''"),
        ({"data": {"prompt": ["a", "a"]}}, "data.prompt: expected each column once"),
        ({"lora": {"rnk": 1}}, 'unknown configuration key "lora.rnk"; did you mean "lora.rank"?'),
        ({"zzz": 1}, 'unknown configuration key "zzz"; known: prompter, target, data'),
        ({"steps": 2.5}, "steps: expected an integer, got 2.5"),
        ({"steps": True}, "steps: expected an integer, got True"),
        ({"steps": "ten"}, "steps: expected an integer, got 'ten'"),
        ({"learning_rate": "fast"}, "learning_rate: expected a finite number, got 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number, got nan"),
        ({"learning_rate": True}, "learning_rate: expected a number, got True"),
        ({"strict_parity": "no"}, "strict_parity: expected true or false, got 'no'"),
        ({"prompter": {"model": 3}}, "prompter.model: expected text or null, got 3"),
        ({"threads": "all"}, "threads: expected an integer or null, got 'all'"),
        ({"threads": 0}, "threads: expected at least 1 or null, got 0"),
        ({"lr_schedule": "linaer"}, 'did you mean "linear"?'),
        ({"prompting": {"mode": "prepend"}}, "prompting.mode: expected one of 'append', 'rewrite'"),
        ({"prompting": {"template": "no braces"}}, 'prompting.template: expected "{prompt}" exac'),
        ({"lora": 3}, "lora: expected a mapping of fields, got 3"),
        ({"lora": {"target_modules": []}}, "lora.target_modules: expected at least one name"),
        ({"lora": {"target_modules": "q_proj"}}, "lora.target_modules: expected"),
        ({"lora": {"rank": 0}}, "lora.rank: expected at least 1, got 0"),
        (
            {"memory_limit": "a lot"},
            'memory_limit: expected bytes, or text as "800MiB" or "1.5GB",',
        ),
        ({"memory_limit": "1.5"}, "memory_limit: expected bytes"),
        ({"memory_limit": "-1GB"}, "memory_limit: expected bytes"),
        ({"memory_limit": "1iB"}, "memory_limit: expected bytes"),
        ({"memory_limit": 1.5}, "memory_limit: expected bytes"),
        ({"memory_limit": True}, "memory_limit: expected bytes"),
        ({"memory_limit": None}, "memory_limit: expected bytes"),
        ({"memory_limit": 0}, "memory_limit: expected at least 1, got 0"),
        ({"memory_limit": "0.5B"}, "memory_limit: expected at least 1, got 0"),
        ({"activations": "drop"}, "activations: expected one of 'auto', 'keep', 'recompute'"),
        ({"micro_batch_size": 0}, "micro_batch_size: expected at least 1 or null, got 0"),
        ({"kl_coef": -0.1}, "kl_coef: expected at least 0, got -0.1"),
        ({"num_rewrites": 1}, "num_rewrites: expected at least 2"),
        ({"algorithm": "rlooo"}, 'did you mean "rloo"?'),
        (
            {"ppo": {"value_head": True}},
            "ppo.value_head: expected its default False (it goes with algorithm ppo), got True",
        ),
        ({"algorithm": "ppo", "ppo": {"clip_range": 1}}, "ppo.clip_range: expected between 0 and"),
        ({"algorithm": "ppo", "ppo": {"epochs": 0}}, "ppo.epochs: expected at least 1, got 0"),
        (
            {"algorithm": "ppo", "ppo": {"gae_lambda": 0.5}},
            "ppo.gae_lambda: expected its default 0.95 (it goes with value_head), got 0.5",
        ),
        (
            {"algorithm": "ppo", "ppo": {"value_head": True, "gae_lambda": 1.5}},
            "ppo.gae_lambda: expected 0 to 1, got 1.5",
        ),
        (
            {"algorithm": "ppo", "prompts_per_step": 1},
            "ppo.minibatches: expected at most prompts_per_step (1): a minibatch has whole prompts",
        ),
        ({"algorithm": "ppo", "num_rewrites": 1}, "num_rewrites: expected at least 2"),
        ({"baseline_decay": 0.5}, "baseline_decay: expected its default 0.9 (it goes with algor"),
        (
            {"algorithm": "reinforce", "baseline_decay": 1},
            "baseline_decay: expected at least 0 and below 1, got 1.0",
        ),
        (
            {"algorithm": "reinforce", "num_rewrites": 1, "prompts_per_step": 1},
            "num_rewrites: expected 2 or more with prompts_per_step 1",
        ),
        ({"algorithm": "reinforce", "num_rewrites": 0}, "num_rewrites: expected at least 1, got 0"),
        (
            {"algorithm": "reinforce", "zero_advantage_group": "skip"},
            "zero_advantage_group: expected its default",
        ),
        (
            {"algorithm": "ppo", "ppo": {"value_head": True}, "zero_advantage_group": "skip"},
            "zero_advantage_group: expected its default 'keep'",
        ),
        ({"kl_gain": 0.2}, "kl_gain: expected its default 0.1 (it goes with kl_target), got 0.2"),
        ({"kl_target": 0}, "kl_target: expected above 0 or null, got 0"),
        ({"kl_target": 1, "kl_coef": 0}, "kl_coef: expected above 0 with kl_target"),
        ({"num_responses": "some"}, "num_responses: expected an integer or one of 'auto'"),
        ({"num_responses": 0}, "num_responses: expected at least 1 or one of 'auto', got 0"),
        ({"response_budget": 8}, "response_budget: expected its default None (it goes with num_"),
        ({"num_responses": "auto"}, "response_budget: expected a product of two numbers above 1"),
        ({"num_responses": "auto", "response_budget": 7}, "response_budget: expected a product"),
        ({"num_responses": "auto", "response_budget": 2}, "response_budget: expected a product"),
        (
            {"num_responses": "auto", "response_budget": 8, "num_rewrites": 2},
            "num_rewrites: expected its default 4 (it goes with a number of num_responses;",
        ),
        ({"policy": "target", "num_responses": 2}, "num_responses: expected its default 1"),
        ({"policy": "target", "common_draws": True}, "common_draws: expected its default False"),
        (
            {"num_responses": "auto", "response_budget": 8, "common_draws": True},
            "common_draws: expected its default False (it goes with a number of num_responses;",
        ),
        (
            {"policy": "target", "target": {"compute": "int8"}},
            "target.compute: expected float32 or bfloat16 where it is trained: int8 has no",
        ),
        (
            {"policy": "target", "target": {}, "prompter": {"device": "cuda"}},
            "prompter: expected a model alone with policy target: it is not loaded",
        ),
        (
            {"policy": "target", "prompter": {"adapter": "sft/adapter"}},
            "prompter.adapter: expected null: target.adapter is tuned, got 'sft/adapter'",
        ),
        ({"algorithm": "grpo"}, "is ppo with normalize_advantage true"),
        (
            {"algorithm": "reinforce", "normalize_advantage": True},
            "normalize_advantage: expected its default False (it goes with a baseline over the",
        ),
        (
            {"prompter": {"compute": "bfloat16"}},
            "prompter.compute: expected float32 or int8 with device cpu, got 'bfloat16'",
        ),
        (
            {"prompter": {"compute": "int8"}},
            "prompter.compute: expected float32 or bfloat16 where it is trained: int8 has no",
        ),
        ({"prompter": {"kv_dtype": "float16"}}, "prompter.kv_dtype: expected float32 or bfloat16"),
        ({"prompter": {"comput": "int8"}}, '"prompter.comput"; did you mean "prompter.compute"?'),
        (
            {"prompter": {"device": "gpu"}},
            "prompter.device: expected one of 'cpu', 'cuda', got 'gpu'",
        ),
        ({"prompter": 3}, "prompter: expected text or a mapping of fields, got 3"),
        ({"target": {"max_batch_rows": 0}}, "target.max_batch_rows: expected at least 1, got 0"),
        ({"target": {"compute": "bfloat16"}}, "float32 or int8 with device cpu"),
        (
            {"target": {"deterministic": False}},
            "target.deterministic: expected true with device cpu, got False",
        ),
        (
            {"target": {"device": "cuda", "compute": "int8"}},
            "bfloat16 or float32 with device cuda",
        ),
        (
            {"policy": "target", "response": {"repetition_penalty": 1.1}},
            "response.repetition_penalty: expected 1.0: training dr",
        ),
        ({"policy": "target", "response": {"top_k": 5}}, "response.top_k: expected 0: training dr"),
        ({"policy": "target", "response": {"temperature": 0}}, "response.temperature: expected ab"),
        ({"policy": "target", "algorithm": "closed_form"}, "algorithm: expected another one with"),
        ({"algorithm": "closed_form", "kl_coef": 0}, "kl_coef: expected above 0 with closed_form"),
        ({"algorithm": "closed_form", "kl_target": 1}, "kl_target: expected its default None"),
        ({"seed": -1}, "seed: expected between 0 and"),
        ({"rewrite": {"temperature": "hot"}}, "rewrite.temperature: expected a finite number, got"),
        ({"rewrite": {"temperature": 0}}, "rewrite.temperature: expected above 0"),
        ({"rewrite": {"top_p": 0.8}}, "rewrite.top_p: expected 1.0: training draws from the untr"),
        ({"rewrite": {"min_new_tokens": 2}}, "rewrite.min_new_tokens: expected 0: training"),
        ({"response": {"n": 2}}, "response.n: expected 1"),
        ({"response": {"seed": 2}}, "response.seed: expected unset"),
        ({"response": {"stop": "\n"}}, "response.stop: expected a list"),
        ({"response": {"stop_token_ids": ["x"]}}, "response.stop_token_ids[0]: expected an int"),
    ],
)
def test_refusals_name_the_field(mapping, line):
    with pytest.raises(ValueError) as caught:
        from_mapping(TrainConfig, mapping)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (12, 12), ("12B", 12), ("3kB", 3000), ("3 KiB", 3072), ("1.5GB", 1_500_000_000),
        ("800MiB", 800 * 2**20), ("1GiB", 2**30), ("0.5TiB", 2**39),
    ],
)  # fmt: skip
def test_bytes_as_text(text, expected):
    for cls in (TrainConfig, SftConfig):
        assert from_mapping(cls, {"memory_limit": text}).memory_limit == expected
    assert from_mapping(QuickstartConfig, {"train": {"memory_limit": text}}).train == TrainConfig(
        memory_limit=expected
    )


@pytest.mark.parametrize(
    "mapping",
    [
        {"algorithm": "ppo", "ppo": {"value_head": True, "gae_lambda": 1}, "num_rewrites": 1},
        {"algorithm": "reinforce", "num_rewrites": 1, "baseline_decay": 0},
        {"normalize_advantage": True, "zero_advantage_group": "skip"},
        {"algorithm": "ppo", "normalize_advantage": True},
        {"kl_target": 2, "kl_gain": 0.3},
        {"num_responses": "auto", "response_budget": 12},
        {"policy": "target", "rewrite": {"top_p": 0.5}},  # nothing is rewritten
    ],
)
def test_what_goes_together(mapping):
    config = from_mapping(TrainConfig, mapping)
    assert from_mapping(TrainConfig, json.loads(json.dumps(to_mapping(config)))) == config


def test_a_group_that_may_be_text_says_what_is_wrong_with_the_group():
    assert from_mapping(EvalConfig, {"static": "Be kind."}).static == "Be kind."
    assert from_mapping(EvalConfig, {"static": {"budget": 600}}).static == StaticSearch(budget=600)
    with pytest.raises(ValueError, match=r'^unknown configuration key "static.budgt"; did you'):
        from_mapping(EvalConfig, {"static": {"budgt": 600}})
    with pytest.raises(ValueError, match=r"^static: expected text or a mapping of fields or null"):
        from_mapping(EvalConfig, {"static": 3})


def test_truncated_responses_are_allowed():
    assert from_mapping(TrainConfig, {"response": {"top_p": 0.9}}).response.top_p == 0.9


def test_overrides_are_yaml_scalars(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: 3\nlora: {rank: 2}\n")
    config = load_yaml(
        TrainConfig,
        path,
        ["learning_rate=1e-4", "lora.alpha=8", "prompter.adapter=null", "reward=vader", "steps=5"],
    )
    assert config.learning_rate == 1e-4
    assert config.lora == LoraConfig(rank=2, alpha=8.0)
    assert (config.prompter.adapter, config.reward, config.steps) == (None, "vader", 5)


@pytest.mark.parametrize(
    ("text", "steps"), [("010", 10), ("08", 8), ("+7", 7), ("1_000", 1000), ("0x10", 16)]
)
def test_integers_are_what_they_look_like(text, steps, tmp_path):
    # In YAML 1.1 a leading 0 makes an octal number, and colons one to the base of 60.
    (tmp_path / "run.yaml").write_text(f"steps: {text}\n")
    assert load_yaml(TrainConfig, tmp_path / "run.yaml").steps == steps
    assert load_yaml(TrainConfig, None, [f"steps={text}"]).steps == steps


@pytest.mark.parametrize("override", ["steps=1:30", "learning_rate=1:30.5", "steps=0b11"])
def test_what_only_yaml_1_1_takes_for_a_number(override):
    field, text = override.split("=")
    with pytest.raises(ValueError, match=f"{field}: expected .* got '{text}'"):
        load_yaml(TrainConfig, None, [override])


@pytest.mark.parametrize(
    ("text", "rate"), [("1e-3", 1e-3), ("1.5e-3", 1.5e-3), (".5", 0.5), ("2.", 2.0), ("1", 1.0)]
)
def test_numbers_are_what_they_look_like(text, rate):
    assert load_yaml(TrainConfig, None, [f"learning_rate={text}"]).learning_rate == rate


def test_overrides_leave_the_mapping_alone():
    mapping = {"lora": {"rank": 2}}
    assert apply_overrides(TrainConfig, mapping, ["lora.rank=3"]) == {"lora": {"rank": 3}}
    assert mapping == {"lora": {"rank": 2}}


def test_home_is_written_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_yaml(TrainConfig, None, ["run_dir=~/run", "prompter=~/m.gguf", "data=~/p.csv"])
    places = (config.run_dir, config.prompter.model, config.data.path)
    assert places == ("/home/me/run", "/home/me/m.gguf", "/home/me/p.csv")


@pytest.mark.parametrize(
    "text",
    [
        "Use at most 3 words # not more",
        "First line.\n\nSecond line. {prompt}",
        "Request {prompt}\nRewrite ",
        "{prompt}",
        "Request: {prompt}",
        "[{prompt}]",
        "- {prompt}",
        "'one' and 'another' {prompt}",
        '"{prompt}" # "said"',
        "&a {prompt}",
    ],
)
def test_text_is_taken_as_it_was_typed(text):
    def read(key):
        found = load_yaml(EvalConfig, None, [f"{key}={text}"])
        return found.static if key == "static" else found.prompting.template

    if "{prompt}" in text:
        assert read("prompting.template") == text
    if text[0] not in "[{":  # which is a search
        assert read("static") == text


def test_text_that_only_looks_like_something_else():
    def read(cls, *overrides):
        return load_yaml(cls, None, overrides)

    assert read(TrainConfig, "prompting.separator=\n\n").prompting.separator == "\n\n"
    assert read(TrainConfig, "prompting.separator= - ").prompting.separator == " - "
    assert read(TrainConfig, "prompting.separator=").prompting.separator == ""
    assert read(TrainConfig, r'prompting.separator="\n"').prompting.separator == "\n"
    assert read(TrainConfig, "data=2024").data == DataConfig("2024")
    assert read(TrainConfig, "data={path: a.csv, split: null}").data.split is None
    assert read(TrainConfig, "data=a.csv", "data.prompt=[instruction, input]").data == DataConfig(
        "a.csv", prompt=("instruction", "input")
    )
    assert read(TrainConfig, "data.split=null").data.split is None
    assert read(TrainConfig, "data.split=yes").data.split == "yes"
    assert read(TrainConfig, "date=2026-11-28").date == "2026-11-28"
    assert read(TrainConfig, "target=2e5").target.model == "2e5"
    assert read(TrainConfig, "target=null").target is None
    assert read(TrainConfig, "memory_limit=800MiB").memory_limit == 800 * 2**20
    labelled = read(EvalConfig, "labelled.instructions.wet=be dry # now").labelled
    assert labelled.instructions == {"wet": "be dry # now"}
    assert read(EvalConfig, "static={joined: 3}").static.joined == 3
    assert read(EvalConfig, "static.instructions=null").static.instructions is None
    assert read(EvalConfig, "static.candidates=[a, b]").static.candidates == ("a", "b")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("steps", 'override "steps": expected key=value'),
        ("=3", 'override "=3": expected key=value'),
        ("steps.more=1", '"steps" is a value, not a group'),
    ],
)
def test_bad_overrides(override, line):
    with pytest.raises(ValueError, match="override") as caught:
        apply_overrides(TrainConfig, {"steps": 1}, [override])
    assert line in str(caught.value)


def test_the_file_is_named_where_the_fault_is_its_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("lora: {rank: x}")
    for overrides, begin in (
        ([], f"{path}: lora.rank"),
        (["seed=2"], f"{path}: lora.rank"),
        (["lora.rank=y"], "lora.rank"),
        (["lora.rank=2", "steps=z"], "steps"),
    ):
        with pytest.raises(ValueError, match=f"^{begin}: expected an integer"):
            load_yaml(TrainConfig, path, overrides)


def test_a_date_is_text(tmp_path):
    """As it was typed, whatever it is for: JSON has no dates."""
    path = tmp_path / "dates.yaml"
    path.write_text("run_dir: 2026-1-2\nprompter: {chat_template_kwargs: {day: 2026-11-28}}\n")
    given = ["run_dir=2026-1-2", "prompter.chat_template_kwargs={day: 2026-11-28}"]
    for config in (load_yaml(TrainConfig, path), load_yaml(TrainConfig, None, given)):
        assert config.run_dir == "2026-1-2"
        assert config.prompter.chat_template_kwargs == {"day": "2026-11-28"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- 1\n- 2\n", "such as `alignpro init` writes, got a list"),
        ("a: [1", "not YAML: expected ',' or ']', but got '<stream end>' (line 1, column 6)"),
        ("steps:\t3\nrewrite:\n\ttop_p: 1\n", "cannot start any token (line 1, column 7)"),
        ("seed: 1\nsteps: 3\nseed: 2\n", "key 'seed' appears twice (lines 1 and 3)"),
        ("[" * 5000, "not YAML: nested too deeply"),
        ("lora: &x [*x, *x]", "expected settings, got a list or mapping in itself"),
        ("lora:\n  rank: 4\n  rank: 8\n", "key 'rank' appears twice (lines 2 and 3)"),
        ("schedule: [{a: 1}, {a: 1, a: 2}]", "key 'a' appears twice (lines 1 and 1)"),
        ("kl_coef: x", "kl_coef: expected a finite number, got 'x'"),
        ("date: 2026-13-01", 'date: expected a date such as "2026-11-28" or null, got'),
        ("steps: " + "9" * 5000, "Exceeds the limit"),
        (
            "target: {endpoint: http://h/v1, model: m, client: {body: {a: !!set {x}}}}",
            "target.client.body.a: expected what JSON has, got {'x'}",
        ),
        (
            "prompter: {chat_template_kwargs: {a: [.nan]}}",
            "prompter.chat_template_kwargs.a: expected what JSON has, got [nan]",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, text, line):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_yaml(TrainConfig, path)
    assert str(caught.value).startswith(f"{path}: ") and line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_yaml(TrainConfig, path) == TrainConfig()


def test_quickstart_hands_its_fields_to_every_stage():
    config = from_mapping(
        QuickstartConfig,
        {"seed": 7, "reward": "vader", "lora": {"rank": 3}, "target": "t"}
        | {"train": {"steps": 2, "kl_coef": 0.3}}
        | {"prompter": {"model": "m", "device": "cuda", "compute": "bfloat16"}},
    )
    sft, train, evaluate = config.stages()
    assert (sft.seed, train.seed, evaluate.seed) == (7, 7, 7)
    assert train.target == evaluate.target == ModelConfig("t")
    assert (train.reward, evaluate.reward) == ("vader", "vader")
    assert sft.lora == train.lora == LoraConfig(rank=3)
    assert train.steps == 2 and evaluate.kl_coef == 0.3  # that of the optimum
    for stage in (sft, train, evaluate):
        assert stage.prompter == ModelConfig("m", device="cuda", compute="bfloat16")


@pytest.mark.parametrize(
    "mapping",
    [
        {"train": {"seed": 3}},
        {"sft": {"prompter": "x"}},
        {"train": {"target": "x"}},
        {"evaluate": {"reward": "vader"}},
    ],
)
def test_quickstart_refuses_a_shared_field_in_one_stage(mapping):
    # It would be overwritten without a word.
    with pytest.raises(ValueError, match="quickstart sets it for every stage"):
        from_mapping(QuickstartConfig, mapping)
    with pytest.raises(ValueError, match=r"evaluate\.kl_coef: .* \(it goes in train\.kl_coef\)"):
        from_mapping(QuickstartConfig, {"evaluate": {"kl_coef": 0.1}})
