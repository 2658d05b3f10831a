"""The supervised warm start: fit (prompt, instruction) pairs. The result is MATH's rho_sft."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from alignpro.config import FitConfig, Prompting, SftConfig
from alignpro.data.files import DataError
from alignpro.data.load import PairRow, load_pairs, load_prompts, pair_at_random
from alignpro.extract.check import verify
from alignpro.extract.parse import as_record
from alignpro.extract.schema import read_schema
from alignpro.lengths import fit_rows
from alignpro.models.language_model import Reads
from alignpro.models.native_client import prompt_end
from alignpro.models.native_model import NativeModel
from alignpro.models.reading import naming, prompter_tokens
from alignpro.models.reasoning import open_block
from alignpro.models.soft_prompt import SoftRows
from alignpro.models.tokenizer import Tokenizer, count_words
from alignpro.train.fit import Fit
from alignpro.train.micro_batches import shared_prefix
from alignpro.train.policy import Policy
from alignpro.types import Conversation, Message, PromptLike

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One pair as tokens: what the prompter reads, and what it is to write (EOS included)."""

    tokens: list[int]
    start: int  # the first token to be written


def warm_start(policy: Policy, pairs: Sequence[tuple[PromptLike, str]], config: SftConfig) -> Fit:
    """Maximises the mean log-probability of the instructions' tokens, step by step.

    Args:
        pairs: (prompt, instruction); where that is empty, the end of the turn is all there is to
            write.

    Raises:
        ValueError: no pairs, an empty prompt, a pair over the context, or a chat template that
            opens a block of reasoning; the message names its index. Before the first step.
    """
    model = policy.model
    limit = model.context_length
    examples = encode_pairs(model.tokenizer, pairs, config.prompting, limit, policy.rows)
    for index, example in enumerate(examples):
        with naming(f"pair {index}"):
            check_example(model, example)
    return Fit(
        policy,
        config,
        len(examples),
        lambda rows: likelihood_gradients(policy, [examples[i] for i in rows], config),
    )


def check_example(model: NativeModel, example: Example) -> None:
    """Refuse what the model cannot read, or could not have written there. Raises ValueError."""
    reason = over_context(model, example)
    if reason is not None:
        raise ValueError(reason)
    if open_block(prompt_end(model.tokenizer, example.tokens[: example.start])) is not None:
        raise ValueError(
            "the chat template opens a block of reasoning, in which no text can be taught; the "
            "model's chat_template_kwargs may close it, or its chat_template takes another"
        )


def over_context(model: Reads, example: Example) -> str | None:
    """Why the model's context does not hold it; None where it does."""
    length, limit = len(example.tokens), model.context_length
    return f"{count_words(length, limit)} exceed the context of {limit}" if length > limit else None


def fit_pairs(
    model: Reads, pairs: Sequence[PairRow], config: SftConfig, rows: SoftRows | None = None
) -> list[tuple[PromptLike, str]]:
    """The pairs that the prompter's context holds, by ``config.on_too_long``. rows: the prompter's.

    Raises as `fit_rows`.
    """
    limit, end = model.context_length, end_of_turn(model.tokenizer)

    def unread(pair: PairRow) -> str | None:
        pieces = (pair.prompt, pair.instruction)
        example = _encode_pair(model.tokenizer, pieces, config.prompting, limit, end, rows)
        return over_context(model, example)

    fitted = fit_rows(pairs, unread, config.on_too_long).rows
    return [(pair.prompt, pair.instruction) for pair in fitted]


def read_pairs(config: SftConfig) -> tuple[list[PairRow], SftConfig]:
    """What is to be taught, and the configuration with the template that it is taught in.

    Raises DataError: see `load_pairs`; a row whose record is none, or not as the schema and its
    text say.
    """
    if config.schema is not None:
        return _record_pairs(config)
    if config.instructions is None:
        return load_pairs(config.data), config
    rows, count = load_prompts(config.data), config.instructions_per_prompt
    return pair_at_random(rows, config.instructions, count, config.seed), config


def _record_pairs(config: SftConfig) -> tuple[list[PairRow], SftConfig]:
    """Texts and the records that are to be written for them, by ``config.schema``."""
    assert config.schema is not None
    schema, form = read_schema(config.schema.path), config.schema.format
    rows = []
    for row in load_prompts(config.data):
        where = f"{row.place}, column {config.schema.record!r}"
        try:
            record = as_record(row.columns.get(config.schema.record))
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        wrong = verify(record, schema, Conversation.of(row.prompt).last_turn)
        if wrong:
            raise DataError(f"{where}: {wrong[0]}")
        rows.append(PairRow(row.prompt, schema.write(record, form), row.place))
    prompting = replace(config.prompting, template=schema.template(form))
    return rows, replace(config, prompting=prompting)


def likelihood_gradients(
    policy: Policy,
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
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[PromptLike, str]],
    prompting: Prompting,
    limit: int,
    rows: SoftRows | None = None,
) -> list[Example]:
    """The pairs as the prompter would read and write them, ended by its end-of-turn token.
    limit: tokens of a pair, for which a conversation's history is cut. rows: the prompter's."""
    if not pairs:
        raise ValueError("pairs: expected at least one, got none")
    end = end_of_turn(tokenizer)
    examples = []
    for index, pair in enumerate(pairs):
        with naming(f"pair {index}"):
            examples.append(_encode_pair(tokenizer, pair, prompting, limit, end, rows))
    return examples


def _encode_pair(
    tokenizer: Tokenizer,
    pair: tuple[PromptLike, str],
    prompting: Prompting,
    limit: int,
    end: int,
    rows: SoftRows | None,
) -> Example:
    conversation = Conversation.of(pair[0])
    written = [*tokenizer.encode(pair[1].strip(), most=limit), end]
    read = prompter_tokens(tokenizer, prompting, conversation, limit, len(written), rows)
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
