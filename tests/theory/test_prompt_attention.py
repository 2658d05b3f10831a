"""The model's formulas against inputs that are drawn, and gradients against differences."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.theory.prompt_attention import (
    AttentionData,
    Measured,
    attend,
    gradients,
    learned_head_error,
    measure,
    three_steps,
)

SMALL = AttentionData()
MANY = AttentionData(tokens=800, relevant=80, dimension=2, relevance=2.0, signal=0.15)


def loss(x: np.ndarray, y: np.ndarray, w: np.ndarray, q: np.ndarray) -> float:
    return float(0.5 * np.mean((y - attend(x, q)[0] @ w) ** 2))


def measured(kappa: float) -> Measured:
    random = np.random.default_rng(2)
    prompt = kappa * MANY.direction
    return measure(MANY, MANY.label_direction, prompt, inputs=4000, random=random)


def test_gradients_are_those_of_the_loss() -> None:
    random = np.random.default_rng(0)
    x, y = SMALL.draw(50, random)
    w, q = random.standard_normal((2, SMALL.dimension))
    by_head, by_prompt = gradients(x, y, w, q)
    for axis in np.eye(SMALL.dimension) * 1e-6:
        head = (loss(x, y, w - axis, q) - loss(x, y, w + axis, q)) / 2e-6
        prompt = (loss(x, y, w, q - axis) - loss(x, y, w, q + axis)) / 2e-6
        assert head == pytest.approx(by_head @ axis / 1e-6, abs=1e-8)
        assert prompt == pytest.approx(by_prompt @ axis / 1e-6, abs=1e-8)


def test_the_first_steps_go_along_what_they_should() -> None:
    c = 0.2
    exact = SMALL.prompt_gradient(c) / SMALL.relevance
    assert exact[0] == pytest.approx(0.0310400)
    assert not exact[1:].any()
    random = np.random.default_rng(1)
    inputs = 100_000
    x, y = SMALL.draw(inputs, random)
    by_head, _ = gradients(x, y, np.zeros(8), np.zeros(8))
    np.testing.assert_allclose(by_head, SMALL.head_gradient(), atol=4e-3)
    _, by_prompt = gradients(x, y, c * SMALL.label_direction, np.zeros(8))
    np.testing.assert_allclose(by_prompt, SMALL.prompt_gradient(c), atol=2.5e-3)
    # Not only in the first order of c.
    many = AttentionData(tokens=3, relevant=1, relevance=0.7, signal=1.3, noise=0.8, dimension=3)
    x, y = many.draw(400_000, random)
    _, by_prompt = gradients(x, y, 2.0 * many.label_direction, np.zeros(3))
    np.testing.assert_allclose(by_prompt, many.prompt_gradient(2.0), atol=1e-2)


@pytest.mark.parametrize(
    ("kappa", "mass", "error"),
    [(0.0, 0.1, 0.327), (0.25, 0.2104, 0.172), (0.5, 0.3324, 0.112), (0.75, 0.4201, 0.172)],
)
def test_predictions_for_many_tokens(kappa: float, mass: float, error: float) -> None:
    assert MANY.relevant_mass(kappa) == pytest.approx(mass, abs=6e-5)
    assert MANY.error(kappa) == pytest.approx(error, abs=6e-4)
    found = measured(kappa)
    assert found.mass == pytest.approx(mass, abs=2e-3)
    # exp((kappa sigma Q)^2) is 1, 1.3, 2.7 and 9.5, of 800 tokens.
    assert found.error == pytest.approx(error, abs=0.02 if kappa <= 0.5 else 0.05)


def test_a_prompt_can_be_too_sharp() -> None:
    assert MANY.best_kappa == 0.5
    assert MANY.gain(MANY.best_kappa) == pytest.approx(math.e)
    assert MANY.gain(0.4) < MANY.gain(0.5) > MANY.gain(0.6)
    assert max(np.linspace(0, 3, 301), key=MANY.relevant_mass) == pytest.approx(1.0)
    errors = [measured(kappa).error for kappa in (0.0, 0.5, 1.0, 2.0)]
    none, best, sharp, sharper = errors
    assert best < sharp < none < sharper


def test_three_steps_beat_the_best_head_without_a_prompt() -> None:
    first, second, third = three_steps(SMALL, inputs=20_000, head_rate=1.0, prompt_rate=16.0)
    np.testing.assert_allclose(first.head, SMALL.head_gradient(), atol=0.01)
    assert second.head is first.head
    along = second.prompt @ SMALL.direction / np.linalg.norm(second.prompt) / SMALL.relevance
    assert along > 0.99
    random = np.random.default_rng(4)
    before = measure(SMALL, SMALL.label_direction, np.zeros(8), inputs=20_000, random=random)
    after = measure(SMALL, third.head, third.prompt, inputs=20_000, random=random)
    assert before.error == pytest.approx(SMALL.error(0.0), abs=0.01)
    assert after.error == pytest.approx(SMALL.error(SMALL.best_kappa), abs=0.01)
    assert after.mass > 1.5 * before.mass


def test_no_linear_model_can_do_what_attention_does() -> None:
    # One relevant token, three that cancel its label: the mean of the tokens does not know it.
    random = np.random.default_rng(5)
    labels = random.choice([-1.0, 1.0], 2000)
    q, w = np.array([4.0, 0.0]), np.array([0.0, 1.0])
    x = random.uniform(-1, 1, (2000, 4, 2)) * [1.0, 0.0] - labels[:, None, None] * w / 3
    x[:, 0] = q + labels[:, None] * w
    mean = x.mean(axis=1)
    assert np.abs(mean @ w).max() < 1e-12
    returned, _ = attend(x, 4 * q)
    assert (labels * (returned @ w) > 0).all()


@pytest.mark.parametrize(
    ("data", "kappa", "samples"),
    [
        (AttentionData(300, 30, 3, relevance=0.5, signal=1.5), 0.4, 20),
        (AttentionData(400, 40, 2, relevance=1.2, signal=1.0), 0.5, 20),
        (AttentionData(400, 40, 2, relevance=1.2, signal=1.0), 0.5, 400),
        (AttentionData(200, 40, 30, relevance=0.3, signal=0.6, noise=1.2), 0.3, 30),
    ],
)
def test_what_a_learned_head_errs(data: AttentionData, kappa: float, samples: int) -> None:
    random = np.random.default_rng(6)
    heads = 12_000 // samples

    def returned(inputs: int) -> tuple[np.ndarray, np.ndarray]:
        parts = [data.draw(200, random) for _ in range(inputs // 200)]
        found = [attend(x, kappa * data.direction)[0] for x, _ in parts]
        return np.concatenate(found), np.concatenate([y for _, y in parts])

    x, y = returned(12_000)
    learned = (x * y[:, None]).reshape(heads, samples, -1).mean(axis=1)
    x, y = returned(2000)
    error = float((np.sign(x @ learned.T) != y[:, None]).mean())
    # Heads are few: errors of one head vary as much as they are.
    assert learned_head_error(data, kappa, samples) == pytest.approx(error, abs=0.04, rel=0.15)


def test_a_learned_head_errs_more_with_fewer_samples() -> None:
    known = learned_head_error(MANY, 0.5, 10**15)
    few = [learned_head_error(MANY, 0.5, samples) for samples in (1, 10, 100)]
    assert few == sorted(few, reverse=True) and few[-1] > known
    assert known == pytest.approx(MANY.error(0.5), abs=1e-6)
    with pytest.raises(ValueError, match="samples: expected 1 or more, got 0"):
        learned_head_error(MANY, 0.5, 0)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"relevant": 20}, "relevant"),
        ({"relevant": 0}, "relevant"),
        ({"dimension": 1}, "dimension"),
        ({"noise": 0.0}, "noise"),
        ({"signal": math.nan}, "signal"),
        ({"relevance": 60.0}, "at most 50 times noise"),
        ({"noise": 1e-3}, "at most 50 times noise"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        AttentionData(**wrong)  # type: ignore[arg-type]


def test_the_command_draws_what_it_says(tmp_path: Path) -> None:
    command = ["theory", "prompt-attention", "--tokens", "50", "--relevant", "5", "--inputs", "200"]
    plot = tmp_path / "curves.svg"
    said = CliRunner().invoke(app, [*command, "--plot", str(plot)])
    assert said.exit_code == 0, said.output
    assert "best is kappa 0.5: 2.72 times" in said.stdout
    assert plot.read_text(encoding="utf-8").count("<use") >= 2 * 13  # a mark a point
    refused = CliRunner().invoke(app, [*command, "--relevant", "50"])
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1, refused.stderr


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (["--seed", "-1"], "'--seed'"),
        (["--tokens", "100000000000"], "'--tokens'"),
        (["--plot", "curves.txt"], "curves.txt: expected a suffix of "),
    ],
)
def test_the_command_refuses_before_anything_is_drawn(
    wrong: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["theory", "prompt-attention", *wrong])
    assert refused.exit_code == 2 and word in refused.stderr, refused.stderr
    assert not list(tmp_path.iterdir())


def test_headroom_refuses_another_plot_before_it_draws() -> None:
    refused = CliRunner().invoke(app, ["headroom", "reward=topic", "--plot", "frontier.txt"])
    assert refused.exit_code == 2 and "expected a suffix of " in refused.stderr, refused.stderr
