"""Where every rewrite can be enumerated: the expected gradient, and the optimum in closed form.

The prompter writes up to 3 tokens out of 3, of which one ends the rewrite, each from a softmax of
its own (a tree of 7 states), so expectations over its 15 rewrites are sums and nothing is sampled.
All in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from alignpro.objective import (
    MovingBaseline,
    PolicyBatch,
    gae,
    k1,
    k3,
    policy_loss,
    reinforce,
    rloo,
    token_advantages,
)

END, LONGEST = 2, 3
STATES = [state for n in range(LONGEST) for state in itertools.product(range(END), repeat=n)]
REWRITES = [
    (*state, token)
    for state in STATES
    for token in range(3)
    if token == END or len(state) == LONGEST - 1
]
KL_COEF = 0.3
Rewrite = tuple[int, ...]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: torch's threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


REWARDS = draw(len(REWRITES), seed=1)
REFERENCE = draw(len(STATES), 3, seed=8)  # logits of the states


def states_of(rewrite: Rewrite) -> list[int]:
    return [STATES.index(rewrite[:n]) for n in range(len(rewrite))]


def sequence_logprobs(logits: Tensor) -> Tensor:
    """log rho(x') of every rewrite."""
    logp = logits.log_softmax(-1)
    return torch.stack([logp[states_of(r), list(r)].sum() for r in REWRITES])


def true_objective(logits: Tensor, kl_coef: float = KL_COEF) -> Tensor:
    """E[R] - kl_coef * KL(rho || rho_ref), by summing over rewrites; torch differentiates it."""
    logp = sequence_logprobs(logits)
    return (logp.exp() * (REWARDS - kl_coef * (logp - sequence_logprobs(REFERENCE)))).sum()


def tokens_of(logits: Tensor, rewrite: Rewrite) -> dict[str, Tensor]:
    """What a scorer gives for the tokens of one rewrite: aligned tensors."""
    states = states_of(rewrite)
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
    """policy_loss of some of the rewrites; advantage: one for each."""
    rows = [tokens_of(logits, REWRITES[i]) for i in group]
    tokens = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    sequence = torch.repeat_interleave(torch.tensor([len(REWRITES[i]) for i in group]))
    batch = PolicyBatch(
        **tokens,
        sequence=sequence,
        advantage=token_advantages(advantage, tokens["kl"], sequence, kl_coef),
    )
    return policy_loss(batch, kl_coef, total_rewrites=len(group)).loss


def expected_loss(logits: Tensor, baseline: float, kl_coef: float = KL_COEF) -> Tensor:
    """Its gradient is the expectation of policy_loss's gradient over one sampled rewrite."""
    probability = sequence_logprobs(logits).detach().exp()
    advantages = (REWARDS - baseline).unsqueeze(1)
    losses = [loss_of(logits, [i], a, kl_coef) for i, a in enumerate(advantages)]
    return (probability * torch.stack(losses)).sum()


def gradient(function, logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(function(logits), logits)
    return result


def slopes(function: Callable[[Tensor], Tensor], logits: Tensor, h: float = 1e-5) -> Tensor:
    """The gradient by central differences, one coordinate after another."""
    result = torch.zeros_like(logits)
    for i in range(logits.numel()):
        step = torch.zeros_like(logits)
        step.view(-1)[i] = h
        difference = function(logits + step) - function(logits - step)
        result.view(-1)[i] = difference / (2 * h)
    return result


def true_kl(logits: Tensor) -> Tensor:
    """KL(rho || rho_ref) of whole rewrites, from their probabilities alone."""
    logp = sequence_logprobs(logits)
    return (logp.exp() * (logp - sequence_logprobs(REFERENCE))).sum()


def expected_over_rewrites(logits: Tensor, loss: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """Its gradient is the expectation of the gradient of ``loss`` over one sampled rewrite."""
    probability = sequence_logprobs(logits).detach().exp()
    return (probability * torch.stack([loss(tokens_of(logits, r)) for r in REWRITES])).sum()


def test_the_tree_is_complete():
    assert (len(STATES), len(REWRITES)) == (7, 15)
    assert {len(r) for r in REWRITES} == {1, 2, 3}
    assert float(sequence_logprobs(draw(7, 3, seed=3)).exp().sum()) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("baseline", [0.0, 1.7])
@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF, 5.0])
def test_the_expected_gradient_is_that_of_the_objective(baseline, kl_coef):
    logits = draw(7, 3, seed=3)
    truth = -gradient(lambda z: true_objective(z, kl_coef), logits)
    ours = gradient(lambda z: expected_loss(z, baseline, kl_coef), logits)
    assert truth.abs().max() > 0.05
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_gradient_of_the_sequence_kl_agrees_with_finite_differences(seed):
    """No autograd on the true side: probabilities of whole rewrites, moved a little."""
    logits = draw(7, 3, seed=seed)

    def kl_loss(z: Tensor) -> Tensor:  # no rewards: policy_loss is the KL alone
        probability = sequence_logprobs(z).detach().exp()
        losses = [loss_of(z, [i], torch.zeros(1, dtype=z.dtype), 1.0) for i in range(15)]
        return (probability * torch.stack(losses)).sum()

    truth = slopes(true_kl, logits)
    assert truth.abs().max() > 0.05
    # The error of a central difference: h^2 and rounding / h, both about 1e-10.
    torch.testing.assert_close(gradient(kl_loss, logits), truth, rtol=1e-7, atol=1e-9)
    # Each half alone is another gradient: the KL's own, and the future's part.
    direct = gradient(lambda z: expected_over_rewrites(z, lambda row: row["kl"].sum()), logits)
    torch.testing.assert_close(direct, gradient(kl_of_visited_states, logits))
    assert (direct - truth).norm() > 0.1 * truth.norm()
    assert direct.norm() > 0.1 * truth.norm()


def kl_of_visited_states(logits: Tensor) -> Tensor:
    """sum over states of how often they are visited, held fixed, times their KL."""
    visits = torch.zeros(7, dtype=torch.float64)
    for probability, rewrite in zip(
        sequence_logprobs(logits).detach().exp(), REWRITES, strict=True
    ):
        visits[states_of(rewrite)] += probability
    logp, logq = logits.log_softmax(-1), REFERENCE.log_softmax(-1)
    return (visits * (logp.exp() * (logp - logq)).sum(-1)).sum()


def test_the_gradient_of_the_objective_agrees_with_finite_differences():
    logits = draw(7, 3, seed=3)
    truth = slopes(lambda z: -true_objective(z), logits)
    ours = gradient(lambda z: expected_loss(z, 0.4), logits)
    torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-9)


def test_what_other_estimators_of_the_kl_expect():
    """k1 in the reward is unbiased; as losses, k1 has no gradient and k3 another one."""
    logits = draw(7, 3, seed=3)
    truth = gradient(true_kl, logits)

    def expected(loss: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        return gradient(lambda z: expected_over_rewrites(z, loss), logits)

    def in_reward(row: dict[str, Tensor]) -> Tensor:
        return k1(row["logprob"], row["reference_logprob"]).sum().detach() * row["logprob"].sum()

    torch.testing.assert_close(expected(in_reward), truth, rtol=1e-10, atol=1e-12)
    zero = expected(lambda row: k1(row["logprob"], row["reference_logprob"]).sum())
    torch.testing.assert_close(zero, torch.zeros_like(truth), rtol=0, atol=1e-14)
    biased = expected(lambda row: k3(row["logprob"], row["reference_logprob"]).sum())
    assert (biased - truth).norm() > 0.1 * truth.norm()


def test_the_future_part_of_the_kl_is_needed():
    """Differentiating KL_t alone, the usual shortcut, is visibly another gradient."""
    logits = draw(7, 3, seed=3)

    def kl_alone(z: Tensor) -> Tensor:
        probability = sequence_logprobs(z).detach().exp()
        rows = [tokens_of(z, rewrite) for rewrite in REWRITES]
        return sum(
            p * (KL_COEF * row["kl"] - row["logprob"] * reward).sum()
            for p, row, reward in zip(probability, rows, REWARDS, strict=True)
        )

    truth = -gradient(true_objective, logits)
    assert (gradient(kl_alone, logits) - truth).abs().max() > 0.01


def expected_over_pairs(logits: Tensor, advantages: Callable[[Tensor], Tensor]) -> Tensor:
    """The expected loss over all 225 pairs of independent rewrites. advantages: [1, 2] to [1, 2]"""
    probability = sequence_logprobs(logits).detach().exp()
    total = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.product(range(15), repeat=2):
        advantage = advantages(REWARDS[[i, j]].reshape(1, 2))[0]
        total = total + probability[i] * probability[j] * loss_of(
            logits, [i, j], advantage, KL_COEF
        )
    return total


@pytest.mark.parametrize(
    "advantages",
    [
        rloo,
        lambda rewards: reinforce(rewards, MovingBaseline()),  # the first step
        lambda rewards: reinforce(rewards, MovingBaseline(3.0, 2.0)),
    ],
)
def test_baselines_keep_the_gradient_unbiased(advantages):
    logits = draw(7, 3, seed=5)
    truth = -gradient(true_objective, logits)
    ours = gradient(lambda z: expected_over_pairs(z, advantages), logits)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def critic_loss(logits: Tensor, values: Tensor, gae_lambda: float) -> Tensor:
    """The expected loss of one sampled rewrite under a critic; values: [7], one a state."""

    def loss(index: int) -> Tensor:
        row = tokens_of(logits, REWRITES[index])
        sequence = torch.zeros(len(REWRITES[index]), dtype=torch.long)
        advantage, _ = gae(
            REWARDS[index : index + 1],
            row["kl"],
            values[states_of(REWRITES[index])],
            sequence,
            kl_coef=KL_COEF,
            gae_lambda=gae_lambda,
        )
        batch = PolicyBatch(**row, sequence=sequence, advantage=advantage)
        return policy_loss(batch, KL_COEF, total_rewrites=1).loss

    probability = sequence_logprobs(logits).detach().exp()
    return (probability * torch.stack([loss(i) for i in range(15)])).sum()


def true_values(logits: Tensor) -> Tensor:
    """[7]: the expected return ``R - kl_coef * sum_{s>t} KL_s`` from each state on."""
    logp = sequence_logprobs(logits).detach().exp()
    kl = [tokens_of(logits, r)["kl"].detach() for r in REWRITES]
    values = []
    for state in STATES:
        through = [i for i, r in enumerate(REWRITES) if r[: len(state)] == state]
        returns = torch.stack(
            [REWARDS[i] - KL_COEF * kl[i][len(state) + 1 :].sum() for i in through]
        )
        values.append((logp[through] * returns).sum() / logp[through].sum())
    return torch.stack(values)


def test_a_critic_keeps_the_gradient_unbiased():
    logits = draw(7, 3, seed=5)
    truth = -gradient(true_objective, logits)
    wrong = draw(7, seed=9)
    ours = gradient(lambda z: critic_loss(z, wrong, 1.0), logits)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)  # whatever the values are
    exact = true_values(logits)
    for gae_lambda in (0.0, 0.9):  # and with the right values whatever lambda is
        ours = gradient(lambda z, g=gae_lambda: critic_loss(z, exact, g), logits)
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    biased = gradient(lambda z: critic_loss(z, wrong, 0.5), logits)
    assert (biased - truth).norm() > 0.1 * truth.norm()


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


def test_a_kl_penalty_without_end_stays_at_the_reference():
    logits = REFERENCE.clone()
    step = gradient(lambda z: expected_loss(z, 0.0, 1e6) / 1e6, logits)
    torch.testing.assert_close(step, torch.zeros(7, 3, dtype=torch.float64), rtol=0, atol=1e-5)
