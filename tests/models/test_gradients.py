"""Gradients of every LoRA matrix of every family against torch's autograd in float64.

The oracle is transformers' own model with the LoRA written out beside each linear. Error budget:
at most twice as far from float64 as the same computation by torch in float32, over some draws: the
error of one draw is luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignpro.models.adapter import LoraWeights
from alignpro.models.native_model import NativeModel, load_model
from alignpro.train.policy import LoraPolicy
from model_variants import VARIANTS, Variant, variant_folder

FLOOR = 2e-6  # relative: some float32 roundings
DRAWS = 4
Gradients = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class Case:
    """A policy, what it is held to, and a loss over scored sequences."""

    weights: LoraWeights
    reference: LoraWeights | None  # None: the base
    sequences: list[list[int]]
    starts: list[int]
    temperature: float
    upstream: np.ndarray  # [3, values]: of logprob, entropy, kl
    anchors: tuple[list[int] | None, ...] = ()  # what the reference reads before the scored tokens


class Oracle:
    """transformers' model, with adapters."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.eval().requires_grad_(False)
        self.dtype = dtype
        if dtype == torch.float64:
            _lift_float32_islands(self.model)
        self.active: tuple[dict[str, list[torch.Tensor]], float] = ({}, 0.0)

    def gradients(self, case: Case) -> Gradients:
        matrices = {n: [self._leaf(m) for m in p] for n, p in case.weights.matrices.items()}
        policy = (matrices, case.weights.scale)
        base: tuple[dict[str, list[torch.Tensor]], float] = ({}, 0.0)
        reference = base
        if case.reference is not None:
            frozen = {n: [self._leaf(m) for m in p] for n, p in case.reference.matrices.items()}
            reference = (frozen, case.reference.scale)
        names = set(policy[0]) | set(reference[0])
        hooks = [self.model.get_submodule(n).register_forward_hook(self._lora(n)) for n in names]
        loss, at = torch.zeros((), dtype=self.dtype), 0
        anchors = case.anchors or (None,) * len(case.sequences)
        for sequence, start, anchor in zip(case.sequences, case.starts, anchors, strict=True):
            logp = self._distributions(policy, sequence, start, case.temperature)
            read = sequence[:start] if anchor is None else anchor
            with torch.no_grad():
                logq = self._distributions(
                    reference, read + sequence[start:], len(read), case.temperature
                )
            upstream = torch.tensor(case.upstream[:, at : at + len(logp)], dtype=self.dtype)
            at += len(logp)
            chosen = logp.gather(1, torch.tensor(sequence[start:])[:, None])[:, 0]
            entropy = -(logp.exp() * logp).sum(-1)
            kl = (logp.exp() * (logp - logq)).sum(-1)
            loss = loss + (upstream * torch.stack([chosen, entropy, kl])).sum()
        loss.backward()
        for hook in hooks:
            hook.remove()
        return {n: (a.grad.numpy(), b.grad.numpy()) for n, (a, b) in matrices.items()}

    def _leaf(self, matrix: np.ndarray) -> torch.Tensor:
        return torch.tensor(matrix, dtype=self.dtype, requires_grad=True)

    def _lora(self, name: str) -> Callable[..., torch.Tensor]:
        def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            matrices, scale = self.active
            if name not in matrices:
                return output
            a, b = matrices[name]
            return output + scale * ((inputs[0] @ a.T) @ b.T)

        return add

    def _distributions(
        self, active: Any, sequence: list[int], start: int, temperature: float
    ) -> torch.Tensor:
        self.active = active
        logits = self.model(torch.tensor([sequence])).logits[0, start - 1 : -1]
        return (logits / temperature).log_softmax(-1)


def _lift_float32_islands(model: Any) -> None:
    """transformers computes norms and angles in float32 whatever the model's type is."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):

            def norm(x: torch.Tensor, m: Any = module) -> torch.Tensor:
                gemma = type(m).__name__.startswith("Gemma")
                weight, eps = (1 + m.weight, m.eps) if gemma else (m.weight, m.variance_epsilon)
                return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

            module.forward = norm
    rotary = model.model.rotary_emb
    choose_factors = rotary.forward  # of longrope, by length

    def angles(
        x: torch.Tensor, position_ids: torch.Tensor, *layer_type: str, **options: Any
    ) -> Any:
        choose_factors(x, position_ids, *layer_type, **options)
        of = "".join(f"{kind}_" for kind in layer_type)  # Gemma 3 turns by layer type
        half = position_ids[..., None].double() * getattr(rotary, f"{of}inv_freq").double()
        both = torch.cat([half, half], -1)
        scaling = getattr(rotary, f"{of}attention_scaling")
        return both.cos() * scaling, both.sin() * scaling

    rotary.forward = angles


@dataclass
class Bench:
    """One variant: the engine's models and the oracles."""

    one: NativeModel  # thread
    two: NativeModel
    truth: Oracle
    plain: Oracle
    long: bool


@pytest.fixture(scope="module")
def bench(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Bench]]:
    made: dict[str, Bench] = {}
    root = tmp_path_factory.mktemp("variants")

    def make(name: str) -> Bench:
        if name not in made:
            variant: Variant = VARIANTS[name]
            folder = variant_folder(variant, tiny_model_dir, root)
            one, two = (
                load_model(folder, threads=n, context_length=variant.context) for n in (1, 2)
            )
            oracles = (Oracle(folder, dtype) for dtype in (torch.float64, torch.float32))
            made[name] = Bench(one, two, *oracles, long=variant.context is not None)
        return made[name]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make
    torch.set_num_threads(threads)


def lora(
    model: NativeModel, seed: int, *, rank: int = 3, rslora: bool = False, among: Any = None
) -> LoraWeights:
    """Random matrices; ``among`` says by its path whether a linear has them."""
    draw = np.random.default_rng(seed)
    return LoraWeights(
        rank=rank,
        alpha=2.0 * rank**0.5 if rslora else 2.0 * rank,
        rslora=rslora,
        matrices={
            name: (
                (draw.normal(size=(rank, inputs)) / inputs**0.5).astype(np.float32),
                (0.3 * draw.normal(size=(outputs, rank))).astype(np.float32),
            )
            for name, (outputs, inputs) in model.lora_modules.items()
            if among is None or among(name)
        },
    )


def sequences_of(layout: str, seed: int, long: bool = False) -> tuple[list[list[int]], list[int]]:
    """ "shared" branches twice and ends inside another; "apart" shares nothing."""
    draw = np.random.default_rng(seed)
    common = 70 if long else 20  # longrope's long factors hold beyond 64 tokens

    def words(count: int) -> list[int]:
        return draw.integers(3, 111, count).tolist()

    if layout == "apart":
        firsts = iter(range(3, 111))
        return [[next(firsts), *words(common + n)] for n in (0, 1, 9)], [common - 2, 1, common]
    prompt = words(common)
    first = prompt + words(13)
    rows = [first, [*first[:-6], *words(19)], first[:-2], [*prompt[:-8], *words(9)], first]
    return rows, [common, common, common - 5, common - 8, common + 12]


def case_for(
    model: NativeModel,
    draw: int = 0,
    *,
    layout: str = "shared",
    long: bool = False,
    weights: LoraWeights | None = None,
    reference: LoraWeights | None = None,
    temperature: float = 1.3,
    outputs: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Case:
    sequences, starts = sequences_of(layout, draw, long)
    values = sum(len(s) - start for s, start in zip(sequences, starts, strict=True))
    upstream = np.random.default_rng(draw).normal(size=(3, values)) * np.array(outputs)[:, None]
    return Case(
        weights if weights is not None else lora(model, 10 + draw),
        reference,
        sequences,
        starts,
        temperature,
        upstream.astype(np.float32),
    )


def engine_gradients(model: NativeModel, case: Case, activations: Any = "keep") -> Gradients:
    policy = LoraPolicy(model, case.weights)
    scores = policy.score(
        case.sequences,
        case.starts,
        temperature=case.temperature,
        reference="base" if case.reference is None else case.reference,
        anchors=case.anchors,
        activations=activations,
    )
    assert scores.kl is not None
    upstream = torch.tensor(case.upstream)
    loss = (upstream * torch.stack([scores.logprob, scores.entropy, scores.kl])).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: (a.grad.numpy(), b.grad.numpy())
        for name, a, b in zip(policy.names, policy.lora_a, policy.lora_b, strict=True)
    }


def errors(gradients: Gradients, truth: Gradients) -> dict[str, float]:
    """Relative, in the Euclidean norm: of every matrix, and of all of them as one vector."""
    apart, whole = {}, [0.0, 0.0]
    for name, halves in truth.items():
        for half, expected, got in zip("AB", halves, gradients[name], strict=True):
            off, size = float(np.linalg.norm(got - expected)), float(np.linalg.norm(expected))
            assert size > 0, f"{name} {half}: nothing to compare with"
            apart[f"{name} {half}"] = off / size
            whole = [whole[0] + off**2, whole[1] + size**2]
    return {**apart, "all": (whole[0] / whole[1]) ** 0.5}


def over_budget(
    bench: Bench, cases: list[Case], computed: list[Case] | None = None
) -> dict[str, tuple[float, float]]:
    """Matrices further from the truth than twice torch's float32: medians of (error, torch's).

    Not a mean: where half a rounding of the matrices moves the true gradient by 1e-5, as in one
    draw of smollm3, the errors are luck, and that draw's would be those of all.

    ``computed``: what the engine is given instead, to see that it would be noticed.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for case, given in zip(cases, computed or cases, strict=True):
        gradients = engine_gradients(bench.two, given)
        assert list(gradients) == list(case.weights.matrices)
        truth = bench.truth.gradients(case)
        ours, plain = errors(gradients, truth), errors(bench.plain.gradients(case), truth)
        assert plain["all"] < 1e-3, "the oracles do not agree with each other"
        for name in ours:
            found.setdefault(name, []).append((ours[name], plain[name]))
    medians = {name: np.median(both, axis=0) for name, both in found.items()}
    over = {n: (float(o), float(p)) for n, (o, p) in medians.items() if o > 2 * p + FLOOR}
    # A fault of one draw alone is more than luck.
    alone = {
        n: pair for n, both in found.items() for pair in both if pair[0] > 20 * pair[1] + FLOOR
    }
    return over | alone


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_matrix_of_every_family(bench: Callable[[str], Bench], variant: str) -> None:
    here = bench(variant)
    held = lora(here.two, 2, rank=2, rslora=True, among=lambda name: "layers.2" not in name)
    cases = [case_for(here.two, i, long=here.long, reference=held) for i in range(DRAWS)]
    assert len(cases[0].weights.matrices) == len(here.two.lora_modules)
    assert over_budget(here, cases) == {}


@pytest.mark.parametrize("variant", ["llama", "qwen3", "phi3", "smollm3"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("layout", ["shared", "apart"])
def test_against_the_base(
    bench: Callable[[str], Bench], variant: str, temperature: float, layout: str
) -> None:
    here = bench(variant)
    cases = [
        case_for(here.two, i, layout=layout, temperature=temperature) for i in range(2 * DRAWS)
    ]
    assert over_budget(here, cases) == {}


@pytest.mark.parametrize("outputs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_each_output_alone(bench: Callable[[str], Bench], outputs: Any) -> None:
    here = bench("qwen2")
    held = lora(here.two, 2)
    cases = [case_for(here.two, i, outputs=outputs, reference=held) for i in range(DRAWS)]
    assert over_budget(here, cases) == {}


def test_kl_to_a_reference_that_reads_another_prompt(bench: Callable[[str], Bench]) -> None:
    here = bench("llama")
    held = lora(here.two, 2)
    plain = [case_for(here.two, i, outputs=(0, 0, 1), reference=held) for i in range(DRAWS)]
    count = len(plain[0].sequences)
    # Shorter, longer and shared ones, and rows that have none among them.
    anchors = tuple(None if i % 3 == 1 else [1, *range(20, 21 + 3 * i)] for i in range(count))
    cases = [replace(case, anchors=anchors) for case in plain]
    assert over_budget(here, cases) == {}
    own = tuple(s[:n] for s, n in zip(plain[0].sequences, plain[0].starts, strict=True))
    read, given = (
        engine_gradients(here.two, replace(plain[0], anchors=a)) for a in ((), own)
    )  # states that are handed over lose no bit
    assert all(np.array_equal(read[n][i], given[n][i]) for n in read for i in (0, 1))


def test_kl_to_where_training_started(bench: Callable[[str], Bench]) -> None:
    # Near the reference, the KL and its gradient are small differences of large numbers.
    here = bench("llama")
    start = lora(here.two, 2)
    policy = LoraPolicy(here.two, start)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        policy.score(*sequences_of("shared", 5)).logprob.mean().neg().backward()
        optimizer.step()
    cases = [
        case_for(here.two, i, outputs=(0, 0, 1), weights=policy.weights(), reference=start)
        for i in range(3 * DRAWS)
    ]
    assert "all" not in over_budget(here, cases)  # single matrices are too much a matter of luck
    near = engine_gradients(here.two, cases[0])
    far = engine_gradients(here.two, replace(cases[0], reference=lora(here.two, 3)))
    assert all(
        0 < np.linalg.norm(near[name][1]) < 0.1 * np.linalg.norm(far[name][1]) for name in near
    )


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SUBSETS = [
    *(("llama", (linear,)) for linear in LLAMA),
    ("llama", ("layers.1.mlp.up_proj",)),
    ("llama", ("layers.0.self_attn.k_proj", "layers.0.self_attn.o_proj", "layers.2.mlp.down_proj")),
    *(("phi3", (linear,)) for linear in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    ("phi3", ("layers.1.mlp.gate_up_proj", "layers.2.self_attn.qkv_proj")),
    ("qwen3", ("q_proj", "v_proj")),
]


@pytest.mark.parametrize(("variant", "linears"), SUBSETS)
def test_any_subset_of_linears(
    bench: Callable[[str], Bench], variant: str, linears: tuple[str, ...]
) -> None:
    here = bench(variant)
    weights = lora(here.two, 4, among=lambda name: name.endswith(linears))
    assert 0 < len(weights.matrices) < len(here.two.lora_modules)
    held = lora(here.two, 2)
    cases = [case_for(here.two, i, weights=weights, reference=held) for i in range(DRAWS)]
    assert over_budget(here, cases) == {}


def test_rank_stabilised_scaling(bench: Callable[[str], Bench]) -> None:
    here = bench("llama")
    weights = lora(here.two, 5, rank=8, rslora=True)
    assert weights.scale == pytest.approx(2.0)
    assert over_budget(here, [case_for(here.two, i, weights=weights) for i in range(DRAWS)]) == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_on_any_threads_kept_or_recomputed(
    bench: Callable[[str], Bench], variant: str
) -> None:
    here = bench(variant)
    case = case_for(here.two, long=here.long, reference=lora(here.two, 2))
    expected = engine_gradients(here.two, case)
    others = [
        engine_gradients(here.two, case),
        engine_gradients(here.two, case, "recompute"),
        engine_gradients(here.one, case),
        engine_gradients(here.one, case, "recompute"),
    ]
    for other in others:
        for name, halves in expected.items():
            assert all(map(np.array_equal, halves, other[name])), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_changes_no_value_and_hardly_the_gradient(
    bench: Callable[[str], Bench], variant: str
) -> None:
    """Sequences that share rows in one call, against one call each."""
    here = bench(variant)
    case = case_for(here.two, long=here.long)
    together = engine_gradients(here.two, case)
    total = {n: [np.zeros(m.shape) for m in halves] for n, halves in together.items()}
    at = 0
    for sequence, start in zip(case.sequences, case.starts, strict=True):
        count = len(sequence) - start
        part = replace(
            case,
            sequences=[sequence],
            starts=[start],
            upstream=case.upstream[:, at : at + count],
        )
        at += count
        for name, halves in engine_gradients(here.two, part).items():
            for sum_, half in zip(total[name], halves, strict=True):
                sum_ += half
    exact = {n: (a, b) for n, (a, b) in total.items()}
    assert max(errors(together, exact).values()) < 2e-5


def test_a_slightly_wrong_gradient_is_over_budget(bench: Callable[[str], Bench]) -> None:
    here = bench("llama")
    case = case_for(here.two, reference=lora(here.two, 2))
    for wrong in (
        replace(case, temperature=case.temperature * 1.001),
        replace(case, reference=None),
        replace(case, weights=replace(case.weights, alpha=case.weights.alpha * 1.001)),
        replace(case, upstream=case.upstream * np.float32(1.001)),
    ):
        assert "all" in over_budget(here, [case], [wrong])
