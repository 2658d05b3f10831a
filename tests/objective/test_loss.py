"""The loss by hand, its accumulation, its ratio and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from alignpro.objective import Metric, PolicyBatch, merge_metrics, policy_loss, token_advantages


def make_batch(**changes) -> PolicyBatch:
    """Two rewrites of 2 and 1 tokens, on policy."""
    logprob = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    fields = {
        "logprob": logprob,
        "kl": torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64),
        "entropy": torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64),
        "reference_logprob": torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64),
        "sampled_logprob": logprob.clone(),
        "sequence": torch.tensor([0, 0, 1]),
        "advantage": torch.tensor([2.0, 2.0, -1.0], dtype=torch.float64),
    }
    fields.update(changes)
    for name in ("logprob", "kl"):
        fields[name] = fields[name].clone().requires_grad_()
    return PolicyBatch(**fields)


def values(metrics):
    return {name: metric.value for name, metric in metrics.items()}


def test_loss_gradient_and_metrics_by_hand():
    batch = make_batch(advantage=torch.tensor([1.9, 2.0, -1.0], dtype=torch.float64))
    result = policy_loss(batch, 0.4, total_rewrites=2)
    result.loss.backward()
    metrics = values(result.metrics)
    # A_0 = 2 - 0.4*0.25 = 1.9, A_1 = 2, A_2 = -1; ratios 1.
    assert result.metrics["policy_loss"].value == pytest.approx(-(1.9 + 2 - 1) / 2)
    assert result.metrics["kl_loss"].value == pytest.approx(0.4 * 0.875 / 2)
    assert result.loss.item() == pytest.approx(-1.45 + 0.175)
    assert batch.logprob.grad.tolist() == pytest.approx([-0.95, -1.0, 0.5])
    assert batch.kl.grad.tolist() == pytest.approx([0.2, 0.2, 0.2])
    assert metrics["loss"] == result.loss.item()
    assert metrics["kl_per_rewrite"] == pytest.approx(0.4375)
    assert metrics["k1_per_rewrite"] == pytest.approx((0.5 - 1.0 + 0.0) / 2)
    k3 = (math.exp(-0.5) - 1 + 0.5) + (math.exp(1) - 1 - 1)
    assert metrics["k3_per_rewrite"] == pytest.approx(k3 / 2)
    assert metrics["entropy"] == pytest.approx(3.0)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0
    assert metrics["clip_fraction"] == 0.0
    assert metrics["tokens"] == 3.0


def test_token_advantages_by_hand():
    batch = make_batch()
    advantage = torch.tensor([2.0, -1.0], dtype=torch.float64)
    # The KL of later tokens of the same rewrite, and not the token's own.
    advantages = token_advantages(advantage, batch.kl, batch.sequence, 0.4)
    assert advantages.tolist() == pytest.approx([2 - 0.4 * 0.25, 2.0, -1.0])
    assert not advantages.requires_grad
    with pytest.raises(ValueError, match="indices below 1, the number of advantages, got 1"):
        token_advantages(advantage[:1], batch.kl, batch.sequence, 0.4)
    with pytest.raises(ValueError, match=r"advantage: expected one dimension, got \(1, 2\)"):
        token_advantages(advantage[None], batch.kl, batch.sequence, 0.4)


def test_off_policy_ratios_by_hand():
    sampled = torch.tensor([-1.0 - math.log(2), -2.0 + math.log(2), -0.5], dtype=torch.float64)
    batch = make_batch(sampled_logprob=sampled)
    result = policy_loss(batch, 0.0, total_rewrites=2)
    result.loss.backward()
    # Ratios 2, 1/2, 1 with advantages 2, 2, -1.
    assert result.loss.item() == pytest.approx(-(4 + 1 - 1) / 2)
    assert batch.logprob.grad.tolist() == pytest.approx([-2.0, -0.5, 0.5])
    assert result.metrics["ratio_max"].value == pytest.approx(2.0)
    assert result.metrics["ratio_mean"].value == pytest.approx(3.5 / 3)


def test_clipping_takes_the_pessimistic_side_and_reports_raw_ratios():
    # Ratios 2 and 1/2 with A = 2: the first is clipped to 1.2, the second is not (it is worse).
    sampled = torch.tensor([-1.0 - math.log(2), -2.0 + math.log(2), -0.5], dtype=torch.float64)
    batch = make_batch(sampled_logprob=sampled)
    result = policy_loss(batch, 0.0, total_rewrites=2, clip_range=0.2)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-(2.4 + 1 - 1) / 2)
    assert batch.logprob.grad.tolist() == pytest.approx([0.0, -0.5, 0.5])
    assert result.metrics["clip_fraction"].value == pytest.approx(1 / 3)
    assert result.metrics["ratio_max"].value == pytest.approx(2.0)


def test_clipping_of_negative_advantages():
    # Ratio 1/2 with A = -1 is clipped to 0.8 (a larger loss); ratio 2 with A = -1 is not.
    sampled = torch.tensor([-1.0 + math.log(2), -2.0 - math.log(2), -0.5], dtype=torch.float64)
    advantage = torch.full((3,), -1.0, dtype=torch.float64)
    batch = make_batch(sampled_logprob=sampled, advantage=advantage)
    result = policy_loss(batch, 0.0, total_rewrites=1 + 1, clip_range=0.2)
    result.loss.backward()
    assert result.loss.item() == pytest.approx((0.8 + 2 + 1) / 2)
    assert batch.logprob.grad.tolist() == pytest.approx([0.0, 1.0, 0.5])


def test_clipping_changes_nothing_on_policy():
    plain, clipped = make_batch(), make_batch()
    policy_loss(plain, 0.4, total_rewrites=2).loss.backward()
    policy_loss(clipped, 0.4, total_rewrites=2, clip_range=0.2).loss.backward()
    assert torch.equal(plain.logprob.grad, clipped.logprob.grad)


def test_the_ratio_of_the_first_epoch_is_exactly_one_in_float32():
    logprob = -10 * torch.rand(1000, generator=torch.manual_seed(0))
    zeros = torch.zeros(1000)
    batch = PolicyBatch(
        logprob=logprob,
        kl=zeros,
        entropy=zeros,
        reference_logprob=logprob,
        sampled_logprob=logprob.clone(),
        sequence=torch.arange(1000),
        advantage=torch.ones(1000),
    )
    metrics = values(policy_loss(batch, 0.1, total_rewrites=1000).metrics)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0
    assert metrics["k1_per_rewrite"] == metrics["k3_per_rewrite"] == 0.0


def random_step() -> PolicyBatch:
    """Eight rewrites of 1 to 8 tokens, slightly off policy."""
    generator = torch.manual_seed(3)
    lengths = [1, 8, 3, 5, 2, 7, 4, 6]
    tokens = sum(lengths)

    def draw() -> torch.Tensor:
        return torch.rand(tokens, dtype=torch.float64, generator=generator)

    logprob = -draw()
    return PolicyBatch(
        logprob=logprob,
        kl=draw(),
        entropy=draw(),
        reference_logprob=-draw(),
        sampled_logprob=logprob + 0.2 * draw() - 0.1,
        sequence=torch.repeat_interleave(torch.arange(8), torch.tensor(lengths)),
        advantage=torch.randn(tokens, dtype=torch.float64, generator=generator),
    )


def accumulate(num_micro_batches: int) -> tuple[float, torch.Tensor, dict[str, float]]:
    """One step in micro-batches; two scalars shared by all tokens collect the gradient."""
    whole = random_step()
    shared = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    results = []
    per_batch = 8 // num_micro_batches
    for first in range(0, 8, per_batch):
        rows = (whole.sequence >= first) & (whole.sequence < first + per_batch)
        part = PolicyBatch(
            logprob=whole.logprob[rows] * shared[0],
            kl=whole.kl[rows] * shared[1],
            entropy=whole.entropy[rows],
            reference_logprob=whole.reference_logprob[rows],
            sampled_logprob=whole.sampled_logprob[rows],
            sequence=whole.sequence[rows] - first,
            advantage=whole.advantage[rows],
        )
        result = policy_loss(part, 0.3, total_rewrites=8, clip_range=0.05)
        result.loss.backward()
        results.append(result)
    return (
        math.fsum(r.loss.item() for r in results),
        shared.grad,
        values(merge_metrics([r.metrics for r in results])),
    )


@pytest.mark.parametrize("num_micro_batches", [2, 4, 8])
def test_accumulation_equals_one_batch(num_micro_batches):
    loss, gradient, metrics = accumulate(1)
    split_loss, split_gradient, split_metrics = accumulate(num_micro_batches)
    assert split_loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(split_gradient, gradient, rtol=1e-12, atol=0)
    assert split_metrics == pytest.approx(metrics, rel=1e-12)
    assert 0 < metrics["clip_fraction"] < 1


def test_a_rewrite_without_tokens_counts_in_the_denominator():
    with_empty = make_batch(sequence=torch.tensor([0, 0, 2]))
    result = policy_loss(with_empty, 0.4, total_rewrites=3)
    assert result.loss.item() == pytest.approx((-1.5 + 0.175) * 2 / 3)


NAN = torch.tensor([0.0, math.nan, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kl": torch.ones(2)}, r"kl: expected shape \[3\] as sequence, got \(2,\)"),
        ({"entropy": torch.ones(1, 3)}, "entropy: expected shape"),
        ({"advantage": torch.ones(2)}, r"advantage: expected shape \[3\] as sequence, got \(2,\)"),
        ({"sequence": torch.tensor([1, 0, 0])}, "non-decreasing"),
        ({"sequence": torch.tensor([0.0, 0.0, 1.0])}, "integer"),
        ({"logprob": NAN}, "logprob: expected finite"),
        ({"kl": NAN}, "kl: expected finite"),
        ({"advantage": torch.tensor([1.0, 0.0, math.inf])}, "advantage: expected finite"),
    ],
)
def test_bad_tensors_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        policy_loss(make_batch(**changes), 0.1, total_rewrites=2)


def test_an_empty_batch_is_refused():
    empty = torch.empty(0)
    batch = PolicyBatch(empty, empty, empty, empty, empty, torch.empty(0, dtype=torch.long), empty)
    with pytest.raises(ValueError, match="at least one rewrite token, got an empty batch"):
        policy_loss(batch, 0.1, total_rewrites=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"kl_coef": math.nan}, "kl_coef"),
        ({"total_rewrites": 1}, "at least the 2 rewrites"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"clip_range": 1.0}, "clip_range"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        policy_loss(make_batch(), **{"kl_coef": 0.1, "total_rewrites": 2, **options})


def test_parts_make_the_whole_as_their_kind_has_it():
    parts = [
        {"kl": Metric(6.0, 2.0), "max": Metric(3.0, kind="largest"), "n": Metric(4, kind="count")},
        {"kl": Metric(1.0, 5.0), "max": Metric(7.0, kind="largest"), "n": Metric(5, kind="count")},
        {"seldom": Metric(2.0, 4.0, "ratio")},
    ]
    assert values(merge_metrics(parts)) == {"kl": 1.0, "max": 7.0, "n": 9.0, "seldom": 0.5}


def test_merging_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        merge_metrics([])
