"""Preference training: pairs of answers, of which the chosen one becomes likelier (DPO)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignpro.config import PreferConfig
from alignpro.data.preferences import PreferenceRow
from alignpro.lengths import fit_rows
from alignpro.models.language_model import Reads
from alignpro.models.reading import naming, prompter_tokens, target_tokens
from alignpro.models.soft_prompt import SoftRows
from alignpro.objective import sum_per_sequence
from alignpro.objective.preference import dpo_loss
from alignpro.statistics import proportion_ci
from alignpro.train.anchor import anchor_of, anchors_of
from alignpro.train.fit import Fit
from alignpro.train.held_out import is_due
from alignpro.train.policy import Policy, Reference
from alignpro.train.sft import Example, check_example, end_of_turn, over_context
from alignpro.types import Conversation, Prompt


@dataclass(frozen=True)
class TokenPair:
    """A pair as tokens: both answers behind what the policy reads, and behind what the reference
    does."""

    policy: tuple[Example, Example]  # chosen, rejected
    reference: tuple[Example, Example]


def preference_fit(
    policy: Policy,
    rows: Sequence[PreferenceRow],
    config: PreferConfig,
    *,
    reference: Reference = "base",
    held_out: Sequence[PreferenceRow] = (),
) -> Fit:
    """Minimises `dpo_loss` over the pairs, step by step; the reference stays as it is.

    reference: "base", or a frozen adapter. held_out: the pairs of ``config.heldout``.

    Raises:
        ValueError: no pairs, one over the context, or a chat template that opens a block of
            reasoning; the message names the row. Anchors that `anchors_of` refuses. Before the
            first step.
    """
    if not rows:
        raise ValueError("pairs: expected at least one, got none")
    if config.anchor is not None:
        anchors_of(config.anchor, rows)
    pairs = Pairs(policy, rows, config, reference)
    watched = Pairs(policy, held_out, config, reference)

    def look(step: int) -> dict[str, Any]:
        due = config.heldout is not None and is_due(config.heldout.every, step, config.steps)
        return {"heldout": watched.measure(range(len(held_out)))} if due else {}

    return Fit(policy, config, len(rows), pairs.gradients, look)


def fit_preferences(
    model: Reads, pairs: Sequence[PreferenceRow], config: PreferConfig, rows: SoftRows | None = None
) -> list[PreferenceRow]:
    """The pairs that the model's context holds, by ``config.on_too_long``. rows: the policy's.

    Raises as `fit_rows`.
    """
    end = end_of_turn(model.tokenizer)

    def unread(row: PreferenceRow) -> str | None:
        pair = encode_preference(model, row, config, end, rows)
        reasons = (over_context(model, e) for e in (*pair.policy, *pair.reference))
        return next(filter(None, reasons), None)

    return fit_rows(pairs, unread, config.on_too_long).rows


def encode_preference(
    model: Reads,
    row: PreferenceRow,
    config: PreferConfig,
    end: int,
    rows: SoftRows | None = None,
) -> TokenPair:
    """end: what ends an answer (`end_of_turn`). rows: of the policy."""
    tokenizer, most = model.tokenizer, model.context_length
    texts = (row.chosen.strip(), row.rejected.strip())
    written = [[*tokenizer.encode(text, most=most), end] for text in texts]
    longest = max(map(len, written))  # both answers behind the same history

    def behind(prompt: Prompt) -> tuple[Example, Example]:
        if config.policy == "target":
            read = target_tokens(tokenizer, prompt, rows, most)
        else:
            asked = Conversation.of(prompt)
            read = prompter_tokens(tokenizer, config.prompting, asked, most, longest, rows)
        chosen, rejected = (Example([*read, *tokens], len(read)) for tokens in written)
        return chosen, rejected

    own, other = behind(row.prompt), anchor_of(config.anchor, row)
    return TokenPair(own, own if other is None else behind(other))


class Pairs:
    """Pairs with their log-probabilities under the policy, and under the frozen reference, which
    are looked up once: by the same op, so that a policy that starts as the reference starts with
    margins of exactly 0."""

    def __init__(
        self,
        policy: Policy,
        rows: Sequence[PreferenceRow],
        config: PreferConfig,
        reference: Reference,
    ) -> None:
        model = policy.model
        self._policy, self._config = policy, config
        self._reference = None if reference == "base" else model.make_adapter(reference)
        self._referred: dict[int, Tensor] = {}  # [2] float64, by pair
        self._pairs: list[TokenPair] = []
        end = end_of_turn(model.tokenizer) if rows else 0
        for index, row in enumerate(rows):
            with naming(row.place or f"pair {index}"):
                self._pairs.append(encode_preference(model, row, config, end, policy.rows))
                for example in self._pairs[-1].policy:
                    check_example(model, example)

    def gradients(self, rows: Sequence[int]) -> dict[str, float]:
        """Accumulate the gradient of the pairs' mean loss; returns its metrics."""
        return self._over(rows, train=True)

    def measure(self, rows: Sequence[int]) -> dict[str, Any]:
        """The metrics alone, with the exact binomial interval of the accuracy."""
        with torch.no_grad():
            found = self._over(rows, train=False)
        accuracy = proportion_ci(round(2 * found["accuracy"] * len(rows)) / 2, len(rows))
        return found | {"accuracy_ci95": [accuracy.low, accuracy.high]}

    def _over(self, rows: Sequence[int], *, train: bool) -> dict[str, float]:
        config, totals = self._config, Counter[str]()
        examples = [example for row in rows for example in self._pairs[row].policy]
        sequences, starts = [e.tokens for e in examples], [e.start for e in examples]
        plan = self._policy.micro_batches(
            sequences, starts, config, with_reference=False, together=2
        )
        for micro in plan:
            part = micro.of(examples)
            lengths = _lengths(part)
            scores = self._policy.score(
                micro.of(sequences), micro.of(starts), activations=micro.activations
            )
            logprob = _sums(scores.logprob, lengths)
            reference = self._under_reference(rows[micro.begin // 2 : micro.end // 2])
            result = dpo_loss(
                *(*logprob.T, *reference.T),
                beta=config.beta,
                label_smoothing=config.label_smoothing,
            )
            per_token = logprob / lengths.view(-1, 2)
            loss = (result.loss - config.chosen_nll * per_token[:, 0]).sum() / len(rows)
            if train:
                loss.backward()  # type: ignore[no-untyped-call]
            chosen_tokens, rejected_tokens = lengths.view(-1, 2).sum(dim=0).tolist()
            chosen_logprob, rejected_logprob = logprob.detach().sum(dim=0).tolist()
            totals.update(
                {
                    "loss": float(loss.detach()) * len(rows),
                    "margin": float(result.margin.detach().sum()),
                    "accuracy": float(result.correct.detach().sum()),
                    "chosen_reward": float(result.chosen_reward.detach().sum()),
                    "rejected_reward": float(result.rejected_reward.detach().sum()),
                    "chosen_logprob": chosen_logprob,
                    "rejected_logprob": rejected_logprob,
                    "chosen_tokens": chosen_tokens,
                    "rejected_tokens": rejected_tokens,
                }
            )
        means = {name: total / len(rows) for name, total in totals.items()}
        return {
            **means,
            "tokens": sum(len(e.tokens) - e.start for e in examples),
            "micro_batches": len(plan),
        }

    def _under_reference(self, rows: Sequence[int]) -> Tensor:
        """[P, 2] float64: log pi_ref of both answers of each pair."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._referred]
        if missing:
            examples = [example for row in missing for example in self._pairs[row].reference]
            score = self._policy.model.core_model.score(
                [e.tokens for e in examples], [e.start for e in examples], adapter=self._reference
            )
            logprob = torch.tensor(score.logprob, dtype=torch.float32)
            found = _sums(logprob, _lengths(examples))
            self._referred.update(zip(missing, found, strict=True))
        return torch.stack([self._referred[row] for row in rows])


def _lengths(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([len(e.tokens) - e.start for e in examples])


def _sums(logprob: Tensor, lengths: Tensor) -> Tensor:
    """[P, 2] float64 of the tokens of P pairs, answer by answer."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return sum_per_sequence(logprob.double(), sequence, len(lengths)).view(-1, 2)
