"""A language model small enough to enumerate, with the seams of the native one.

The next token depends on the last one alone: logits = (W + scale B A) h[last]. Log-probabilities
are rows of one table a weight version, so sampler and scorer agree to the bit, and the optimum of
the objective can be written down.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from alignpro.models.adapter import LoraWeights
from alignpro.types import Completion, SamplingParams

BOS, GEN, EOS = 0, 1, 2
LETTERS = "abcdefgh"
VOCABULARY = 3 + len(LETTERS)
HIDDEN = 6
MODULE = "model.layers.0.mlp.down_proj"


class ToyTokenizer:
    bos_id = BOS
    eos_ids = (EOS,)

    def encode(self, text: str, *, add_bos: bool = False, most: int | None = None) -> list[int]:
        return [3 + LETTERS.index(letter) for letter in text]

    def decode(self, tokens: list[int], *, skip_special: bool = True) -> str:
        return "".join(LETTERS[token - 3] for token in tokens if token >= 3)

    def encode_chat(
        self, messages: Any, *, add_generation_prompt: bool = True, most: int | None = None
    ) -> list[int]:
        tokens = [BOS]
        for message in messages:
            if message["role"] == "user":
                tokens += [*self.encode(message["content"]), GEN]
            else:
                tokens += [*self.encode(message["content"]), EOS]
        return tokens

    def around_turn(self) -> tuple[str, str, bool]:
        return "", "", False


class ToyAdapter:
    def __init__(self, weights: LoraWeights):
        self.a, self.b = (torch.tensor(m) for m in weights.matrices[MODULE])
        self.scale = weights.scale


class ToyScore:
    def __init__(self, logprob, entropy, kl, reference_logprob, adapter, hidden):
        self.nodes = [logprob, entropy, kl]
        self.logprob = logprob.detach().numpy()
        self.entropy = entropy.detach().numpy()
        self.kl = None if kl is None else kl.detach().numpy()
        self.reference_logprob = (
            None if reference_logprob is None else reference_logprob.detach().numpy()
        )
        self.adapter = adapter
        self.hidden = hidden
        self.sequences: list[list[int]] = []
        self.activations = ""
        self.received: list[Any] = []

    def backward(self, d_logprob, d_entropy, d_kl):
        self.received = [d_logprob, d_entropy, d_kl]
        total = torch.zeros(())
        with torch.enable_grad():
            for node, upstream in zip(self.nodes, self.received, strict=True):
                if upstream is not None:
                    assert upstream.dtype == np.float32 and upstream.flags.c_contiguous
                    total = total + (node * torch.tensor(upstream)).sum()
            a, b = torch.autograd.grad(total, [self.adapter.a, self.adapter.b])
        return {MODULE: (a.numpy(), b.numpy())}


class ToyCore:
    """What the policy asks of ``_core.Model``."""

    def __init__(self, seed: int, hidden_size: int):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(VOCABULARY, hidden_size, generator=generator)
        if hidden_size >= VOCABULARY:  # every token's logits are its own, and as easily learnt
            self.hidden = 2.0 * torch.linalg.qr(self.hidden.T).Q.T
        self.weight = 0.5 * torch.randn(VOCABULARY, hidden_size, generator=generator)
        self.scores: list[ToyScore] = []
        self.error = 0.0  # added to scored log-probabilities, to see that parity is watched

    def table(self, adapter: ToyAdapter | None, temperature: float) -> torch.Tensor:
        """log p(next | last): [last, next]."""
        weight = self.weight
        if adapter is not None:
            weight = weight + adapter.scale * (adapter.b @ adapter.a)
        return torch.log_softmax(self.hidden @ weight.T / temperature, dim=-1)

    def score(
        self,
        sequences,
        starts,
        adapter=None,
        temperature=1.0,
        reference=None,
        with_reference=False,
        keep_graph=False,
        activations="keep",
        with_hidden=False,
        reference_hidden=None,
    ):
        pairs = [
            (sequence[i - 1], sequence[i])
            for sequence, start in zip(sequences, starts, strict=True)
            for i in range(start, len(sequence))
        ]
        last, token = ([pair[side] for pair in pairs] for side in (0, 1))
        with torch.set_grad_enabled(keep_graph):
            if keep_graph:
                adapter.a.requires_grad_(True)
                adapter.b.requires_grad_(True)
            rows = self.table(adapter, temperature)[last]
            logprob = rows[range(len(token)), token] + self.error
            entropy = -(rows.exp() * rows).sum(-1)
            kl = reference_logprob = None
            if with_reference:
                read = last
                if reference_hidden is not None:  # which token's state each row is
                    states = [torch.tensor(row) for row in reference_hidden]
                    read = [int((self.hidden == state).all(-1).nonzero()) for state in states]
                other = self.table(reference, temperature)[read].detach()
                kl = (rows.exp() * (rows - other)).sum(-1)
                reference_logprob = other[range(len(token)), token]
        hidden = self.hidden[last].numpy() if with_hidden else None
        score = ToyScore(logprob, entropy, kl, reference_logprob, adapter, hidden)
        score.sequences, score.activations = sequences, activations
        self.scores.append(score)
        return score

    def score_bytes(
        self,
        sequences,
        starts,
        adapter,
        with_reference,
        keep_graph,
        activations="keep",
        with_hidden=False,
    ):
        """A made-up need: 100 a token (40 when recomputed), half as much more with a reference, and
        10 for its hidden state."""
        assert isinstance(adapter, ToyAdapter) and keep_graph
        each = {"keep": 100, "recompute": 40}[activations]
        hidden = 10 if with_hidden else 0
        return sum(map(len, sequences)) * (each * (3 if with_reference else 2) // 2 + hidden)


@dataclass(eq=False)
class ToyHandle:
    model: ToyModel
    prompt_tokens: list[int]
    params: SamplingParams
    adapter: ToyAdapter | None
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    def advance(self) -> None:
        rows, edges = self.model.table(self.adapter, self.params.temperature)
        last = (self.prompt_tokens[-1:] + self.tokens)[-1]
        uniform = self.uniform()
        token = bisect.bisect_right(edges[last], uniform * edges[last][-1], hi=VOCABULARY - 1)
        self.tokens.append(token)
        self.logprobs.append(rows[last][token])
        self.finished = token == EOS or len(self.tokens) == self.params.max_new_tokens

    def uniform(self) -> float:
        key = repr((self.params.seed, self.sample, len(self.tokens))).encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2**48

    def completion(self) -> Completion:
        assert self.finished
        return Completion(
            tokens=self.tokens,
            text=self.model.tokenizer.decode(self.tokens),
            logprobs=self.logprobs,
            kept_mass=[1.0] * len(self.tokens),
            finish_reason="stop" if self.tokens[-1] == EOS else "length",
            prompt_tokens=self.prompt_tokens,
        )


class ToyModel:
    name = published_name = "toy"
    fingerprint = "of the toy"
    context_length = 64
    bit_exact = True
    lora_modules: ClassVar = {MODULE: (VOCABULARY, HIDDEN)}

    def __init__(self, seed: int = 0, hidden_size: int = HIDDEN):
        self.tokenizer = ToyTokenizer()
        self.core_model = ToyCore(seed, hidden_size)
        self.lora_modules = {MODULE: (VOCABULARY, hidden_size)}
        self.handles: list[ToyHandle] = []
        self.adapters: list[ToyAdapter] = []
        self._tables: dict[Any, Any] = {}

    def make_adapter(self, weights: LoraWeights) -> ToyAdapter:
        self.adapters.append(ToyAdapter(weights))
        return self.adapters[-1]

    def table(self, adapter: ToyAdapter | None, temperature: float) -> Any:
        """Log-probabilities and cumulative probabilities, [last][next], as lists."""
        if (adapter, temperature) not in self._tables:
            with torch.no_grad():
                rows = self.core_model.table(adapter, temperature)
            edges = torch.cumsum(rows.double().exp(), 1)
            self._tables[adapter, temperature] = (rows.tolist(), edges.tolist())
        return self._tables[adapter, temperature]

    def client(self):
        return self  # which has one caller here

    def cancel(self) -> None:
        self.handles = []

    def submit(self, tokens, params, *, adapter=None, sample=0):
        handle = ToyHandle(self, tokens, params, adapter, sample)
        self.handles.append(handle)
        return handle

    def launch(self) -> None: ...

    def ready(self) -> bool:
        return True

    def step(self) -> list[ToyHandle]:
        for handle in self.handles:
            handle.advance()
        done = [handle for handle in self.handles if handle.finished]
        self.handles = [handle for handle in self.handles if not handle.finished]
        return done

    def idle(self) -> bool:
        return not self.handles
