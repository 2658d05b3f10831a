"""transformers' `generate` in float32 on the CPU: decode, prefill and rollout."""

from __future__ import annotations

import statistics

import harness
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from alignpro.bench.work import ROLLOUT
from alignpro.config import RESPONSE, REWRITE, Prompting
from alignpro.data.load import load_prompts


def load(request: harness.Request):
    model = _model(request)
    model.generation_config.eos_token_id = None  # cheaper than a processor that forbids it

    def generate(prompts, new_tokens, seed):
        torch.manual_seed(seed)
        ids = torch.tensor(prompts)
        out = _sampled(model, ids, torch.ones_like(ids), new_tokens, 1.0, pad=0)
        return harness.Written(out.sequences[:, ids.shape[1] :].tolist(), _logprobs(out).tolist())

    return generate


def rollout() -> None:
    """Every rewrite, then a response to each: two calls of `generate`, which end where ours do."""
    request, report = harness.start("transformers")
    model, report["load_seconds"] = harness.timed(lambda: _model(request))
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends])
    prompting = Prompting()
    texts = [row.prompt for row in load_prompts(ROLLOUT.data, split=ROLLOUT.split)]
    texts = texts[: request.prompts]

    def answers(turns, max_new_tokens, temperature):
        inputs = harness.chat_inputs(tokenizer, turns)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        out = _sampled(model, ids, mask, max_new_tokens, temperature, pad)
        _logprobs(out)
        written = out.sequences[:, ids.shape[1] :]
        ended = torch.isin(written, ends)
        tokens = int((ended.cumsum(1) - ended.long() == 0).sum())  # up to the end, and with it
        return tokenizer.batch_decode(written, skip_special_tokens=True), tokens

    def round_of(seed):
        torch.manual_seed(seed)
        turns = [prompting.prompter_turn(text) for text in texts for _ in range(ROLLOUT.rewrites)]
        rewrites, first = answers(turns, ROLLOUT.rewrite_tokens, REWRITE.temperature)
        turns = [
            prompting.target_turn(texts[index // ROLLOUT.rewrites], rewrite.strip())
            for index, rewrite in enumerate(rewrites)
        ]
        _, second = answers(turns, ROLLOUT.response_tokens, RESPONSE.temperature)
        return first + second

    tokens, seconds = [], []
    for seed in range(request.repeats + 1):
        written, took = harness.timed(lambda seed=seed: round_of(seed))
        tokens.append(written)
        seconds.append(took)
    report["results"].append(
        {
            "batch": len(texts) * ROLLOUT.rewrites,
            "tokens": tokens[1:],
            "all_seconds": seconds[1:],
            "seconds": statistics.median(seconds[1:]),
            "logprobs": True,
        }
    )
    harness.write(report)


def _model(request: harness.Request):
    torch.set_num_threads(request.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32).eval()


@torch.inference_mode()
def _sampled(model, ids, mask, max_new_tokens, temperature, pad):
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_scores=True,
    )


def _logprobs(out) -> torch.Tensor:
    """As `compute_transition_scores(normalize_logits=True)`, without its copies of all scores."""
    drawn = out.sequences[:, -len(out.scores) :]
    steps = [
        scores.gather(1, drawn[:, t : t + 1])[:, 0] - scores.logsumexp(1)
        for t, scores in enumerate(out.scores)
    ]
    return torch.stack(steps, 1)


if __name__ == "__main__":
    import sys

    if harness.Request.from_json(sys.argv[1]).benchmark == "rollout":
        rollout()
    else:
        harness.generation("transformers", load)
