"""The supervised warm start on the enumerable model."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from alignpro.config import LoraConfig, Prompting, SftConfig, from_mapping
from alignpro.train.policy import LoraPolicy
from alignpro.train.sft import encode_pairs, end_of_turn, read_pairs, warm_start
from train.toy_model import EOS, GEN, MODULE, ToyModel, ToyTokenizer

PLAIN = Prompting(template="{prompt}")
PAIRS = [("ab", "c"), ("d", "c"), ("a", "e"), ("b", "c")]


def config(**changes):
    defaults = {"steps": 2, "batch_size": 4, "prompting": PLAIN, "learning_rate": 0.05}
    return SftConfig(**{**defaults, **changes})


TEXTS = ("In steps.", "Yes or No.", "As a list.", "")


def test_instructions_are_paired_evenly_and_without_a_look_at_the_prompt(tmp_path):
    kinds = {"prompt": [f"{kind} {i}" for kind in "abc" for i in range(20)]}  # sorted, as files are
    data = tmp_path / "p.csv"
    data.write_text("prompt\n" + "\n".join(kinds["prompt"]) + "\n")
    settings = {"data": str(data), "instructions": TEXTS, "instructions_per_prompt": 3}
    pairs, same = read_pairs(SftConfig(**settings, seed=4))
    assert same == SftConfig(**settings, seed=4)
    assert Counter(pair.prompt for pair in pairs) == dict.fromkeys(kinds["prompt"], 3)
    assert len({(pair.prompt, pair.instruction) for pair in pairs}) == len(pairs)
    assert Counter(pair.instruction for pair in pairs) == dict.fromkeys(TEXTS, 45)
    for kind in "abc":
        of_kind = Counter(pair.instruction for pair in pairs if pair.prompt.startswith(kind))
        assert all(11 <= count <= 19 for count in of_kind.values()), of_kind
    assert pairs == read_pairs(SftConfig(**settings, seed=4))[0]
    assert pairs != read_pairs(SftConfig(**settings, seed=5))[0]

    few = read_pairs(SftConfig(**{**settings, "instructions_per_prompt": 1}))[0]
    assert sorted(Counter(pair.instruction for pair in few).values()) == [15] * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"instructions": ["a"]}, r"instructions: expected two texts or more, each once, got"),
        ({"instructions": ["a", "b", "a"]}, r"two texts or more, each once"),
        ({"instructions": ["a", "", " "]}, r"two texts or more, each once"),
        ({"instructions": ["a", 2]}, r"^instructions\[1\]: expected text, got 2$"),
        (
            {"instructions": "a"},
            r"instructions: expected a list such as \[\.\.\.\] or null, got 'a'",
        ),
        ({"instructions": ["a", "b"]}, r"at most the 2 instructions there are, got 3"),
        ({"instructions_per_prompt": 2}, r"its default 3 \(it goes with instructions\)"),
        ({"instructions": TEXTS, "schema": {"path": "s.json"}}, r"schema: expected its default"),
        ({"instructions": TEXTS, "data": {"instruction": "x"}}, r"data\.instruction: expected its"),
    ],
)
def test_instructions_that_cannot_be_paired(changes, said):
    with pytest.raises(ValueError, match=said):
        from_mapping(SftConfig, changes)


def test_what_is_read_and_what_is_written():
    tokenizer = ToyTokenizer()
    first, *_ = encode_pairs(tokenizer, [("ab", " ca\n")], PLAIN, 99)
    assert first.tokens == [0, 3, 4, GEN, 5, 3, EOS]
    assert first.start == 4


def test_an_empty_instruction_is_the_end_alone():
    (example,) = encode_pairs(ToyTokenizer(), [("ab", " ")], PLAIN, 99)
    assert example.tokens[example.start :] == [EOS]
    policy = LoraPolicy.fresh(ToyModel(), LoraConfig(rank=4), seed=0)
    list(warm_start(policy, [("ab", ""), ("d", "")], config(steps=100)).rows())
    table = policy.model.core_model.table(policy.core_adapter(), 1.0).detach()
    assert math.exp(table[GEN, EOS]) > 0.95


class SeveralEnds(ToyTokenizer):
    """As Phi-3.5: a turn ends with one EOS id, the text with another, and neither comes first."""

    eos_ids = (9, 8, 7)

    def encode_chat(self, messages, *, add_generation_prompt=True, most=None):
        tokens = []
        for message in messages:
            tokens += [{"user": 0, "assistant": 1}[message["role"]], 5, 8]
        return [*tokens, 1] if add_generation_prompt else [*tokens, 7]


class EndBeforeTheNextTurn(ToyTokenizer):
    """As Apertus: nothing follows the last turn; between turns there is an end."""

    eos_ids = (9, 8, 7)

    def encode_chat(self, messages, *, add_generation_prompt=True, most=None):
        tokens = []
        for message in messages:
            if message["role"] == "user":
                tokens += [7] * (len(tokens) > 0) + [0, *self.encode(message["content"]), 8]
            else:
                tokens += [1, *self.encode(message["content"])]
        return tokens


class NoEnd(ToyTokenizer):
    def decode(self, tokens, *, skip_special=True):
        assert not skip_special
        return "".join({EOS: "</s>"}[token] for token in tokens)

    def encode_chat(self, messages, *, add_generation_prompt=True, most=None):
        return [0, 1, 5, 5][: 2 * len(messages)]


def test_the_end_is_the_one_after_the_assistants_words(caplog):
    assert end_of_turn(ToyTokenizer()) == EOS
    assert end_of_turn(SeveralEnds()) == 8
    assert end_of_turn(EndBeforeTheNextTurn()) == 7
    assert caplog.text == ""
    assert end_of_turn(NoEnd()) == EOS
    assert "writes none of the model's end tokens (</s>) after an assistant turn" in caplog.text
    bare = ToyTokenizer()
    bare.eos_ids = ()
    with pytest.raises(ValueError, match="names no EOS token"):
        end_of_turn(bare)


def test_the_loss_is_the_mean_over_tokens():
    model = ToyModel()
    policy = LoraPolicy.fresh(model, LoraConfig(rank=2), seed=0)
    (row,) = list(warm_start(policy, PAIRS, config(steps=1)).rows())
    table = model.core_model.table(None, 1.0)
    c, e = 5, 7
    by_hand = -(3 * (table[GEN, c] + table[c, EOS]) + table[GEN, e] + table[e, EOS]) / 8
    assert row["loss"] == pytest.approx(float(by_hand), rel=1e-5)
    assert row["tokens"] == 8


@pytest.mark.parametrize(
    ("changes", "micro_batches", "mode"),
    [
        ({"micro_batch_size": 3}, 2, "keep"),
        ({"memory_limit": 1100}, 2, "keep"),  # 100 bytes a token, and 5 or 6 tokens a pair
        ({"memory_limit": 450}, 2, "recompute"),  # 40 bytes a token
        ({"activations": "recompute"}, 1, "recompute"),
    ],
)
def test_micro_batches_change_neither_loss_nor_gradient(changes, micro_batches, mode):
    def run(**changes):
        policy = LoraPolicy.fresh(ToyModel(), LoraConfig(rank=2), seed=0)
        (row,) = list(warm_start(policy, PAIRS, config(steps=1, **changes)).rows())
        return row, [p.grad for p in policy.parameters()], policy.model.core_model.scores

    whole, gradients, _ = run()
    assert whole["micro_batches"] == 1
    row, parts, scores = run(**changes)
    assert row["micro_batches"] == len(scores) == micro_batches
    assert {score.activations for score in scores} == {mode}
    for name in ("loss", "entropy", "grad_norm", "tokens"):
        assert row[name] == pytest.approx(whole[name], rel=1e-5)
    for mine, theirs in zip(parts, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_fitting_reaches_the_frequencies_of_the_data():
    policy = LoraPolicy.fresh(ToyModel(), LoraConfig(rank=4), seed=0)
    rows = list(warm_start(policy, PAIRS, config(steps=150)).rows())
    assert rows[-1]["loss"] < rows[0]["loss"]
    table = policy.model.core_model.table(policy.core_adapter(), 1.0).detach()
    # Three instructions in four are "c": the entropy of that choice is what no fit can remove.
    assert math.exp(table[GEN, 5]) == pytest.approx(0.75, abs=0.01)
    floor = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2
    assert rows[-1]["loss"] == pytest.approx(floor, abs=0.01)


def test_the_same_seed_gives_the_same_weights():
    pairs = [("a", letter) for letter in "abcdefgh"]

    def run(seed):
        policy = LoraPolicy.fresh(ToyModel(), LoraConfig(rank=2), seed=0)
        list(warm_start(policy, pairs, config(steps=3, batch_size=2, seed=seed)).rows())
        return policy.weights().matrices[MODULE][1]

    assert np.array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))


def test_global_randomness_is_left_alone():
    before = torch.random.get_rng_state()
    list(
        warm_start(LoraPolicy.fresh(ToyModel(), LoraConfig(rank=2), seed=0), PAIRS, config()).rows()
    )
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        ([], "pairs: expected at least one"),
        ([("a", "b"), ("", "b")], "pair 1: expected text or a chat, got an empty string"),
        ([("a" * 70, "b")], "pair 0: 74 tokens exceed the context of 64"),
    ],
)
def test_bad_pairs_are_named(pairs, line):
    policy = LoraPolicy.fresh(ToyModel(), LoraConfig(rank=2), seed=0)
    with pytest.raises(ValueError, match="pair") as caught:
        warm_start(policy, pairs, config())
    assert line in str(caught.value)
