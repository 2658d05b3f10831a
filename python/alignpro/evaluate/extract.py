"""From texts and a schema to records, each of which is kept as it is finished."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignpro.config import (
    ExtractConfig,
    SchemaConfig,
    SftConfig,
    TrainConfig,
    check_config,
    target_of,
    to_mapping,
    unchecked,
)
from alignpro.config.fields import require
from alignpro.data.files import DataError
from alignpro.data.load import PromptRow, load_prompts, stack_columns
from alignpro.evaluate.inputs import load_adapter
from alignpro.evaluate.kept import calls_path, kept_date
from alignpro.evaluate.progress import OnProgress
from alignpro.evaluate.results import ExtractReport
from alignpro.extract.draw import Extraction
from alignpro.extract.parse import as_record
from alignpro.extract.schema import Schema, read_schema
from alignpro.extract.score import FieldScore, score_record
from alignpro.files import append_line, read_kept, write_file
from alignpro.fingerprints import of_adapter_folder, of_models, of_rows, to_plain
from alignpro.lengths import fit_rows, unread_by
from alignpro.models.chat_template import today
from alignpro.models.endpoint import EndpointModel
from alignpro.models.native_model import NativeModel, load_model, load_models
from alignpro.pipeline import Pipeline
from alignpro.run_directory import add_note, config_of_run, is_run_dir
from alignpro.statistics import paired_difference, proportion_ci, ratio_of_means
from alignpro.types import Conversation, not_unicode

# What changes no record.
_FREE = ("threads", "num_texts")


def run_extract(
    config: ExtractConfig, *, output: Path | None = None, on_progress: OnProgress | None = None
) -> tuple[list[dict[str, Any]], ExtractReport]:
    """The records of the texts, a row each, and what share of them is verified, and right where the
    true ones are known.

    output: the file of rows that is to be written (by this function, whole). Beside it each row is
        kept as it is finished (``.rows.jsonl``), as are calls to an endpoint, and an extraction
        that was stopped goes on with them.

    Raises:
        ValueError: bad input, or kept rows of other settings. FailedRowsError: as `Pipeline`.
    """
    check_config(config, ExtractConfig)
    schema, form, rows = read_inputs(config)
    kept_at = None if output is None else output.with_name(output.name + ".rows.jsonl")
    config = replace(config, date=config.date or kept_date(kept_at) or today())
    pipeline = _pipeline(config, schema, calls_path(output))
    numbers = {row.place: number for number, row in enumerate(rows)}
    rows = fit_rows(rows, unread_by(pipeline), config.on_too_long).rows
    kept = _KeptRows(kept_at, _made_from(config, schema, pipeline, rows))
    left = [row for row in rows if numbers[row.place] not in kept.done]

    def show() -> None:
        if on_progress is not None:
            on_progress("texts", len(kept.done), len(rows))

    def finished(index: int, extraction: Extraction) -> None:
        kept.put(numbers[left[index].place], extraction)
        show()

    show()
    try:
        if left:
            pipeline.extract(
                [row.prompt for row in left],
                schema,
                attempts=config.attempts,
                form=form,
                seed=config.seed,
                numbers=[numbers[row.place] for row in left],
                on_extracted=finished,
            )
    except BaseException as error:
        if kept.path is not None and kept.done:
            add_note(error, f"{len(kept.done)} of {len(rows)} texts are done; the same goes on")
        raise
    done = [kept.done[numbers[row.place]] for row in rows]
    written = [
        {"number": numbers[row.place], "text": Conversation.of(row.prompt).plain} | one.to_plain()
        for row, one in zip(rows, done, strict=True)
    ]
    if output is not None:
        write_file(output, "".join(f"{line_of(row)}\n" for row in written))
        kept.remove()
    truths = true_records(rows, config)
    report = measure(done, truths, schema, config)
    if isinstance(pipeline.target, EndpointModel):
        report = replace(report, target_usage=pipeline.target.usage())
    return written, report


def line_of(row: dict[str, Any]) -> str:
    """A row as a line of JSON, in plain text where that is valid Unicode: a model may write the
    escape of half a character."""
    line = json.dumps(row, ensure_ascii=False)
    return line if not_unicode(line) is None else json.dumps(row)


def read_inputs(config: ExtractConfig) -> tuple[Schema, Any, list[PromptRow]]:
    """The schema, the form of records, and the rows. Raises ValueError."""
    named = "a schema, as --schema or schema.path names it"
    require("schema", config.schema, config.schema is not None, named)
    require("data.path", config.data.path, config.data.path is not None, "a source of texts")
    assert config.schema is not None
    schema = read_schema(config.schema.path)
    rows = load_prompts(config.data)[: config.num_texts]
    true_records(rows, config)
    return schema, config.schema.format, rows


def true_records(rows: Sequence[PromptRow], config: ExtractConfig) -> list[dict[str, Any]] | None:
    """Of rows that have their column; None where none has. Raises DataError, naming the row."""
    assert config.schema is not None
    column, records = config.schema.record, []
    if all(row.columns.get(column) is None for row in rows):
        return None
    for row in rows:
        try:
            records.append(as_record(row.columns.get(column)))
        except ValueError as error:
            raise DataError(f"{row.place}, column {column!r}: {error}") from None
    return records


def measure(
    done: Sequence[Extraction],
    truths: Sequence[dict[str, Any]] | None,
    schema: Schema,
    config: ExtractConfig,
) -> ExtractReport:
    """What the records are worth, of texts that were answered. Intervals: exact of shares,
    bootstrap over texts of F1."""
    answered = [index for index, one in enumerate(done) if one.answered]
    failed = len(done) - len(answered)
    done = [done[index] for index in answered]
    truths = None if truths is None else [truths[index] for index in answered]
    verified = [float(one.verified) for one in done]
    first = [float(one.verified and one.attempts == 1) for one in done]
    report = ExtractReport(
        texts=len(done),
        records=sum(one.record is not None for one in done),
        attempts=sum(one.attempts for one in done) / len(done),
        verified=proportion_ci(sum(verified), len(done)),
        verified_first=proportion_ci(sum(first), len(done)),
        violations=dict(Counter(v.check for one in done for v in one.violations).most_common()),
        failed_texts=failed or None,
        config=to_mapping(config),
    )
    if len(done) > 1:
        gain = paired_difference(verified, first, seed=config.seed)
        report = replace(report, verified_gain=gain)
    if truths is None:
        return report
    scores = [
        score_record(one.record, truth, schema) for one, truth in zip(done, truths, strict=True)
    ]
    whole = sum(scores, FieldScore())
    right = [score.right == score.predicted == score.true for score in scores]
    of_verified = [r for r, one in zip(right, done, strict=True) if one.verified]
    both = [float(score.predicted + score.true) for score in scores]
    twice = [2.0 * score.right for score in scores]
    return replace(
        report,
        f1=ratio_of_means(twice, both, seed=config.seed) if len(done) > 1 and any(both) else None,
        precision=whole.precision,
        recall=whole.recall,
        exact=proportion_ci(right.count(True), len(right)),
        exact_of_verified=proportion_ci(of_verified.count(True), len(of_verified))
        if of_verified
        else None,
    )


def extract_of_run(run: Path) -> ExtractConfig:
    """Models, adapters and schema of a run: the target that `sft` taught to extract, or the tuned
    target or trained prompter of `train`.

    Raises:
        FileNotFoundError: no run, or one that is not done.
    """
    adapter = run / "adapter"
    if not is_run_dir(run) or not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"--run {run}: expected the directory of a run that is done")
    config = config_of_run(run)
    values: dict[str, Any] = {"date": config.date}
    if isinstance(config, SftConfig):
        values["target"] = replace(config.prompter, adapter=str(adapter))
        values["schema"] = config.schema
        return unchecked(ExtractConfig, values)
    target = target_of(config.prompter, config.target)
    if config.policy == "target":
        values["target"] = replace(target, adapter=str(adapter))
    else:
        values["target"] = target
        values["prompter"] = replace(config.prompter, adapter=str(adapter))
        values["rewrite"] = config.rewrite
    values["prompting"] = config.prompting
    if isinstance(config, TrainConfig):
        values["response"] = config.response
        if config.reward.startswith("schema:"):
            path, _, form = config.reward.removeprefix("schema:").partition("#")
            values["schema"] = SchemaConfig(path, "lines" if form == "lines" else "json")
    return unchecked(ExtractConfig, values)


def _pipeline(config: ExtractConfig, schema: Schema, calls: Path | None) -> Pipeline:
    assert config.schema is not None
    prompter, adapter = None, None
    target: NativeModel | EndpointModel
    if config.prompter is not None:
        prompter, target = load_models(
            config.prompter, config.target, config.threads, calls=calls, date=config.date
        )
        adapter = load_adapter(config.prompter.adapter, prompter)
    elif config.target.endpoint is not None:
        target = EndpointModel(config.target, calls)
    else:
        target = load_model(config.target, config.threads, date=config.date)
    pipeline = Pipeline.configured(config, prompter, target, None).with_adapter(adapter)
    return pipeline.for_schema(schema, config.schema.format)


def _made_from(
    config: ExtractConfig, schema: Schema, pipeline: Pipeline, rows: Sequence[PromptRow]
) -> dict[str, Any]:
    """What every kept row depends on."""
    made_from = of_models(pipeline.prompter, pipeline.target)
    for role in ("prompter", "target"):
        group = getattr(config, role)
        if group is not None and group.adapter is not None:
            made_from[f"adapter of the {role}"] = of_adapter_folder(group.adapter)
    prompts = [row.prompt for row in rows]
    made_from["data"] = of_rows(str(config.data.path), prompts, stack_columns(rows))
    settings = {name: v for name, v in to_mapping(config).items() if name not in _FREE}
    settings["template"] = pipeline.prompting.target_template
    settings["checks"] = [check.text for check in schema.checks]
    plain: dict[str, Any] = json.loads(
        json.dumps({"config": settings, "fingerprints": to_plain(made_from)})
    )
    return plain


class _KeptRows:
    """Rows by number, each written down as it is finished; without a path, in memory alone.

    Raises:
        ValueError: a file of rows with other settings, or of something else.
    """

    def __init__(self, path: Path | None, made_from: dict[str, Any]) -> None:
        self.path = path
        self.done: dict[int, Extraction] = {}
        if path is not None and not (path.exists() and self._read(path, made_from)):
            append_line(path, json.dumps(made_from))

    def _read(self, path: Path, made_from: dict[str, Any]) -> bool:
        """Whether there is a whole first line."""
        first = []

        def take(number: int, row: Any) -> None:
            if number == 1:
                first.append(row)
            else:
                self.done[int(row["number"])] = Extraction.of_plain(row["of"])

        read_kept(path, take, "a row of an extraction")
        if first not in ([], [made_from]):
            raise ValueError(
                f"{path}: rows of an extraction with other settings, models or texts; move it away "
                "to begin anew, or name another --output"
            )
        return bool(first)

    def put(self, number: int, extraction: Extraction) -> None:
        self.done[number] = extraction
        if self.path is not None and extraction.answered:  # another is asked for again
            plain = {"number": number, "of": extraction.to_plain()}
            append_line(self.path, json.dumps(plain))

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
