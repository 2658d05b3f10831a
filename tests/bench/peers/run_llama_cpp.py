"""llama.cpp on the GGUF file as it is, by llama-cpp-python's low-level calls: decode and prefill.

One stream of the batch for each sequence, with a KV cache of its own (not the unified one, which
attends over all of them). The draw and its log-probability take one pass over the logits.
"""

from __future__ import annotations

import ctypes

import harness
import llama_cpp
import numpy as np

_TOKENS = 2048  # in one call, llama.cpp's own default


@llama_cpp.llama_log_callback
def _silent(level, text, data):
    pass


class Streams:
    """A context for up to as many sequences as the largest case has."""

    def __init__(self, request: harness.Request):
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            request.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise ValueError("llama.cpp does not load this file")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.threads = request.threads
        self.batch = llama_cpp.llama_batch_init(_TOKENS, 0, 1)
        self.context, self.size = None, (0, 0)

    def __call__(self, prompts, new_tokens, seed):
        self._fit(len(prompts), len(prompts[0]) + new_tokens)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        draw = np.random.default_rng(seed)
        tokens = [[] for _ in prompts]
        logprobs = [[] for _ in prompts]
        # (token, position, sequence, whether the next is drawn from it)
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        while entries:
            following = []
            for start in range(0, len(entries), _TOKENS):
                part = entries[start : start + _TOKENS]
                self._decode(part)
                for row, (_, position, sequence, last) in enumerate(part):
                    if not last:
                        continue
                    token, logprob = self._drawn(row, draw)
                    tokens[sequence].append(token)
                    logprobs[sequence].append(logprob)
                    if len(tokens[sequence]) < new_tokens:
                        following.append((token, position + 1, sequence, True))
            entries = following
        return harness.Written(tokens, logprobs)

    def _fit(self, sequences, length):
        """A context of the case's size: made before its warm-up, and kept until the next case."""
        if (sequences, length) == self.size:
            return
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * -(-length // 256) * 256  # a stream's share is padded to 256
        params.n_batch = _TOKENS
        params.n_seq_max = sequences
        params.kv_unified = False
        params.n_threads = params.n_threads_batch = self.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"no context for {sequences} sequences of {length}")
        self.size = (sequences, length)

    def _decode(self, entries):
        batch = self.batch
        batch.n_tokens = len(entries)
        for row, (token, position, sequence, last) in enumerate(entries):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = last
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise ValueError(f"llama_decode returned {status}")

    def _drawn(self, row, draw):
        pointer = llama_cpp.llama_get_logits_ith(self.context, row)
        logits = np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))
        top = logits.max()
        mass = np.cumsum(np.exp(logits - top))
        # A number in (0, mass]: a token of no mass is never the first to reach it.
        token = int(np.searchsorted(mass, (1 - draw.random()) * mass[-1]))
        return token, float(logits[token] - top - np.log(mass[-1]))


if __name__ == "__main__":
    harness.generation("llama-cpp-python", Streams)
