"""The command line as a person meets it: files left behind, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.run_directory import open_run_dir
from alignpro.train.metrics import read_metrics
from alignpro.train.trainer import Trainer

SMALL = [
    "threads=2",
    "reward=letter_reward:count_e",
    "lora.rank=2",
    "sft.steps=2",
    "sft.batch_size=4",
    "train.prompts_per_step=2",
    "train.num_rewrites=2",
    "train.rewrite.max_new_tokens=4",
    "train.response.max_new_tokens=4",
    "evaluate.rewrite.max_new_tokens=4",
    "evaluate.response.max_new_tokens=4",
    "evaluate.num_rewrites=2",
]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*arguments):
    """The one line that was printed."""
    line = run(*arguments, code=2).stderr
    assert line.startswith("alignpro: ") and line.count("\n") == 1, line
    return line


def python(code, **environment):
    """Run code in an interpreter of its own, without torch, transformers and matplotlib."""
    prelude = (
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'matplotlib'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Gone())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


SENTIMENT = Path(__file__).parents[1] / "examples" / "sentiment.yaml"


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def quick(tiny, tmp_path_factory):
    """One short quickstart, looked at by several tests."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    options = ["--model", tiny, "--run", folder, "--steps", 2, "--prompts", 3, "--seed", 1]
    return folder, run("quickstart", SENTIMENT, *options, *SMALL)


def test_quickstart_leaves_its_files(quick, tiny):
    folder, result = quick
    report = json.loads((folder / "report.json").read_text())
    assert set(report["arms"]) == {"raw", "untuned", "trained"}
    for arm in report["arms"].values():
        assert {"mean_reward", "reward_variance", "ci95", "n"} <= set(arm)
        assert arm["n"] == 3 and arm["ci95"][0] <= arm["mean_reward"] <= arm["ci95"][1]
    assert set(report["paired"]) == {"trained_minus_raw", "trained_minus_untuned"}
    assert set(report["paired"]["trained_minus_raw"]) == {"mean", "ci95"}
    assert set(report["seconds"]) == {"download", "load", "sft", "train", "evaluate"}
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert report["peak_rss_bytes"] > 2**20
    assert report["kl_per_rewrite"] > 0 and report["tokens_per_second"] > 0
    assert report["seed"] == 1 and report["model"] == str(tiny)
    assert {"torch", "numpy", "python", "cpu_isa"} <= set(report["versions"])
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 1]
    assert len(read_metrics(folder / "sft-metrics.jsonl")) == 2
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "report.html").read_text()
    for adapter in ("adapter", "reference"):
        assert (folder / adapter / "adapter_model.safetensors").is_file()
    assert f"report: {folder / 'report.html'}" in result.output
    assert "trained rewrite" in result.output


def test_a_quickstarts_evaluation_can_be_run_again(quick, tmp_path):
    folder, _ = quick
    asked = json.loads((folder / "evaluate.json").read_text())
    assert asked["num_prompts"] == 3 and not {"prompter", "reward", "trained"} & asked.keys()
    run("evaluate", "--run", folder, "--output", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["arms"] == json.loads((folder / "report.json").read_text())["arms"]


def test_a_quickstart_that_does_not_reach_what_is_required(tiny, tmp_path):
    rows = [
        {"prompt": f"tell me about {what}", "kind": kind, "split": split}
        for split, whats in {"train": "ab", "validation": "cd", "heldout": "ef"}.items()
        for what, kind in zip(whats, ("long", "short"), strict=True)
    ]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    static = "{instructions: null, candidates: [a, b, c], num_written: 0, budget_tokens: auto}"
    options = ["--model", tiny, "--run", tmp_path / "run", "--steps", 2, "reward=topic"]
    settings = [f"{stage}.data={data}" for stage in ("train", "evaluate")]
    settings += ["train.heldout={num_prompts: 2}", f"evaluate.static={static}"]
    settings += ["evaluate.labelled.instructions={long: be long, short: ''}"]
    settings += ["evaluate.policy_text=be", "evaluate.require=[trained>static+9]"]
    result = run("quickstart", SENTIMENT, *options, *SMALL, *settings, code=3)
    assert "Required: trained>static+9: not met" in result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["required"][0]["met"] is False
    assert {"static", "policy_text", "labelled"} <= report["arms"].keys()
    assert {"trained_minus_static", "trained_minus_policy_text"} <= report["paired"].keys()
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert report["static_search"]["budget"] == sum(row["target_tokens"] for row in metrics)
    assert all("heldout" in row for row in metrics)


def test_the_report_is_built_one_way(quick):
    folder, _ = quick
    written = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert f"report: {folder / 'report.html'}" in run("report", folder).output
    assert (folder / "report.html").read_bytes() == written


def test_the_same_seed_gives_the_same_numbers_in_a_new_directory(quick, tiny):
    folder, _ = quick
    options = ["--model", tiny, "--run", folder, "--steps", 2, "--prompts", 3, "--seed", 1]
    run("quickstart", SENTIMENT, *options, *SMALL)
    second = folder.with_name("run-2")
    first_report, second_report = (
        json.loads((f / "report.json").read_text()) for f in (folder, second)
    )
    for name in ("arms", "paired", "kl_per_rewrite", "samples"):
        assert first_report[name] == second_report[name]
    adapters = [
        (f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (folder, second)
    ]
    assert adapters[0] == adapters[1]


def test_a_quickstart_can_be_trained_further(quick):
    folder, _ = quick
    run("train", folder / "config.json", "steps=3", "--resume")
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2]


def test_generate_through_the_trained_prompter(quick):
    folder, _ = quick
    arguments = ["generate", "the heron", "--run", folder, "--max-new-tokens", 5, "--seed", 2]
    first, second = run(*arguments), run(*arguments)
    assert first.stdout == second.stdout and first.stdout.endswith("\n")
    assert first.stderr.startswith("rewrite: ")
    assert len({run(*arguments[:-1], n, "--rewrite-temperature", 0).stderr for n in (2, 3)}) == 1


@pytest.fixture(scope="module")
def small_yaml(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "train.yaml"
    path.write_text(
        f"prompter: {{model: {tiny}}}\n"
        "threads: 2\nsteps: 3\nprompts_per_step: 2\nnum_rewrites: 2\n"
        "rewrite: {max_new_tokens: 4}\nresponse: {max_new_tokens: 4}\nlora: {rank: 2}\n"
        "reward: topic\n"
    )
    return path


def test_sft_then_train_then_evaluate(tiny, small_yaml, tmp_path):
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    options = [f"prompter={tiny}", f"run_dir={sft}", "steps=2", "batch_size=2", "lora.rank=2"]
    assert f"adapter: {sft / 'adapter'}" in run("sft", *options).output
    assert "is not empty" in refused("sft", *options)
    run("sft", *options, "--overwrite")
    run("train", small_yaml, f"run_dir={rl}", f"prompter.adapter={sft / 'adapter'}")
    first = read_metrics(rl / "metrics.jsonl")[0]
    assert first["kl_per_rewrite"] == 0.0  # the warm-started adapter is the reference
    output = tmp_path / "arms.json"
    arguments = [
        f"prompter={tiny}",
        f"prompter.adapter={sft / 'adapter'}",
        f"trained={rl / 'adapter'}",
        "num_prompts=2",
        "num_rewrites=1",
        "reward=topic",
        "rewrite.max_new_tokens=4",
        "response.max_new_tokens=4",
    ]
    run("evaluate", *arguments, "--output", output)
    assert set(json.loads(output.read_text())["paired"]) == {
        "trained_minus_raw",
        "trained_minus_untuned",
    }
    assert "is there already" in refused("evaluate", *arguments, "--output", output)


def test_a_tuned_target_trains_resumes_and_answers(small_yaml, tmp_path):
    folder = tmp_path / "target"
    options = [f"run_dir={folder}", "policy=target"]
    run("train", small_yaml, *options)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["parity_max_abs"] for row in rows] == [0.0] * 3
    run("train", folder / "config.json", "steps=4", "--resume")
    assert len(read_metrics(folder / "metrics.jsonl")) == 4
    result = run("generate", "the heron", "--run", folder, "--max-new-tokens", 5, "--seed", 2)
    assert not result.stderr and result.stdout.endswith("\n")


def test_ctrl_c_leaves_a_checkpoint_that_resumes(small_yaml, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    plain = Trainer._rollout

    def interrupted(self, rows):
        if self.step == 1:
            raise KeyboardInterrupt
        return plain(self, rows)

    monkeypatch.setattr(Trainer, "_rollout", interrupted)
    result = run("train", small_yaml, f"run_dir={folder}", code=130)
    command = f"alignpro train {folder / 'config.json'} --resume"
    line = result.stderr.splitlines()[-1]  # after a warning of the step
    assert line == f"alignpro: interrupted after step 1; go on with: {command}"
    monkeypatch.undo()
    run(*command.split()[1:])
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2]
    assert (folder / "adapter").is_dir()


def test_a_run_directory_that_exists_is_not_touched(small_yaml, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert "--resume goes on" in refused("train", small_yaml, f"run_dir={folder}")
    line = refused("train", small_yaml, f"run_dir={folder}", "--overwrite")
    assert "not one of alignpro's" in line
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "missing.yaml"], "missing.yaml: expected a YAML file of settings, found no su"),
        (["train", "."], ".: expected a YAML file of settings, found a folder"),
        (["train", "steps=few"], "steps: expected an integer, got 'few'"),
        (["evaluate", "prompter_mode=fast"], "prompter_mode: is now prompter.deterministic"),
        (["train", "{yaml}", "target_mode=fast"], "target_mode: is now target.deterministic"),
        (["train", "{yaml}", "lerning_rate=1"], 'did you mean "learning_rate"?'),
        (
            ["quickstart", "stepz=1"],
            'alignpro: unknown configuration key "stepz"; did you mean "sft.',
        ),
        (["train", "{yaml}", "steps"], "expected key=value"),
        (["train", "{yaml}", "rewrite.temperature=-1"], "rewrite.temperature: expected above 0"),
        (["train", "{yaml}", "prompter=nowhere/at/all.gguf"], "nowhere/at/all.gguf"),
        (["train", "{yaml}", "reward=vadr"], "vadr"),
        (["train", "{yaml}", "data=nothing.jsonl"], "nothing.jsonl"),
        (["train", "{yaml}", "prompter.adapter=nothing"], "nothing"),
        (["train", "{yaml}", "run_dir=/proc/x"], "alignpro: /proc/x: "),
        (["train", "{yaml}", "prompting.template=x"], 'expected "{{prompt}}" exactly once'),
        (["quickstart", "train.seed=3"], "quickstart sets it for every stage"),
        (["quickstart", "--steps", "-1"], "steps: expected at least 0, got -1"),
        (
            ["quickstart", "train.common_draws=true"],
            "common_draws: expected its default False (it goes without closed_form.answers",
        ),
        (
            ["quickstart", "train.closed_form.loss=variance"],
            "train.closed_form.answers: expected its default None (it goes with loss pooled)",
        ),
        (["generate", "", "--model", "{tiny}"], "expected text"),
        (["generate", "x" * 999, "--model", "{tiny}"], "context"),
        (["generate", "x", "--model", "{tiny}", "--top-p", "2"], "top_p"),
        (["generate", "", "--model", "nothing.gguf"], "prompt: expected text"),
        (["generate", "x", "--model", "nothing.gguf", "--temperature", "-1"], "temperature: exp"),
        (["generate", "x", "--run", "nothing"], "nothing: expected the directory of a run"),
        (["generate", "x", "--rewrite-temperature", "0"], "--rewrite-temperature: expected --run"),
        (
            ["generate", "x", "--run", "nothing", "--chat-template", "rag"],
            "expected no chat template with --run",
        ),
        (
            ["generate", "x", "--model", "{tiny}", "--chat-template", "rag"],
            "chat_template: expected a name (this model has default), a file",
        ),
        (
            ["generate", "x", "--model", "{tiny}", "--chat-template-kwargs", "{{thinking: no}}"],
            "chat_template_kwargs: the template reads no thinking",
        ),
        (
            ["generate", "x", "--model", "{tiny}", "--device", "gpu"],
            "device: expected one of 'cpu'",
        ),
        (
            ["generate", "x", "--model", "{tiny}", "--no-deterministic"],
            "deterministic: expected true with device cpu, got False",
        ),
        (["quickstart", "evaluate.require=[trained>stat]"], 'did you mean "static"?'),
        (
            ["quickstart", str(SENTIMENT), "evaluate.require=[trained>static]"],
            "require: trained>static: expected one of the arms raw, untuned, trained, got 'static'",
        ),
        (
            ["evaluate", "--require", "trained>raw", "prompter={tiny}"],
            "raw, untuned, got 'trained'",
        ),
        (["evaluate", "trained=nothing", "prompter={tiny}"], "nothing"),
        (["evaluate", "num_prompts=1000", "prompter={tiny}"], "1000 asked for"),
    ],
)
def test_bad_input_is_one_line(arguments, line, small_yaml, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(yaml=small_yaml, tiny=tiny) for a in arguments]
    assert line.format() in refused(*filled)
    assert list(tmp_path.iterdir()) == []  # nothing was made


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("ALIGNPRO_DEBUG", "1")
    result = CliRunner().invoke(app, ["train", "missing.yaml"])
    assert isinstance(result.exception, FileNotFoundError)


def test_a_defect_in_a_run_goes_to_its_error_log(small_yaml, tmp_path, monkeypatch):
    def broken(self, rows):
        return {}["a defect"]

    monkeypatch.setattr(Trainer, "_rollout", broken)
    folder = tmp_path / "run"
    line = run("train", small_yaml, f"run_dir={folder}", code=1).stderr
    assert line == f"alignpro: KeyError: 'a defect'; traceback: {folder / 'error.log'}\n"
    log = (folder / "error.log").read_text()
    assert "Traceback" in log and "in broken" in log


def test_a_reward_that_fails_in_a_run_keeps_its_traceback(small_yaml, tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text("def f(responses):\n    return [1 / 0 for _ in responses]\n")
    monkeypatch.chdir(tmp_path)
    line = refused("train", small_yaml, "run_dir=run", "reward=fails:f")
    assert "raised ZeroDivisionError at row 0" in line and "traceback: run/error.log" in line
    assert "fails.py" in (tmp_path / "run" / "error.log").read_text()


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("foreign"), ZeroDivisionError()])
def test_a_defect_outside_of_a_run_keeps_its_traceback(error, small_yaml, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("alignpro.train.run.load_prompts", broken)
    result = CliRunner().invoke(app, ["train", str(small_yaml), f"run_dir={tmp_path / 'run'}"])
    assert result.exception is error and result.exit_code == 1


@pytest.mark.parametrize("signature", ["state", "nothing", "both", "positional", "thing", "absent"])
def test_a_wrong_reward_is_one_line(signature, small_yaml, tmp_path, monkeypatch):
    (tmp_path / "wrong_signatures.py").write_text(
        "def state(completions, trainer_state):\n    return []\n"
        "def nothing(prompts):\n    return []\n"
        "def both(responses, completions):\n    return []\n"
        "def positional(prompts, responses, /):\n    return []\nthing = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    refused("train", small_yaml, "run_dir=run", f"reward=wrong_signatures:{signature}")
    assert not (tmp_path / "run").exists()


def test_everything_that_stages_write_may_be_overwritten(quick, tiny, tmp_path):
    """And a model's folder may not, nor may a run with a file of somebody's."""
    source, _ = quick
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    train = ["train", folder / "config.json", f"run_dir={folder}", "steps=1", "--overwrite"]
    (folder / "notes.md").write_text("mine")
    assert "notes.md is not a run's" in refused(*train)
    assert (folder / "report.json").is_file()
    (folder / "notes.md").unlink()
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    train[1] = tmp_path / "config.json"
    run(*train)
    assert not (folder / "report.json").exists() and (folder / "adapter").is_dir()
    before = sorted(p.name for p in tiny.iterdir())
    for command in (["train", tmp_path / "config.json"], ["sft", f"prompter.model={tiny}"]):
        assert "not one of alignpro's" in refused(*command, f"run_dir={tiny}", "--overwrite")
    assert sorted(p.name for p in tiny.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train none.yaml", "none.yaml: expected a YAML file of settings"),
        ("train bad.yaml", "bad.yaml: not YAML"),
        ("train empty.yaml data=none.csv", "none.csv: there is no such file"),
        ("train empty.yaml reward=none", "unknown reward 'none'"),
        ("train empty.yaml prompter.model=none.gguf", "none.gguf: no such file or folder"),
        ("train empty.yaml heldout.data=none.csv", "none.csv: there is no such file"),
        ("train empty.yaml --resume", "no run to resume there"),
        ("sft data=none.csv", "none.csv: there is no such file"),
        ("sft stepz=2", 'unknown configuration key "stepz"'),
        ("prefer data=none.csv", "none.csv: there is no such file"),
        ("prefer run_dir=bad.yaml", "a file of that name is there"),
        ("self-improve data=none.csv", "none.csv: there is no such file"),
        ("self-improve calibrator=none", "unknown reward 'none'"),
        ("quickstart train.data=none.csv", "none.csv: there is no such file"),
        ("quickstart reward=none", "unknown reward 'none'"),
        ("reward fit none.csv", "none.csv: there is no such file"),
        ("reward fit data=warm_tones model=none.gguf", "none.gguf: no such file or folder"),
        ("evaluate data=none.csv", "none.csv: there is no such file"),
        ("evaluate reward=2*none", "unknown reward 'none'"),
        ("safety safety.harm=none", "unknown reward 'none'"),
        ("headroom data=none.csv", "none.csv: there is no such file"),
        ("bound target.model=none.gguf", "none.gguf: no such file or folder"),
        ("train empty.yaml data=none.csv --dry-run", "none.csv: there is no such file"),
        ("sft prompter=none.gguf --dry-run", "none.gguf: no such file or folder"),
        ("self-improve calibrator=none --dry-run", "unknown reward 'none'"),
        ("extract none.csv --schema reaction", "none.csv: there is no such file"),
        ("extract none.csv --run none", "none: expected the directory of a run"),
        ("extract reactions --schema none.json", "schema 'none.json': no such file"),
        ("extract reactions --schema recipe --model none.gguf", "none.gguf: no such file"),
        ("mix runs=[none,other] --output mixed", "none: expected the directory of a run"),
        ("train empty.yaml run_dir=", "run_dir: expected a path or a name, got ''"),
        ("train empty.yaml prompter=", "prompter.model: expected a path or a name or null, got ''"),
    ],
)
def test_what_is_not_there_is_said_before_anything_heavy_is_imported(words, said, tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    (tmp_path / "empty.yaml").write_text("{}\n")
    code = (
        f"import sys\nsys.argv = {['alignpro', *words.split()]!r}\n"
        "from alignpro.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2, end.code\n"
        "heavy = {'numpy', 'tokenizers', 'rich', 'jinja2', 'torch', 'alignpro._core'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == "[]\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "empty.yaml"]


def test_the_configuration_of_another_commands_run_is_named(tmp_path):
    from alignpro.config import SftConfig, to_mapping

    with open_run_dir(tmp_path / "warm"):
        (tmp_path / "warm" / "config.json").write_text(json.dumps(to_mapping(SftConfig())))
    of_sft = "warm: a run of `alignpro sft`, expected one of `alignpro train`"
    assert of_sft in refused("train", tmp_path / "warm" / "config.json", "--resume")
    said = refused("train", tmp_path / "warm", "--resume")
    assert f"found a folder; that of a run is {tmp_path / 'warm' / 'config.json'}" in said
    said = refused("report", tmp_path / "warm" / "config.json")
    assert "no such folder; expected a run's" in said


@pytest.mark.parametrize("command", ["train", "prefer", "self-improve"])
def test_a_model_that_takes_no_part_need_not_be_there(command, tiny, tmp_path):
    file = tmp_path / "given.yaml"
    file.write_text("prompter: {model: none.gguf}\npolicy: target\ndata: none.csv\n")
    assert "none.csv: there is no such file" in refused(command, file)


def test_the_base_install_generates_and_informs(tiny):
    code = "import sys\nsys.argv = {arguments!r}\nfrom alignpro.cli import main\nmain()\n"
    info = python(code.format(arguments=["alignpro", "info"]))
    assert info.returncode == 0, info.stderr
    rows = dict(line.split(maxsplit=1) for line in info.stdout.splitlines())
    assert rows["cpu_isa"] in ("amx", "avx512", "avx2", "neon", "generic")
    assert int(rows["threads"]) >= 1 and rows["cuda"] == "no"
    arguments = ["alignpro", "generate", "the heron", "--model", str(tiny), "--max-new-tokens", "3"]
    written = python(code.format(arguments=arguments))
    assert written.returncode == 0, written.stderr
    trained = python(code.format(arguments=["alignpro", "quickstart"]))
    assert trained.returncode == 2
    assert "quickstart needs the package 'torch', which is not installed; " in trained.stderr
