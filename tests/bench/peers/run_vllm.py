"""vLLM on the CPU in float32, eager, in this process: decode and prefill."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import harness

_OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"


def load(request: harness.Request):
    if request.threads != len(os.sched_getaffinity(0)):
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{request.threads - 1}"
    from vllm import LLM, SamplingParams

    model = LLM(
        model=request.model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=request.longest,
        max_num_seqs=request.widest,
        disable_log_stats=True,
    )

    def generate(prompts, new_tokens, seed):
        params = [
            SamplingParams(
                temperature=1.0,
                max_tokens=new_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,  # of the drawn token alone
                seed=seed * len(prompts) + index,
            )
            for index in range(len(prompts))
        ]
        outputs = model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        completions = [output.outputs[0] for output in outputs]
        return harness.Written(
            [list(one.token_ids) for one in completions],
            [
                [
                    step[token].logprob
                    for token, step in zip(one.token_ids, one.logprobs, strict=True)
                ]
                for one in completions
            ],
        )

    return generate


def prepare() -> None:
    """What has to be so before vLLM is imported; it is imported here, outside the clock."""
    if "LD_PRELOAD" not in os.environ and _OPENMP.exists():
        # vLLM asks for this OpenMP to be loaded first, and counts its own threads.
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ["LD_PRELOAD"] = str(_OPENMP)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: its memory is counted
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    importlib.import_module("vllm")


if __name__ == "__main__":
    prepare()
    harness.generation("vllm-cpu", load)
