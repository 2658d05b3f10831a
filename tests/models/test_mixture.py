"""Mixtures of adapters: what they draw is what their members' states say, to the bit, whoever
shares the batch; as folders they stand where an adapter does; what cannot take one says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignpro.fingerprints import of_adapter, of_adapter_folder
from alignpro.models.adapter import LoraWeights, load_peft, save_peft
from alignpro.models.mixture import Mixture, read_mixture, save_mixture, score_tokens
from alignpro.models.native_model import NativeModel, load_model
from alignpro.models.prompter_file import save_prompter
from alignpro.models.redraw import Redraw
from alignpro.pipeline import Pipeline
from alignpro.prompter import Prompter
from alignpro.train.policy import LoraPolicy
from alignpro.types import SamplingParams
from native_runs import ENDLESS, SHORT, assert_settles, drain, lora

PROMPTS = [[5, 6, 7], list(range(20, 60)), [5, 6, 8, 9, 10, 11], [70]]


@pytest.fixture
def members(tiny: NativeModel) -> tuple[LoraWeights, LoraWeights]:
    return lora(tiny, 1), lora(tiny, 2, modules=9)


def mixtures(one: LoraWeights, other: LoraWeights) -> list[Any]:
    return [
        Mixture(((one, 0.46), (other, 0.54))),
        Mixture(((one, 1.5), ("base", -0.5))),
        Mixture((("base", 0.5), (other, 0.25), (one, 0.25))),
        one,
        None,
    ]


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("qwen3", {"kv_dtype": "float16"}), ("phi3", {"max_batch_rows": 5})],
)
def test_recorded_log_probabilities_are_those_of_the_members_states(
    family: str, options: dict[str, Any], tiny_model_dir: Callable[..., Path]
) -> None:
    model = load_model(tiny_model_dir(family), threads=2, **options)
    one, other = lora(model, 1), lora(model, 2, modules=9)
    for mixture in mixtures(one, other)[:3]:
        params = replace(SHORT, temperature=0.8)
        done = model.generate(PROMPTS, params, adapter=mixture)
        sequences = [p + c.tokens for p, c in zip(PROMPTS, done, strict=True)]
        starts = [len(p) for p in PROMPTS]
        states = np.zeros(())
        for member, weight in mixture.members:
            scored = model.core_model.score(
                sequences,
                starts,
                adapter=None if member == "base" else model.make_adapter(member),
                with_hidden=True,
            )
            states = states + float(np.float32(weight)) * scored.hidden.astype(np.float64)
        mixed = states.astype(np.float32)
        expected = [x for c in done for x in c.logprobs]
        given = model.core_model.score(sequences, starts, temperature=0.8, given_hidden=mixed)
        assert given.logprob.tolist() == expected
        as_reference = model.core_model.score(
            sequences, starts, temperature=0.8, with_reference=True, reference_hidden=mixed
        )
        assert as_reference.reference_logprob.tolist() == expected
        scored = score_tokens(model, sequences, starts, adapter=mixture, temperature=0.8)
        assert scored.logprob.tolist() == expected
        to_itself = score_tokens(
            *(model, sequences, starts),
            adapter=mixture,
            reference=mixture,
            with_reference=True,
        )
        assert to_itself.kl is not None and not to_itself.kl.any()
        whole = model.score(sequences[:1], adapter=mixture, temperature=0.8)[0]
        assert whole[starts[0] - 1 :].tolist() == done[0].logprobs


def test_a_member_of_all_the_weight_is_that_adapter(tiny, members):
    one, other = members
    alone = tiny.generate(PROMPTS, SHORT, adapter=one)
    copy = replace(one)  # the same matrices as another adapter: a lane of its own
    for mixture in (
        Mixture(((one, 1.0), (other, 0.0))),
        Mixture(((one, 1.0), ("base", 1e-30))),
        Mixture(((one, 0.5), (copy, 0.5))),
        Mixture(((one, 1.25), (copy, -0.25))),
    ):
        assert tiny.generate(PROMPTS, SHORT, adapter=mixture) == alone
    base = tiny.generate(PROMPTS, SHORT)
    assert tiny.generate(PROMPTS, SHORT, adapter=Mixture((("base", 1.0),))) == base != alone


def test_the_whole_mixture_is_drawn_from(tiny, members):
    """Frequencies of first tokens are those of prod_k rho_k^w_k."""
    one, other = members
    mixture = Mixture(((one, 0.7), (other, 0.3)))
    logs = np.zeros(111)
    tokens = [[5, 6, 7, t] for t in range(111)]
    for member, weight in mixture.members:
        scored = tiny.core_model.score(tokens, [3] * 111, adapter=tiny.make_adapter(member))
        logs += weight * scored.logprob
    expected = np.exp(logs) / np.exp(logs).sum()
    count = 4000
    params = SamplingParams(max_new_tokens=1, n=count, seed=4, ignore_eos=True)
    drawn = [c.tokens[0] for c in tiny.generate([[5, 6, 7]], params, adapter=mixture)]
    assert chi_square(np.bincount(drawn, minlength=111), expected * count) < 1.0


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """As a share of its quantile of 0.999 (Wilson and Hilferty); bins under 5 are one."""
    small = expected < 5
    seen = [*counts[~small], counts[small].sum()]
    wanted = [*expected[~small], expected[small].sum()]
    value = sum((s - w) ** 2 / w for s, w in zip(seen, wanted, strict=True) if w > 0)
    k = len(seen) - 1
    return float(value / (k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3))


def test_neighbours_change_no_bit(tiny_model_dir, members):
    """Prompts, lengths, stops and limits that differ, mixed and plain, in narrow and wide steps."""
    one, other = members
    kinds = mixtures(one, other)
    asked = []
    for i in range(30):
        params = SamplingParams(
            max_new_tokens=1 + i % 13,
            seed=i % 4,
            temperature=(0.0, 0.7, 1.0)[i % 3],
            top_p=(1.0, 0.8)[i % 2],
            stop_token_ids=(20 + i, 40) if i % 3 == 0 else (),
            stop=("e",) if i % 7 == 0 else (),
            ignore_eos=i % 2 == 0,
            presence_penalty=0.5 if i % 10 == 9 else 0.0,
        )
        asked.append((PROMPTS[i % 4], params, kinds[i % 5]))
    expected = None
    for options in ({}, {"max_batch_rows": 7, "prefix_cache": False}, {"threads": 2}):
        model = load_model(tiny_model_dir("llama"), **{"threads": 1, **options})
        with model.client() as client:
            handles = [client.submit(p, params, adapter=kind) for p, params, kind in asked]
            client.submit(PROMPTS[1], ENDLESS, adapter=kinds[0]).cancel()
            drain(client)
        together = [handle.completion() for handle in handles]
        alone = [model.generate([p], params, adapter=kind)[0] for p, params, kind in asked]
        assert together == alone
        assert expected is None or together == expected
        expected = together
        assert_settles(model)


def test_cancelled_late_and_full(tiny_model_dir, members):
    one, other = members
    mixture = Mixture(((one, 0.5), (other, 0.5)))
    folder = tiny_model_dir("llama")
    block = load_model(folder, threads=1)
    per_block = 2 * 2 * 12 * 16 * 3 * 4  # K and V, heads, width, positions, layers, bytes
    model = load_model(folder, threads=1, kv_cache_bytes=8 * per_block)
    assert model.stats()["kv_blocks_capacity"] == 8
    with model.client() as client:
        first = client.submit([5, 6, 7], replace(ENDLESS, max_new_tokens=60), adapter=mixture)
        waiting = client.submit([5, 6, 8], replace(ENDLESS, max_new_tokens=60), adapter=mixture)
        client.step()
        assert model.stats()["kv_blocks_in_use"] == 8  # four blocks a lane: the other waits
        for _ in range(3):
            client.step()
        first.cancel()
        drain(client)
    cut, whole = first.completion(), waiting.completion()
    assert (cut.finish_reason, whole.finish_reason) == ("cancelled", "length")
    assert 0 < len(cut.tokens) < 60
    assert (
        whole
        == block.generate([[5, 6, 8]], replace(ENDLESS, max_new_tokens=60), adapter=mixture)[0]
    )
    late = replace(ENDLESS, max_new_tokens=60, deadline_seconds=1e-6)
    assert model.generate([[1, 2]], late, adapter=mixture)[0].finish_reason == "deadline"
    with pytest.raises(ValueError, match="needs 10 KV blocks in 2 lanes, the cache holds 8"):
        model.generate([[1] * 20], replace(SHORT, max_new_tokens=60), adapter=mixture)
    narrow = load_model(folder, threads=1, max_batch_rows=1)
    with pytest.raises(ValueError, match="mixture of 2 takes as many rows a step, max_batch_rows"):
        narrow.generate([[1]], SHORT, adapter=mixture)
    assert_settles(model)


def test_prompts_of_a_mixture_are_cached_under_its_members(tiny_model_dir, members):
    one, other = members
    model = load_model(tiny_model_dir("llama"), threads=1)
    mixture, prompt = Mixture(((one, 0.5), (other, 0.5))), list(range(20, 60))

    def cached(adapter: Any) -> int:
        before = model.stats()["cached_tokens"]
        model.generate([prompt], SHORT, adapter=adapter)
        return int(model.stats()["cached_tokens"] - before)

    assert cached(mixture) == 0
    assert cached(mixture) == 2 * 39
    assert cached(Mixture(((other, 2.0), (one, -1.0)))) == 2 * 39
    assert cached(one) == 39
    assert cached(Mixture(((one, 0.5), ("base", 0.5)))) == 0  # the base has never read it
    assert cached(Mixture(((one, 0.5), ("base", 0.5)))) == 2 * 39


# --- whole sequences ---

A, B = {(): 0.8, 0: 0.9, 1: 0.3}, {(): 0.3, 0: 0.2, 1: 0.6}  # of token 0, by what came before


class Drawn:
    """What a Redraw reads of a sequence."""

    def __init__(self, tokens: list[int], logprobs: list[float]) -> None:
        self.tokens, self.logprobs = tokens, logprobs


def test_rejection_gives_the_mixture_of_whole_sequences():
    """A tree of two tokens: the sampler's own choices, 1e5 of them."""

    def chance(tree: dict[Any, float], before: Any, token: int) -> float:
        return tree[before] if token == 0 else 1 - tree[before]

    def token_wise(before: Any) -> float:
        both = [math.sqrt(chance(A, before, t) * chance(B, before, t)) for t in (0, 1)]
        return both[0] / sum(both)

    q = {(): token_wise(()), 0: token_wise(0), 1: token_wise(1)}
    outcomes = [(first, second) for first in (0, 1) for second in (0, 1)]
    logs = {
        pair: [
            math.log(chance(tree, (), pair[0])) + math.log(chance(tree, pair[0], pair[1]))
            for tree in (A, B, q)
        ]
        for pair in outcomes
    }
    densities = {pair: (a + b) / 2 for pair, (a, b, _) in logs.items()}
    proposal = np.exp([logs[pair][2] for pair in outcomes])
    assert proposal == pytest.approx([0.340182, 0.226788, 0.192696, 0.240334], abs=1e-6)
    target = np.exp([densities[pair] for pair in outcomes])
    acceptance = target.sum()
    assert acceptance == pytest.approx(0.703145, abs=1e-6)
    target /= acceptance
    assert target == pytest.approx([0.295595, 0.197063, 0.225764, 0.281578], abs=1e-6)

    count = 100_000
    draws = iter(np.random.default_rng(1).choice(4, size=2 * count, p=proposal).tolist())
    taken = np.zeros(4, int)
    tries = 0
    mixture: Any = type("Prepared", (), {"tries": 1000})
    params = SamplingParams(seed=7)
    drawn: list[Any] = []
    for pair in outcomes:
        first = math.log(chance(q, (), pair[0]))
        drawn.append(Drawn(list(pair), [first, logs[pair][2] - first]))
    for sample in range(count):
        redraw = Redraw(mixture, [], params, sample)
        redraw.tries = 0
        while not redraw.done:
            redraw.tries += 1
            which = next(draws)
            redraw.judge(drawn[which], densities[outcomes[which]])
            tries += 1
        taken[which] += 1
    assert chi_square(taken, target * count) < 1.0
    assert chi_square(taken, proposal * count) > 10.0  # the test can tell them apart
    error = math.sqrt(acceptance * (1 - acceptance) / tries)
    assert count / tries == pytest.approx(acceptance, abs=3 * error)


def test_the_engine_draws_whole_sequences_exactly(tiny_model_dir, members):
    one, other = (  # nearer to each other
        replace(w, matrices={n: (a, b * np.float32(0.1)) for n, (a, b) in w.matrices.items()})
        for w in members
    )
    model = load_model(tiny_model_dir("llama"), threads=1)
    mixture = Mixture(((one, 0.5), (other, 0.5)), "sequence", tries=200)
    prompt, count = [70], 2000
    pairs = [[*prompt, a, b] for a in range(111) for b in range(111)]
    logs = np.zeros(len(pairs))
    for member, weight in mixture.members:
        scored = model.core_model.score(pairs, [1] * len(pairs), adapter=model.make_adapter(member))
        logs += weight * scored.logprob.reshape(-1, 2).sum(axis=1)
    total = float(np.exp(logs).sum())
    exact = (np.exp(logs) / total).reshape(111, 111).sum(axis=1)
    params = SamplingParams(max_new_tokens=2, n=count, seed=3, ignore_eos=True)
    done = model.generate([prompt], params, adapter=mixture)
    first = np.bincount([c.tokens[0] for c in done], minlength=111)
    assert chi_square(first, exact * count) < 1.0
    plain = model.generate([prompt], params, adapter=replace(mixture, sampling="token"))
    of_tokens = np.bincount([c.tokens[0] for c in plain], minlength=111)
    assert chi_square(of_tokens, exact * count) > 3.0
    stats = model.stats()
    assert stats["sequence_accepted"] == count and stats["sequence_given_up"] == 0
    deviation = math.sqrt(total * (1 - total))
    assert stats["sequence_acceptance"] == pytest.approx(total, abs=3 * deviation / count**0.5)
    tries = stats["sequence_tries"]
    assert count / tries == pytest.approx(total, abs=3 * deviation / tries**0.5)
    # An accepted first try is the token-wise draw; the same request gives the same again.
    assert sum(a == b for a, b in zip(done, plain, strict=True)) > 0.5 * total * count
    again = model.generate([prompt], replace(params, n=20), adapter=mixture)
    assert again == done[:20]
    assert_settles(model)


def test_tries_give_out_and_ends_are_kept(tiny_model_dir, members):
    one, other = members
    model = load_model(tiny_model_dir("llama"), threads=1)
    once = Mixture(((one, 0.5), (other, 0.5)), "sequence", tries=1)
    params = replace(SHORT, n=20)
    assert model.generate([[5, 6]], params, adapter=once) == model.generate(
        [[5, 6]], params, adapter=replace(once, sampling="token")
    )
    stats = model.stats()
    assert stats["sequence_given_up"] == 20 - stats["sequence_accepted"] > 0
    many = replace(once, tries=10_000)
    long = replace(ENDLESS, max_new_tokens=100, temperature=3.0)
    with model.client() as client:
        stopped = client.submit([5, 6], long, adapter=many)
        beside = client.submit([5, 6], SHORT, adapter=one)
        for _ in range(250):  # several tries
            client.step()
        assert stopped.redraw is not None and stopped.redraw.tries > 1 and not stopped.finished
        stopped.cancel()
        drain(client)
    assert stopped.completion().finish_reason == "cancelled"
    assert beside.completion() == model.generate([[5, 6]], SHORT, adapter=one)[0]
    late = model.generate([[5, 6]], replace(long, deadline_seconds=0.5), adapter=many)[0]
    assert late.finish_reason == "length" and len(late.tokens) == 100  # the best by then
    with pytest.raises(ValueError, match="may take back what is written, and is not streamed"):
        model.stream([5, 6], SHORT, adapter=many)
    with pytest.raises(ValueError, match="not streamed"):
        model.generate([[5, 6]], SHORT, adapter=many, on_token=lambda *_: None)
    for change, text in (
        ({"top_p": 0.9}, "top_p: .*whole distribution: expected 1.0, got 0.9"),
        ({"temperature": 0.0}, "temperature: .*expected above 0, got 0"),
        ({"min_new_tokens": 2}, "min_new_tokens: .*expected 0, got 2"),
    ):
        with pytest.raises(ValueError, match=text):
            model.generate([[5, 6]], replace(SHORT, **change), adapter=many)
    assert_settles(model)


# --- folders, and where one stands ---


@pytest.fixture
def folder(tmp_path, members):
    one, other = members
    save_mixture(
        tmp_path / "mixed", {"kind": (one, 0.75), "brief": (other, 0.5), "x": (None, -0.25)}
    )
    return tmp_path / "mixed"


def test_a_folder_stands_where_an_adapter_does(tiny, members, folder):
    one, other = members
    mixture = Mixture(((one, 0.75), (other, 0.5), ("base", -0.25)))
    expected = tiny.generate(PROMPTS, SHORT, adapter=mixture)
    assert tiny.generate(PROMPTS, SHORT, adapter=folder) == expected
    assert tiny.generate(PROMPTS, SHORT, adapter=str(folder)) == expected
    unseeded = replace(SHORT, seed=None)
    pipeline = Pipeline(tiny, None, None, rewrite_params=unseeded)
    written = [
        pipeline.with_adapter(adapter).rewrite(["hello"], num_rewrites=3, seed=1)
        for adapter in (mixture, folder, Mixture(((one, 0.5), (other, 0.5)), "sequence"))
    ]
    assert written[0] == written[1] != written[2]
    with Prompter(tiny, folder, params=unseeded) as prompter:
        text = prompter.rewrite("hello", seed=1).text
        assert "".join(prompter.stream("hello", seed=1)) != "" and text
        prompter.reload()
        assert prompter.rewrite("hello", seed=1).text == text
    with Prompter(tiny, Mixture(((one, 1.0),), "sequence"), params=unseeded) as prompter:
        assert prompter.rewrite("hello", seed=1).text
    assert read_mixture(folder).tries == Mixture.tries


def test_fingerprints_go_by_what_is_inside(tiny, members, folder, tmp_path):
    one, other = members
    first = of_adapter_folder(folder).hash
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert of_adapter_folder(moved).hash == first
    save_mixture(folder, {"a": (one, 0.75), "b": (other, 0.5), "c": (None, -0.25)})
    assert of_adapter_folder(folder).hash == first
    save_mixture(folder, {"a": (one, 0.75), "b": (lora(tiny, 8), 0.5), "c": (None, -0.25)})
    assert of_adapter_folder(folder).hash != first
    save_mixture(folder, {"a": (one, 0.5), "b": (other, 0.75), "c": (None, -0.25)})
    assert of_adapter_folder(folder).hash != first
    in_memory = of_adapter(Mixture(((one, 0.5), (other, 0.5)))).hash
    assert in_memory != of_adapter(Mixture(((one, 0.4), (other, 0.6)))).hash
    assert in_memory != of_adapter(Mixture(((one, 0.5), (other, 0.5)), "sequence")).hash


@pytest.mark.parametrize(
    ("members", "options", "text"),
    [
        ((), {}, "expected at least one member, got none"),
        ((("base", float("nan")),), {}, "expected a finite number as weight, got nan"),
        ((("base", "1"),), {}, "expected a finite number as weight, got '1'"),
        ((("base", True),), {}, "expected a finite number as weight, got True"),
        ((("base", 10**400),), {}, "expected a finite number as weight, got 1000"),
        ((("base", 1e308), ("a", 1e308)), {}, "weights that sum to 1, got a sum of inf"),
        ((("base", 0.5), ("a", 0.6)), {}, "weights that sum to 1, got a sum of 1.1"),
        ((("base", 1.0), ("a",)), {}, "weight\\) a member, got \\('a',\\)"),
        (((3, 1.0),), {}, "a member, got int 3"),
        ((("", 1.0),), {}, "a member, got str ''"),
        ((("base", 1.0),), {"sampling": "tree"}, 'expected "token" or "sequence", got \'tree\''),
        ((("base", 1.0),), {"tries": 0}, "tries: expected an integer above 0, got 0"),
        ((("a", 1.5), ("base", -0.5)), {"sampling": "sequence"}, "weights of 0 and above, got -0"),
    ],
)
def test_what_is_no_mixture_is_one_line(members, options, text):
    with pytest.raises(ValueError, match=text) as caught:
        Mixture(members, **options)
    assert "\n" not in str(caught.value)


def test_members_of_another_base_or_shape(tiny, members, tiny_model_dir, tmp_path):
    one, other = members
    named = [
        replace(w, base_model_name=name, base_fingerprint=name * 16)
        for w, name in ((one, "abcd"), (other, "efgh"))
    ]
    with pytest.raises(ValueError, match="members of one base model, got those of abcd, efgh"):
        Mixture(((named[0], 0.5), (named[1], 0.5)))
    for weights in named:
        save_peft(tmp_path / weights.base_model_name, weights)
    (tmp_path / "mixture.json").write_text(json.dumps({"members": {"abcd": 0.5, "efgh": 0.5}}))
    with pytest.raises(ValueError, match=r"mixture.json: .*got those of abcd, efgh"):
        tiny.generate([[1]], SHORT, adapter=tmp_path)
    wide = lora(load_model(tiny_model_dir("qwen3"), threads=1), 1)
    with pytest.raises(ValueError, match=r"mixture: adapter: .*expects A"):
        tiny.generate([[1]], SHORT, adapter=Mixture(((one, 0.5), (wide, 0.5))))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ("[]", 'expected "members", folders and their weights'),
        ('{"members": ["a"]}', 'expected "members", folders and their weights'),
        ('{"members": {}}', "expected at least one member"),
        ('{"members": {"base": NaN}}', "finite number as weight, got nan"),
        ('{"members": {"base": null}}', "finite number as weight, got None"),
        ('{"members": {"gone": 1}}', "gone: no adapter_config.json there"),
        ('{"members": {"inner": 1}}', "inner: is a mixture itself; name its members"),
        ('{"members": {"base": 1}, "sampling": 3}', 'expected "token" or "sequence", got 3'),
        ('{"members": {"base": 1}, "tries": 1e9}', "tries: expected an integer above 0"),
    ],
)
def test_a_damaged_folder_is_one_line(tiny, text, says, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "mixture.json").write_text('{"members": {"base": 1}}')
    (tmp_path / "mixture.json").write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        tiny.generate([[1]], SHORT, adapter=tmp_path)
    assert str(tmp_path / "mixture.json") in str(caught.value) and "\n" not in str(caught.value)


def test_what_takes_no_mixture_says_so(tiny, members, folder, tmp_path):
    one, other = members
    mixture: Any = Mixture(((one, 0.5), (other, 0.5)))
    with pytest.raises(ValueError, match="got Mixture; text is drawn with a mixture and scored"):
        tiny.make_adapter(mixture)
    for read in (lambda: load_peft(folder, tiny.lora_modules), lambda: tiny.load_adapter(folder)):
        with pytest.raises(ValueError, match=r"a mixture of adapters .*nothing is trained from"):
            read()
    with pytest.raises(ValueError, match="adapter: expected LoraWeights, got Mixture"):
        LoraPolicy(tiny, mixture)
    with pytest.raises(ValueError, match="adapter: expected LoraWeights or a SoftPrompt, got Mix"):
        save_prompter(
            tmp_path / "no", mixture, tiny.tokenizer, Pipeline(tiny, None, None).prompting, SHORT
        )
