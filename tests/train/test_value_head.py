"""The critic: 0 at the start, learns what its states tell, and leaves the policy's graph alone."""

from __future__ import annotations

import pytest
import torch

from alignpro.config import LoraConfig
from alignpro.train.critic import ValueHead
from alignpro.train.policy import LoraPolicy
from train.toy_model import HIDDEN, ToyModel

SEQUENCES, STARTS = [[0, 3, 1, 4, 5, 2], [0, 1, 6]], [3, 2]


def states(count):
    return 3.0 * torch.randn(count, 12, generator=torch.Generator().manual_seed(4))


def test_it_starts_at_zero():
    values = ValueHead(12)(states(7))
    assert values.shape == (7,) and not values.any()
    assert ValueHead(12)(states(0)).shape == (0,)


def test_it_learns_what_the_states_tell():
    hidden = states(64)
    returns = 0.5 * torch.sign(hidden[:, 3]) + 0.2
    head = ValueHead(12)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (head(hidden) - returns).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * float(returns.var())


def test_its_loss_does_not_reach_the_policy():
    policy = LoraPolicy.fresh(ToyModel(), LoraConfig(rank=3), seed=1)
    scores = policy.score(SEQUENCES, STARTS, with_hidden=True)
    head = ValueHead(HIDDEN)
    (head(scores.hidden) - 1.0).square().mean().backward()
    assert all(p.grad is None for p in policy.parameters())
    assert head.out.bias.grad is not None and float(head.out.bias.grad) != 0.0


def test_what_is_saved_is_what_comes_back():
    one, other = ValueHead(12), ValueHead(12)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.25)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(states(5)), other(states(5))) and one(states(5)).any()


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match=r"^hidden_size: expected 1 or more, got 0"):
        ValueHead(0)
