"""From an evaluation's configuration to its report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from alignpro.config import EvalConfig, JudgeConfig, StaticSearch, to_mapping
from alignpro.data.load import PromptRow, load_prompts, stack_columns
from alignpro.evaluate.adapters import check_adapter, load_adapter
from alignpro.evaluate.arms import sample_arms
from alignpro.evaluate.compare import compare_arms
from alignpro.evaluate.judge import Judge, JudgeError, VerdictFile, judge_arms
from alignpro.evaluate.judges import EndpointJudge, LocalJudge, check_judge
from alignpro.evaluate.progress import OnProgress
from alignpro.evaluate.results import Evaluation
from alignpro.evaluate.static import SearchData, StaticInstruction, load_search, search_static
from alignpro.models.adapter import LoraWeights
from alignpro.models.native_model import NativeModel, load_configured, load_model
from alignpro.models.resolve import resolve_model
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.types import Reward


@dataclass(frozen=True)
class EvalInputs:
    """What an evaluation reads before any model is loaded."""

    rows: list[PromptRow]  # held out
    search: SearchData | None  # of a static instruction that is to be found
    verdicts: VerdictFile | None


class UnjudgedError(JudgeError):
    """The judge failed; ``report`` holds everything that was there before it was asked."""

    def __init__(self, message: str, report: Evaluation) -> None:
        super().__init__(message)
        self.report = report


def run_evaluation(
    config: EvalConfig, *, output: Path | None = None, on_progress: OnProgress | None = None
) -> Evaluation:
    """Load what the configuration names and compare the arms; returns what `evaluate_loaded` does,
    and ``evaluation_config``.

    output: where the report will be written; a judge's verdicts are kept beside it.

    Raises:
        ValueError, OSError, ImportError: bad input, before a model is loaded or while it is.
        UnjudgedError: the judge failed.
    """
    if config.judge is not None and config.trained is None:
        raise ValueError("judge: it compares the trained prompter; set trained to its PEFT folder")
    names = ["untuned"] if config.trained is None else ["untuned", "trained"]
    inputs = load_inputs(config, num_prompters=len(names), output=output)
    reward = build_reward(config.reward)
    prompter, target = load_configured(config)
    prompters = {name: load_adapter(getattr(config, name), prompter) for name in names}
    report = evaluate_loaded(config, prompter, target, reward, inputs, prompters, on_progress)
    return replace(report, evaluation_config=to_mapping(config))


def evaluate_loaded(
    config: EvalConfig,
    prompter: NativeModel,
    target: NativeModel,
    reward: Reward,
    inputs: EvalInputs,
    prompters: dict[str, LoraWeights | None],
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """The same over loaded parts."""
    tuned = load_adapter(config.tuned, target)
    judge = None if config.judge is None else _judge(config.judge, config, prompter, target)
    pipeline = Pipeline.configured(config, prompter, target, reward)
    static = None
    if isinstance(config.static, str):
        static = StaticInstruction(config.static.strip())
    elif config.static is not None:
        assert inputs.search is not None
        static = search_static(
            pipeline,
            config.static,
            inputs.search,
            prompters,
            seed=config.seed,
            on_progress=on_progress,
        )
    arms = sample_arms(
        pipeline,
        [row.prompt for row in inputs.rows],
        config,
        prompters=prompters,
        static=static,
        tuned=tuned,
        columns=stack_columns(inputs.rows),
        on_progress=on_progress,
    )
    report = compare_arms(pipeline, arms, config, prompters)
    if static is not None:
        report = replace(report, static_search=static.search)
    if judge is None or config.judge is None:
        return report
    try:
        verdicts = judge_arms(
            judge,
            arms,
            config.judge,
            seed=config.seed,
            verdicts=inputs.verdicts,
            on_progress=on_progress,
        )
    except JudgeError as error:
        raise UnjudgedError(str(error), report) from error
    return replace(report, judge=verdicts)


def load_inputs(
    config: EvalConfig, *, num_prompters: int = 2, output: Path | None = None
) -> EvalInputs:
    """Read and check everything that needs no model.

    Raises:
        ValueError, OSError, ImportError: bad input.
    """
    for name in ("untuned", "trained", "tuned"):
        check_adapter(name, getattr(config, name))
    rows = load_eval_rows(config)
    search = None
    if isinstance(config.static, StaticSearch):
        search = load_search(config.static, config, rows, num_prompters)
    verdicts = None
    if config.judge is not None:
        check_judge(config.judge)
        verdicts = VerdictFile(_verdict_path(config.judge, output))
        if config.judge.base_url is None:
            resolve_model(config.judge.model)
    return EvalInputs(rows, search, verdicts)


def load_eval_rows(config: EvalConfig) -> list[PromptRow]:
    """The held-out rows, cut to ``num_prompts``.

    Raises:
        ValueError: fewer rows than asked for.
    """
    rows = load_prompts(config.data, split=config.split)
    wanted = config.num_prompts
    if wanted is not None and wanted > len(rows):
        raise ValueError(f"num_prompts: {config.data} has {len(rows)} rows, {wanted} asked for")
    return rows[:wanted]


def _verdict_path(judge: JudgeConfig, output: Path | None) -> Path | None:
    path = None if output is None else output.with_name(output.name + ".judge.jsonl")
    if judge.cache is not None:
        path = Path(judge.cache)
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"judge.cache: {path.parent}: no such folder; make it first")
    return path


def _judge(
    judge: JudgeConfig, config: EvalConfig, prompter: NativeModel, target: NativeModel
) -> Judge:
    if judge.base_url is not None:
        return EndpointJudge(judge)
    path = resolve_model(judge.model)
    loaded = (
        (prompter, config.prompter_device, config.prompter_compute),
        (target, config.target_device, config.target_compute),
    )
    for model, device, compute in loaded:
        if (device, compute) == ("cpu", "float32") and path.samefile(model.path):
            return LocalJudge(model)
    return LocalJudge(load_model(judge.model, threads=config.threads))
