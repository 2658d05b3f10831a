"""Future KL, sums and the sampled estimators."""

from __future__ import annotations

import pytest
import torch

from alignpro.objective import future_kl, k1, k3, sum_per_sequence


def test_future_kl_by_hand():
    kl = torch.tensor([1.0, 2.0, 4.0, 10.0, 5.0, 7.0])
    sequence = torch.tensor([0, 0, 0, 1, 3, 3])
    assert future_kl(kl, sequence).tolist() == [6.0, 4.0, 0.0, 0.0, 7.0, 0.0]


def test_future_kl_is_detached():
    kl = torch.ones(3, requires_grad=True)
    assert not future_kl(kl, torch.zeros(3, dtype=torch.long)).requires_grad


def test_the_bits_of_a_sequence_do_not_depend_on_its_neighbours():
    kl = torch.rand(50, generator=torch.manual_seed(0))
    sequence = torch.tensor([0] * 13 + [1] * 30 + [2] * 7)
    alone = future_kl(kl[13:43], sequence[13:43])
    assert torch.equal(future_kl(kl * 1.0, sequence)[13:43], alone)
    large = kl.clone()
    large[43:] = 1e8
    assert torch.equal(future_kl(large, sequence)[13:43], alone)


def test_empty_is_empty():
    empty = torch.empty(0)
    assert future_kl(empty, torch.empty(0, dtype=torch.long)).shape == (0,)


def test_sum_per_sequence_with_one_that_has_no_tokens():
    sums = sum_per_sequence(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 2]), 4)
    assert sums.tolist() == [3.0, 0.0, 4.0, 0.0]


def test_k1_and_k3_estimate_the_exact_kl_without_bias():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * k1(p.log(), q.log())).sum(), exact)
    torch.testing.assert_close((p * k3(p.log(), q.log())).sum(), exact)
    assert (k1(p.log(), q.log()) < 0).any()
    assert (k3(p.log(), q.log()) > 0).all()


def test_k3_of_a_small_difference_keeps_its_digits():
    a = torch.tensor([-1.0], dtype=torch.float64)
    assert k3(a, a + 1e-6).item() == pytest.approx(5e-13, rel=1e-3)
    assert k3(a, a).item() == 0.0


@pytest.mark.parametrize(
    ("sequence", "says"),
    [
        ([0, 1, 0], "non-decreasing"),
        ([-1, 0, 0], "non-negative"),
        ([0, 0], "aligned"),
        ([0.0, 0.0, 0.0], "integer"),
        ([[0, 0, 0]], "aligned"),
    ],
)
def test_a_bad_index_is_refused(sequence, says):
    with pytest.raises(ValueError, match=says):
        future_kl(torch.ones(3), torch.tensor(sequence))


def test_an_index_past_the_end_is_refused():
    with pytest.raises(ValueError, match="below 2, got 2"):
        sum_per_sequence(torch.ones(2), torch.tensor([0, 2]), 2)
