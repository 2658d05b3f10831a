"""Rows of a soft prompt in the engine, by ids below 0: against transformers with the rows in place
of embeddings, against PEFT's prompt tuning, and against the same rows as tokens, to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignpro import native
from alignpro.models.native_model import NativeModel, load_model
from alignpro.types import SamplingParams
from model_variants import VARIANTS, variant_folder
from models.test_gradients import FLOOR, Case, Oracle, case_for, lora
from native_runs import draw_ids

ROWS = 4


def random_rows(model: NativeModel, seed: int, count: int = ROWS) -> np.ndarray:
    """As large as the tiny models' embeddings."""
    table = model.base_table("embed_tokens") * np.float32(model.config["embedding_scale"])
    drawn = np.random.default_rng(seed).normal(size=(count, table.shape[1]))
    return (drawn * table.std()).astype(np.float32)


def with_rows_named(case: Case, ids: dict[int, int]) -> Case:
    """Rows in the place of some positions that nobody scores."""
    for sequence, start in zip(case.sequences, case.starts, strict=True):
        for position, name in ids.items():
            if position < min(start, len(sequence)):
                sequence[position] = name
    return case


@contextlib.contextmanager
def rows_in(model: Any, rows: torch.Tensor) -> Iterator[None]:
    """transformers' model, reading ids below 0 as rows."""
    embedding = model.get_input_embeddings()
    read: list[torch.Tensor] = []

    def before(module: Any, inputs: Any) -> Any:
        read[:] = [inputs[0]]
        return (inputs[0].clamp(min=0),)

    def behind(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        soft = read[0] < 0
        return torch.where(soft[..., None], rows[(-1 - read[0]).clamp(min=0)], output)

    hooks = [
        embedding.register_forward_pre_hook(before),
        embedding.register_forward_hook(behind),
    ]
    yield
    for hook in hooks:
        hook.remove()


def oracle_of(oracle: Oracle, case: Case, rows: np.ndarray) -> tuple[np.ndarray, Any, np.ndarray]:
    """Log-probabilities of the scored tokens, the LoRA's gradients and those of the rows."""
    leaf = torch.tensor(rows, dtype=oracle.dtype, requires_grad=True)
    with rows_in(oracle.model, leaf):
        of_lora = oracle.gradients(case)
        matrices = {n: [torch.tensor(m) for m in p] for n, p in case.weights.matrices.items()}
        cast = {n: [m.to(oracle.dtype) for m in p] for n, p in matrices.items()}
        hooks = [oracle.model.get_submodule(n).register_forward_hook(oracle._lora(n)) for n in cast]
        chosen = []
        with torch.no_grad():
            for sequence, start in zip(case.sequences, case.starts, strict=True):
                policy = (cast, case.weights.scale)
                logp = oracle._distributions(policy, sequence, start, case.temperature)
                chosen.append(logp.gather(1, torch.tensor(sequence[start:])[:, None])[:, 0])
        for hook in hooks:
            hook.remove()
    assert leaf.grad is not None
    return torch.cat(chosen).numpy(), of_lora, leaf.grad.numpy()


def engine_of(model: NativeModel, case: Case, rows: np.ndarray, activations: str = "keep") -> Any:
    made = model.core_model.make_adapter(case.weights.matrices, case.weights.scale, rows)
    assert (made.num_rows, made.modules) == (len(rows), sorted(case.weights.matrices))
    reference = {} if case.reference is None else case.reference.matrices
    scale = 1.0 if case.reference is None else case.reference.scale
    scored = model.core_model.score(
        case.sequences,
        case.starts,
        adapter=made,
        temperature=case.temperature,
        reference=model.core_model.make_adapter(reference, scale, rows),
        with_reference=True,
        keep_graph=True,
        activations=activations,
    )
    return scored.logprob, scored.backward(*case.upstream)


def off(got: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(got - truth) / np.linalg.norm(truth))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(
    request: pytest.FixtureRequest,
    tiny_model_dir: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, NativeModel, bool]:
    made = VARIANTS[request.param]
    folder = variant_folder(made, tiny_model_dir, tmp_path_factory.mktemp("variants"))
    model = load_model(folder, threads=2, context_length=made.context)
    return folder, model, made.context is not None


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("beside_lora", [False, True])
def test_every_family_against_transformers(
    variant: tuple[Path, NativeModel, bool], one_thread: None, beside_lora: bool
) -> None:
    """The error budget of test_gradients: twice torch's own float32, over some draws."""
    folder, model, long = variant
    truth, plain = Oracle(folder, torch.float64), Oracle(folder, torch.float32)
    squares = np.zeros((2, 1 + beside_lora))
    for draw in range(3):
        weights = lora(model, 10 + draw, among=None if beside_lora else lambda name: False)
        case = case_for(model, draw, long=long, weights=weights, reference=lora(model, 2, rank=2))
        case = with_rows_named(case, {0: -1, 1: -2, 11: -1, 12: -3, 15: -2})
        rows = random_rows(model, draw)
        logprob, gradients = engine_of(model, case, rows)
        expected, of_lora, of_rows = oracle_of(truth, case, rows)
        _, lora32, rows32 = oracle_of(plain, case, rows)
        np.testing.assert_allclose(logprob, expected, rtol=0, atol=1e-4)
        assert (of_rows[3] == 0).all() and (gradients["rows"][3] == 0).all()  # never named
        assert len(gradients) == len(of_lora) + 1
        got, rounded = [off(gradients["rows"], of_rows)], [off(rows32, of_rows)]
        if beside_lora:
            flat = [
                np.concatenate([half.ravel() for name in of_lora for half in which[name]])
                for which in (gradients, lora32, of_lora)
            ]
            got.append(off(flat[0], flat[2]))
            rounded.append(off(flat[1], flat[2]))
        squares += np.array([got, rounded]) ** 2
    ours, torchs = np.sqrt(squares / 3)
    assert (torchs < 1e-3).all(), "the oracles do not agree with each other"
    assert (ours <= 2 * torchs + FLOOR).all(), (ours, torchs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "smollm3"])
def test_rows_before_everything_are_pefts_prompt_tuning(
    tiny_model_dir: Callable[..., Path], family: str
) -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny_model_dir(family)
    model = load_model(folder, threads=1)
    rows = random_rows(model, 3)
    tuned: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=ROWS),
    )
    embedded = tuned.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        embedded.copy_(torch.from_numpy(rows))
    tokens, start = [1, 40, 9, 77, 8, 30, 31, 70, 2, 90], 4
    upstream = np.random.default_rng(4).normal(size=len(tokens) - start).astype(np.float32)
    logits = tuned(input_ids=torch.tensor([tokens])).logits[0]
    assert len(logits) == ROWS + len(tokens)
    chosen = logits[ROWS + start - 1 : -1].log_softmax(-1)
    chosen = chosen.gather(1, torch.tensor(tokens[start:])[:, None])[:, 0]
    (torch.from_numpy(upstream) * chosen).sum().backward()

    named = [-1 - row for row in range(ROWS)]
    scored = model.core_model.score(
        [named + tokens],
        [ROWS + start],
        adapter=model.core_model.make_adapter({}, 1.0, rows),
        keep_graph=True,
    )
    np.testing.assert_allclose(scored.logprob, chosen.detach().numpy(), rtol=0, atol=1e-5)
    got = scored.backward(upstream, None, None)
    assert list(got) == ["rows"]
    assert off(got["rows"], embedded.grad.numpy()) < 2e-5


def test_rows_that_are_embeddings_are_those_tokens(
    variant: tuple[Path, NativeModel, bool],
) -> None:
    """Drawn and scored, from a file's own table, after a cached beginning and without."""
    _, model, _ = variant
    tokens, prompt = [40, 9, 77, 8], [1, 40, 9, 77, 8, 40, 30, 31, *range(50, 70), 9, 8]
    scale = np.float32(model.config["embedding_scale"])
    rows = np.ascontiguousarray(model.base_table("embed_tokens")[tokens] * scale)
    soft = [-1 - tokens.index(t) if t in tokens else t for t in prompt]
    assert sum(t < 0 for t in soft) == 7
    adapter = model.core_model.make_adapter({}, 1.0, rows)
    params = SamplingParams(max_new_tokens=6, temperature=0.8, seed=5, ignore_eos=True)
    plain = model.generate([prompt], params)[0]
    for _ in range(2):
        (drawn,) = draw_ids(model, [soft], params, adapter)
        assert (drawn.tokens, drawn.logprobs) == (plain.tokens, plain.logprobs)
    scored = model.core_model.score(
        [soft + drawn.tokens], [len(soft)], adapter=adapter, temperature=0.8
    )
    assert scored.logprob.tolist() == drawn.logprobs


def test_what_is_held_is_known_before(tiny: NativeModel) -> None:
    case = with_rows_named(case_for(tiny), {0: -1, 3: -4})
    facts = native.core.describe(str(tiny.path))
    for weights in (case.weights, lora(tiny, 1, among=lambda name: False)):
        adapter = tiny.core_model.make_adapter(weights.matrices, 1.0, random_rows(tiny, 1))
        for activations in ("keep", "recompute"):
            asked: Any = {"with_reference": False, "activations": activations}
            ours = tiny.core_model.score_bytes(
                case.sequences, case.starts, adapter=adapter, keep_graph=True, **asked
            )
            planned = facts.score_bytes(
                case.sequences, case.starts, list(weights.matrices), weights.rank,
                threads=2, num_rows=ROWS, **asked,
            )  # fmt: skip
            assert planned == ours
    with pytest.raises(ValueError, match="num_rows: expected 0 or more, got -1"):
        facts.score_bytes([[1, 2]], [1], [], 0, num_rows=-1)


def test_what_is_no_row_is_refused(tiny: NativeModel) -> None:
    core, good = tiny.core_model, random_rows(tiny, 1, 2)
    broken = good.copy()
    broken[1, 3] = np.inf
    for rows, said in (
        (good.astype(np.float64), "adapter: rows: expected float32, got float64"),
        (good[0], "adapter: rows: expected 2 dimensions, got 1"),
        (good[:, ::2], "adapter: rows: expected C-contiguous"),
        (np.ascontiguousarray(good[:, :40]), r"expected shape \[1 or more, 48\], got \[2, 40\]"),
        (good[:0], r"expected shape \[1 or more, 48\], got \[0, 48\]"),
        (broken, "adapter: rows: row 1 holds NaN or infinity"),
        (None, "adapter: nothing given"),
    ):
        with pytest.raises(ValueError, match=said):
            core.make_adapter({}, 1.0, rows)
    adapter = core.make_adapter({}, 1.0, good)
    assert (adapter.rank, adapter.num_rows, adapter.modules) == (0, 2, [])
    assert tiny.make_adapter(lora(tiny, 1)).num_rows == 0  # type: ignore[union-attr]
    params = SamplingParams(max_new_tokens=2, seed=1)
    for prompt, given, said in (
        ([1, -1], None, "index 1: id -1 names row 0 of a soft prompt, and there is no adapter"),
        ([-3, 1], adapter, "index 0: id -3 names row 2 of a soft prompt, the adapter has 2 rows"),
    ):
        with pytest.raises(ValueError, match=said):
            draw_ids(tiny, [prompt], params, given)
        with pytest.raises(ValueError, match=said):
            core.score([[*prompt, 2]], [2], adapter=given)
    with pytest.raises(ValueError, match="id -1 is below 0: soft rows are read and not scored"):
        core.score([[1, -1, 2]], [1], adapter=adapter)
