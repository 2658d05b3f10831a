"""What compute="int8" costs: log-probabilities and rewards against float32, on the same model.

    python tests/bench/int8_cost.py [--model MODEL] [--prompts 96] [--responses 4] [--json FILE]

Log-probabilities: the float32 model answers shipped prompts, and both score its tokens. Rewards:
each model answers the same prompts with the same seeds, and the quickstart's reward judges; the
difference is paired by prompt, with a bootstrap interval. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from alignpro.config import RESPONSE, QuickstartConfig
from alignpro.data.load import load_prompts
from alignpro.models.native_model import load_model
from alignpro.rewards import build_reward
from alignpro.statistics import paired_difference
from alignpro.types import Completion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.model, options.prompts, options.responses)
    gap, reward = result["logprob_difference"], result["reward_difference"]
    print(f"{result['tokens']} tokens of {result['prompts']} prompts x {result['responses']}\n")
    print("| int8 against float32 | |\n|---|---:|")
    for name in ("mean", "p99", "p99_9", "max"):
        print(f"| log-probability, absolute difference, {name} | {gap[name]:.3f} |")
    print(f"| nats a token, int8 minus float32 | {result['nats_per_token_difference']:+.4f} |")
    print(
        f"| mean reward, int8 minus float32 | {reward['mean']:+.4f} "
        f"({reward['low']:+.4f} to {reward['high']:+.4f}) |"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(model: str, num_prompts: int, num_responses: int) -> dict:
    prompts = [row.prompt for row in load_prompts("everyday", split="train")[:num_prompts]]
    reward = build_reward(QuickstartConfig().reward)
    params = [replace(RESPONSE, n=num_responses, seed=seed) for seed in range(len(prompts))]
    logprobs, rewards = {}, {}
    answers: list[Completion] = []  # the float32 model's
    for compute in ("float32", "int8"):
        loaded = load_model(model, compute=compute)
        written = loaded.generate(prompts, params)
        answers = answers or written
        scored = loaded.score([a.prompt_tokens + a.tokens for a in answers])
        logprobs[compute] = np.concatenate(
            [row[len(a.prompt_tokens) - 1 :] for a, row in zip(answers, scored, strict=True)]
        )
        asked = [prompt for prompt in prompts for _ in range(num_responses)]
        judged = reward(asked, asked, [a.text for a in written])
        rewards[compute] = np.reshape(judged, (len(prompts), num_responses)).mean(axis=1)
    difference = logprobs["int8"] - logprobs["float32"]
    size = np.abs(difference)
    return {
        "model": model,
        "prompts": len(prompts),
        "responses": num_responses,
        "tokens": len(size),
        "logprob_difference": {
            "mean": float(size.mean()),
            "p99": float(np.quantile(size, 0.99)),
            "p99_9": float(np.quantile(size, 0.999)),
            "max": float(size.max()),
        },
        "nats_per_token_difference": float(-difference.mean()),
        "mean_reward": {name: float(values.mean()) for name, values in rewards.items()},
        "reward_difference": paired_difference(rewards["int8"], rewards["float32"])._asdict(),
    }


if __name__ == "__main__":
    main()
