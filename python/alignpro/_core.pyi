"""The compiled engine, as Python sees it. Only ``native.py`` imports this module."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class EngineError(RuntimeError): ...
class ModelFileError(ValueError): ...
class UnavailableError(RuntimeError): ...
class NumericError(ArithmeticError): ...

def cpu_isa() -> str:
    """The instruction set; ALIGNPRO_CPU_ISA = amx, avx512, avx2, neon or generic forces one."""

def available_cpus() -> int: ...
def measure_fma_peak(threads: int = 0) -> float:
    """GFLOP/s of multiply-adds in registers, on so many threads (0: available_cpus)."""

def measure_read_bandwidth(threads: int = 0) -> float:
    """GB/s of reading memory that no cache holds."""

def build_info() -> dict[str, str]:
    """Compiler, build type, compiled ISAs, "cuda": "no" | version."""

def trace_start(level: str, limit: int = ...) -> None:
    """Record the engine's spans, at most ``limit``: "steps", or "ops" for every op as well. Raises
    ValueError where it is on already."""

def trace_stop() -> dict[str, Any]:
    """What was recorded, in the order in which it ended. One value an event: name (int32, into
    names), begin_ns, end_ns (int64, the clock of time.perf_counter_ns), thread
    (threading.get_native_id), rows, flops, bytes (int64), key (uint64, the seed of a request's
    rows). And names (list[str]), dropped (int, events beyond the limit). Raises ValueError where
    it is off."""

class ModelFiles:
    """The files of one model, each read once: a GGUF file, or a folder in Hugging Face's layout.
    Raises ModelFileError for a file that is missing or damaged."""

    def __init__(self, path: str) -> None: ...
    @property
    def path(self) -> str: ...
    def metadata(self) -> dict[str, Any] | None:
        """Every key of a GGUF header, arrays as lists; None for a folder."""

    def json(self, name: str) -> dict[str, Any] | None:
        """One of a folder's JSON files; None where it has no such file."""

    def table(self, name: str) -> NDArray[np.float32]:
        """The embedding ("embed_tokens") or the output head ("lm_head"), [vocab, hidden]."""

    def eos_ids(self) -> list[int]:
        """Every id that ends a text: what the files name, and the end tokens of known chat
        templates; the tokenizer's own EOS first."""

def list_weight_files(folder: str) -> list[str]:
    """The *.safetensors of a model folder that hold its weights, by name."""

GGUF_END_KEYS: list[str]  # of GGUF metadata, that name the end of a text

def end_of_text_ids(named: list[int], tokens: list[str], types: list[int]) -> list[int]:
    """As ModelFiles.eos_ids, of a GGUF vocabulary that is no file; named: ids by GGUF_END_KEYS."""

class QuantizedWeight:
    """A matrix of a GGUF file, mapped: its bytes are read where they are used."""

    rows: int
    cols: int
    dtype: str
    nbytes: int
    @staticmethod
    def from_gguf(path: str, name: str) -> QuantizedWeight: ...

# The vocabulary op. hidden, reference_hidden: float32 [T, D]; weights: [V, D] float32, float16,
# bfloat16 as its uint16 bits, or QuantizedWeight; tokens: int32 [T].
def linear_logprob(
    hidden: NDArray[np.float32],
    weight: NDArray[Any] | QuantizedWeight,
    tokens: NDArray[np.int32],
    temperature: float,
    reference_hidden: NDArray[np.float32] | None,
    reference_weight: NDArray[Any] | QuantizedWeight | None,
    with_jacobian: bool,
) -> dict[str, NDArray[Any] | None]:
    """logprob, entropy, kl, reverse_kl, reference_logprob, lse, reference_lse: [T]; d_logprob and
    d_kl: [T, D], the derivatives by hidden. None where there is no reference (or no jacobian)."""

def total_variation(
    hidden: NDArray[np.float32],
    weight: NDArray[Any] | QuantizedWeight,
    tokens: NDArray[np.int32],
    temperature: float,
    reference_hidden: NDArray[np.float32] | None,
    reference_weight: NDArray[Any] | QuantizedWeight | None,
    forward: dict[str, NDArray[Any] | None],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(total variation, mass_above), [T] each."""

def linear_logprob_backward(
    hidden: NDArray[np.float32],
    weight: NDArray[Any] | QuantizedWeight,
    tokens: NDArray[np.int32],
    temperature: float,
    reference_hidden: NDArray[np.float32] | None,
    reference_weight: NDArray[Any] | QuantizedWeight | None,
    forward: dict[str, NDArray[Any] | None],
    mass_above: NDArray[np.float32] | None,
    upstream: dict[str, NDArray[np.float32] | None],
    want_hidden: bool,
    want_weight: bool,
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """(d_hidden [T, D], d_weight [V, D]) for derivatives of the loss by the outputs, by name."""

def linear_logprob_bytes(
    num_tokens: int, hidden_size: int, vocab_size: int, dtype: str, reference: bool, gradient: bool
) -> int: ...
def ops_threads() -> int: ...
def set_ops_threads(threads: int) -> None: ...

class Adapter:
    """LoRA matrices and rows of a soft prompt, of one weight version. Replaced, never edited: KV
    entries stay valid."""

    rank: int  # 0: rows alone
    num_rows: int
    modules: list[str]

class ModelFacts:
    """What a model is and weighs, from the headers of its files: no weight is read. A folder may
    hold config.json alone; its weights are then taken to be bfloat16."""

    config: dict[str, Any]
    """family, vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads,
    head_dim, context_length, bos_id (int | None), eos_ids, tied_head"""
    has_weights: bool
    lora_modules: dict[str, tuple[int, int]]
    """As Model.lora_modules()."""
    layer_parameters: int
    """Numbers in the layers' matrices."""
    head_parameters: int
    kv_elements: int
    """Numbers that a position keeps in all layers."""

    def matrix_bytes(self, device: str = "cpu", compute: str = "float32") -> dict[str, int]:
        """Of "layers", "head" and "embedding" (0 where it is the head) when loaded. A step reads
        layers and head, however few rows it has."""

    def score_bytes(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        modules: Sequence[str],
        rank: int,
        with_reference: bool = False,
        activations: str = "keep",
        threads: int = 1,
        num_rows: int = 0,
    ) -> int:
        """As Model.score_bytes on the CPU, with keep_graph and an adapter of ``rank`` on
        ``modules`` and of ``num_rows``."""

def describe(files: ModelFiles | str) -> ModelFacts:
    """Raises ModelFileError."""

class Model:
    @staticmethod
    def load(
        files: ModelFiles | str,
        *,
        device: str = "cpu",
        compute: str | None = None,
        kv_dtype: str | None = None,
        deterministic: bool = True,
        threads: int = 0,
        context_length: int = 0,
        library_folders: Sequence[str] = (),
    ) -> Model:
        """On "cpu", compute is "float32" (None) or "int8" and kv_dtype "float32" (None) or
        "float16"; on "cuda", the current CUDA device, compute is "bfloat16" (None) or "float32",
        and kv_dtype is the same. deterministic=False: products by cuBLASLt, which is what
        ALIGNPRO_CUBLASLT names, or is looked for where the loader looks and then in
        library_folders. UnavailableError where this machine or build lacks what was asked for."""

    @property
    def config(self) -> dict[str, Any]:
        """As ModelFacts.config, and device, threads, weight_bytes, compute, kv_dtype,
        deterministic, streamed_bytes (read by every step), embedding_scale (times a
        table's row is what enters the first layer)"""

    def lora_modules(self) -> dict[str, tuple[int, int]]:
        """Every linear a LoRA can attach to, by its PEFT path ("model.layers.0.self_attn.q_proj"),
        with (out_features, in_features). Phi-3 has "...qkv_proj" and "...gate_up_proj"."""

    def make_adapter(
        self,
        matrices: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
        scale: float,
        rows: NDArray[np.float32] | None = None,
    ) -> Adapter:
        """{module path: (A [r, in], B [out, r])}; the matrices are copied. Any subset of modules.
        y = W x + scale * B (A x). rows [m, hidden_size]: a soft prompt (Lester et al. 2021), beside
        the modules or alone. In a prompt, or before what is scored of a sequence, the id -1 - r
        stands for row r, as a token stands for its embedding."""

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        adapter: Adapter | None = None,
        temperature: float = 1.0,
        reference: Adapter | None = None,
        with_reference: bool = False,
        keep_graph: bool = False,
        activations: str = "keep",
        with_hidden: bool = False,
        reference_hidden: Any = None,
        given_hidden: Any = None,
    ) -> Score:
        """Scores tokens [start, len) of every sequence (1 <= start <= len). Common prefixes are
        computed once. with_reference: also the exact KL to the distribution under ``reference``
        (None: base weights). keep_graph: keep what backward() needs. activations: "keep" every
        layer's, or "recompute" them in backward(), to the same bits. with_hidden: also the states
        that the tokens were predicted from. reference_hidden: such states [sum(len - start), D] of
        the same tokens behind other contexts, of which the reference's distributions are then.
        given_hidden: such states in the place of the policy's own, constants."""

    def score_bytes(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        adapter: Adapter | None = None,
        with_reference: bool = False,
        keep_graph: bool = False,
        activations: str = "keep",
        with_hidden: bool = False,
    ) -> int:
        """What score() and its backward() hold at most of the device's memory, in bytes, beside
        weights, adapters and (on the CPU) gradients."""

class Score:
    """Flat float32 arrays, sequences one after another: total = sum(len - start)."""

    logprob: NDArray[np.float32]
    entropy: NDArray[np.float32]
    kl: NDArray[np.float32] | None  # KL(policy || reference) per token, full vocabulary
    reference_logprob: NDArray[np.float32] | None
    # [total, hidden_size], float32, a fresh copy: the policy's final normalised state before each
    # token, whose product with the vocabulary gives the token's logits. No gradient flows into it.
    hidden: NDArray[np.float32] | None
    def backward(
        self,
        d_logprob: NDArray[np.float32],
        d_entropy: NDArray[np.float32] | None,
        d_kl: NDArray[np.float32] | None,
    ) -> dict[str, Any]:
        """Gradients {module: (dA, dB), "rows": [m, hidden_size]}, the last of an adapter that has
        them, for given derivatives of the loss by each output. Once."""

class SamplingParams:
    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        max_new_tokens: int,
        min_new_tokens: int,
        seed: int,
        sample: int,
        stop: list[str],
        stop_token_ids: list[int],
        ignore_eos: bool,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        deadline_seconds: float,
    ) -> None: ...
    @property
    def penalises(self) -> bool: ...

class Sequence_:  # exported as _core.Sequence
    tokens: list[int]
    logprobs: list[float]
    kept_mass: list[float]
    prompt_tokens: list[int]
    finished: bool
    # "stop" | "length" | "cancelled" | "deadline"; "failed" where raise_error() raises
    finish_reason: str | None
    matched_stop: str | None  # the stop string that ended it
    def cancel(self) -> None: ...
    def raise_error(self) -> None:
        """Raises what ended it, if something did."""
    def read(self, begin: int) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities from index ``begin`` on, as far as written."""

class Engine:
    def __init__(
        self,
        model: Model,
        *,
        kv_cache_bytes: int = 0,
        max_batch_rows: int = 256,
        prefix_cache: bool = True,
        lookup: bool = True,
    ) -> None: ...
    def set_token_bytes(self, pieces: list[bytes]) -> None: ...
    def step(self) -> None: ...
    def ready(self) -> bool: ...
    def idle(self) -> bool: ...
    def stats(self) -> dict[str, int | float]:
        """prefill_tokens, cached_tokens, decode_tokens, drafted_tokens, accepted_tokens, steps,
        kv_blocks_in_use, kv_blocks_cached, kv_blocks_capacity"""

class Mixture:
    """prod_k rho_k^weight, token by token. Real weights that sum to 1; None is the base weights."""

    def __init__(self, members: Sequence[tuple[Adapter | None, float]]) -> None: ...
    lanes: list[tuple[Adapter | None, float]]
    """Distinct members of a weight other than 0, in the order in which their states are summed, in
    float64, each weight rounded to float32."""

class Client:
    def __init__(self, engine: Engine) -> None: ...
    def submit(
        self, tokens: list[int], params: SamplingParams, adapter: Adapter | Mixture | None = None
    ) -> Sequence_: ...
    def step(self) -> list[Sequence_]:
        """One step for everybody, unless a request of this client has finished already; returns
        what has finished since the last call."""

    def launch(self) -> None: ...
    def run(self) -> None:
        """Steps until no request of this client is open; Ctrl-C cancels them."""

    def cancel(self) -> None: ...
    def idle(self) -> bool:
        """No request is open, or finished and not yet returned by step()."""

class cuda:
    """Whether there is a CUDA device, and which."""

    @staticmethod
    def is_available() -> bool: ...
    @staticmethod
    def unavailable_reason() -> str:
        """In one line; "" where it is available."""
    @staticmethod
    def device_name() -> str: ...
    @staticmethod
    def version() -> str:
        """Of the runtime it was built with; "no" without."""
