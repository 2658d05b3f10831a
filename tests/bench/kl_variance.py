"""Bias and variance of estimators of the gradient of KL(policy || reference) over whole rewrites.

Run by hand; nothing here asserts more than its own arithmetic. Prints Markdown:

    python tests/bench/kl_variance.py                  # the enumerable policy, then SmolLM2
    python tests/bench/kl_variance.py --model ""       # the enumerable policy alone

All are sums over a rewrite's tokens of w_t grad log rho_t + v grad KL_t. Bias and variance are of
the gradient of one rewrite, relative to the norm of the true gradient (the variance, the trace of
the covariance, to its square). Leave-one-out baselines are over groups of 4.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignpro.config import LoraConfig, Prompting
from alignpro.data.load import load_prompts
from alignpro.models.adapter import LoraWeights, load_peft
from alignpro.models.native_model import load_model
from alignpro.objective import PolicyBatch, future_kl, policy_loss, token_advantages
from alignpro.train.policy import LoraPolicy, initial_weights, one_torch_thread
from alignpro.types import SamplingParams

GROUP = 4
OURS = "exact KL, both halves"
Vector = NDArray[np.float64]


@dataclass
class Parts:
    """What the estimators of one rewrite are made of: gradients by all parameters, and sums."""

    score: Vector  # sum_t grad log rho_t
    future: Vector  # sum_t F_t grad log rho_t, F_t = sum_{s>t} KL_s
    to_go: Vector  # the same with sum_{s>=t} k1_s
    k3: Vector  # sum_t grad k3_t
    direct: Vector  # sum_t grad KL_t
    kl: float  # sum_t KL_t
    k1: float  # sum_t k1_t


def token_weights(kl: Tensor, log_ratio: Tensor) -> dict[str, Tensor]:
    """The w_t of `Parts`, from KL_t and k1_t = log rho_t - log rho_ref_t."""
    return {
        "score": torch.ones_like(kl),
        "future": future_kl(kl, torch.zeros(len(kl), dtype=torch.long)),
        "to_go": log_ratio.flip(0).cumsum(0).flip(0),
        "k3": 1 - torch.exp(-log_ratio),
    }


def estimates(p: Parts, kl_baseline: float, k1_baseline: float) -> dict[str, Vector]:
    """The estimators of one rewrite. Baselines: means over the siblings of the sums."""
    return {
        OURS: p.future + p.direct,
        OURS + ", leave-one-out": p.future + p.direct - kl_baseline * p.score,
        "direct half alone": p.direct,
        "k1 in the reward": p.k1 * p.score,
        "k1 in the reward, to go": p.to_go,
        "k1 in the reward, leave-one-out": (p.k1 - k1_baseline) * p.score,
        "k3 as a loss": p.k3,
        "k1 as a loss": p.score,
    }


# --- where every rewrite can be enumerated ---

LETTERS, LONGEST = 3, 5  # and the token that ends a rewrite


class Tree:
    """A softmax of its own for every state, as one table of logits; expectations are sums."""

    def __init__(self, distance: float) -> None:
        draw = torch.Generator().manual_seed(1)
        states = [s for n in range(LONGEST) for s in itertools.product(range(LETTERS), repeat=n)]
        self.index = {state: i for i, state in enumerate(states)}
        self.rewrites = [
            (*state, token)
            for state in states
            for token in range(LETTERS + 1)
            if token == LETTERS or len(state) == LONGEST - 1
        ]
        shape = (len(states), LETTERS + 1)
        self.reference = torch.randn(shape, dtype=torch.float64, generator=draw)
        noise = torch.randn(shape, dtype=torch.float64, generator=draw)
        self.logits = (self.reference + distance * noise).requires_grad_()

    def tokens(self, rewrite: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """log rho_t, KL_t and log rho_ref_t."""
        states = [self.index[rewrite[:n]] for n in range(len(rewrite))]
        logp = self.logits[states].log_softmax(-1)
        logq = self.reference[states].log_softmax(-1)
        rows = range(len(rewrite))
        return logp[rows, rewrite], (logp.exp() * (logp - logq)).sum(-1), logq[rows, rewrite]

    def gradient(self, loss: Tensor) -> Vector:
        (gradient,) = torch.autograd.grad(loss, self.logits, retain_graph=True)
        return gradient.numpy().ravel().copy()

    def parts(self, rewrite: tuple[int, ...]) -> tuple[float, Parts]:
        """The rewrite's probability, and its parts."""
        logp, kl, logq = self.tokens(rewrite)
        log_ratio = (logp - logq).detach()
        weights = token_weights(kl.detach(), log_ratio)
        parts = Parts(
            **{name: self.gradient((w * logp).sum()) for name, w in weights.items()},
            direct=self.gradient(kl.sum()),
            kl=float(kl.detach().sum()),
            k1=float(log_ratio.sum()),
        )
        sequence = torch.zeros(len(rewrite), dtype=torch.long)
        advantage = token_advantages(torch.zeros(1, dtype=torch.float64), kl, sequence, 1.0)
        batch = PolicyBatch(logp, kl, kl.detach(), logq, logp.detach(), sequence, advantage)
        trained = self.gradient(policy_loss(batch, 1.0, total_rewrites=1).loss)
        assert np.allclose(estimates(parts, 0, 0)[OURS], trained, rtol=1e-12, atol=1e-14)
        return float(logp.detach().sum().exp()), parts

    def true_gradient(self) -> Vector:
        total = torch.zeros((), dtype=torch.float64)
        for rewrite in self.rewrites:
            logp, _, logq = self.tokens(rewrite)
            total = total + logp.sum().exp() * (logp.sum() - logq.sum())
        return self.gradient(total)


def enumerated(distance: float) -> tuple[float, list[tuple[str, float, float]]]:
    """KL in nats, and (estimator, bias, variance), exactly."""
    tree = Tree(distance)
    truth = tree.true_gradient()
    size = float(truth @ truth)
    pairs = [tree.parts(rewrite) for rewrite in tree.rewrites]
    assert abs(sum(p for p, _ in pairs) - 1) < 1e-12
    mean_kl = sum(p * parts.kl for p, parts in pairs)
    mean_k1 = sum(p * parts.k1 for p, parts in pairs)
    # A leave-one-out baseline: the mean of 3 siblings, independent of the rewrite.
    spread = {
        OURS + ", leave-one-out": sum(p * (parts.kl - mean_kl) ** 2 for p, parts in pairs),
        "k1 in the reward, leave-one-out": sum(p * (parts.k1 - mean_k1) ** 2 for p, parts in pairs),
    }
    rows = []
    for name in estimates(pairs[0][1], 0, 0):
        mean, square = np.zeros_like(truth), 0.0
        for probability, parts in pairs:
            g = estimates(parts, mean_kl, mean_k1)[name]
            mean += probability * g
            noise = spread.get(name, 0.0) / (GROUP - 1) * float(parts.score @ parts.score)
            square += probability * (float(g @ g) + noise)
        bias = float(np.linalg.norm(mean - truth)) / size**0.5
        rows.append((name, bias, (square - float(mean @ mean)) / size))
    return mean_kl, rows


# --- on a language model ---


class Sums:
    """Moments of a random vector, and of its difference to another one."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.total, self.square = np.zeros(size), 0.0
        self.apart, self.apart_square = np.zeros(size), 0.0

    def add(self, value: Vector, other: Vector) -> None:
        apart = value - other
        self.count += 1
        self.total += value
        self.square += float(value @ value)
        self.apart += apart
        self.apart_square += float(apart @ apart)

    def variance(self) -> float:
        return self._trace(self.total, self.square)

    def size(self) -> float:
        """|mean|^2, less what the noise of the mean adds to it."""
        return float(self.total @ self.total) / self.count**2 - self.variance() / self.count

    def bias(self) -> tuple[float, float]:
        """|mean difference|^2 likewise, and the noise that was taken off."""
        noise = self._trace(self.apart, self.apart_square) / self.count
        return float(self.apart @ self.apart) / self.count**2 - noise, noise

    def _trace(self, total: Vector, square: float) -> float:
        return (square - float(total @ total) / self.count) / (self.count - 1)


def perturbed(model: Any, options: argparse.Namespace, deviation: float) -> LoraWeights:
    """Fresh matrices with B drawn at random: a policy some way off the base."""
    config = LoraConfig(rank=options.rank, alpha=2.0 * options.rank)
    weights = initial_weights(model, config, seed=options.seed)
    draw = np.random.default_rng(options.seed)
    return replace(
        weights,
        matrices={
            name: (a, draw.normal(scale=deviation, size=b.shape).astype(np.float32))
            for name, (a, b) in weights.matrices.items()
        },
    )


def sampled_parts(policy: LoraPolicy, sequence: list[int], start: int) -> Parts:
    """One rewrite's parts, by one forward and backward each."""

    def gradient(loss: Tensor) -> Vector:
        policy.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in policy.parameters()]
        return np.concatenate([g.numpy().ravel() for g in grads if g is not None]).astype(
            np.float64
        )

    def score() -> Any:
        return policy.score([sequence], [start], reference="base")

    scores = score()
    kl, log_ratio = scores.kl.detach(), scores.logprob.detach() - scores.reference_logprob
    direct = gradient(scores.kl.sum())
    weights = token_weights(kl.double(), log_ratio.double())
    return Parts(
        **{name: gradient((w.float() * score().logprob).sum()) for name, w in weights.items()},
        direct=direct,
        kl=float(kl.sum()),
        k1=float(log_ratio.sum()),
    )


@one_torch_thread()
def measured(
    policy: LoraPolicy, options: argparse.Namespace
) -> tuple[float, list[tuple[str, float, float, float]]]:
    """KL in nats, and (estimator, bias, its noise, variance), over sampled rewrites."""
    model, turn = policy.model, Prompting().prompter_turn
    params = SamplingParams(
        max_new_tokens=options.tokens, temperature=1.0, seed=options.seed, n=options.rewrites
    )
    sums: dict[str, list[float]] = {}
    kl = size = 0.0
    for row in load_prompts("everyday", split="train")[: options.prompts]:
        chat = [{"role": "user", "content": turn(row.prompt)}]
        group = model.generate([chat], params, adapter=policy.core_adapter())
        moments: dict[str, Sums] = {}
        for siblings in batched(group, GROUP):
            parts = [
                sampled_parts(policy, c.prompt_tokens + c.tokens, len(c.prompt_tokens))
                for c in siblings
            ]
            for own in parts:
                others = [other for other in parts if other is not own]
                baselines = (np.mean([o.kl for o in others]), np.mean([o.k1 for o in others]))
                each = estimates(own, *map(float, baselines))
                for name, value in each.items():
                    moments.setdefault(name, Sums(len(value))).add(value, each[OURS])
                kl += own.kl / (options.prompts * options.rewrites)
        size += moments[OURS].size()
        for name, moment in moments.items():
            so_far = sums.setdefault(name, [0.0, 0.0, 0.0])
            for i, value in enumerate((*moment.bias(), moment.variance())):
                so_far[i] += value
    rows = []
    for name, (bias, noise, variance) in sums.items():
        rows.append((name, (max(bias, 0.0) / size) ** 0.5, (noise / size) ** 0.5, variance / size))
    return kl, rows


def batched(items: list[Any], size: int) -> Iterator[list[Any]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2", help='path or name; "": none')
    parser.add_argument("--adapter", help="PEFT folder of the policy, instead of random matrices")
    parser.add_argument("--deviations", type=float, nargs="*", default=[0.01, 0.03], help="of B")
    parser.add_argument("--distances", type=float, nargs="*", default=[0.1, 1.0], help="of logits")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rewrites", type=int, default=32, help=f"a prompt; a multiple of {GROUP}")
    parser.add_argument("--tokens", type=int, default=12, help="the most in a rewrite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.rewrites % GROUP or options.rewrites < GROUP:
        parser.error(f"--rewrites: expected a multiple of {GROUP}, got {options.rewrites}")

    for distance in options.distances:
        kl, exact = enumerated(distance)
        print(f"\nEnumerated ({len(Tree(distance).rewrites)} rewrites), KL {kl:.2g} nats:\n")
        print("| estimator | bias | variance | over ours |\n|---|---:|---:|---:|")
        ours = exact[0][2]
        for name, bias, variance in exact:
            shown = f"{bias:.0%}" if bias > 1e-9 else "0"
            print(f"| {name} | {shown} | {variance:.3g} | {variance / ours:.3g} |")
    if not options.model:
        return
    model = load_model(options.model, threads=options.threads)
    if options.adapter:
        policies = [load_peft(options.adapter, model.lora_modules)]
    else:
        policies = [perturbed(model, options, deviation) for deviation in options.deviations]
    for weights in policies:
        kl, rows = measured(LoraPolicy(model, weights), options)
        print(
            f"\n{options.model}, {options.prompts} prompts x {options.rewrites} rewrites of at "
            f"most {options.tokens} tokens, KL {kl:.2g} nats:\n"
        )
        print("| estimator | bias | variance | over ours |\n|---|---:|---:|---:|")
        ours = rows[0][3]
        for name, bias, noise, variance in rows:
            shown = "(truth)" if name == OURS else f"{bias:.0%} +- {noise:.0%}"
            print(f"| {name} | {shown} | {variance:.3g} | {variance / ours:.3g} |", flush=True)


if __name__ == "__main__":
    main()
