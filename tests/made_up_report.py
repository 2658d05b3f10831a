"""A report with every section, made up, and texts that try to break out of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from alignpro.config import ARMS
from alignpro.evaluate.results import (
    ArmResult,
    Comparison,
    Evaluation,
    Interval,
    Report,
    from_json,
)

HOSTILE = "<script>alert('x')</script> & [red]not red[/red] {{ 7*7 }} \x1b[31m"
NASTY = (
    "</div></section><style>*{display:none}</style>",
    "unbroken" * 60,
    "https://example.invalid/" + "a/" * 120,
    "\u202egnp.exe\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "&lt;b&gt; \" onmouseover='alert(1)' ]]> <!-- ",
    "# heading\n\n| a | b |\n|---|---|\n    code\n\ttab",
    "Z\u0351\u036b\u0343a\u0363\u036cl\u030fg\u0334o \U0001f469\u200d\U0001f680 " + "\u4e2d" * 80,
)


def typed(report: dict[str, Any]) -> Report:
    return from_json(Report, report, "report")


def arm(mean: float = 0.5, ci95: tuple[float, float] = (0.45, 0.55), **fields: Any) -> ArmResult:
    given = {
        "reward_variance": 0.16,
        "n": 64,
        "num_responses": 256,
        "components": {"vader": mean},
        "empty_rewrites": 0,
        "response_tokens": 40.0,
    }
    return ArmResult(Interval(mean, *ci95), **{**given, **fields})


def comparison(**fields: Any) -> Comparison:
    given = dict.fromkeys(field.name for field in dataclasses.fields(Comparison))
    counts = dict.fromkeys(("wins", "ties", "losses", "identical", "order_disagreements"), 0)
    return Comparison(**{**given, **counts, "n": 100, "errors": 0, **fields})


def evaluation(arms: dict[str, ArmResult], **fields: Any) -> Evaluation:
    return Evaluation(
        arms,
        **{
            "paired": {},
            "kl_per_rewrite": None,
            "kl_per_token": None,
            "tokens_per_second": 1234.5,
            "samples": [],
            **fields,
        },
    )


def full_report() -> dict[str, Any]:
    """Every part of the contract; the static instruction wins."""
    values = (0.521, 0.702, 0.655, 0.492, 0.665, 0.721, 0.688, 0.73, 0.741)
    means = dict(zip(ARMS, values, strict=True))
    arms: dict[str, Any] = {}
    for index, (key, mean) in enumerate(means.items()):
        arms[key] = {
            "mean_reward": mean,
            "reward_variance": 0.17 - 0.01 * index,
            "ci95": [mean - 0.06, mean + 0.055],
            "n": 64,
            "num_responses": 256,
            "components": {"vader": mean - 0.1, "topic": 0.3 + 0.02 * index, NASTY[1][:40]: 0.5},
            "empty_rewrites": 0,
            "response_tokens": 41.5 + 2 * index,
            "rewrite_tokens": 0.0 if key == "raw" else 11.25 + index,
            "copy_rate": 0.04 * index,
            "truncated_responses": 0.02 * index,
        }
        if key not in ("raw", "soft", "tuned"):
            arms[key] |= {"common_rewrite": 0.11 * index, "leaked_answers": 0.01 * index}
    arms["static"]["instruction"] = "Answer warmly, in two sentences. " + HOSTILE
    paired = {
        f"trained_minus_{key}": {
            "mean": means["trained"] - mean,
            "ci95": [means["trained"] - mean - 0.03, means["trained"] - mean + 0.03],
        }
        for key, mean in means.items()
        if key != "trained"
    }
    return {
        "model": "SmolLM2-135M-Instruct",
        "reward": "vader+0.2*topic",
        "seed": 3,
        "versions": {"alignpro": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        "config": {"train": {"kl_coef": 0.05, "prompts_per_step": 16}, "name": HOSTILE},
        "arms": arms,
        "paired": paired,
        "kl_per_rewrite": 1.97,
        "kl_per_token": 0.17,
        "soft_differences": {
            f"soft_minus_{key}": {"mean": means["soft"] - mean, "ci95": [-0.03, 0.24]}
            for key, mean in means.items()
            if key != "soft"
        },
        "gap_closed": {
            "share": 0.695,
            "ci95": [0.52, 0.88],
            "gap": {"mean": 0.249, "ci95": [0.2, 0.3]},
        },
        "static_to_labelled": {
            "share": 0.41,
            "ci95": [-0.2, 0.95],
            "gap": {"mean": 0.019, "ci95": [0.004, 0.04]},
        },
        "required": [
            {
                "requirement": f"trained>{key}{HOSTILE}",
                "left": "trained",
                "right": key,
                "difference": paired[f"trained_minus_{key}"],
                "margin": 0.05,
                "met": key == "raw",
            }
            for key in ("raw", "policy_text")
        ],
        "static_search": {
            "instruction": arms["static"]["instruction"],
            "source": "given",
            "candidates": 52,
            "train_prompts": 96,
            "budget": 160000,
            "responses": 4010,
            "rounds": [],
            "tokens": 159870,
        },
        "judge": {
            "name": "a local judge " + HOSTILE,
            "questions": 384,
            "replayed": 0,
            "failed": 2,
            "comparisons": _comparisons(),
        },
        "headroom": headroom(),
        "bound": bound(),
        "samples": samples(),
        "tokens_per_second": 1234.5,
        "seconds": {"sft": 40.25, "train": 200.5, "evaluate": 31.0},
        "peak_rss_bytes": 700 * 2**20,
    }


def _comparisons() -> dict[str, Any]:
    return {
        name: {
            "n": 64,
            "wins": wins,
            "ties": 10,
            "losses": 54 - wins,
            "win_rate": (wins + 5) / 64,
            "ci95": [(wins + 5) / 64 - 0.11, (wins + 5) / 64 + 0.11],
            "length_controlled_win_rate": (wins + 1) / 64,
            "length_controlled_ci95": [(wins + 1) / 64 - 0.12, (wins + 1) / 64 + 0.12],
            "identical": 0,
            "order_disagreements": 9,
            "first_chosen": None,
            "mean_length_difference": 3.4,
            "errors": 0,
        }
        for name, wins in (
            ("trained_vs_raw", 39),
            ("trained_vs_untuned", 30),
            ("trained_vs_static", 15),
        )
    }


def headroom() -> dict[str, Any]:
    """Twelve kl_coef on a curve of the right shape."""
    frontier = []
    for index in range(12):
        kl_coef = 0.8 / 1.5**index
        kl = math.log(16) * (1 - math.exp(-0.06 / kl_coef))
        reward = 0.49 + 0.12 * math.sqrt(kl)
        frontier.append(
            {
                "kl_coef": round(kl_coef, 4),
                "objective": reward - kl_coef * kl,
                "objective_ci95": [reward - kl_coef * kl - 0.02, reward - kl_coef * kl + 0.02],
                "gain": reward - kl_coef * kl - 0.49,
                "gain_ci95": [reward - kl_coef * kl - 0.5, reward - kl_coef * kl - 0.48],
                "reward": reward,
                "kl": kl,
                "effective_samples": 16 * math.exp(-kl),
                "crossfit_objective": reward - kl_coef * kl - 0.02,
                "crossfit_reward": reward - 0.03 * kl,
                "crossfit_kl": 0.9 * kl,
                "corrected_objective": reward - kl_coef * kl - 0.01,
                "crossfit_ci95": [reward - 0.05, reward],
                "corrected_ci95": [reward - 0.05, reward],
            }
        )
    return {
        "num_prompts": 64,
        "num_rewrites": 16,
        "num_responses": 2,
        "untuned_reward": 0.49,
        "untuned_ci95": [0.43, 0.55],
        "frontier": frontier,
        "best_of_n": [
            {
                "n": n,
                "reward": 0.49 + 0.14 * math.sqrt(kl),
                "crossfit_reward": 0.49 + 0.09 * math.sqrt(kl),
                "kl": kl,
            }
            for n, kl in ((2, 0.193), (4, 0.636), (8, 1.204), (16, 1.835))
        ],
        "recommended_kl_coef": frontier[7]["kl_coef"],
        "variance": {"between_rewrites": 0.021, "within_rewrite": 0.094},
    }


def bound() -> dict[str, Any]:
    return {
        "reward_range": [-1.0, 1.2],
        "reward_range_source": "observed",
        "tuned": "closed form",
        "closed_form": {"kl_coef": 0.05, "effective_samples": 4.2},
        "num_prompts": 64,
        "num_rewrites": 16,
        "num_responses": 2,
        "truncated_responses": 0.4,
        "parity_max_abs": None,
        "kl_coef": 0.05,
        "terms": {
            "tv_tuned": {"mean": 0.43, "ci95": [0.39, 0.47]},
            "tv_rewrites": {"mean": 0.81, "ci95": [0.78, 0.84]},
            "kl": {"mean": 1.62, "ci95": [1.4, 1.9]},
        },
        "bound": {"mean": 2.65, "ci95": [2.5, 2.8]},
        "measured_gap": {"mean": 0.076, "ci95": [0.03, 0.12]},
        "slack": {"mean": 2.574, "ci95": [2.4, 2.7]},
        "trained_gap": None,
        "rewards": {"raw": {"mean": 0.52, "ci95": [0.46, 0.57]}},
        "holds": True,
        "vacuous": True,
    }


def samples() -> list[dict[str, Any]]:
    """One sample a nasty text, in the prompt, the rewrites and the responses of every arm."""
    rows = []
    for text in (HOSTILE, *NASTY):
        row: dict[str, Any] = {"prompt": f"How do bees find home? {text}"}
        for index, key in enumerate(ARMS):
            if key not in ("raw", "soft", "tuned"):
                row[f"rewrite_{key}"] = f"Be kind. {text}"
            row[f"response_{key}"] = "By landmarks, the sun and scent. " * (2 + index) + text
            row[f"reward_{key}"] = 0.1 * index
        rows.append(row)
    return rows


def full_metrics(steps: int = 40) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl with every key that is drawn."""
    rows: list[dict[str, Any]] = [{"stage": "sft", "loss": 2.0}]
    for step in range(steps):
        done = step / steps
        wave = math.sin(1.7 * step)
        rows.append(
            {
                "step": step,
                "reward_mean": 0.5 + 0.2 * done + 0.03 * wave,
                "kl_per_rewrite": 2.0 * done,
                "k1_per_rewrite": 2.0 * done + 0.3 * wave,
                "k3_per_rewrite": 2.0 * done + 0.2 * abs(wave),
                "kl_per_token": 0.17 * done,
                "entropy": 2.1 - 0.6 * done,
                "rewrite_tokens": 14.0 - 3 * done + wave,
                "response_tokens": 42.0 + 4 * done + wave,
                "grad_norm": 1.2 + 0.3 * wave,
                "kl_coef": 0.05 + 0.02 * done,
                "variance_between": 0.02 - 0.01 * done,
                "variance_within": 0.09 if step != 7 else None,
                "zero_advantage_groups": int(step % 3 == 0),
                "truncated_rewrites": 2,
                "parity_max_abs": 0.0,
                "num_rewrites": 4,
                "num_responses": 2,
                "generated_tokens": 4000,
                "target_tokens": 3000,
                "common_rewrite": 0.2 + 0.6 * done,
            }
        )
        if step % 10 == 0:
            rows[-1]["heldout"] = {"reward_mean": 0.45 + 0.15 * done}
    return rows
