"""Adapters on disk: what PEFT reads and writes is what we read and write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignpro.models.adapter import LoraWeights, load_peft, save_peft

SHAPES = {
    "self_attn.q_proj": (48, 48),
    "self_attn.k_proj": (24, 48),
    "self_attn.v_proj": (24, 48),
    "self_attn.o_proj": (48, 48),
    "mlp.gate_proj": (100, 48),
    "mlp.up_proj": (100, 48),
    "mlp.down_proj": (48, 100),
}
MODULES = {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in SHAPES.items()}


def weights_for(
    modules: dict[str, tuple[int, int]], *, rank: int = 4, alpha: float = 6.0, rslora: bool = False
) -> LoraWeights:
    draw = np.random.default_rng(7)
    return LoraWeights(
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        matrices={
            name: (
                draw.normal(size=(rank, inputs)).astype(np.float32),
                draw.normal(size=(outputs, rank)).astype(np.float32),
            )
            for name, (outputs, inputs) in modules.items()
        },
        base_model_name="some/base",
    )


def assert_same(one: LoraWeights, other: LoraWeights) -> None:
    assert (one.rank, one.alpha, one.rslora) == (other.rank, other.alpha, other.rslora)
    assert one.scale == other.scale
    assert list(one.matrices) == list(other.matrices)
    for name, (a, b) in one.matrices.items():
        np.testing.assert_array_equal(a, other.matrices[name][0])
        np.testing.assert_array_equal(b, other.matrices[name][1])
        assert other.matrices[name][0].dtype == other.matrices[name][1].dtype == np.float32


def subsets() -> dict[str, dict[str, tuple[int, int]]]:
    return {
        "all": MODULES,
        "one kind": {n: s for n, s in MODULES.items() if n.endswith("q_proj")},
        "one layer": {n: s for n, s in MODULES.items() if ".1." in n},
        "one module": {"model.layers.2.mlp.down_proj": (48, 100)},
        "uneven": {
            "model.layers.0.self_attn.q_proj": (48, 48),
            "model.layers.1.mlp.up_proj": (100, 48),
        },
    }


@pytest.mark.parametrize("subset", subsets())
@pytest.mark.parametrize("rslora", [False, True])
def test_round_trip(tmp_path: Path, subset: str, rslora: bool) -> None:
    weights = weights_for(subsets()[subset], rslora=rslora)
    save_peft(tmp_path / "adapter", weights)
    again = load_peft(tmp_path / "adapter", MODULES)
    assert_same(weights, again)
    assert again.base_model_name == "some/base"


def test_scale() -> None:
    assert weights_for(MODULES, rank=4, alpha=6.0).scale == 1.5
    assert weights_for(MODULES, rank=4, alpha=6.0, rslora=True).scale == 3.0


@pytest.mark.parametrize("subset", subsets())
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_we_save(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], subset: str, rslora: bool
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    weights = weights_for(subsets()[subset], rslora=rslora)
    save_peft(tmp_path, weights)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path)
    state = dict(model.named_parameters())
    seen = {n.split(".lora_A")[0].removeprefix("base_model.model.") for n in state if "lora_A" in n}
    assert seen == set(weights.matrices)  # neither fewer nor more
    for name, (a, b) in weights.matrices.items():
        for half, expected in (("A", a), ("B", b)):
            got = state[f"base_model.model.{name}.lora_{half}.default.weight"]
            np.testing.assert_array_equal(got.detach().numpy(), expected)
        layer = model.get_submodule(f"base_model.model.{name}")
        assert layer.scaling["default"] == pytest.approx(weights.scale, rel=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_we_load_what_peft_saves(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], family: str, rslora: bool
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family), dtype=torch.float32)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    weights = load_peft(tmp_path, linears)
    assert set(weights.matrices) == set(linears)
    state = dict(model.named_parameters())
    for name, (a, b) in weights.matrices.items():
        for half, got in (("A", a), ("B", b)):
            expected = state[f"base_model.model.{name}.lora_{half}.default.weight"]
            np.testing.assert_array_equal(got, expected.detach().numpy())
        scaling = model.get_submodule(f"base_model.model.{name}").scaling["default"]
        assert weights.scale == pytest.approx(scaling, rel=1e-12)


PATTERNS = {
    "rank": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}},
    "alpha": {"alpha_pattern": {"layers.0.self_attn.q_proj": 64, "o_proj": 0}},
    "both": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    "all of them": {"rank_pattern": {".*": 2}, "alpha_pattern": {".*": 5}, "lora_alpha": 0},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_ranks_and_scales_by_module_are_pefts(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], name: str
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.float32)
    shapes = {
        path: (module.out_features, module.in_features)
        for path, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    options = {"lora_alpha": 5} | PATTERNS[name]
    config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM",
                        init_lora_weights=False, **options)  # fmt: skip
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    weights = load_peft(tmp_path, shapes)
    ranks = {matrix.shape[0] for matrix, _ in weights.matrices.values()}
    assert ranks == {weights.rank}
    for path, (a, b) in weights.matrices.items():
        delta = model.get_submodule(f"base_model.model.{path}").get_delta_weight("default")
        wide = weights.scale * (b.astype(np.float64) @ a.astype(np.float64))
        np.testing.assert_allclose(wide, delta.detach().numpy(), rtol=1e-4, atol=1e-6)
    save_peft(tmp_path / "again", weights)
    assert_same(load_peft(tmp_path / "again", shapes), weights)


@pytest.mark.parametrize("parts", [("q", "k", "v"), ("k",), ("v",), ("gate", "up"), ("up",)])
def test_parts_of_a_fused_matrix_are_stacked(tmp_path: Path, parts: tuple[str, ...]) -> None:
    rows = {"q": 48, "k": 24, "v": 24, "gate": 100, "up": 100}
    begins = {"q": 0, "k": 48, "v": 72, "gate": 0, "up": 100}
    is_mlp = parts[-1] == "up"
    block = "mlp" if is_mlp else "self_attn"
    whole = f"model.layers.0.{block}.{'gate_up' if is_mlp else 'qkv'}_proj"
    fused = {whole: (200 if is_mlp else 96, 48)}
    apart = {f"model.layers.0.{block}.{part}_proj": (rows[part], 48) for part in parts}
    weights = weights_for(apart)
    save_peft(tmp_path, weights)
    expected = np.zeros(fused[whole])
    for part in parts:
        a, b = weights.matrices[f"model.layers.0.{block}.{part}_proj"]
        expected[begins[part] : begins[part] + rows[part]] = weights.scale * (b @ a)
    got = load_peft(tmp_path, fused)
    a, b = got.matrices[whole]
    np.testing.assert_allclose(got.scale * (b @ a), expected, rtol=1e-5, atol=1e-5)


def test_parts_that_do_not_fit_a_fused_matrix(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn"
    save_peft(tmp_path, weights_for({f"{path}.q_proj": (48, 48), f"{path}.k_proj": (30, 48)}))
    with pytest.raises(ValueError, match=r"qkv_proj is fused, of 96 outputs.*k_proj with 30"):
        load_peft(tmp_path, {f"{path}.qkv_proj": (96, 48)})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    weights = weights_for(MODULES)
    save_peft(tmp_path, weights)
    path = tmp_path / "adapter_model.safetensors"
    halved = {k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in load_file(path).items()}
    save_torch(halved, path)
    again = load_peft(tmp_path, MODULES)
    for name, (a, _) in again.matrices.items():
        expected = halved[f"base_model.model.{name}.lora_A.weight"].to(torch.float32).numpy()
        np.testing.assert_array_equal(a, expected)


# --- what is refused ---

Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_peft(tmp_path, weights_for(MODULES))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA or PROMPT_TUNING, got IA3"),
        ({"task_type": "SEQ_CLS"}, "task_type: expected CAUSAL_LM, got SEQ_CLS"),
        ({"bias": "all"}, "bias: expected none, got all"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .*not supported"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj: expected lora_A of shape \(8, 48\) \(rank 8"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj: expected a rank of 1 or more"),
        ({"rank_pattern": [4]}, "rank_pattern: expected an object, got list"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern: q_proj: expected a number, got '8'"),
        ({"alpha_pattern": {"(q": 8}}, r"alpha_pattern: \(q: no pattern"),
        ({"lora_alpha": 0}, "lora_alpha is 0: the adapter adds nothing"),
        ({"alpha_pattern": {".*": 0}}, "alpha_pattern is 0: the adapter adds nothing"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = .*not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not supported"),
        ({"some_future_option": 3}, "some_future_option = 3 is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"init_lora_weights": "some_future_svd"}, "changes the base weights"),
        ({"use_rslora": "true"}, "use_rslora: expected true or false, got 'true'"),
        ({"use_rslora": 1}, "use_rslora: expected true or false, got 1"),
        ({"target_modules": ".*(q_proj"}, r"target_modules: \.\*\(q_proj: no pattern"),
        ({"target_modules": 3}, "target_modules: expected names of modules, got 3"),
        ({"exclude_modules": "*"}, r"exclude_modules: \*: no pattern"),
        ({"exclude_modules": [1]}, r"exclude_modules: expected names of modules, got \[1\]"),
        ({"layers_to_transform": "all"}, "layers_to_transform: expected layer numbers, got 'all'"),
        ({"r": 0}, "r: expected a rank of 1 or more, got 0"),
        ({"r": "4"}, "r: expected a rank"),
        ({"r": 8}, r"mlp.down_proj: .*rank 8\), got \(4, 100\)"),
        ({"lora_alpha": None}, "lora_alpha: expected a number"),
    ],
)
def test_unsupported_options(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text("utf-8")) | change
    path.write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_peft(folder, MODULES)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_targets_of_other_models_are_passed_over_and_missing_ones_are_not(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"target_modules": ["q_proj", "c_attn"]}), "utf-8")
    assert load_peft(folder, MODULES).matrices
    path.write_text(json.dumps(config | {"exclude_modules": "nothing"}), "utf-8")
    changed(folder, lambda t: [t.pop(key) for key in list(t) if "0.self_attn.q_proj" in key])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is in target_modules"):
        load_peft(folder, MODULES)
    for targets in (r".*\.(q|k)_proj", "all-linear"):
        path.write_text(json.dumps(config | {"target_modules": targets}), "utf-8")
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is in target_modules"):
            load_peft(folder, MODULES)
    for excluded in (["layers.0.self_attn.q_proj"], ["q_proj"], r".*0\.self_attn\.q_proj"):
        path.write_text(json.dumps(config | {"exclude_modules": excluded}), "utf-8")
        assert "model.layers.0.self_attn.q_proj" not in load_peft(folder, MODULES).matrices


@pytest.mark.parametrize("initial", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_keep_the_base(folder: Path, initial: object) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text("utf-8")) | {"init_lora_weights": initial}
    path.write_text(json.dumps(config), "utf-8")
    assert load_peft(folder, MODULES).matrices


def test_what_git_lfs_left_in_the_place_of_the_matrices_is_said(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="not the file itself but a Git LFS pointer"):
        load_peft(folder, MODULES)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{KEY}.lora_A.weight"), f"{Q}: lora_A is missing"),
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), f"{Q}: lora_B is missing"),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": np.zeros((4, 47), np.float32)}),
            rf"{Q}: expected lora_A of shape \(4, 48\) \(rank 4\), got \(4, 47\)",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_B.weight": np.zeros((48, 3), np.float32)}),
            rf"{Q}: expected lora_B of shape \(48, 4\)",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": np.full((4, 48), np.nan, np.float32)}),
            f"{Q}: lora_A holds NaN or infinity",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": np.zeros((4, 48), np.int32)}),
            "expected F32, F16 or BF16, got I32",
        ),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.3.mlp.up_proj.lora_A.weight": np.zeros((4, 48))}
            ),
            "expected F32, F16 or BF16, got F64",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.lm_head.lora_A.weight": np.zeros((4, 48), np.float32),
                    "base_model.model.lm_head.lora_B.weight": np.zeros((111, 4), np.float32),
                }
            ),
            "lm_head.lora_A.weight: LoRA of lm_head is not supported; expected modules of the",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.model.embed_tokens.lora_embedding_A": np.zeros(
                        (4, 111), np.float32
                    )
                }
            ),
            "embed_tokens.lora_embedding_A: LoRA of embed_tokens is not supported",
        ),
        (lambda t: t.clear(), "holds no LoRA matrices"),
    ],
)
def test_damaged_tensors(folder: Path, change: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_peft(changed(folder, change), MODULES)
    assert "adapter_model.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_truncated_tensors(folder: Path, size: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_peft(folder, MODULES)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_a_copy_of_a_table_is_passed_over_and_another_is_refused(folder: Path, name: str) -> None:
    last = name.rpartition(".")[2]
    table = np.random.default_rng(0).normal(size=(111, 48)).astype(np.float32)
    tables = {last: table}.__getitem__
    changed(folder, lambda t: t.update({f"base_model.model.{name}.weight": table}))
    assert_same(load_peft(folder, MODULES, tables), weights_for(MODULES))
    table[7, 3] += 1
    for base_table in (tables, None):
        with pytest.raises(ValueError, match=f"holds a {last} of its own"):
            load_peft(folder, MODULES, base_table)


def test_a_named_adapter_lies_in_a_subfolder(tmp_path: Path) -> None:
    save_peft(tmp_path / "policy", weights_for(MODULES))
    assert_same(load_peft(tmp_path, MODULES), weights_for(MODULES))
    save_peft(tmp_path / "value", weights_for(MODULES))
    with pytest.raises(FileNotFoundError, match="got one with several: policy, value; pass one"):
        load_peft(tmp_path, MODULES)


def test_what_is_no_adapter_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(FileNotFoundError, match="this folder holds a model"):
        load_peft(tmp_path, MODULES)
    (tmp_path / "adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(FileNotFoundError, match=f"got a file; that is {tmp_path}$"):
        load_peft(tmp_path / "adapter_config.json", MODULES)
    with pytest.raises(FileNotFoundError, match="adapters as GGUF files are not read"):
        load_peft(tmp_path / "lora.gguf", MODULES)


def test_a_byte_order_mark_is_passed_over(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(config.read_text("utf-8"), "utf-8-sig")
    load_peft(folder, MODULES)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the folder of a PEFT adapter"):
        load_peft(tmp_path / "nowhere", MODULES)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="is a pickle and is not read"):
        load_peft(folder, MODULES)


@pytest.mark.parametrize("text", ["", "[]", "<html>", "\x80"])
def test_damaged_config(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_peft(folder, MODULES)


def test_saving_refuses_another_rank(tmp_path: Path) -> None:
    weights = weights_for(MODULES, rank=4)
    weights.rank = 5
    with pytest.raises(ValueError, match=r"expected A \[5, in\] and B \[out, 5\]"):
        save_peft(tmp_path / "new", weights)
    assert not (tmp_path / "new").exists()
