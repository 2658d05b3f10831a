"""The supervised warm start: fit (prompt, instruction) pairs. The result is MATH's rho_sft."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignpro.config import FitConfig, Prompting, SftConfig, to_mapping
from alignpro.data.load import PairRow
from alignpro.lengths import fit_rows
from alignpro.models.native_client import prompt_end
from alignpro.models.native_model import NativeModel
from alignpro.models.reading import naming, prompter_tokens
from alignpro.models.reasoning import open_block
from alignpro.models.tokenizer import Tokenizer
from alignpro.train.checkpoint import Checkpoint, check_same_run
from alignpro.train.micro_batches import shared_prefix
from alignpro.train.policy import LoraPolicy, one_torch_thread
from alignpro.train.schedule import (
    apply_gradients,
    batch_indices,
    make_optimizer,
    rate_factor,
)
from alignpro.types import Conversation, Message, PromptLike

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One pair as tokens: what the prompter reads, and what it is to write (EOS included)."""

    tokens: list[int]
    start: int  # the first token to be written


class WarmStart:
    """Maximises the mean log-probability of the instructions' tokens, step by step.

    Args:
        pairs: (prompt, instruction); where that is empty, the end of the turn is all there is to
            write. Batches are shuffled by (config.seed, epoch).

    Raises:
        ValueError: no pairs, an empty prompt, a pair over the context, or a chat template that
            opens a block of reasoning; the message names its index. Before the first step.
    """

    def __init__(
        self, policy: LoraPolicy, pairs: Sequence[tuple[PromptLike, str]], config: SftConfig
    ) -> None:
        limit = policy.model.context_length
        self._examples = encode_pairs(policy.model.tokenizer, pairs, config.prompting, limit)
        for index, example in enumerate(self._examples):
            if len(example.tokens) > limit:
                raise ValueError(f"pair {index}: {_OVER.format(len(example.tokens), limit)}")
            read = prompt_end(policy.model.tokenizer, example.tokens[: example.start])
            if open_block(read) is not None:
                raise ValueError(
                    f"pair {index}: the chat template opens a block of reasoning, in which no "
                    "instruction can be taught; prompter.chat_template_kwargs may close it, or "
                    "prompter.chat_template takes another"
                )
        self.policy, self.config = policy, config
        self.optimizer = make_optimizer(policy.parameters(), config)
        self.step = 0  # steps done

    def rows(self) -> Iterator[dict[str, Any]]:
        """The steps that are left: one for each row of metrics that is taken."""
        while self.step < self.config.steps:
            yield self.advance()

    def advance(self) -> dict[str, Any]:
        """Do a step, as a whole; returns its row of metrics."""
        config, started = self.config, time.perf_counter()
        chosen = batch_indices(
            seed=config.seed,
            cursor=self.step * config.batch_size,
            count=config.batch_size,
            rows=len(self._examples),
        )
        self.optimizer.zero_grad(set_to_none=True)
        rate = config.learning_rate * rate_factor(config, self.step)
        batch = [self._examples[i] for i in chosen]
        with one_torch_thread():
            metrics = likelihood_gradients(self.policy, batch, config)
            (norm,) = apply_gradients({self.optimizer: rate}, max_grad_norm=config.max_grad_norm)
        self.step += 1
        return {
            "step": self.step - 1,
            **metrics,
            "grad_norm": norm,
            "learning_rate": rate,
            "seconds": time.perf_counter() - started,
        }

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            step=self.step,
            cursor=self.step * self.config.batch_size,
            config=to_mapping(self.config),
            weights=self.policy.weights(),
            optimizer=self.optimizer.state_dict(),
            adaptive={},
        )

    def restore(self, checkpoint: Checkpoint, same: Mapping[str, str] | None = None) -> None:
        """Go on as if it had not stopped. Raises ValueError as `check_same_run`."""
        check_same_run(checkpoint.config, to_mapping(self.config), same)
        self.policy.load_weights(checkpoint.weights)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.step = checkpoint.step


def fit_pairs(
    model: NativeModel, pairs: Sequence[PairRow], config: SftConfig
) -> list[tuple[PromptLike, str]]:
    """The pairs that the prompter's context holds, by ``config.on_too_long``.

    Raises as `fit_rows`.
    """
    limit, end = model.context_length, end_of_turn(model.tokenizer)

    def unread(pair: PairRow) -> str | None:
        pieces = (pair.prompt, pair.instruction)
        example = _encode_pair(model.tokenizer, pieces, config.prompting, limit, end)
        over = len(example.tokens) > limit
        return _OVER.format(len(example.tokens), limit) if over else None

    rows = fit_rows(pairs, unread, config.on_too_long).rows
    return [(pair.prompt, pair.instruction) for pair in rows]


_OVER = "{} tokens exceed the context of {}"


def likelihood_gradients(
    policy: LoraPolicy,
    batch: Sequence[Example],
    config: FitConfig,
    *,
    temperature: float = 1.0,
    per: Literal["token", "text"] = "token",
) -> dict[str, float]:
    """Accumulate the gradient of minus the mean log-probability of what is to be written.

    per: what the mean is over. Of a token, it weighs a batch of short texts as one of long ones.
    """
    sequences, starts = [e.tokens for e in batch], [e.start for e in batch]
    tokens = sum(len(e.tokens) - e.start for e in batch)
    count = tokens if per == "token" else len(batch)
    plan = policy.micro_batches(sequences, starts, config, with_reference=False)
    total_loss = total_entropy = 0.0
    for micro in plan:
        scores = policy.score(
            micro.of(sequences),
            micro.of(starts),
            temperature=temperature,
            activations=micro.activations,
        )
        loss = -scores.logprob.sum() / count
        loss.backward()  # type: ignore[no-untyped-call]
        total_loss += float(loss.detach())
        total_entropy += float(scores.entropy.detach().sum()) / tokens
    return {
        "loss": total_loss,
        "entropy": total_entropy,
        "tokens": tokens,
        "micro_batches": len(plan),
    }


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[PromptLike, str]], prompting: Prompting, limit: int
) -> list[Example]:
    """The pairs as the prompter would read and write them, ended by its end-of-turn token.
    limit: tokens of a pair, for which a conversation's history is cut."""
    if not pairs:
        raise ValueError("pairs: expected at least one, got none")
    end = end_of_turn(tokenizer)
    examples = []
    for index, pair in enumerate(pairs):
        with naming(f"pair {index}"):
            examples.append(_encode_pair(tokenizer, pair, prompting, limit, end))
    return examples


def _encode_pair(
    tokenizer: Tokenizer, pair: tuple[PromptLike, str], prompting: Prompting, limit: int, end: int
) -> Example:
    conversation = Conversation.of(pair[0])
    written = [*tokenizer.encode(pair[1].strip()), end]
    read = prompter_tokens(tokenizer, prompting, conversation, limit - len(written))
    return Example(tokens=[*read, *written], start=len(read))


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The id that ends what is written: of those that end a generation, the first that the chat
    template writes after the assistant's words.

    A model may have several (Phi-3.5 has three); that one it was taught to write there. Some
    templates write it only where another turn follows. One that writes none of them leaves the
    tokenizer's own EOS, and a warning says so.
    """
    ends = tokenizer.eos_ids
    if not ends:
        raise ValueError(
            "the model names no EOS token, so it cannot be taught where to stop; expected "
            "eos_token in tokenizer_config.json or tokenizer.ggml.eos_token_id"
        )

    def after(*following: Message) -> list[int]:
        """What two conversations end with that differ in the assistant's words alone."""
        one, other = (
            tokenizer.encode_chat(
                [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": words},
                    *following,
                ],
                add_generation_prompt=False,
            )
            for words in ("b", "c")
        )
        return one[len(one) - shared_prefix(one[::-1], other[::-1]) :]

    one, other = (after({"role": "user", "content": words}) for words in ("d", "e"))
    between = one[: shared_prefix(one, other)]
    found = next((token for token in [*after(), *between] if token in ends), None)
    if found is not None:
        return found
    known = ", ".join(tokenizer.decode([end], skip_special=False) for end in ends)
    _log.warning(
        "the chat template writes none of the model's end tokens (%s) after an assistant turn; "
        "the first is taught as the end",
        known,
    )
    return ends[0]
