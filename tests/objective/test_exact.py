"""Where every rewrite can be enumerated: the expected gradient, and the optimum in closed form.

The prompter writes 2 tokens out of 3, each from a softmax of its own (a tree of 1 + 3 states), so
expectations over its 9 rewrites are sums and nothing is sampled. All in float64.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from alignpro.objective import PolicyBatch, kl_adjusted_rloo, policy_loss, rloo

REWRITES = list(itertools.product(range(3), range(3)))
KL_COEF = 0.3


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


REWARDS = draw(9, seed=1)
REFERENCE = draw(4, 3, seed=2)  # logits of the states: the root, then "after token a"


def sequence_logprobs(logits: Tensor) -> Tensor:
    """log rho(x') of the 9 rewrites."""
    logp = logits.log_softmax(-1)
    return torch.stack([logp[0, a] + logp[1 + a, b] for a, b in REWRITES])


def true_objective(logits: Tensor, kl_coef: float = KL_COEF) -> Tensor:
    """E[R] - kl_coef * KL(rho || rho_ref), by summing over rewrites; torch differentiates it."""
    logp = sequence_logprobs(logits)
    return (logp.exp() * (REWARDS - kl_coef * (logp - sequence_logprobs(REFERENCE)))).sum()


def tokens_of(logits: Tensor, rewrite: tuple[int, int]) -> dict[str, Tensor]:
    """What a scorer gives for the tokens of one rewrite: aligned [2] tensors."""
    states = [0, 1 + rewrite[0]]
    logp, reference = logits.log_softmax(-1)[states], REFERENCE.log_softmax(-1)[states]
    chosen = torch.tensor(rewrite).unsqueeze(1)
    logprob = logp.gather(1, chosen).squeeze(1)
    return {
        "logprob": logprob,
        "kl": (logp.exp() * (logp - reference)).sum(-1),
        "entropy": -(logp.exp() * logp).sum(-1),
        "reference_logprob": reference.gather(1, chosen).squeeze(1),
        "sampled_logprob": logprob.detach(),
    }


def loss_of(logits: Tensor, group: list[int], advantage: Tensor, kl_coef: float) -> Tensor:
    """policy_loss of some of the 9 rewrites."""
    rows = [tokens_of(logits, REWRITES[i]) for i in group]
    batch = PolicyBatch(
        **{name: torch.cat([row[name] for row in rows]) for name in rows[0]},
        sequence=torch.arange(len(group)).repeat_interleave(2),
        advantage=advantage,
    )
    return policy_loss(batch, kl_coef, total_rewrites=len(group)).loss


def expected_loss(logits: Tensor, baseline: float, kl_coef: float = KL_COEF) -> Tensor:
    """Its gradient is the expectation of policy_loss's gradient over one sampled rewrite."""
    probability = sequence_logprobs(logits).detach().exp()
    losses = [loss_of(logits, [i], (REWARDS[i] - baseline).reshape(1), kl_coef) for i in range(9)]
    return (probability * torch.stack(losses)).sum()


def gradient(function, logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(function(logits), logits)
    return result


@pytest.mark.parametrize("baseline", [0.0, 1.7])
@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF, 5.0])
def test_the_expected_gradient_is_that_of_the_objective(baseline, kl_coef):
    logits = draw(4, 3, seed=3)
    truth = -gradient(lambda z: true_objective(z, kl_coef), logits)
    ours = gradient(lambda z: expected_loss(z, baseline, kl_coef), logits)
    assert truth.abs().max() > 0.05
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_the_true_gradient_agrees_with_finite_differences():
    logits, direction, h = draw(4, 3, seed=3), draw(4, 3, seed=4), 1e-6
    difference = true_objective(logits + h * direction) - true_objective(logits - h * direction)
    slope = (gradient(true_objective, logits) * direction).sum()
    assert (difference / (2 * h)).item() == pytest.approx(slope.item(), rel=1e-7)


def test_the_future_part_of_the_kl_is_needed():
    """Differentiating KL_t alone, the usual shortcut, is visibly another gradient."""
    logits = draw(4, 3, seed=3)

    def kl_alone(z: Tensor) -> Tensor:
        probability = sequence_logprobs(z).detach().exp()
        rows = [tokens_of(z, rewrite) for rewrite in REWRITES]
        return sum(
            p * (KL_COEF * row["kl"] - row["logprob"] * reward).sum()
            for p, row, reward in zip(probability, rows, REWARDS, strict=True)
        )

    truth = -gradient(true_objective, logits)
    assert (gradient(kl_alone, logits) - truth).abs().max() > 0.01


def kl_of(logits: Tensor, rewrite: tuple[int, int]) -> Tensor:
    return tokens_of(logits, rewrite)["kl"].sum().detach()


@pytest.mark.parametrize("adjusted", [False, True])
def test_leave_one_out_baselines_keep_the_gradient_unbiased(adjusted):
    """Over all 81 pairs of independent rewrites."""
    logits = draw(4, 3, seed=5)
    kl = torch.stack([kl_of(logits, rewrite) for rewrite in REWRITES])

    def expected(z: Tensor) -> Tensor:
        probability = sequence_logprobs(z).detach().exp()
        total = torch.zeros((), dtype=torch.float64)
        for i, j in itertools.product(range(9), repeat=2):
            rewards = REWARDS[[i, j]].reshape(1, 2)
            advantage = (
                kl_adjusted_rloo(rewards, kl[[i, j]].reshape(1, 2), KL_COEF)
                if adjusted
                else rloo(rewards)
            )
            total = total + probability[i] * probability[j] * loss_of(
                z, [i, j], advantage[0], KL_COEF
            )
        return total

    truth = -gradient(true_objective, logits)
    torch.testing.assert_close(gradient(expected, logits), truth, rtol=1e-10, atol=1e-12)


def ascend(kl_coef: float, steps: int) -> Tensor:
    """The prompter after gradient descent on the expected loss, from the reference."""
    logits = REFERENCE.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.2, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        expected_loss(logits, 0.0, kl_coef).backward()
        optimiser.step()
        schedule.step()
    return logits.detach()


def test_training_reaches_the_closed_form_optimum():
    kl_coef = 0.5
    trained = ascend(kl_coef, steps=400)
    log_optimum = sequence_logprobs(REFERENCE) + REWARDS / kl_coef
    log_z = log_optimum.logsumexp(0)
    optimum = (log_optimum - log_z).exp()
    reached = sequence_logprobs(trained).exp()
    start = sequence_logprobs(REFERENCE).exp()
    assert (start - optimum).abs().sum() / 2 > 0.2  # there was a way to go
    torch.testing.assert_close(reached, optimum, rtol=0, atol=1e-5)
    # MATH: the value at the optimum is kl_coef * log Z.
    assert true_objective(trained, kl_coef).item() == pytest.approx(
        (kl_coef * log_z).item(), abs=1e-6
    )


def test_a_leash_without_end_stays_at_the_reference():
    logits = REFERENCE.clone()
    step = gradient(lambda z: expected_loss(z, 0.0, 1e6) / 1e6, logits)
    torch.testing.assert_close(step, torch.zeros(4, 3, dtype=torch.float64), rtol=0, atol=1e-5)
