"""OpenVINO GenAI's continuous batching on the GGUF file, in its own choice of precision, which
quantises activations, or in float32 arithmetic."""

from __future__ import annotations

import harness
import numpy as np
import openvino
import openvino_genai

PRECISIONS = {
    "default": {},
    "float32": {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    },
}


def load(request: harness.Request):
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = request.widest
    options = {"INFERENCE_NUM_THREADS": request.threads, **PRECISIONS[request.variant]}
    pipeline = openvino_genai.ContinuousBatchingPipeline(request.model, scheduler, "CPU", options)

    def generate(prompts, new_tokens, seed):
        handles = []
        for index, prompt in enumerate(prompts):
            config = openvino_genai.GenerationConfig()
            config.do_sample = True
            config.temperature = 1.0
            config.top_p = 1.0
            config.ignore_eos = True
            config.max_new_tokens = new_tokens
            config.logprobs = 1
            config.rng_seed = seed * len(prompts) + index
            ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(pipeline.add_request(index, ids, config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
        outputs = [handle.read_all()[0] for handle in handles]
        return harness.Written(
            [output.generated_ids for output in outputs],
            [output.generated_log_probs for output in outputs],
        )

    return generate


if __name__ == "__main__":
    harness.generation("openvino-genai", load)
