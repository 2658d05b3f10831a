"""LoraPolicy: parameters in torch, scores from a model behind the engine's seam."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alignpro.config import LoraConfig
from alignpro.train.policy import LoraPolicy, initial_weights, select_modules
from train.toy_model import HIDDEN, MODULE, VOCABULARY, ToyModel

MODULES = {
    "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.0.mlp.up_proj": (16, 8),
    "model.layers.1.self_attn.q_proj": (8, 8),
    "model.layers.1.self_attn.q_proj_extra": (8, 8),
}
SEQUENCES, STARTS = [[0, 3, 1, 4, 5, 2], [0, 1, 6]], [3, 2]


@pytest.fixture
def policy():
    policy = LoraPolicy.fresh(ToyModel(), LoraConfig(rank=3, alpha=6.0), seed=1)
    with torch.no_grad():
        for b in policy.lora_b:
            b.normal_(generator=torch.Generator().manual_seed(2))
    return policy


def test_initial_matrices_follow_the_seed_and_start_at_the_base():
    model, config = ToyModel(), LoraConfig(rank=4, alpha=2.0, rslora=True)
    first, again, other = (initial_weights(model, config, seed=s) for s in (5, 5, 6))
    a, b = first.matrices[MODULE]
    assert a.shape == (4, HIDDEN) and b.shape == (VOCABULARY, 4)
    assert not b.any()
    assert np.array_equal(a, again.matrices[MODULE][0])
    assert not np.array_equal(a, other.matrices[MODULE][0])
    # Kaiming-uniform with a = sqrt 5 is uniform within 1 / sqrt(in).
    assert 0.5 / math.sqrt(HIDDEN) < np.abs(a).max() <= 1 / math.sqrt(HIDDEN)
    assert first.scale == 2.0 / math.sqrt(4)
    before = torch.random.get_rng_state()
    initial_weights(model, config, seed=7)
    assert torch.equal(before, torch.random.get_rng_state())


def test_target_modules():
    assert list(select_modules(MODULES, "all-linear")) == list(MODULES)
    assert list(select_modules(MODULES, ["q_proj"])) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert list(select_modules(MODULES, ["layers.0.mlp.up_proj"])) == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match='no module "k_proj"; it has q_proj, up_proj') as caught:
        select_modules(MODULES, ["q_proj", "k_proj"])
    assert "\n" not in str(caught.value)


def test_gradients_agree_with_finite_differences(policy):
    reference = initial_weights(policy.model, LoraConfig(rank=2), seed=9)
    reference.matrices[MODULE][1][:] = 0.3
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(3, 4, generator=generator)

    def loss():
        s = policy.score(SEQUENCES, STARTS, temperature=1.7, reference=reference)
        return (upstream[0] * s.logprob + upstream[1] * s.entropy + upstream[2] * s.kl).sum()

    loss().backward()
    for parameter in policy.parameters():
        gradient = parameter.grad.clone()
        direction = torch.randn(parameter.shape, generator=generator)
        step = 1e-2
        with torch.no_grad():
            parameter += step * direction
            above = float(loss())
            parameter -= 2 * step * direction
            below = float(loss())
            parameter += step * direction
        # Central differences in float32: the error is mostly rounding / step.
        slope = (above - below) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-2)


def test_upstream_gradients_of_every_layout(policy):
    scores = policy.score(SEQUENCES, STARTS)
    scores.logprob.mean().backward()  # expanded, stride 0
    d_logprob, d_entropy, d_kl = policy.model.core_model.scores[-1].received
    assert np.array_equal(d_logprob, np.full(4, 0.25, np.float32))
    assert d_entropy is None and d_kl is None
    scores = policy.score(SEQUENCES, STARTS)
    scores.entropy[::2].sum().backward()  # only entropy, strided
    d_logprob, d_entropy, _ = policy.model.core_model.scores[-1].received
    assert not d_logprob.any() and list(d_entropy) == [1, 0, 1, 0]
    scores = policy.score(SEQUENCES, STARTS)
    (scores.logprob.double() * torch.arange(4).double()).sum().backward()
    assert list(policy.model.core_model.scores[-1].received[0]) == [0, 1, 2, 3]


def test_micro_batches_accumulate(policy):
    policy.score(SEQUENCES, STARTS).logprob.sum().backward()
    whole = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    for sequence, start in zip(SEQUENCES, STARTS, strict=True):
        policy.score([sequence], [start]).logprob.sum().backward()
    for p, expected in zip(policy.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_what_is_kept_is_the_engines_business(policy):
    for activations in ("keep", "recompute"):
        policy.score(SEQUENCES, STARTS, activations=activations)
        assert policy.model.core_model.scores[-1].activations == activations
    kept, recomputed = (
        policy.score_bytes(SEQUENCES, STARTS, mode, with_reference=False)
        for mode in ("keep", "recompute")
    )
    assert (kept, recomputed) == (900, 360)
    assert policy.score_bytes(SEQUENCES, STARTS, with_reference=True) == 1350
    made = len(policy.model.adapters)
    with torch.no_grad():
        policy.lora_a[0].add_(1.0)
    policy.score_bytes(SEQUENCES, STARTS, with_reference=True)
    assert len(policy.model.adapters) == made  # asking uploads nothing


def test_hidden_states_come_on_request_and_carry_no_gradient(policy):
    assert policy.score(SEQUENCES, STARTS).hidden is None
    scores = policy.score(SEQUENCES, STARTS, with_hidden=True)
    before = [s[i - 1] for s, at in zip(SEQUENCES, STARTS, strict=True) for i in range(at, len(s))]
    assert torch.equal(scores.hidden, policy.model.core_model.hidden[before])
    assert not scores.hidden.requires_grad and scores.logprob.requires_grad
    scores.logprob.sum().backward()  # the graph is whole beside it
    without = policy.score_bytes(SEQUENCES, STARTS, with_reference=False)
    need = policy.score_bytes(SEQUENCES, STARTS, with_reference=False, with_hidden=True)
    assert need > without


def test_kl_is_zero_to_the_bit_against_its_own_weights(policy):
    scores = policy.score(SEQUENCES, STARTS, reference=policy.weights())
    assert float(scores.kl.detach().abs().max()) == 0.0
    assert torch.equal(scores.reference_logprob, scores.logprob.detach())
    assert not scores.reference_logprob.requires_grad
    fresh = LoraPolicy.fresh(ToyModel(), LoraConfig(rank=3), seed=1)
    assert float(fresh.score(SEQUENCES, STARTS, reference="base").kl.detach().abs().max()) == 0.0


def test_without_a_reference_there_is_no_kl(policy):
    scores = policy.score(SEQUENCES, STARTS)
    assert scores.kl is None and scores.reference_logprob is None


def test_no_graph_under_no_grad(policy):
    with torch.no_grad():
        scores = policy.score(SEQUENCES, STARTS)
    assert not scores.logprob.requires_grad
    with pytest.raises(RuntimeError):
        scores.logprob.sum().backward()


def test_a_spent_graph_says_so(policy):
    loss = policy.score(SEQUENCES, STARTS).logprob.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="spent: call score"):
        loss.backward()


@pytest.mark.parametrize("change", ["in_place", "data", "fused", "plain"])
def test_the_engine_never_sees_stale_matrices(policy, change):
    before = policy.core_adapter()
    assert policy.core_adapter() is before
    parameter = next(iter(policy.parameters()))
    if change == "in_place":
        with torch.no_grad():
            parameter.add_(1.0)
    elif change == "data":  # torch's version counter does not move
        parameter.data = parameter.data + 1.0
    else:  # nor under a fused optimizer
        policy.score(SEQUENCES, STARTS).logprob.sum().backward()
        torch.optim.AdamW(policy.parameters(), lr=0.1, fused=change == "fused").step()
    after = policy.core_adapter()
    assert after is not before
    assert np.array_equal(after.a.detach().numpy(), policy.lora_a[0].detach().numpy())


def test_weights_are_a_copy_and_load_back(policy):
    weights = policy.weights()
    with torch.no_grad():
        policy.lora_a[0].zero_()
    assert weights.matrices[MODULE][0].any()
    parameter = policy.lora_a[0]
    policy.load_weights(weights)
    assert policy.lora_a[0] is parameter
    assert np.array_equal(parameter.detach().numpy(), weights.matrices[MODULE][0])
    with pytest.raises(ValueError, match=r"expected rank 3, .* got rank 2"):
        policy.load_weights(initial_weights(policy.model, LoraConfig(rank=2), seed=0))
