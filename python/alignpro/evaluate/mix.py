"""From the runs of several prompters to the mixture of them: drawn from, and as one adapter."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignpro.config import MixConfig, PreferConfig, TrainConfig, check_config, to_mapping
from alignpro.data.load import PromptRow, load_prompts
from alignpro.data.preferences import load_preferences
from alignpro.evaluate.progress import OnProgress, watch
from alignpro.evaluate.results import MixedGoal, MixReport, to_json
from alignpro.files import check_new_folder, whole_folder
from alignpro.fingerprints import of_adapter_folder, other_settings, read_fingerprints
from alignpro.lengths import fit_rows, unread_by
from alignpro.models.adapter import LoraWeights, require_lora, save_peft
from alignpro.models.adapter_files import MIXTURE
from alignpro.models.answer_scores import sequence_logprobs
from alignpro.models.mixture import BASE, Mixture, Sampling, read_mixture, save_mixture
from alignpro.models.native_model import NativeModel, load_model
from alignpro.models.redraw import restriction
from alignpro.models.seeds import derive_seed
from alignpro.pipeline import Pipeline
from alignpro.run_directory import RunConfig, configs_of_runs, find_record, is_run_dir
from alignpro.statistics import Floats, Interval, bootstrap_mean_ci
from alignpro.theory.mixture import (
    MixtureWeights,
    balance_draws,
    exponents_of,
    maxmin_weights,
)
from alignpro.train.metrics import read_metrics
from alignpro.types import Prompt, Rewrite, SamplingParams

_PROMPTS_AT_ONCE = 8  # between two words of progress

MixedRun = TrainConfig | PreferConfig


@dataclass(frozen=True)
class MixInputs:
    """The runs and their prompts, read and checked before any model is loaded."""

    runs: dict[Path, MixedRun]
    betas: list[float]  # the kl_coef that each run ended with, of preferences their beta
    beta: float  # the mixture's
    reference: Path | None  # what all began with; None: the base
    rows: list[PromptRow]


def run_mix(
    config: MixConfig,
    output: Path | None = None,
    on_progress: OnProgress | None = None,
    *,
    inputs: MixInputs | None = None,
) -> MixReport:
    """The weights of the runs' prompters that serve the worst-off goal best, measured on rewrites
    that they write (MPO: `theory.mixture`); their mixture as it is drawn from, and as one adapter
    of stacked rank, whose updates are theirs with these weights: the mixture itself to first order
    in the updates.

    output: a folder that nothing is in yet, which is then the mixture's (`save_mixture`, with the
        report), and the adapter's (``output/adapter``): all of it, or nothing.
    inputs: what `load_inputs` gives, where that is there already.

    Raises as `load_inputs`, and ValueError for rows that the prompter cannot read, as `fit_rows`,
    by the first run's on_too_long. FileExistsError: something is in ``output``.
    """
    check_config(config, MixConfig)
    if output is not None:
        check_new_folder(output)
    inputs = inputs or load_inputs(config)
    given, betas, beta = _Given.load(config, inputs, on_progress), inputs.betas, inputs.beta
    experts, reference = given.experts, given.reference
    by_experts = [
        given.written(run, expert, k)
        for k, (run, expert) in enumerate(zip(config.runs, experts, strict=True))
    ]
    samples = [[w for group in of for w in group] for of in zip(*by_experts, strict=True)]
    ratios = given.scored("all prompters", samples).ratios
    importance = math.log(len(experts)) - np.logaddexp.reduce(ratios, axis=2)
    mixed = maxmin_weights(ratios, importance, betas=betas, beta=beta)
    if config.sampling == "sequence":
        _check_exact(float(mixed.exponents.sum()), betas, beta)
    of_draws = config.sampling == "token" and config.weights != "whole" and len(experts) > 1
    if of_draws:
        weights, token_wise = given.balanced(mixed.weights)
    else:
        weights = mixed.weights
        token_wise = given.drawn(weights, "the mixture")
    exponents = exponents_of(weights, betas, beta)
    members = _members(config.runs, experts, exponents, reference)
    of_mixture, given_up = token_wise, None
    if config.sampling == "sequence":
        mixture = _mixture_of(members, config.sampling, config.tries)
        of_mixture = given.of("whole rewrites", mixture, len(experts) + 2)
        refused = given.model.stats()["sequence_given_up"]
        given_up = refused / (len(given.prompts) * config.num_rewrites)
    soup = soup_of(experts, list(exponents), reference)
    of_soup = given.of("the mixed adapter", soup, len(experts))
    acceptance = given.acceptance(members, exponents, token_wise)
    logs = importance + ratios @ exponents
    report = MixReport(
        goals=given.goals(mixed, weights, ratios, of_mixture, of_soup),
        kl_coef=beta,
        value=mixed.value,
        kkt_gap=mixed.kkt_gap,
        kl=mixed.kl,
        effective_samples=mixed.effective_samples,
        samples=len(experts) * config.num_rewrites,
        num_prompts=len(given.prompts),
        acceptance=acceptance,
        expected_acceptance=None if acceptance is None else float(np.exp(logs).mean()),
        given_up=given_up,
        config=to_mapping(config),
    )
    if output is not None:
        how = {"sampling": config.sampling, "tries": config.tries, "about": to_json(report)}
        with whole_folder(output) as partial:
            save_peft(partial / "adapter", soup)
            save_mixture(partial, members, **how)
    return report


def load_inputs(config: MixConfig, read: Mapping[Path, RunConfig] | None = None) -> MixInputs:
    """read: the runs' configurations, where they are read already.

    Raises ValueError for runs that did not begin with one untuned prompter, or not for the same
    use, and for goals without a KL penalty; FileNotFoundError for no run, or one that is not done.
    """
    read = configs_of_runs(config.runs) if read is None else read
    runs = {run: _mixed(run, of) for run, of in read.items()}
    (first_run, first), *others = runs.items()
    for run, other in others:
        _check_same_use(first_run, first, run, other)
    reference = _same_reference(config.runs)
    betas = [_kl_coef(run, of) for run, of in runs.items()]
    beta = sum(betas) / len(betas) if config.kl_coef is None else config.kl_coef
    if config.sampling == "sequence":
        _check_exact(min(betas) / beta, betas, beta)  # the least sum that exponents can have
    rows = load_prompts(config.data) if config.data is not None else _prompts_of(first)
    return MixInputs(runs, betas, beta, reference, rows[: config.num_prompts])


def is_mixed(config: MixConfig, inputs: MixInputs, output: Path) -> bool:
    """Whether the folder holds what `run_mix` would write there, of the same adapters."""
    record = find_record(output / MIXTURE)
    if record is None or record.get("config") != to_json(to_mapping(config)):
        return False
    members = zip(inputs.runs, read_mixture(output).members, strict=False)  # one may be untuned
    # A run has more beside its adapter, such as prompter.json.
    files = (
        (run / "adapter", file) for run, (of, _) in members for file in Path(str(of)).iterdir()
    )
    return all(
        (mine := folder / file.name).is_file() and filecmp.cmp(mine, file, shallow=False)
        for folder, file in files
    )


@dataclass(frozen=True)
class _Scored:
    """Rewrites of every prompt, in nats of whole rewrites."""

    ratios: Floats  # [prompts, samples, prompters]: log(prompter / untuned prompter)
    before: Floats  # [prompts, samples]: of the untuned prompter
    drawn: Floats  # [prompts, samples]: of what wrote them


@dataclass(frozen=True)
class _Given:
    """The prompters of the runs, and the prompts that they are compared on."""

    config: MixConfig
    inputs: MixInputs
    model: NativeModel
    pipeline: Pipeline
    prompts: list[Prompt]
    experts: list[LoraWeights]
    reference: LoraWeights | None  # what all began with; None: the base
    on_progress: OnProgress | None

    @classmethod
    def load(cls, config: MixConfig, inputs: MixInputs, on_progress: OnProgress | None) -> _Given:
        """Raises as `run_mix`."""
        runs = list(inputs.runs.values())
        first, began = runs[0], inputs.reference
        model = load_model(first.prompter, config.threads, date=first.date)
        pipeline = Pipeline(
            model, None, None, prompting=first.prompting, rewrite_params=_rewrite_of(runs)
        )
        unread = unread_by(pipeline, responses=False)
        rows = fit_rows(inputs.rows, unread, first.on_too_long).rows

        def matrices(folder: Path) -> LoraWeights:
            return require_lora(model.load_adapter(folder), f"runs: {folder}")

        return cls(
            *(config, inputs, model, pipeline),
            prompts=[row.prompt for row in rows],
            experts=[matrices(run / "adapter") for run in inputs.runs],
            reference=None if began is None else matrices(began),
            on_progress=on_progress,
        )

    def written(
        self, name: str, adapter: LoraWeights | Mixture, number: int
    ) -> list[list[Rewrite]]:
        """Rewrites of every prompt. number: of their stream of randomness."""
        show = watch(self.on_progress, name, len(self.prompts))
        writing, groups = self.pipeline.with_adapter(adapter), list[list[Rewrite]]()
        for begin in range(0, len(self.prompts), _PROMPTS_AT_ONCE):
            groups += writing.rewrite(
                self.prompts[begin : begin + _PROMPTS_AT_ONCE],
                num_rewrites=self.config.num_rewrites,
                seed=derive_seed(self.config.seed, number, begin),
            )
            if show is not None:
                show(len(groups))
        return groups

    def of(self, name: str, adapter: LoraWeights | Mixture, number: int) -> _Scored:
        """What it writes, scored. number: as of `written`."""
        return self.scored(name, self.written(name, adapter, number))

    def drawn(self, weights: Floats, name: str) -> _Scored:
        """Token by token, with the same randomness for any weights."""
        exponents = exponents_of(weights, self.inputs.betas, self.inputs.beta)
        members = _members(self.config.runs, self.experts, exponents, self.reference)
        return self.of(name, _mixture_of(members), len(self.experts) + 1)

    def balanced(self, weights: Floats) -> tuple[Floats, _Scored]:
        """Weights whose token-wise draws serve the worst-off goal best, and those draws: of a few
        rounds from the given weights on."""
        found = list[_Scored]()

        def draw(at: Floats) -> tuple[Floats, Floats]:
            found.append(self.drawn(at, f"the mixture, round {len(found) + 1}"))
            return found[-1].ratios, found[-1].drawn - found[-1].before

        best, number = balance_draws(weights, draw, self.inputs.betas, self.inputs.beta)
        return best, found[number]

    def scored(self, name: str, samples: Sequence[Sequence[Rewrite]]) -> _Scored:
        """Under every prompter. name: of what wrote them."""
        adapters, logprobs = [self.reference, *self.experts], list[Floats]()
        show = watch(self.on_progress, f"{name}, scored", len(adapters))
        for adapter in adapters:
            logprobs.append(self.logprobs(samples, adapter))
            if show is not None:
                show(len(logprobs))
        before, *after = logprobs
        return _Scored(
            np.stack([of - before for of in after], axis=2),
            before,
            np.array([[math.fsum(w.logprobs) for w in group] for group in samples]),
        )

    def logprobs(self, samples: Sequence[Sequence[Rewrite]], adapter: LoraWeights | None) -> Floats:
        """[prompts, samples] nats of whole rewrites."""
        flat = [w for group in samples for w in group]
        read, written = [w.prompter_tokens for w in flat], [w.tokens for w in flat]
        temperature = self.pipeline.rewrite_params.temperature
        sums = sequence_logprobs(self.model, read, written, temperature, adapter)
        return np.array(sums).reshape(len(samples), -1)

    def goals(
        self,
        mixed: MixtureWeights,
        weights: Floats,
        ratios: Floats,
        of_mixture: _Scored,
        of_soup: _Scored,
    ) -> dict[str, MixedGoal]:
        """By run. ratios: [prompts, samples, prompters], each prompter's own samples together."""
        betas = self.inputs.betas
        exponents = exponents_of(weights, betas, self.inputs.beta)
        goals = {}
        for k, run in enumerate(self.inputs.runs.values()):
            count = self.config.num_rewrites
            goals[self.config.runs[k]] = MixedGoal(
                reward=_goal_of(run),
                kl_coef=betas[k],
                weight=float(weights[k]),
                exponent=float(exponents[k]),
                of_expert=float(betas[k] * ratios[:, k * count : (k + 1) * count, k].mean()),
                of_mixture=float(mixed.implicit[k]),
                of_drawn=float(betas[k] * of_mixture.ratios[:, :, k].mean()),
                of_adapter=float(betas[k] * of_soup.ratios[:, :, k].mean()),
                whole_weight=None if weights is mixed.weights else float(mixed.weights[k]),
            )
        return goals

    def acceptance(
        self,
        members: Mapping[str, tuple[LoraWeights | None, float]],
        exponents: Floats,
        token_wise: _Scored,
    ) -> Interval | None:
        """How often a first draw is accepted (`models.mixture`); None where no rejection is exact,
        and of one prompt, which has no interval."""
        exact = min(weight for _, weight in members.values()) >= 0
        whole = restriction(self.pipeline.rewrite_params) is None
        if not (exact and whole and len(self.prompts) > 1):
            return None
        densities = token_wise.before + token_wise.ratios @ exponents
        accepted = np.exp(np.minimum(0.0, densities - token_wise.drawn)).mean(axis=1)
        return bootstrap_mean_ci(accepted.tolist(), seed=self.config.seed)


def _mixture_of(
    members: Mapping[str, tuple[LoraWeights | None, float]],
    sampling: Sampling = "token",
    tries: int = Mixture.tries,
) -> Mixture:
    parts = ((BASE if part is None else part, weight) for part, weight in members.values())
    return Mixture(tuple(parts), sampling, tries)


def _members(
    runs: Sequence[str],
    experts: Sequence[LoraWeights],
    exponents: Sequence[float] | Floats,
    reference: LoraWeights | None,
) -> dict[str, tuple[LoraWeights | None, float]]:
    """By the names of their folders; the untuned prompter has what the exponents leave of 1."""
    members: dict[str, tuple[LoraWeights | None, float]] = {
        f"{number}-{Path(run).resolve().name}": (expert, float(weight))
        for number, (run, expert, weight) in enumerate(
            zip(runs, experts, exponents, strict=True), start=1
        )
    }
    left = 1.0 - math.fsum(exponents)
    if abs(left) > 1e-9:
        members["untuned"] = (reference, left)
    return members


def soup_of(
    adapters: Sequence[LoraWeights], weights: Sequence[float], rest: LoraWeights | None
) -> LoraWeights:
    """One adapter whose update of every module is the weighted sum of theirs, exactly: A's rows and
    B's columns beside each other. rest: what has the weight that is left of 1; None: the base,
    which has no update."""
    parts = list(zip(adapters, weights, strict=True))
    left = 1.0 - math.fsum(weights)
    if rest is not None and abs(left) > 1e-9:
        parts.append((rest, left))
    parts = [(adapter, weight) for adapter, weight in parts if weight != 0.0]
    shapes = {
        name: (a.shape[1], b.shape[0])
        for adapter, _ in parts
        for name, (a, b) in adapter.matrices.items()
    }
    rank = sum(adapter.rank for adapter, _ in parts)
    matrices = {}
    for name, (inputs, outputs) in shapes.items():
        stacked_a = np.zeros((rank, inputs), np.float32)
        stacked_b = np.zeros((outputs, rank), np.float32)
        row = 0
        for adapter, weight in parts:
            if name in adapter.matrices:
                a, b = adapter.matrices[name]
                stacked_a[row : row + len(a)] = a
                stacked_b[:, row : row + len(a)] = np.float32(weight * adapter.scale) * b
            row += adapter.rank
        matrices[name] = (stacked_a, stacked_b)
    first = adapters[0]
    return LoraWeights(
        rank=rank,
        alpha=float(rank),
        rslora=False,
        matrices=matrices,
        base_model_name=first.base_model_name,
        base_fingerprint=first.base_fingerprint,
    )


def _mixed(run: Path, config: RunConfig) -> MixedRun:
    """Refuses a run that does not mix."""
    if not is_run_dir(run):
        raise FileNotFoundError(f"runs: {run}: expected the directory of a run")
    if not isinstance(config, TrainConfig | PreferConfig) or config.policy != "prompter":
        raise ValueError(
            f"runs: {run}: expected the training of a prompter, by a reward or on preferences"
        )
    if isinstance(config, TrainConfig) and config.normalize_advantage:
        raise ValueError(
            f"runs: {run}: trained with normalize_advantage, so that its KL penalty has another "
            "weight at every prompt: no mixture is known for that"
        )
    if config.anchor is not None:
        raise ValueError(
            f"runs: {run}: trained with anchor, so that its reference read other prompts than it: "
            "what it was trained for is not told by its log ratio to the untuned prompter"
        )
    if not (run / "adapter").is_dir():
        raise FileNotFoundError(f"runs: {run}: no adapter yet; let its training end first")
    return config


def _prompts_of(config: MixedRun) -> list[PromptRow]:
    """What a run was trained on, each prompt of its pairs once."""
    if isinstance(config, TrainConfig):
        return load_prompts(config.data)
    pairs = {pair.prompt: pair for pair in reversed(load_preferences(config.data))}
    return [PromptRow(p.prompt, dict(p.columns), p.place) for p in reversed(pairs.values())]


def _rewrite_of(runs: Sequence[MixedRun]) -> SamplingParams:
    """How rewrites are drawn: as in training by a reward; one on preferences drew none."""
    return next((run for run in runs if isinstance(run, TrainConfig)), runs[0]).rewrite


def _goal_of(config: MixedRun) -> str:
    if isinstance(config, TrainConfig):
        return str(config.reward)
    return f"preferences {config.data.path}"


def _check_same_use(run: Path, config: MixedRun, other_run: Path, other: MixedRun) -> None:
    names = ["prompter", "prompting"]
    if isinstance(config, TrainConfig) and isinstance(other, TrainConfig):
        names.append("rewrite")
    one, two = ({name: to_mapping(of)[name] for name in names} for of in (config, other))
    found = other_settings(one, two, read_fingerprints(run), read_fingerprints(other_run))
    found.pop("prompter.adapter", None)  # which is their reference
    if found:
        said = "; ".join(f"{path}: {mine!r}, {theirs!r}" for path, (mine, theirs) in found.items())
        raise ValueError(
            f"runs: expected prompters that read and write alike, {run} and {other_run} differ in "
            f"{said}"
        )


def _same_reference(runs: Sequence[str]) -> Path | None:
    folders = [Path(run) / "reference" for run in runs]
    hashes = {of_adapter_folder(f).hash if f.exists() else None for f in folders}
    if len(hashes) > 1:
        raise ValueError(
            f"runs: {', '.join(runs)}: expected trainings of one untuned prompter; their folders "
            "reference/ differ"
        )
    return folders[0] if folders[0].exists() else None


def _check_exact(total: float, betas: Sequence[float], beta: float) -> None:
    """Refuse to draw whole rewrites where the untuned prompter has a weight below 0."""
    if total > 1 + 1e-9:
        raise ValueError(
            f"sampling: sequence: expected exponents that sum to 1 or less, got {total:.4g} at "
            f"kl_coef {beta:g}; kl_coef={max(betas):g} and above give such; token takes any"
        )


def _kl_coef(run: Path, config: MixedRun) -> float:
    """What the run ended with: the weight that its prompter is near the optimum of."""
    value = config.kl_coef if isinstance(config, TrainConfig) else config.beta
    if isinstance(config, TrainConfig) and config.kl_target is not None:
        value = read_metrics(run / "metrics.jsonl")[-1]["kl_coef"]
    if not value > 0:
        raise ValueError(f"runs: {run}: expected a kl_coef above 0, got {value:g}")
    return float(value)
