"""The pooled rewards: the dense formula, many observations, few of them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignpro.objective.pooled_rewards import _FLOOR, pooled_rewards, principal


def few(seed=0, prompts=7, texts=4, count=40, size=5):
    rng = np.random.default_rng(seed)
    return {
        "features": torch.from_numpy(rng.normal(size=(prompts, size))),
        "prompt": torch.from_numpy(rng.integers(prompts, size=count)),
        "text": torch.from_numpy(rng.integers(texts, size=count)),
        "rewards": torch.from_numpy(rng.normal(2.0, 0.7, size=count)),
    }


def test_the_posterior_is_the_formula():
    given = few()
    result = pooled_rewards(**given, num_texts=5)  # the last one was never answered
    x, i, t, y = (given[k].numpy() for k in ("features", "prompt", "text", "rewards"))
    x = x - x.mean(axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    near = np.exp(result.sharpness * (x @ x.T - 1))

    def covariance(p, s, q, u):
        same = s == u
        rest = result.prompt_features * near[p, q] + result.prompt * (p == q)
        return same * (result.text + result.text_by_features * near[p, q]) + rest

    seen = list(zip(i, t, strict=True))
    gram = np.array([[covariance(p, s, q, u) for q, u in seen] for p, s in seen])
    gram += np.eye(len(y)) * (result.noise + _FLOOR * y.var())
    weights = np.linalg.solve(gram, y - y.mean())
    expected = [
        [
            y.mean()
            + sum(covariance(p, s, q, u) * w for (q, u), w in zip(seen, weights, strict=True))
            for s in range(5)
        ]
        for p in range(7)
    ]
    np.testing.assert_allclose(result.mean.numpy(), expected, rtol=1e-7)


def test_many_observations_are_believed():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(3, 2))
    prompt, text = np.repeat(np.arange(3), 160), np.tile([0, 1], 240)
    rewards = truth[prompt, text] + 0.5 * rng.normal(size=480)
    result = pooled_rewards(
        torch.from_numpy(rng.normal(size=(3, 4))),
        torch.from_numpy(prompt),
        torch.from_numpy(text),
        torch.from_numpy(rewards),
        num_texts=2,
    )
    sample_means = [[rewards[(prompt == p) & (text == t)].mean() for t in (0, 1)] for p in range(3)]
    np.testing.assert_allclose(result.mean.numpy(), sample_means, atol=0.05)
    assert result.noise == pytest.approx(0.25, rel=0.2)


def test_one_response_a_prompt_finds_what_is_best_for_its_kind():
    """60 prompts of 3 kinds, 3 texts; the right one earns 1 in 2 answers, another 1 in 8."""
    rng = np.random.default_rng(2)
    kind = np.repeat(np.arange(3), 20)
    features = np.eye(3)[kind] @ rng.normal(size=(3, 16)) + 0.3 * rng.normal(size=(60, 16))
    prompt = np.repeat(np.arange(60), 2)
    text = np.concatenate([rng.choice(3, size=2, replace=False) for _ in range(60)])
    right = text == kind[prompt]
    rewards = (rng.random(120) < np.where(right, 0.5, 0.125)).astype(float)
    result = pooled_rewards(*map(torch.from_numpy, (features, prompt, text, rewards)), num_texts=3)
    found = result.mean.argmax(dim=1).numpy() == kind
    assert found.mean() > 0.85
    # Each prompt's own two responses alone say little.
    own = np.full((60, 3), -1.0)
    own[prompt, text] = rewards
    assert (own.argmax(axis=1) == kind).mean() < 0.6


def test_principal_axes_keep_what_varies_most():
    generator = torch.Generator().manual_seed(0)
    signal, noise, plane = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((30, 2), (30, 50), (2, 50))
    )

    def apart(x):
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")

    rows = 7 + 10 * signal @ plane + 0.01 * noise
    assert torch.allclose(apart(principal(rows, 50)), apart(rows))
    kept = principal(rows, 2)
    assert kept.shape == (30, 2) and kept.mean(dim=0).abs().max() < 1e-9
    assert torch.allclose(apart(kept), apart(rows), rtol=0.01, atol=0.1)
    assert not torch.allclose(apart(principal(rows, 1)), apart(rows), rtol=0.2, atol=1)


def test_rewards_that_are_all_the_same_teach_nothing():
    given = few() | {"rewards": torch.full((40,), 0.25)}
    result = pooled_rewards(**given, num_texts=4)
    torch.testing.assert_close(result.mean, torch.full((7, 4), 0.25, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.zeros(3)}, r"features: expected \[prompts, size\]"),
        ({"rewards": torch.zeros(39)}, "of one shape"),
        ({"prompt": torch.full((40,), 7)}, r"prompt: expected numbers in \[0, 7\)"),
        ({"text": torch.full((40,), -1)}, r"text: expected numbers in \[0, 4\)"),
        ({"rewards": torch.full((40,), float("nan"))}, "finite"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        pooled_rewards(**(few() | changes), num_texts=4)
