"""What a mixture of two prompters is worth: the goal that it serves worst, against its parts.

    python tests/bench/mixture.py --runs DIR [--seed 0] [setting=value ...]

Two prompters are trained from one warm start, for sentiment and for the topic; `alignpro mix` finds
their weights. Arms on held-out prompts: the mixture drawn token by token, with its weights and with
lambda*; whole rewrites with lambda*; one adapter of its weights, and of equal ones; the parts; and
a training of its own for the sum of the goals by lambda*. An arm's win rate for a goal counts the
pairs of responses to a prompt in which its reward is above the untuned prompter's, equal ones a
half; its gain is in standard deviations of the untuned responses' rewards. The lesser of both goals
is what counts.

Settings are those of `alignpro quickstart examples/sentiment.yaml`. The same call goes on with what
an interrupted one has left; what was made otherwise is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from alignpro.config import EvalConfig, MixConfig, QuickstartConfig, TrainConfig, load_yaml
from alignpro.data.load import stack_columns
from alignpro.evaluate.arms import Arm, sample_arms
from alignpro.evaluate.inputs import load_rows, made_from_of
from alignpro.evaluate.kept import KeptArms
from alignpro.evaluate.mix import run_mix, soup_of
from alignpro.evaluate.results import MixedGoal, MixReport, from_json
from alignpro.models.adapter import AdapterWeights, require_lora
from alignpro.models.adapter_files import MIXTURE
from alignpro.models.mixture import Mixture, load_writer
from alignpro.models.native_model import NativeModel, load_models
from alignpro.pipeline import Pipeline
from alignpro.report.words import interval, number
from alignpro.rewards.build import build_reward
from alignpro.run_directory import read_record
from alignpro.statistics import Floats
from alignpro.train.metrics import read_metrics

sys.path.append(str(Path(__file__).parents[1]))

from bench.paper_figure import make_run

_TASK = Path(__file__).parents[2] / "examples" / "sentiment.yaml"
GOALS = ("vader", "topic")
MIXED = "token by token"
# Of every arm on the held-out prompts.
SIZES = {"num_prompts": 64, "num_rewrites": 4, "num_responses": 2}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", type=Path, default=_TASK)
    parser.add_argument("settings", nargs="*", help="of the task's QuickstartConfig")
    options = parser.parse_args(arguments)
    folder = options.runs / f"seed-{options.seed}"
    settings = [*options.settings, f"seed={options.seed}"]
    sft, train, evaluation = load_yaml(QuickstartConfig, options.task, settings).stages()
    sft = replace(sft, run_dir=str(folder / "warm"))
    make_run(sft, "both")
    started = replace(train.prompter, adapter=str(folder / "warm" / "adapter"))
    train = replace(train, prompter=started)
    for goal in GOALS:
        make_run(replace(train, reward=goal, run_dir=str(folder / goal)), goal)
    report = mix(train, folder)
    weights = [lambda_star(report.goals[str(folder / goal)]) for goal in GOALS]
    both = "+".join(f"{weight:.4f}*{goal}" for weight, goal in zip(weights, GOALS, strict=True))
    make_run(replace(train, reward=both, run_dir=str(folder / "both")), both)
    tokens = sum(row["target_tokens"] for row in read_metrics(folder / "both" / "metrics.jsonl"))
    evaluation = replace(evaluation, prompter=started, reward="+".join(GOALS), **SIZES)
    arms = answer(replace(evaluation, static=None, optimum=None, judge=None), folder, weights)
    print(table(arms))
    accepted, expected = report.acceptance, report.expected_acceptance
    shown = ", ".join(number(weight) for weight in weights)
    drawn = ", ".join(number(goal.weight) for goal in report.goals.values())
    print(f"\nlambda* {shown}, KKT gap {report.kkt_gap:.1g}; of what is drawn {drawn}")
    print(f"tokens of the target: {tokens} for the weighted sum, 0 for the mixture")
    if accepted is not None:
        print(
            f"accepted at the first draw: {accepted.mean:.3f} ({interval(accepted.ci95)}), by the "
            f"parts' own rewrites {number(expected)}"
        )


def lambda_star(goal: MixedGoal) -> float:
    return goal.weight if goal.whole_weight is None else goal.whole_weight


def mix(train: TrainConfig, folder: Path) -> MixReport:
    """`alignpro mix` of the runs, or what an earlier one wrote."""
    mixed = folder / "mixed"
    if not (mixed / MIXTURE).exists():
        print("mixed", flush=True)
        runs = tuple(str(folder / goal) for goal in GOALS)
        return run_mix(MixConfig(runs=runs, seed=train.seed, threads=train.threads), mixed)
    return from_json(MixReport, read_record(mixed / MIXTURE), str(mixed))


def answer(config: EvalConfig, folder: Path, weights: list[float]) -> dict[str, Arm]:
    """Every arm's answers, kept as they are finished."""
    rows, reward = load_rows(config), build_reward(config.reward)
    prompter, target = load_models(config.prompter, config.target, config.threads, date=config.date)
    made_from = made_from_of(config, prompter, target, reward, rows)
    with KeptArms.at(folder / "arms.jsonl", config, made_from) as kept:
        return sample_arms(
            Pipeline.configured(config, prompter, target, reward),
            [row.prompt for row in rows],
            config,
            prompters=prompters(prompter, folder, weights),
            columns=stack_columns(rows),
            kept=kept,
            on_progress=lambda name, done, total: done or print(f"arm: {name}", flush=True),
        )


def prompters(
    model: NativeModel, folder: Path, weights: list[float]
) -> dict[str, AdapterWeights | Mixture | None]:
    """By the names of the arms; weights: lambda*, of the goals."""
    warm, *parts, both = (
        require_lora(model.load_adapter(folder / name / "adapter"), name)
        for name in ("warm", *GOALS, "both")
    )
    whole = Mixture(tuple(zip(parts, weights, strict=True)))
    return {
        "untuned": warm,
        **dict(zip(GOALS, parts, strict=True)),
        "one adapter, equal weights": soup_of(parts, [1 / len(parts)] * len(parts), warm),
        "one adapter": model.load_adapter(folder / "mixed" / "adapter"),
        MIXED: load_writer(model, folder / "mixed"),
        f"{MIXED}, lambda*": whole,
        "whole rewrites, lambda*": replace(whole, sampling="sequence"),
        "trained for both": both,
    }


def table(arms: Mapping[str, Arm]) -> str:
    """Win rates and gains over the untuned prompter, and the mixture minus every arm, in
    Markdown."""
    before = {goal: _scores(arms["untuned"], goal) for goal in GOALS}
    wins, gains = {}, {}
    for name, arm in arms.items():
        scores = {goal: _scores(arm, goal) for goal in GOALS}
        wins[name] = np.array([_wins(scores[goal], before[goal]) for goal in GOALS])
        gains[name] = np.array(
            [(scores[g] - before[g]).mean(axis=1) / (before[g].std() or 1.0) for g in GOALS]
        )
    head = ["arm", *GOALS, *(f"wins, {goal}" for goal in GOALS), "the lesser", "mixture minus it"]
    head += ["lesser gain", "mixture minus it"]
    lines = [head, ["---"] * len(head)]
    for name, arm in arms.items():
        means = [number(float(_scores(arm, goal).mean())) for goal in GOALS]
        rates = [number(float(rate)) for rate in wins[name].mean(axis=1)]
        lesser = [*_lesser(wins, name), *_lesser(gains, name)]
        lines.append([name, *means, *rates, *lesser])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scores(arm: Arm, goal: str) -> Floats:
    """[prompts, responses]"""
    return np.array(arm.components[goal]).reshape(len(arm.rewards), -1)


def _wins(scores: Floats, before: Floats) -> Floats:
    """[prompts]"""
    above = scores[:, :, None] - before[:, None, :]
    rates: Floats = ((np.sign(above) + 1) / 2).mean(axis=(1, 2))
    return rates


def _lesser(measured: Mapping[str, Floats], name: str) -> tuple[str, str]:
    """The lesser mean of an arm's goals, and how far the mixture's is above it: [goals, prompts]
    each, with intervals of a bootstrap over prompts, both arms together."""
    mine, mixed = measured[name], measured[MIXED]
    drawn = np.random.default_rng(0).integers(mine.shape[1], size=(10_000, mine.shape[1]))

    def said(lessers: Floats, mean: float, *, sign: bool) -> str:
        low, high = np.quantile(lessers, (0.025, 0.975))
        ends = interval((float(low), float(high)), sign=sign)
        return f"{number(mean, sign=sign)} ({ends})"

    draws = [of[:, drawn].mean(axis=2).min(axis=0) for of in (mine, mixed)]
    means = [float(of.mean(axis=1).min()) for of in (mine, mixed)]
    above = "" if name == MIXED else said(draws[1] - draws[0], means[1] - means[0], sign=True)
    return said(draws[0], means[0], sign=False), above


if __name__ == "__main__":
    main()
