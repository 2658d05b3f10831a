"""From an evaluation's configuration to its report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from alignpro import fingerprints
from alignpro.config import (
    ARMS,
    EvalConfig,
    JudgeConfig,
    StaticSearch,
    check_config,
    read_requirement,
    target_of,
    to_mapping,
)
from alignpro.data.load import PromptRow, stack_columns
from alignpro.evaluate.arms import sample_arms
from alignpro.evaluate.compare import compare_arms
from alignpro.evaluate.inputs import (
    check_adapters,
    instructions_by_label,
    load_adapter,
    load_rows,
    load_soft_prompt,
    made_from_of,
)
from alignpro.evaluate.judge import Judge, JudgeError, VerdictFile, judge_arms
from alignpro.evaluate.judges import EndpointJudge, LocalJudge, check_judge
from alignpro.evaluate.kept import KeptArms, arms_path, calls_path, kept_date
from alignpro.evaluate.of_run import say_what_differs
from alignpro.evaluate.progress import OnProgress
from alignpro.evaluate.results import Evaluation, SearchResult, from_json, to_json
from alignpro.evaluate.safety import check_safety, measure_safety
from alignpro.evaluate.static import SearchData, StaticInstruction, load_search, search_static
from alignpro.lengths import FittedRows, fit_rows, unread_by
from alignpro.models.adapter import AdapterWeights
from alignpro.models.answer_scores import TargetScorer
from alignpro.models.chat_template import today
from alignpro.models.language_model import ChatModel
from alignpro.models.mixture import Mixture, soft_rows
from alignpro.models.native_model import NativeModel, load_model, load_models, reusable
from alignpro.models.resolve import resolve_model
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward
from alignpro.rewards.check import check_columns, offer_scorer
from alignpro.run_directory import recorded_date
from alignpro.train.metrics import read_metrics
from alignpro.types import Reward


@dataclass(frozen=True)
class EvalInputs:
    """What an evaluation reads before any model is loaded."""

    rows: list[PromptRow]  # held out
    search: SearchData | None  # of a static instruction that is to be found
    labelled: list[str] | None  # the instruction of each row's label
    verdicts: VerdictFile | None
    harm: Reward | None = None  # what scores it, for a safety report


class UnjudgedError(JudgeError):
    """The judge failed; ``report`` holds everything that was there before it was asked."""

    def __init__(self, message: str, report: Evaluation) -> None:
        super().__init__(message)
        self.report = report


def run_evaluate(
    config: EvalConfig,
    *,
    output: Path | None = None,
    run: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Load what the configuration names and compare the arms; returns what `evaluate_loaded` does,
    and ``evaluation_config``.

    output: where the report will be written. Beside it are kept each arm as it is finished, a
        judge's verdicts, and the calls to a target behind an endpoint: an evaluation that was
        stopped goes on with them.
    run: the run whose evaluation this is to be; a warning names what differs from what it was made
        from. None: the one that an adapter of the configuration lies in.

    Raises:
        ValueError, OSError, ImportError: bad input, before a model is loaded or while it is.
        UnjudgedError: the judge failed.
    """
    check_config(config, EvalConfig)
    if config.judge is not None and config.trained is None:
        raise ValueError("judge: it compares the trained prompter; set trained to its PEFT folder")
    inputs = load_inputs(config, prompters=tuple(config.prompters), output=output)
    arms = arms_path(output)
    recorded = recorded_date(config.trained, config.tuned, config.soft) or kept_date(arms)
    date = config.date or recorded or today()
    config = replace(_with_budget(config), date=date)
    reward = build_reward(config.reward)
    for read in (inputs.rows, inputs.search.rows if inputs.search else []):
        if read:
            check_columns(reward, stack_columns(read))
    # Without prompters the target is in both places, and is all that is loaded.
    asked = config.prompter if config.prompters else target_of(config.prompter, config.target)
    prompter, target = load_models(
        asked, config.target, config.threads, calls=calls_path(output), date=date
    )
    prompters = {name: load_adapter(folder, prompter) for name, folder in config.prompters.items()}
    wrote = prompter if prompters else None
    made_from = made_from_of(config, wrote, target, reward, inputs.rows)
    around = (run, config.trained, config.tuned, config.soft, config.prompter.adapter)
    say_what_differs(config, made_from, prompters.get("untuned"), inputs.rows, *around)
    with KeptArms.at(arms, config, made_from) as kept:
        report = evaluate_loaded(
            *(config, prompter, target, reward, inputs, prompters, on_progress), kept=kept
        )
    return replace(report, evaluation_config=to_mapping(config))


def evaluate_loaded(
    config: EvalConfig,
    prompter: NativeModel,
    target: NativeModel | ChatModel,
    reward: Reward,
    inputs: EvalInputs,
    prompters: dict[str, AdapterWeights | Mixture | None],
    on_progress: OnProgress | None = None,
    *,
    kept: KeptArms | None = None,
) -> Evaluation:
    kept = kept or KeptArms()
    soft = tuned = None
    if config.soft is not None or config.tuned is not None:
        assert isinstance(target, NativeModel)  # the configuration's rule
        tuned = load_adapter(config.tuned, target)
        soft = load_soft_prompt(config.soft, target)
    calls = _judge_calls(inputs.verdicts)
    judge = None if config.judge is None else _judge(config.judge, config, prompter, target, calls)
    pipeline = Pipeline.configured(config, prompter, target, reward)
    fitted, searched = fit_inputs(
        config,
        _with_most_rows(pipeline, prompters.values(), (soft, tuned)),
        inputs,
        rewrites=bool(prompters),
    )
    rows = fitted.rows
    static = None
    if isinstance(config.static, str):
        static = StaticInstruction(config.static.strip())
    elif config.static is not None:
        assert inputs.search is not None
        search = replace(inputs.search, rows=searched)
        static = _searched(pipeline, config, search, prompters, kept, on_progress)
    columns = stack_columns(rows)
    arms = sample_arms(
        pipeline,
        [row.prompt for row in rows],
        config,
        prompters=prompters,
        static=static,
        labelled=instructions_by_label(config, rows),
        soft=soft,
        tuned=tuned,
        columns=columns,
        kept=kept,
        on_progress=on_progress,
    )
    answers = {row.prompt: row.columns.get("answer") for row in rows}
    report = compare_arms(pipeline, arms, config, prompters, answers)
    report = replace(report, too_long=fitted.note)
    if inputs.harm is not None:
        report = replace(report, safety=measure_safety(arms, rows, config, inputs.harm))
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


def fit_inputs(
    config: EvalConfig, pipeline: Pipeline, inputs: EvalInputs, *, rewrites: bool = True
) -> tuple[FittedRows[PromptRow], list[PromptRow]]:
    """The held-out rows that the models and rewards can read, and those of a search. rewrites:
    whether a prompter takes part.

    Raises ValueError, as `fit_rows`, and for a target that the measure of harm cannot ask.
    """
    harm = [] if inputs.harm is None else [inputs.harm]
    for reward in harm:
        offer_scorer(reward, TargetScorer(pipeline.target))
    given = [text for text in (config.static, config.policy_text) if isinstance(text, str)]
    texts = [*given, *(inputs.labelled or ())]
    unread = unread_by(pipeline, rewrites=rewrites, texts=texts, scored_by=harm)
    fitted, searched = fit_rows(inputs.rows, unread, config.on_too_long), list[PromptRow]()
    if inputs.search is not None:
        unread = unread_by(pipeline, rewrites=rewrites, texts=inputs.search.instructions)
        searched = fit_rows(inputs.search.rows, unread, config.on_too_long).rows
    return fitted, searched


def _with_most_rows(
    pipeline: Pipeline, prompters: Iterable[Any], of_target: Iterable[Any]
) -> Pipeline:
    """Before whichever of the adapters reads the most tokens."""

    def most(adapters: Iterable[Any]) -> Any:
        return max(adapters, key=lambda a: 0 if (rows := soft_rows(a)) is None else rows.count)

    longest = most([pipeline.target_adapter, *of_target])
    return pipeline.with_adapter(most([None, *prompters])).with_target_adapter(longest)


def _searched(
    pipeline: Pipeline,
    config: EvalConfig,
    data: SearchData,
    prompters: dict[str, AdapterWeights | Mixture | None],
    kept: KeptArms,
    on_progress: OnProgress | None,
) -> StaticInstruction:
    """The search, or what an earlier one found."""
    assert isinstance(config.static, StaticSearch)
    name, rows = "static search", [row.prompt for row in data.rows]
    of = [
        asdict(config.static),
        fingerprints.of_rows("", rows, stack_columns(data.rows)).hash,
        data.instructions,
        {writer: kept.hash_of(adapter) for writer, adapter in prompters.items()},
    ]
    known = kept.get(name, of)
    if known is not None:
        found = from_json(SearchResult, known, name)
        return StaticInstruction(found.instruction, found)
    static = search_static(
        *(pipeline, config.static, data, prompters), seed=config.seed, on_progress=on_progress
    )
    kept.put(name, of, to_json(static.search))
    return static


def load_inputs(
    config: EvalConfig,
    *,
    prompters: tuple[str, ...] = ("untuned", "trained"),
    output: Path | None = None,
) -> EvalInputs:
    """Read and check everything that needs no model. prompters: the arms that are prompters.

    Raises:
        ValueError, OSError, ImportError: bad input.
    """
    there = {"raw", *prompters}
    there |= {name for name in ARMS if name not in prompters and getattr(config, name, None)}
    for text in config.require:
        read_requirement(text, [name for name in ARMS if name in there])
    check_adapters(config, trained=config.trained, soft=config.soft, tuned=config.tuned)
    rows = load_rows(config)
    harm = None if config.safety is None else check_safety(config.safety, rows)
    search = None
    if isinstance(config.static, StaticSearch):
        search = load_search(config.static, config, rows, prompters)
    verdicts = None
    if config.judge is not None:
        verdicts = VerdictFile(_verdict_path(config.judge, output))
        check_judge(config.judge, _judge_calls(verdicts))
        if config.judge.base_url is None:
            resolve_model(config.judge.model.name)
    return EvalInputs(rows, search, instructions_by_label(config, rows), verdicts, harm)


def spend(config: EvalConfig, rows: Sequence[Mapping[str, Any]], where: str) -> EvalConfig:
    """``static.budget_tokens: auto`` as a number: what a training's rows of metrics add up to."""
    if not isinstance(config.static, StaticSearch) or config.static.budget_tokens != "auto":
        return config
    tokens = sum(row.get("target_tokens") or 0 for row in rows)
    if not tokens:
        raise ValueError(
            f"static.budget_tokens: auto: {where} does not say how many tokens the target wrote; "
            "set the number"
        )
    return replace(config, static=replace(config.static, budget_tokens=tokens))


def _with_budget(config: EvalConfig) -> EvalConfig:
    if not isinstance(config.static, StaticSearch) or config.static.budget_tokens != "auto":
        return config
    log = None if config.trained is None else Path(config.trained).parent / "metrics.jsonl"
    if log is None or not log.is_file():
        raise FileNotFoundError(
            "static.budget_tokens: auto: expected a trained adapter with its run's metrics.jsonl "
            f"in the folder around it, got {'no trained adapter' if log is None else log}"
        )
    return spend(config, read_metrics(log), str(log))


def _verdict_path(judge: JudgeConfig, output: Path | None) -> Path | None:
    path = None if output is None else output.with_name(output.name + ".judge.jsonl")
    if judge.cache is not None:
        path = Path(judge.cache)
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"judge.cache: {path.parent}: no such folder; make it first")
    return path


def _judge_calls(verdicts: VerdictFile | None) -> Path | None:
    """The file of the judge's calls, beside that of its verdicts."""
    if verdicts is None or verdicts.path is None:
        return None
    return verdicts.path.with_suffix(".calls.jsonl")


def _judge(
    judge: JudgeConfig,
    config: EvalConfig,
    prompter: NativeModel,
    target: NativeModel | ChatModel,
    calls: Path | None,
) -> Judge:
    if judge.base_url is not None:
        return EndpointJudge(judge, calls)
    loaded = [(config.prompter, prompter)]
    if isinstance(target, NativeModel):
        loaded.append((target_of(config.prompter, config.target), target))
    model = reusable(judge.model, loaded)
    return LocalJudge(model or load_model(judge.model, config.threads, date=config.date))
