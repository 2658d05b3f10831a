"""From the runs of several prompters to the mixture of them: drawn from, and as one adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from alignpro.config import MixConfig, TrainConfig, check_config, to_mapping
from alignpro.data.load import load_prompts
from alignpro.evaluate.progress import OnProgress, watch
from alignpro.evaluate.results import MixedGoal, MixReport, to_json
from alignpro.fingerprints import of_adapter_folder
from alignpro.models.adapter import LoraWeights, require_lora, save_peft
from alignpro.models.answer_scores import sequence_logprobs
from alignpro.models.mixture import BASE, Mixture, save_mixture
from alignpro.models.native_model import NativeModel, load_model
from alignpro.models.redraw import restriction
from alignpro.models.seeds import derive_seed
from alignpro.pipeline import Pipeline
from alignpro.run_directory import config_of_run, is_run_dir
from alignpro.statistics import Floats, bootstrap_mean_ci
from alignpro.theory.mixture import maxmin_weights
from alignpro.train.metrics import read_metrics
from alignpro.types import Rewrite

_PROMPTS_AT_ONCE = 8  # between two words of progress


def run_mix(
    config: MixConfig, output: Path | None = None, on_progress: OnProgress | None = None
) -> MixReport:
    """The weights of the runs' prompters that serve the worst-off goal best, measured on rewrites
    that they write (MPO: `theory.mixture`); their mixture as it is drawn from, and as one adapter
    of stacked rank, whose updates are theirs with these weights: the mixture itself to first order
    in the updates.

    output: a folder that nothing is in yet, which is then the mixture's (`save_mixture`, with the
        report), and the adapter's (``output/adapter``).

    Raises:
        ValueError: runs that did not begin with one untuned prompter, or not for the same use;
            goals without a KL penalty. FileNotFoundError: no run, or one that is not done.
    """
    check_config(config, MixConfig)
    runs = [_read_run(Path(run)) for run in config.runs]
    first = runs[0]
    for name, other in zip(config.runs[1:], runs[1:], strict=True):
        _check_same_use(config.runs[0], first, name, other)
    reference_folder = _same_reference(config.runs)
    for name in () if output is None else ("adapter", "mixture.json"):
        if output is not None and (output / name).exists():
            raise FileExistsError(f"{output / name}: is there already; name another folder")
    betas = [_kl_coef(Path(run), of) for run, of in zip(config.runs, runs, strict=True)]
    beta = config.kl_coef if config.kl_coef is not None else sum(betas) / len(betas)
    rows = load_prompts(config.data or first.data)[: config.num_prompts]
    model = load_model(first.prompter, config.threads, date=first.date)

    def matrices(folder: Path) -> LoraWeights:
        return require_lora(model.load_adapter(folder), f"runs: {folder}")

    experts = [matrices(Path(run) / "adapter") for run in config.runs]
    reference = None if reference_folder is None else matrices(reference_folder)
    pipeline = Pipeline(model, model, None, prompting=first.prompting, rewrite_params=first.rewrite)
    prompts = [row.prompt for row in rows]

    def written(name: str, adapter: LoraWeights | Mixture, number: int) -> list[list[Rewrite]]:
        show = watch(on_progress, name, len(prompts))
        before, groups = pipeline.with_adapter(adapter), list[list[Rewrite]]()
        for begin in range(0, len(prompts), _PROMPTS_AT_ONCE):
            groups += before.rewrite(
                prompts[begin : begin + _PROMPTS_AT_ONCE],
                num_rewrites=config.num_rewrites,
                seed=derive_seed(config.seed, number, begin),
            )
            if show is not None:
                show(len(groups))
        return groups

    drawn = [
        written(run, expert, k)
        for k, (run, expert) in enumerate(zip(config.runs, experts, strict=True))
    ]
    samples = [[w for group in of for w in group] for of in zip(*drawn, strict=True)]
    temperature = first.rewrite.temperature
    by_expert = np.stack([_logprobs(model, samples, e, temperature) for e in experts], axis=2)
    by_reference = _logprobs(model, samples, reference, temperature)
    proposal = np.logaddexp.reduce(by_expert, axis=2) - math.log(len(experts))
    ratios = by_expert - by_reference[..., None]
    mixed = maxmin_weights(ratios, by_reference - proposal, betas=betas, beta=beta)
    members = _members(config.runs, experts, mixed.exponents, reference)
    mixture = Mixture(
        tuple((BASE if part is None else part, weight) for part, weight in members.values()),
        config.sampling,
        config.tries,
    )
    token_wise = written("the mixture", replace(mixture, sampling="token"), len(experts) + 1)
    of_mixture, given_up = token_wise, None
    if config.sampling == "sequence":
        of_mixture = written("whole rewrites", mixture, len(experts) + 2)
        given_up = model.stats()["sequence_given_up"] / (len(prompts) * config.num_rewrites)
    soup = soup_of(experts, list(mixed.exponents), reference)
    of_soup = written("the mixed adapter", soup, len(experts))
    soup_reference = _logprobs(model, of_soup, reference, temperature)
    drawn_reference = _logprobs(model, of_mixture, reference, temperature)
    goals = {}
    for k, (run, expert) in enumerate(zip(config.runs, experts, strict=True)):
        own = ratios[:, k * config.num_rewrites : (k + 1) * config.num_rewrites, k]
        reached = _logprobs(model, of_soup, expert, temperature) - soup_reference
        by_draws = _logprobs(model, of_mixture, expert, temperature) - drawn_reference
        goals[run] = MixedGoal(
            reward=str(runs[k].reward),
            kl_coef=betas[k],
            weight=float(mixed.weights[k]),
            exponent=float(mixed.exponents[k]),
            of_expert=float(betas[k] * own.mean()),
            of_mixture=float(mixed.implicit[k]),
            of_drawn=float(betas[k] * by_draws.mean()),
            of_adapter=float(betas[k] * reached.mean()),
        )
    acceptance = expected = None
    simplex = min(weight for _, weight in members.values()) >= 0
    if simplex and len(prompts) > 1 and restriction(first.rewrite) is None:
        densities = np.zeros((len(prompts), config.num_rewrites))
        for part, weight in members.values():
            densities += weight * _logprobs(model, token_wise, part, temperature)
        drawn_by = [[math.fsum(w.logprobs) for w in group] for group in token_wise]
        accepted = np.exp(np.minimum(0.0, densities - np.array(drawn_by))).mean(axis=1)
        acceptance = bootstrap_mean_ci(accepted.tolist(), seed=config.seed)
        logs = by_reference - proposal + ratios @ mixed.exponents
        expected = float(np.exp(logs).mean(axis=1).mean())
    report = MixReport(
        goals=goals,
        kl_coef=beta,
        value=mixed.value,
        kkt_gap=mixed.kkt_gap,
        kl=mixed.kl,
        effective_samples=mixed.effective_samples,
        samples=len(experts) * config.num_rewrites,
        num_prompts=len(prompts),
        acceptance=acceptance,
        expected_acceptance=expected,
        given_up=given_up,
        config=to_mapping(config),
    )
    if output is not None:
        save_peft(output / "adapter", soup)
        how = {"sampling": config.sampling, "tries": config.tries, "about": to_json(report)}
        save_mixture(output, members, **how)
    return report


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


def _logprobs(
    model: NativeModel,
    samples: Sequence[Sequence[Rewrite]],
    adapter: LoraWeights | None,
    temperature: float,
) -> Floats:
    """[prompts, samples] nats of whole rewrites."""
    flat = [w for group in samples for w in group]
    read, written = [w.prompter_tokens for w in flat], [w.tokens for w in flat]
    sums = sequence_logprobs(model, read, written, temperature, adapter)
    return np.array(sums).reshape(len(samples), -1)


def _read_run(run: Path) -> TrainConfig:
    if not is_run_dir(run):
        raise FileNotFoundError(f"runs: {run}: expected the directory of a run")
    config = config_of_run(run)
    if not isinstance(config, TrainConfig) or config.policy != "prompter":
        raise ValueError(f"runs: {run}: expected the training of a prompter")
    if config.normalize_advantage:
        raise ValueError(
            f"runs: {run}: trained with normalize_advantage, so that its KL penalty has another "
            "weight at every prompt: no mixture is known for that"
        )
    if not (run / "adapter").is_dir():
        raise FileNotFoundError(f"runs: {run}: no adapter yet; let its training end first")
    return config


def _check_same_use(name: str, first: TrainConfig, other_name: str, other: TrainConfig) -> None:
    for what in ("prompter", "prompting", "rewrite"):
        mine, theirs = getattr(first, what), getattr(other, what)
        if mine != theirs:
            raise ValueError(f"runs: {name} and {other_name} differ in {what}: {mine}, {theirs}")


def _same_reference(runs: Sequence[str]) -> Path | None:
    folders = [Path(run) / "reference" for run in runs]
    hashes = {of_adapter_folder(f).hash if f.exists() else None for f in folders}
    if len(hashes) > 1:
        raise ValueError(
            f"runs: {', '.join(runs)}: expected trainings of one untuned prompter; their folders "
            "reference/ differ"
        )
    return folders[0] if folders[0].exists() else None


def _kl_coef(run: Path, config: TrainConfig) -> float:
    """What the run ended with: the weight that its prompter is near the optimum of."""
    value = config.kl_coef
    if config.kl_target is not None:
        value = read_metrics(run / "metrics.jsonl")[-1]["kl_coef"]
    if not value > 0:
        raise ValueError(f"runs: {run}: expected a kl_coef above 0, got {value:g}")
    return float(value)
