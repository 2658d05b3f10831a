"""Fitting a reward to preferences: a Bradley-Terry head on how a frozen model reads an answer.

Pairs are split by how their conversation begins (its first user turn, and what stands before it):
what a model has seen of a dialogue says nothing of how it judges another.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alignpro import fingerprints
from alignpro.config import (
    ModelConfig,
    PreferencesConfig,
    RewardFitConfig,
    check_config,
    to_mapping,
)
from alignpro.data.files import DataError
from alignpro.data.preferences import PreferenceRow, load_preferences
from alignpro.files import check_new_folder, whole_folder, write_json
from alignpro.lengths import fit_rows
from alignpro.models.native_model import NativeModel, load_model
from alignpro.objective.bradley_terry import fit_bradley_terry
from alignpro.rewards.learned import RECORD, answer_features, read_answer
from alignpro.statistics import Calibration, Interval, calibration, proportion_ci
from alignpro.train.callbacks import OnProgress
from alignpro.train.policy import one_torch_thread
from alignpro.types import Conversation

_log = logging.getLogger(__name__)
Opening = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RewardQuality:
    """What a reward is worth on pairs that nothing of it was fitted to."""

    pairs: int
    conversations: int  # that begin differently: the independent unit
    accuracy: Interval  # of the mean over conversations; pairs of equal rewards count a half
    log_loss: float  # log 2 = 0.693 is that of a coin
    calibration: Calibration  # of the probability that the answer with the higher reward is chosen
    longer: float  # accuracy of taking the longer answer


@dataclass(frozen=True)
class RewardFit:
    """What `fit_reward` found, and how good it is."""

    weights: NDArray[np.float64]  # [D]
    bias: float
    strength: float
    fold_losses: dict[float, float]  # log loss of the cross-validation, by strength
    training: int  # pairs
    training_accuracy: float
    held_out: RewardQuality


def run_reward_fit(
    config: RewardFitConfig, output: str | Path, on_progress: OnProgress | None = None
) -> RewardFit:
    """Fit a reward to the pairs that the configuration names, and write its folder, which
    ``learned:FOLDER`` then names wherever a reward is named.

    Raises:
        FileExistsError: something is in ``output``. ValueError: pairs that cannot be read, or too
            few conversations to hold some out and choose by the others.
    """
    check_config(config, RewardFitConfig)
    output = Path(output)
    check_new_folder(output)
    rows = load_preferences(config.data)
    held_out = None
    if config.heldout is not None:
        source = config.heldout.of(config.data)
        assert isinstance(source, PreferencesConfig)  # one of the two
        held_out = load_preferences(source)
    model = load_model(config.model, config.threads, date=config.date)

    def unread(row: PreferenceRow) -> str | None:
        try:
            for answer in (row.chosen, row.rejected):
                read_answer(model, row.prompt, answer, config.state)
        except ValueError as error:
            return str(error)
        return None

    rows = fit_rows(rows, unread, config.on_too_long).rows
    if held_out is not None:
        held_out = fit_rows(held_out, unread, config.on_too_long).rows
    training, held_out = split_rows(rows, held_out, config)
    features = _features(model, [*training, *held_out], config, on_progress)
    with one_torch_thread():
        fit = fit_reward(
            *(training, features[: len(training)]),
            *(held_out, features[len(training) :]),
            config,
        )
    with whole_folder(output) as partial:
        write_json(partial / RECORD, _record(fit, config, model, training))
    return fit


def opening(row: PreferenceRow) -> Opening:
    """What a row's conversation begins with: up to its first user turn."""
    conversation = Conversation.of(row.prompt)
    turns = (*conversation.history, ("user", conversation.last_turn))
    first = next(i for i, (role, _) in enumerate(turns) if role == "user")
    return turns[: first + 1]


def split_rows(
    rows: Sequence[PreferenceRow],
    held_out: Sequence[PreferenceRow] | None,
    config: RewardFitConfig,
) -> tuple[list[PreferenceRow], list[PreferenceRow]]:
    """Rows to fit to, and rows to measure on: ``held_out``, or a share of the conversations. No
    conversation begins alike in both.

    Raises ValueError where too few are left.
    """
    if held_out is None:
        known = sorted({opening(row) for row in rows})
        count = round(config.held_out_share * len(known))
        apart = set(random.Random(config.seed).sample(known, count))
        held_out = [row for row in rows if opening(row) in apart]
    else:
        apart = {opening(row) for row in held_out}
    training = [row for row in rows if opening(row) not in apart]
    left_out = len(rows) - len(training)
    if left_out and config.heldout is not None:
        _log.warning(
            "%s: %d of %d pairs belong to conversations that are held out, and are left out of the "
            "fit",
            *(config.data.path, left_out, len(rows)),
        )
    for what, part, least in (("fit to", training, config.folds), ("held out", held_out, 2)):
        there = len({opening(row) for row in part})
        if there < least:
            raise DataError(
                f"{config.data.path}: expected at least {least} conversations that begin "
                f"differently to be {what}, got {there}"
            )
    return training, list(held_out)


def fit_reward(
    training: Sequence[PreferenceRow],
    features: NDArray[np.float32],
    held_out: Sequence[PreferenceRow],
    held_out_features: NDArray[np.float32],
    config: RewardFitConfig,
) -> RewardFit:
    """features: [pairs, 2, D], of the chosen and the rejected answer of each row."""
    known = features.astype(np.float64)
    deviation = known.std(axis=(0, 1))
    scale = np.where(deviation > 0, deviation, 1.0)  # a feature that never moves says nothing
    differences = torch.from_numpy((known[:, 0] - known[:, 1]) / scale)
    fold_losses = _cross_validated(training, differences, config)
    strength = min(fold_losses, key=lambda s: (fold_losses[s], -s))
    weights = fit_bradley_terry(differences, strength).numpy() / scale
    margins = (known[:, 0] - known[:, 1]) @ weights
    apart = held_out_features.astype(np.float64)
    return RewardFit(
        weights=weights,
        bias=-float(known.mean(axis=(0, 1)) @ weights),
        strength=strength,
        fold_losses=fold_losses,
        training=len(training),
        training_accuracy=float(_correct(margins).mean()),
        held_out=measure_reward(held_out, (apart[:, 0] - apart[:, 1]) @ weights),
    )


def measure_reward(rows: Sequence[PreferenceRow], margins: NDArray[np.float64]) -> RewardQuality:
    """margins: [pairs], the reward of each row's chosen answer above that of its rejected one."""
    correct = _correct(margins)
    _, conversation = np.unique([repr(opening(row)) for row in rows], return_inverse=True)
    by_conversation = np.bincount(conversation, weights=correct) / np.bincount(conversation)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    longer = [float(len(r.chosen) - len(r.rejected)) for r in rows]
    return RewardQuality(
        pairs=len(rows),
        conversations=len(by_conversation),
        accuracy=proportion_ci(float(by_conversation.sum()), len(by_conversation)),
        log_loss=float(np.logaddexp(0, -margins).mean()),
        calibration=calibration(confidence, correct),
        longer=float(_correct(np.array(longer)).mean()),
    )


def _cross_validated(
    rows: Sequence[PreferenceRow], differences: torch.Tensor, config: RewardFitConfig
) -> dict[float, float]:
    """Log loss of every strength on conversations that were left out of its fit."""
    openings = sorted({opening(row) for row in rows})
    random.Random(config.seed).shuffle(openings)
    fold_of = {one: place % config.folds for place, one in enumerate(openings)}
    fold = torch.tensor([fold_of[opening(row)] for row in rows])
    losses = {}
    for strength in config.strengths:
        margins = torch.empty(len(rows), dtype=torch.float64)
        for number in range(config.folds):
            left_out = fold == number
            weights = fit_bradley_terry(differences[~left_out], strength)
            margins[left_out] = differences[left_out] @ weights
        losses[strength] = float(torch.nn.functional.softplus(-margins).mean())
    return losses


def _correct(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((np.sign(margins) + 1) / 2)


def _features(
    model: NativeModel,
    rows: Sequence[PreferenceRow],
    config: RewardFitConfig,
    on_progress: OnProgress | None,
) -> NDArray[np.float32]:
    """[pairs, 2, D]."""

    def show(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress("reading", done // 2, total // 2)

    chats = [
        read_answer(model, row.prompt, answer, config.state)
        for row in rows
        for answer in (row.chosen, row.rejected)
    ]
    return answer_features(model, chats, show).reshape(len(rows), 2, -1)


def _record(
    fit: RewardFit,
    config: RewardFitConfig,
    model: NativeModel,
    training: Sequence[PreferenceRow],
) -> dict[str, Any]:
    """What `LearnedReward` reads (model, state, weights, bias), and what there is to know of it."""
    chosen, default = to_mapping(config.model), to_mapping(ModelConfig())
    options = {k: v for k, v in chosen.items() if v != default[k] and k != "model"}
    quality = asdict(fit.held_out)
    quality["accuracy"] = fit.held_out.accuracy._asdict()
    data = fingerprints.of_rows(
        str(config.data.path),
        [row.prompt for row in training],
        {side: [getattr(row, side) for row in training] for side in ("chosen", "rejected")},
    )
    return {
        "model": {
            "name": config.model.name,
            "options": options,
            "date": model.tokenizer.date,
            "fingerprint": model.fingerprint,
        },
        "state": config.state,
        "config": to_mapping(config),
        "data": asdict(data),
        "strength": fit.strength,
        "fold_losses": {str(strength): loss for strength, loss in fit.fold_losses.items()},
        "training": {"pairs": fit.training, "accuracy": fit.training_accuracy},
        "heldout": quality,
        "bias": fit.bias,
        "weights": fit.weights.tolist(),
    }
