"""The closed form with rewards pooled over prompts: what every prompt should be rewritten to.

``rho*(x'|x) ~ rho_ref(x'|x) exp(R(x, x') / kl_coef)`` over a prompt's candidates: of the texts that
many prompts share, those that earn most behind this one by `pooled_rewards`. The fit then draws
from it, one text a prompt, and raises its likelihood: an unbiased step towards the least
KL(rho* || rho).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignpro.config import TrainConfig
from alignpro.models.seeds import derive_seed
from alignpro.objective.pooled_rewards import PooledRewards, directions, pooled_rewards, principal
from alignpro.train.micro_batches import shared_prefix
from alignpro.train.policy import Policy, Reference
from alignpro.train.sft import Example
from alignpro.types import Response, Rewrite

# Prompts that a text was answered behind, to be a candidate. The best of many estimates is the
# luckiest: with every text a candidate, the fit wrote what had once earned 1 (KL 16 nats).
SHARED_BY = 5
# Principal axes that are kept of either state: with all, texts are chosen worse (house-rules.md).
AXES = 16
LABEL_STREAM = 4  # of randomness, beside those of the pipeline, the minibatches and the search


@dataclass(frozen=True)
class Target:
    """What one prompt is to be rewritten to."""

    context: list[int]  # what the prompter reads
    rewrites: list[list[int]]  # C candidates, end of turn included
    weights: list[float]  # [C] of them, which sum to 1
    expected: float  # pooled reward under these weights


def distinct_responses(rewrites: Iterable[Rewrite]) -> list[tuple[Rewrite, Response]]:
    """A prompt's responses, each once: rewrites of one text share theirs under common draws."""
    found = {(w.text, r.text): (w, r) for w in rewrites for r in w.responses}
    return list(found.values())


class Pool:
    """All rollouts so far, by prompt, and what is to be learnt from them."""

    def __init__(self, policy: Policy, reference: Reference, config: TrainConfig) -> None:
        self.policy = policy
        self.config = config
        self._reference = None if reference == "base" else policy.model.make_adapter(reference)
        self._written: dict[int, list[Rewrite]] = {}  # by the prompt's number
        self._prior: dict[tuple[int, tuple[int, ...]], float] = {}  # log rho_ref, by tokens
        self._observed: list[tuple[int, str, float]] = []  # prompt, text and reward of a response
        self._directions: torch.Tensor | None = None  # the prompts' features, which stay

    def add(self, prompt: int, rewrites: Sequence[Rewrite]) -> None:
        """What rho_ref wrote, with the responses that it has."""
        if rewrites:
            self._written[prompt] = list(rewrites)
        for w in rewrites:
            self._prior[prompt, tuple(w.tokens)] = math.fsum(w.logprobs)
        for rewrite, response in distinct_responses(rewrites):
            self._observed.append((prompt, rewrite.text, response.reward))

    def observe(self, prompt: int, answered: Rewrite) -> None:
        """Responses to a text behind a prompt that was added, whoever wrote it."""
        self._observed += [(prompt, answered.text, r.reward) for r in answered.responses]

    def most_wanted(self) -> list[str]:
        """For every prompt that was added, the text that the target is to answer next. First, of
        those that the prompt was rewritten to, the one that the fewest prompts before it got; then
        the one that promises most and was not answered behind this prompt, or the most promising.

        Raises ValueError where prompts share no texts.
        """
        shared = self._shared()
        if not self._observed:
            tried: Counter[str] = Counter()
            wanted = []
            for rewrites in self._written.values():
                own = [w.text for w in rewrites if w.text in shared]
                wanted.append(min(own or shared, key=lambda text: tried[text]))
                tried[wanted[-1]] += 1
            return wanted
        behind = {(prompt, text) for prompt, text, _ in self._observed}
        texts = list(shared)
        wanted = []
        for prompt, row in zip(self._written, self._estimates(shared).mean, strict=True):
            best = [texts[i] for i in row.argsort(descending=True, stable=True).tolist()]
            wanted.append(next((t for t in best if (prompt, t) not in behind), best[0]))
        return wanted

    def targets(self) -> tuple[list[Target], PooledRewards]:
        """A target for every prompt that was added, under the weights as they are.

        Raises ValueError where prompts share no texts.
        """
        shared = self._shared()
        pooled = self._estimates(shared)
        tokens = list(shared.values())
        count = min(self.config.closed_form.candidates, len(shared))
        best = pooled.mean.topk(count, dim=1).indices
        chosen = [[tokens[i] for i in indices] for indices in best.tolist()]
        self._look_up_priors(chosen)
        targets = []
        for place, (prompt, rewrites) in enumerate(self._written.items()):
            rewards = pooled.mean[place, best[place]]
            prior = torch.tensor([self._prior[prompt, tuple(t)] for t in chosen[place]])
            weights = torch.softmax(prior + rewards / self.config.kl_coef, dim=0)
            targets.append(
                Target(
                    context=rewrites[0].prompter_tokens,
                    rewrites=chosen[place],
                    weights=weights.tolist(),
                    expected=float(weights @ rewards),
                )
            )
        return targets, pooled

    def _shared(self) -> dict[str, list[int]]:
        """The candidates, texts that enough prompts were rewritten to, with their tokens: those of
        one that was not cut."""
        behind = Counter(
            text for rewrites in self._written.values() for text in {w.text for w in rewrites}
        )
        shared: dict[str, list[int]] = {}
        for rewrites in self._written.values():
            for w in rewrites:
                enough = behind[w.text] >= SHARED_BY
                if enough and (w.finish_reason == "stop" or w.text not in shared):
                    shared[w.text] = w.tokens
        if len(shared) < 2:
            raise ValueError(
                "closed_form.loss: pooled needs a prompter that chooses among few texts, and fewer "
                f"than two were written behind {SHARED_BY} prompts; use variance, or more prompts"
            )
        return shared

    def _estimates(self, shared: Mapping[str, Any]) -> PooledRewards:
        """What each shared text is worth behind each prompt."""
        row = {prompt: place for place, prompt in enumerate(self._written)}
        number = {text: place for place, text in enumerate(shared)}
        observed = [
            (row[prompt], number[text], reward)
            for prompt, text, reward in self._observed
            if text in number
        ]
        prompts, texts, rewards = zip(*observed, strict=True)
        if self._directions is None:
            self._directions = self._features()
        return pooled_rewards(
            self._directions,
            torch.tensor(prompts),
            torch.tensor(texts),
            torch.tensor(rewards, dtype=torch.float64),
            num_texts=len(shared),
        )

    def _contexts(self) -> list[list[int]]:
        return [rewrites[0].prompter_tokens for rewrites in self._written.values()]

    def _features(self) -> torch.Tensor:
        """[P, at most 2 AXES]: how the untrained prompter reads each prompt: the directions of its
        state where it begins to write, and of its mean state over what prompts do not begin with
        alike, on their principal axes.

        A warm start on random rewrites blurs what tells prompts apart (docs/notes/house-rules.md).
        """
        contexts = self._contexts()
        rows = [[*c, w[0].tokens[0]] for c, w in zip(contexts, self._written.values(), strict=True)]
        alike = min(shared_prefix(contexts[0], c) for c in contexts)
        starts = [min(alike + 1, len(c)) for c in contexts]
        plan = self.policy.micro_batches(
            rows, starts, self.config, with_reference=False, with_hidden=True
        )
        last, mean = [], []
        for micro in plan:
            part, begin = micro.of(rows), micro.of(starts)
            score = self.policy.model.core_model.score(
                [list(r) for r in part], list(begin), with_hidden=True
            )
            assert score.hidden is not None
            lengths = [len(row) - start for row, start in zip(part, begin, strict=True)]
            for states in np.split(score.hidden, np.cumsum(lengths)[:-1]):
                last.append(states[-1])
                mean.append(states.mean(axis=0))
        both = [directions(torch.from_numpy(np.stack(states))) for states in (last, mean)]
        return torch.cat([principal(states, AXES) for states in both], dim=1)

    def _look_up_priors(self, chosen: Sequence[Sequence[list[int]]]) -> None:
        """log rho_ref(rewrite | prompt) of the pairs that were not known before."""
        missing = [
            (prompt, context, tokens)
            for prompt, context, candidates in zip(
                self._written, self._contexts(), chosen, strict=True
            )
            for tokens in candidates
            if (prompt, tuple(tokens)) not in self._prior
        ]
        rows = [[*context, *tokens] for _, context, tokens in missing]
        starts = [len(context) for _, context, _ in missing]
        plan = self.policy.micro_batches(rows, starts, self.config, with_reference=False)
        for micro in plan:
            score = self.policy.model.core_model.score(
                [list(r) for r in micro.of(rows)],
                list(micro.of(starts)),
                adapter=self._reference,
                temperature=self.config.rewrite.temperature,
            )
            logprobs = np.asarray(score.logprob, np.float64)
            lengths = [len(tokens) for _, _, tokens in micro.of(missing)]
            parts = np.split(logprobs, np.cumsum(lengths)[:-1])
            for (prompt, _, tokens), part in zip(micro.of(missing), parts, strict=True):
                self._prior[prompt, tuple(tokens)] = float(part.sum())


def draw(targets: Sequence[Target], seed: int) -> list[Example]:
    """A candidate of each target by its weights, to be written after the target's context."""
    rng = np.random.default_rng(derive_seed(seed, LABEL_STREAM))
    return [
        Example([*t.context, *t.rewrites[rng.choice(len(t.weights), p=t.weights)]], len(t.context))
        for t in targets
    ]
