"""What the house rules are worth: the mean reward of each kind's prompts behind each fixed text.

    python tests/bench/house_rules.py [--model smollm2] [--per-kind 40] [--responses 2]
                                      [--split train] [--kind how_to] [--text TEXT] [--threads N]

Prints a Markdown table, a row for every text and a column for every kind, and the mean tokens of
an answer. The last row takes each prompt's own rule by its label. Wordings are chosen here, on
training prompts: further texts to try are given with --text, and --kind leaves out other kinds.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Collection

from alignpro.config import QUICKSTART, QuickstartConfig, load_yaml
from alignpro.data.load import PromptRow, load_prompts, stack_columns
from alignpro.models.native_model import load_model
from alignpro.pipeline import Pipeline
from alignpro.rewards.build import build_reward

ARMS = load_yaml(QuickstartConfig, QUICKSTART).evaluate
RESPONSE = ARMS.response
RULES = ARMS.labelled.instructions  # kind -> text, "" for none
RIGHT_RULE = "the right rule by the label"
TOKENS = "tokens"


def rows_of(split: str, per_kind: int, kinds: Collection[str]) -> list[PromptRow]:
    """The first so many prompts of every kind."""
    by_kind = defaultdict(list)
    for row in load_prompts("house_rules", split=split):
        by_kind[row.columns["kind"]].append(row)
    return list(itertools.chain.from_iterable(by_kind[kind][:per_kind] for kind in kinds))


def measure(
    pipeline: Pipeline, rows: list[PromptRow], texts: list[str], responses: int, seed: int
) -> dict[str, dict[str, float]]:
    """Text -> kind -> mean reward, and mean TOKENS of an answer; all texts of a prompt answer under
    the same draws."""
    rollout = pipeline.answer(
        [row.prompt for row in rows],
        [texts] * len(rows),
        num_responses=responses,
        seed=seed,
        columns=stack_columns(rows),
        common_draws=True,
    )
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row, rewrites in zip(rows, rollout.rewrites, strict=True):
        kind = row.columns["kind"]
        for rewrite in rewrites:
            tokens = sum(r.num_tokens for r in rewrite.responses) / responses
            is_right = rewrite.text == RULES[kind]
            for text in (rewrite.text, RIGHT_RULE) if is_right else (rewrite.text,):
                found[text][kind].append(rewrite.reward)
                found[text][TOKENS].append(tokens)
    return {
        text: {kind: sum(values) / len(values) for kind, values in by_kind.items()}
        for text, by_kind in found.items()
    }


def table(means: dict[str, dict[str, float]], kinds: Collection[str]) -> str:
    lines = [f"| text | {' | '.join(kinds)} | all | tokens |", "|---" * (len(kinds) + 3) + "|"]
    for text, by_kind in means.items():
        rewards = [by_kind[kind] for kind in kinds]
        cells = [f"{reward:.2f}" for reward in [*rewards, sum(rewards) / len(rewards)]]
        cells.append(f"{by_kind[TOKENS]:.0f}")
        lines.append(f"| {text or 'none: the raw prompt'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="The target.")
    parser.add_argument("--split", default="train", help="Whose prompts are answered.")
    parser.add_argument("--per-kind", type=int, default=40, help="Prompts of every kind.")
    parser.add_argument("--responses", type=int, default=2, help="Responses to every prompt.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed of the responses.")
    parser.add_argument("--kind", action="append", choices=RULES, help="This alone; repeatable.")
    parser.add_argument("--text", action="append", default=[], help="A further text; repeatable.")
    parser.add_argument("--threads", type=int, default=None, help="Threads of the engine.")
    given = parser.parse_args(arguments)
    model = load_model(given.model, given.threads, compute="int8")  # the quickstart's target
    pipeline = Pipeline(model, model, build_reward("house_rules"), response_params=RESPONSE)
    texts = list(dict.fromkeys(["", *RULES.values(), ARMS.policy_text, *given.text]))
    kinds = given.kind or list(RULES)
    rows = rows_of(given.split, given.per_kind, kinds)
    means = measure(pipeline, rows, texts, given.responses, given.seed)
    means[RIGHT_RULE] = means.pop(RIGHT_RULE)  # the last row
    print(table(means, kinds))


if __name__ == "__main__":
    main()
