"""What the policy of a round does on the prompts that every round is measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignpro.config import SelfImproveConfig
from alignpro.findings import COPY_RATE, copied_share
from alignpro.models.adapter import LoraWeights
from alignpro.models.answer_scores import divergences
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.native_model import NativeModel
from alignpro.pipeline import Pipeline
from alignpro.rewards.check import score_checked
from alignpro.rewards.grounding import GroundingReward
from alignpro.rewards.scenes import Chair, SceneCounts, chair, listed_objects, scene_counts
from alignpro.statistics import bootstrap_mean_ci, paired_difference, relative_reduction
from alignpro.types import Conversation, Prompt

_LEAST = 2  # prompts, for an interval
_SHORTER = 0.2  # the share of the length from which on a shorter answer is said


@dataclass(frozen=True)
class MeasuredAnswer:
    """One answer of the policy, or of the target to its rewrite."""

    prompt: int
    text: str  # the response
    rewrite: str
    tokens: int  # of the response
    confidence: float  # nats a token
    grounding: float  # nats a token, as of the reward
    copied: float  # the share of the response's words that its source says in a row
    kl_first: float  # exact, nats an answer (a rewrite, with policy prompter)
    kl_previous: float
    entropy: float  # of the policy, nats a token
    scene: SceneCounts | None = None  # where the data have objects

    @property
    def faithfulness(self) -> float:
        """1 - CHAIR_I of the response where the data have objects (1 of one that names none, for
        nothing is made up), else its grounding."""
        if self.scene is None:
            return self.grounding
        return 1 - self.scene.hallucinated / max(1, self.scene.mentions)

    def to_plain(self) -> dict[str, Any]:
        scene = None if self.scene is None else self.scene._asdict()
        return {**asdict(self), "scene": scene}


def measured_of_plain(plain: Mapping[str, Any]) -> MeasuredAnswer:
    """What `MeasuredAnswer.to_plain` made of it."""
    scene = plain["scene"]
    return MeasuredAnswer(**{**plain, "scene": None if scene is None else SceneCounts(**scene)})


def measure_policy(
    pipeline: Pipeline,
    model: NativeModel,
    config: SelfImproveConfig,
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]],
    *,
    adapter: LoraWeights | None,
    previous: LoraWeights | None,
    first: LoraWeights | None,
    grounding: GroundingReward,
    seed: int,
) -> list[MeasuredAnswer]:
    """One answer a prompt, under the same draws for every policy. A response that failed is left
    out, and so is one without log-probabilities, of which there is no confidence.

    Raises FailedRowsError where none is left.
    """
    unscored = pipeline.without_reward()
    if config.policy == "target":
        rollout = unscored.with_target_adapter(adapter).respond(prompts, seed=seed)
    else:
        rollout = unscored.with_adapter(adapter).rollout(prompts, seed=seed)
    found = [(w.prompt_index, w, r) for (w,) in rollout.rewrites for r in w.responses if r.logprobs]
    if not found:
        raise FailedRowsError(
            f"target: none of {len(prompts)} answers came with log-probabilities of its tokens, "
            f"which are the confidence; {pipeline.target.name} does not serve them"
        )
    asked = [prompts[index] for index, _, _ in found]
    of_rows = {name: [values[i] for i, _, _ in found] for name, values in columns.items()}
    texts = [response.text for _, _, response in found]
    grounded = score_checked(grounding, asked, [""] * len(found), texts, of_rows)
    if config.policy == "target":
        read = [w.target_tokens for _, w, _ in found], [r.tokens for _, _, r in found]
        temperature = config.response.temperature
    else:
        read = [w.prompter_tokens for _, w, _ in found], [w.tokens for _, w, _ in found]
        temperature = config.rewrite.temperature
    to_first, to_previous = (
        divergences(model, *read, temperature, policy=adapter, reference=reference)
        for reference in (first, previous)
    )
    objects = of_rows.get("objects")
    sources = of_rows.get("source") or [None] * len(found)
    return [
        MeasuredAnswer(
            prompt=index,
            text=response.text,
            rewrite=rewrite.text,
            tokens=response.num_tokens,
            confidence=math.fsum(response.logprobs) / len(response.logprobs),
            grounding=grounded[row],
            copied=copied_share(
                sources[row] or Conversation.of(prompts[index]).text, response.text
            ),
            kl_first=to_first[row].kl,
            kl_previous=to_previous[row].kl,
            entropy=to_first[row].entropy,
            scene=None
            if objects is None
            else scene_counts(response.text, listed_objects(objects[row])),
        )
        for row, (index, rewrite, response) in enumerate(found)
    ]


def summarise(
    answers: Sequence[MeasuredAnswer], first: Sequence[MeasuredAnswer], asked: int, seed: int
) -> dict[str, Any]:
    """Means over the answers, at least one, and what changed since the first policy, paired by
    prompt, with its 95% interval: [mean, low, high]; None where fewer than 2 prompts have both.

    asked: prompts, some of which may have no answer.
    """
    both = sorted({a.prompt for a in answers} & {a.prompt for a in first})
    now, then = {a.prompt: a for a in answers}, {a.prompt: a for a in first}

    def mean(name: str) -> float:
        return math.fsum(getattr(a, name) for a in answers) / len(answers)

    def change(name: str) -> list[float] | None:
        values = [[float(getattr(of[p], name)) for p in both] for of in (now, then)]
        return list(paired_difference(*values, seed=seed)) if len(both) >= _LEAST else None

    names = ("faithfulness", "grounding", "copied", "confidence", "tokens", "entropy")
    row: dict[str, Any] = {name: mean(name) for name in (*names, "kl_first", "kl_previous")}
    row |= {"answers": len(answers), "failed": asked - len(answers), "compared": len(both)}
    own = [a.confidence for a in answers]
    row["confidence_ci"] = list(bootstrap_mean_ci(own, seed=seed)) if len(own) >= _LEAST else None
    row["change"] = {name: change(name) for name in names}
    scenes = [a.scene for a in answers if a.scene is not None]
    if scenes:
        row["chair"] = _chair_row(chair(scenes))
        pairs = [(now[p].scene, then[p].scene) for p in both]
        row["change"] |= _chair_change([(a, b) for a, b in pairs if a and b], seed)
    return row


def _chair_row(counts: Chair) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in counts._asdict().items()}


def _chair_change(
    pairs: Sequence[tuple[SceneCounts, SceneCounts]], seed: int
) -> dict[str, list[float]]:
    """How much lower CHAIR_I and CHAIR_S are, as shares of the first policy's; where that makes
    nothing up there is nothing to say, nor of fewer than 2 pairs. pairs: of the policy now, and of
    the first."""
    if len(pairs) < _LEAST:
        return {}
    found = {}
    made_up = [[c.hallucinated for c in of] for of in zip(*pairs, strict=True)]
    mentions = [[c.mentions for c in of] for of in zip(*pairs, strict=True)]
    if sum(made_up[1]) and sum(mentions[0]):
        of_mentions = relative_reduction(
            made_up[0], mentions[0], made_up[1], mentions[1], seed=seed
        )
        flags, ones = [[float(n > 0) for n in of] for of in made_up], [1.0] * len(pairs)
        of_answers = relative_reduction(flags[0], ones, flags[1], ones, seed=seed)
        found = {"chair_i_reduction": list(of_mentions), "chair_s_reduction": list(of_answers)}
    true = [[float(c.true_objects) for c in of] for of in zip(*pairs, strict=True)]
    found["true_objects"] = list(paired_difference(*true, seed=seed))
    return found


def round_warnings(summary: Mapping[str, Any]) -> dict[str, str]:
    """What to doubt in a round's policy, by the name of the rule."""
    change = summary["change"]
    found = {}
    few = change["tokens"] is None
    if summary["failed"]:
        asked = summary["failed"] + summary["answers"]
        found["unanswered"] = (
            f"{summary['failed']} of {asked} measured prompts have no answer, and changes are of "
            f"the {summary['compared']} that the first policy's answers are known of as well"
            f"{', too few for an interval' if few else ''}."
        )
    if few:
        return found
    confidence, faithful = change["confidence"], change["faithfulness"]
    if confidence[1] > 0 and not faithful[1] > 0:
        found["self_confidence"] = (
            f"Since the first policy the confidence rose by {confidence[0]:.3f} nats a token, and "
            f"faithfulness changed by {faithful[0]:+.3f} [{faithful[1]:+.3f}, {faithful[2]:+.3f}]: "
            "the policy agrees more with itself, not with its source. A larger calibration counts "
            "the source more; a smaller learning_rate holds the policy closer."
        )
    copied = change["copied"]
    if summary["copied"] > COPY_RATE and copied[1] > 0:
        found["copies"] = (
            f"{summary['copied']:.0%} of the answers' words repeat their source, "
            f"{summary['copied'] - copied[0]:.0%} of the first policy's: nothing is likelier "
            "behind a source than the source itself. A smaller learning_rate or fewer steps hold "
            "the policy closer; a term against copies pays for other words, if it has any."
        )
    length, before = change["tokens"], summary["tokens"] - change["tokens"][0]
    if before > 0 and length[2] < 0 and -length[0] > _SHORTER * before:
        found["shorter"] = (
            f"Answers are {-length[0] / before:.0%} shorter than the first policy's: a shorter one "
            "makes up less by itself. Compare what it says, too."
        )
    return found
