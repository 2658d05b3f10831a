"""The maintainers' benchmarks of tests/bench run at toy size, and write what they promise."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from alignpro.types import SamplingParams
from bench import barrier, endpoint, growth, house_rules, lanes, mixture, paper_figure, score

SCORE = ["--shape", "300x16", "--tokens", "12", "--repeats", "2"]


def test_score_writes_every_figure(tmp_path: Path, capsys):
    file = tmp_path / "score.json"
    score.main([*SCORE, "--no-peers", "--threads", "1", "--json", str(file)])
    report = json.loads(file.read_text("utf-8"))
    assert report["limits"]["fma_gflops"] > 0 and report["limits"]["read_gbps"] > 0
    (head,) = report["heads"]
    assert (head["vocab_size"], head["hidden_size"], head["num_tokens"]) == (300, 16, 12)
    ours = next(row for row in head["implementations"] if row["name"] == "alignpro")
    for phase in ("forward", "forward_backward"):
        assert ours[phase]["seconds"] > 0 and ours[phase]["gflops"] > 0
        assert 0 < ours[phase]["fma_share"] < 2
        assert ours[phase]["extra_bytes"] is None or ours[phase]["extra_bytes"] >= 0
    assert report["lora_pass"] is None
    shown = capsys.readouterr().out
    assert "FMA peak" in shown and "backward" in shown


def test_a_peer_is_measured_or_says_why_not(tmp_path: Path, monkeypatch):
    # None passes here, so the processes that would say it, of which two compile, can fail nothing.
    monkeypatch.setattr(score, "extra_bytes_of", lambda request: None)
    # Nor what Inductor makes of a compiled peer, which takes its C++ compiler half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    file = tmp_path / "score.json"
    score.main([*SCORE, "--json", str(file)])
    rows = json.loads(file.read_text("utf-8"))["heads"][0]["implementations"]
    assert len(rows) > 4
    for row in rows:
        assert row["skipped"] or row["forward_backward"]["seconds"] > 0, row["name"]
    with pytest.raises(FileExistsError, match="is there already"):
        score.main([*SCORE, "--json", str(file)])


def test_growth_writes_every_figure_and_is_drawn(tmp_path: Path, smollm2_path: Path, capsys):
    file, plot = tmp_path / "growth.json", tmp_path / "growth.svg"
    work = ["--batch", "1,3", "--context", "32,64", "--compute", "float32,int8", "--repeats", "1"]
    files = ["--json", str(file), "--plot", str(plot)]
    growth.main(["--model", str(smollm2_path), *work, *files])
    report = json.loads(file.read_text("utf-8"))
    cells = [(1, 32), (3, 32), (1, 64)]
    assert [(row["batch"], row["context"]) for row in report["results"]] == 2 * cells
    assert all(row["tokens_per_second"] > 0 for row in report["results"])
    assert report["limits"]["fma_gflops"] > 0 and report["peak_rss_bytes"] > 0
    assert "<svg" in plot.read_text("utf-8") and "peak memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1", "--context", "3", "--repeats", "1"], "context:"),
        (["--context", "64,99999", "--batch", "1"], "the model holds 8192"),
        (["--context", "64", "--batch", "1", "--compute", "float32,int3"], "compute: expected"),
    ],
)
def test_growth_refuses_what_it_cannot_do(arguments, message, smollm2_path: Path):
    with pytest.raises(ValueError, match=message):
        growth.main(["--model", str(smollm2_path), *arguments])


def test_a_barrier_draws_the_same_and_is_timed(smollm2_path: Path):
    seconds = barrier.measure(smollm2_path, prompts=2, repeats=1, threads=2)
    assert list(seconds) == ["interleaved", "with_barrier"]
    assert all(len(values) == 1 and values[0] > 0 for values in seconds.values())


def test_house_rules_prints_a_row_for_every_text(smollm2_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(house_rules, "RESPONSE", SamplingParams(max_new_tokens=4))
    work = ["--per-kind", "1", "--responses", "1", "--split", "validation"]
    work += ["--kind", "fact", "--kind", "ideas"]
    house_rules.main(["--model", str(smollm2_path), *work, "--text", "Sing."])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| text | fact | ideas | all | tokens |"
    texts = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    rules = [rule for rule in house_rules.RULES.values() if rule]
    policy = house_rules.ARMS.policy_text
    assert texts == ["none: the raw prompt", *rules, policy, "Sing.", house_rules.RIGHT_RULE]
    for row in rows:
        *rewards, tokens = map(float, row.strip("| ").split(" | ")[1:])
        assert all(0 <= reward <= 1 for reward in rewards) and 1 <= tokens <= 4


def test_a_mixture_is_timed_beside_one_adapter(tiny_model_dir, tmp_path: Path, capsys):
    file = tmp_path / "lanes.json"
    work = ["--lanes", "2,3", "--sequences", "1,5", "--tokens", "4", "--repeats", "1"]
    lanes.main(["--model", str(tiny_model_dir("llama")), *work, "--json", str(file)])
    rows = json.loads(file.read_text("utf-8"))
    assert [(row["sequences"], row["lanes"]) for row in rows] == [
        (at_once, count) for at_once in (1, 5) for count in (1, 2, 3)
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows) and rows[0]["share"] == 1.0
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)


def test_the_papers_figure_goes_on_where_it_was_stopped(
    tiny_model_dir, tmp_path: Path, monkeypatch, capsys
):
    file = tmp_path / "task.yaml"
    few = "rewrite: {max_new_tokens: 3}, response: {max_new_tokens: 4}"
    file.write_text(
        "sft: {steps: 1, batch_size: 2}\n"
        f"train: {{steps: 1, prompts_per_step: 2, num_rewrites: 2, {few}}}\n"
        f"evaluate: {{num_prompts: 4, num_rewrites: 2, static: null, {few}}}\n"
    )
    tuning = {"steps": 1, "prompts_per_step": 2, "num_rewrites": 2}
    monkeypatch.setattr(paper_figure, "TASKS", {"toy": paper_figure.Task(file, tuning)})
    one, other = str(tiny_model_dir("llama")), str(tiny_model_dir("qwen2"))
    plot = tmp_path / "figure.svg"
    asked = ["--models", f"{one},{other}", "--runs", str(tmp_path / "runs"), "--tasks", "toy"]
    asked += ["--plot", str(plot), "--threads", "1"]

    evaluate = paper_figure.run_evaluate
    evaluated = []

    def stopped(config, **options):
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        evaluated.append(config)
        return evaluate(config, **options)

    monkeypatch.setattr(paper_figure, "run_evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        paper_figure.main(asked)
    assert {(c.prompter.model, c.target.model) for c in evaluated} == {(one, one), (one, other)}
    capsys.readouterr()
    monkeypatch.setattr(paper_figure, "run_evaluate", evaluate)
    paper_figure.main(asked)
    said = capsys.readouterr().out
    doings = [line for line in said.splitlines() if line.startswith("toy, ")]
    assert sum("warm-" in line or "tuned-" in line for line in doings) <= 1  # each is made once
    assert sum("evaluation" in line for line in doings) == 2
    rows = [line for line in said.splitlines() if line.startswith("| toy |")]
    assert len(rows) == 4 and all(row.count("|") == 9 for row in rows)
    assert "<svg" in plot.read_text("utf-8")
    paper_figure.main(asked)  # nothing is left to do
    assert capsys.readouterr().out.splitlines() == said.splitlines()[-6:]
    for changes, message in (
        (["--rate", "0.1"], "tuned-.*: made otherwise .learning_rate was 0.0003, is 0.1"),
        (["--rate", "0.1,tiny-qwen2-untied=3e-4"], "tuned-tiny-llama-untied: made otherwise"),
        (["--rate", "tiny=3e-4"], "--rate: expected some of tiny-llama-untied, tiny-qwen2-untied"),
    ):
        with pytest.raises(ValueError, match=message):
            paper_figure.main([*asked, *changes])
    namesake = tmp_path / "elsewhere" / Path(one).name
    shutil.copytree(other, namesake)
    with pytest.raises(ValueError, match="two models of one name would share their runs"):
        paper_figure.main([*asked, "--targets", f"{one},{namesake}"])
    with pytest.raises(ValueError, match=r"target\.model was '.*', is '.*elsewhere"):
        paper_figure.main([*asked, "--models", str(namesake), "--prompters", other])
    file.write_text(file.read_text().replace("num_prompts: 4", "num_prompts: 5"))
    with pytest.raises(ValueError, match=r"\.json: made otherwise .num_prompts was 4, is 5"):
        paper_figure.main(asked)
    with pytest.raises(SystemExit):
        paper_figure.main([*asked, "--tasks", "toy,poems"])
    assert "expected some of toy, got 'poems'" in capsys.readouterr().err


def test_a_mixture_is_compared_with_its_parts(tiny_model_dir, tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "task.yaml"
    few = "rewrite: {max_new_tokens: 3}, response: {max_new_tokens: 4}"
    file.write_text(
        "sft: {steps: 1, batch_size: 2}\n"
        f"train: {{steps: 1, prompts_per_step: 2, num_rewrites: 2, {few}}}\n"
        f"evaluate: {{static: null, {few}}}\n"
    )
    monkeypatch.setattr(mixture, "SIZES", {"num_prompts": 4, "num_rewrites": 2, "num_responses": 2})
    asked = ["--runs", str(tmp_path / "runs"), "--task", str(file), "threads=1"]
    asked += [f"prompter.model={tiny_model_dir('llama')}"]
    mixture.main(asked)
    said = capsys.readouterr().out.splitlines()
    arms = {line.split(" | ")[0]: line.split(" | ") for line in said if line.startswith("| ")}
    assert len(arms) == 2 + 10
    assert arms["| untuned"][3:5] == ["0.500", "0.500"]  # against itself
    assert float(arms["| untuned"][7].split()[0]) == 0.0
    assert "0 for the mixture" in said[-2] and "accepted at the first draw" in said[-1]
    mixture.main(asked)  # nothing is left to do
    again = capsys.readouterr().out.splitlines()
    assert again == [line for line in said if line in again] and again[-1] == said[-1]
    with pytest.raises(ValueError, match=r"warm: made otherwise .seed was 0"):
        shutil.copytree(tmp_path / "runs" / "seed-0", tmp_path / "runs" / "seed-1")
        mixture.main([*asked, "--seed", "1"])


@pytest.mark.parametrize(
    "wins", [([[1.0, 3.0]], [[2.0, 2.0]], 0.5), ([[2.0, 3.0]], [[2.0, 1.0]], 0.875)]
)
def test_equal_responses_are_half_a_win(wins):
    scores, before, rate = wins
    assert mixture._wins(np.array(scores), np.array(before)) == [rate]


@pytest.mark.parametrize("server", ["llama.cpp", "alignpro"])
def test_a_target_behind_a_server_is_compared_with_the_one_in_process(server, capsys):
    work = ["--seeds", "1", "--steps", "2", "--prompts", "1", "--responses", "1"]
    sizes = ["--rewrite-tokens", "3", "--response-tokens", "4", "--threads", "1"]
    endpoint.main(["--server", server, "--server-threads", "1", *work, *sizes])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| step | in process | server |" and len(shown) == 9
    difference, (ours, theirs), ratios = shown[4], shown[5:7], shown[7:]
    assert difference.startswith("server - in process: ") and "] of reward" in difference
    assert ours.startswith("in process: ") and theirs.startswith("server: ")
    for line, what in zip(ratios, ("seconds", "cpu_seconds"), strict=True):
        assert line.startswith(f"{what}, server over in process: ")
        assert float(line.split(": ")[1].split(" ")[0]) > 0
