"""CTranslate2's generator, float32 or int8: decode and prefill."""

from __future__ import annotations

import json
from pathlib import Path

import ctranslate2
import harness


def load(request: harness.Request):
    generator = ctranslate2.Generator(
        request.model,
        device="cpu",
        compute_type=request.variant,
        inter_threads=1,
        intra_threads=request.threads,
    )
    # Prompts go in as the texts of their tokens.
    names = json.loads((Path(request.model) / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompts, new_tokens, seed):
        ctranslate2.set_random_seed(seed + 1)
        results = generator.generate_batch(
            [[names[token] for token in prompt] for prompt in prompts],
            min_length=new_tokens,
            max_length=new_tokens,
            include_prompt_in_result=False,
            sampling_topk=0,
            sampling_temperature=1,
            return_scores=True,
        )
        tokens = [result.sequences_ids[0] for result in results]
        return harness.Written(tokens, [result.scores for result in results])

    return generate


if __name__ == "__main__":
    harness.generation("ctranslate2", load)
