"""What a prompter's texts and answers look like in numbers, and what to doubt in them.

Training looks at a few held-out prompts while it runs, an evaluation at all of them: the measures
and the rules are these for both. Every threshold stands beside its reason, and every finding names
what was measured and where the line is. A number that is absent is no finding.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from alignpro.config import GuardConfig, Prompting
from alignpro.guards import broken_by
from alignpro.statistics import variance
from alignpro.types import Conversation, Rollout

# Share of the length. Judges and reward models pay for length alone; a quarter is past chance in
# a mean over some dozens of prompts.
LENGTH_DRIFT = 0.25
# Share of the rewrite that repeats the prompt: then the prompter hands on the prompt more than it
# writes anything.
COPY_RATE = 0.5
# Share of the rewrites, or of the responses, that were cut at max_new_tokens: the reward then
# judges halves of sentences, and the length cannot shrink by learning to end.
TRUNCATED = 0.25
# Standard errors of the difference between two means of a component of the reward: past chance,
# the more so as the prompts are the same and the errors are taken as if they were not.
COMPONENT_FALLS = 2.0
# Share of the rewrites that hold the answer. An instruction and its answer share words by chance;
# one rewrite in ten is no chance any more.
LEAKED_ANSWERS = 0.1
# Share of the rewrites of all prompts that are one and the same text: the prompter has become a
# fixed instruction, which costs no prompter, and nothing else is explored any more.
ONE_REWRITE = 0.9

# Share of the rewrites that break a guard: in production their prompts go out as they are, and with
# them that share of what was gained.
BROKEN_GUARDS = 0.1

# The learning rate below which the rows of a soft prompt hardly move: AdamW moves a number by about
# its rate a step, and embeddings are of the size of some hundredths to tenths.
SLOW_ROWS = 1e-3

COPIED_RUN = 3  # words
_WORD = re.compile(r"\w+")
_GUARDS = GuardConfig()
_Value = TypeVar("_Value")


class Finding(NamedTuple):
    key: str  # stable name of the rule
    text: str  # one or two sentences with the number, the threshold and the reason


@dataclass(frozen=True)
class Measured:
    """What was written for some prompts; lengths are means in tokens, cuts and leaks are shares."""

    components: dict[str, float]  # means of the reward's parts, unweighted
    component_errors: dict[str, float]  # standard errors, of those that the reward pays for
    empty_rewrites: int
    response_tokens: float
    truncated_responses: float
    # None, here and below, where nothing stands between the prompt and the target.
    rewrite_tokens: float | None = None
    truncated_rewrites: float | None = None
    copy_rate: float | None = None  # share of the rewrites' words that is copied from the prompt
    leaked_answers: float | None = None  # share of the rewrites: see `holds_answer`
    distinct_rewrites: int | None = None
    common_rewrite: float | None = None  # share of the rewrites that are the most frequent text
    broken_guards: dict[str, float] | None = None  # share of the rewrites, by the guard they break


class Measures(Protocol):
    """What the rules read: `Measured`, or an arm of a report, which may lack any of it."""

    @property
    def components(self) -> dict[str, float]: ...
    @property
    def component_errors(self) -> dict[str, float] | None: ...
    @property
    def response_tokens(self) -> float: ...
    @property
    def truncated_responses(self) -> float | None: ...
    @property
    def rewrite_tokens(self) -> float | None: ...
    @property
    def truncated_rewrites(self) -> float | None: ...
    @property
    def copy_rate(self) -> float | None: ...
    @property
    def leaked_answers(self) -> float | None: ...
    @property
    def common_rewrite(self) -> float | None: ...
    @property
    def broken_guards(self) -> dict[str, float] | None: ...


def equal_rewards(cut: float, responses: int) -> Finding:
    """Of a step whose rewards are all equal. cut: responses that ended at max_new_tokens."""
    text = f"All {responses} rewards of a step are equal, so it teaches nothing but the KL"
    if cut > TRUNCATED * responses:
        text += (
            f": {cut:.0f} of {responses} responses were cut at response.max_new_tokens, and what "
            "the reward looks for may not have come by then. Raise it"
        )
    return Finding("equal_rewards", text + ".")


def measure(
    rollout: Rollout,
    components: Mapping[str, Sequence[float]],
    paid: frozenset[str],
    *,
    adds: bool,
    prompting: Prompting,
    count_tokens: Callable[[str], int],
    answers: Sequence[Any] | None = None,
) -> Measured:
    """The measures of a scored rollout.

    Args:
        components, paid: as `rewards.combine.score_rollout` gives them.
        adds: whether the target reads anything but the prompt.
        prompting: how rewrites were asked for; they are judged by the guards' defaults.
        count_tokens: of a rewrite that was given, and so has no tokens of a prompter.
        answers: what the reward looks for, by prompt: text, a list of texts, or None; None where
            the data have none.
    """
    rewrites = [w for group in rollout.rewrites for w in group]
    responses = [r for w in rewrites for r in w.responses]
    prompt_of = [w.prompt_index for w in rewrites for _ in w.responses]
    # NaN: the part abstained.
    scores = {name: _without_nan(values, values) for name, values in components.items()}
    scores = {name: given for name, given in scores.items() if given}
    measured = Measured(
        components={name: math.fsum(given) / len(given) for name, given in scores.items()},
        component_errors={
            name: _error_by_prompt(given, of)
            for name, given in scores.items()
            if name in paid and len(set(of := _without_nan(prompt_of, components[name]))) > 1
        },
        empty_rewrites=sum(not w.text for w in rewrites) if adds else 0,
        response_tokens=sum(r.num_tokens for r in responses) / len(responses),
        truncated_responses=_share(r.finish_reason == "length" for r in responses),
    )
    if not adds:
        return measured
    written = [w for w in rewrites if w.text]
    prompts = [Conversation.of(prompt).text for prompt in rollout.prompts]
    copied = [copied_share(prompts[w.prompt_index], w.text) for w in written]
    given = answers or [None] * len(rollout.prompts)
    distinct, common = diversity(rollout)
    judged = [broken_by(w, rollout.prompts[w.prompt_index], prompting, _GUARDS) for w in rewrites]
    broken = Counter(guard for guard in judged if guard is not None)
    return Measured(
        **{
            **vars(measured),
            "rewrite_tokens": sum(len(w.tokens) or count_tokens(w.text) for w in rewrites)
            / len(rewrites),
            "truncated_rewrites": _share(w.finish_reason == "length" for w in rewrites),
            "copy_rate": sum(copied) / len(copied) if copied else None,
            "leaked_answers": _share(
                holds_answer(
                    w.text,
                    prompts[w.prompt_index],
                    [r.text for r in w.responses],
                    given[w.prompt_index],
                )
                for w in rewrites
            ),
            "distinct_rewrites": distinct,
            "common_rewrite": common,
            "broken_guards": {name: n / len(rewrites) for name, n in sorted(broken.items())},
        }
    )


def diversity(rollout: Rollout) -> tuple[int, float | None]:
    """(how many texts the rewrites are, the share of the most frequent one); the share is None with
    one prompt, where a prompter that goes by the prompt may well write one text."""
    texts = Counter(w.text for group in rollout.rewrites for w in group)
    several = len(set(rollout.prompts)) > 1
    return len(texts), max(texts.values()) / texts.total() if several else None


def copied_share(source: str, text: str) -> float:
    """Share of the text's words that lie in a run of three or more words (or in the whole text,
    where it is shorter) that stands in the source: 1 for a text that repeats it.

    Runs, since single words such as "the" are shared by any two texts. Case is ignored.
    """
    there, written = (_WORD.findall(one.lower()) for one in (source, text))
    run = min(COPIED_RUN, len(written))
    if run == 0:
        return 0.0
    known = {tuple(there[i : i + run]) for i in range(len(there) - run + 1)}
    copied: set[int] = set()
    for i in range(len(written) - run + 1):
        if tuple(written[i : i + run]) in known:
            copied.update(range(i, i + run))
    return len(copied) / len(written)


def holds_answer(rewrite: str, prompt: str, responses: Sequence[str], answer: Any = None) -> bool:
    """Whether the rewrite gives the answer away, which the prompt does not.

    With an ``answer`` (text, or a list of texts of which each will do): whether its words stand in
    the rewrite. Without one: whether a response repeats at least half of the rewrite, or comes from
    it by half, in runs of three words: a target does not repeat an instruction, but what it is told
    to say. An answer of one or two words ("Yes.") is not known by that.
    """
    known = [answer] if isinstance(answer, str) else answer if isinstance(answer, list) else []
    known = [text for text in known if isinstance(text, str) and _WORD.search(text)]
    if known:
        return any(_stands_in(text, rewrite) and not _stands_in(text, prompt) for text in known)
    return not _repeats(rewrite, prompt) and any(
        _repeats(rewrite, response) or _repeats(response, rewrite) for response in responses
    )


def arm_findings(
    now: Measures,
    before: Mapping[str, Measures],
    who: str = "trained prompter",
    since: int | None = None,
) -> Iterator[Finding]:
    """What to doubt in what a prompter writes.

    Args:
        before: what it is measured against, by its name.
        since: the step from which on the training wrote one text.
    """
    yield from _component_falls(now, before, who)
    responses = {name: one.response_tokens for name, one in before.items()}
    rewrites = {name: one.rewrite_tokens for name, one in before.items()}
    yield from _length("responses", now.response_tokens, responses, who)
    yield from _length("rewrites", now.rewrite_tokens, rewrites, who)
    if now.copy_rate is not None and now.copy_rate > COPY_RATE:
        yield Finding(
            "copy_rate",
            f"The {who}'s copy rate is {now.copy_rate:.0%}, above {COPY_RATE:.0%}: its rewrites "
            "repeat the prompt more than they add to it.",
        )
    if now.leaked_answers is not None and now.leaked_answers > LEAKED_ANSWERS:
        yield Finding(
            "leaked_answers",
            f"{now.leaked_answers:.0%} of the {who}'s rewrites hold the answer, above "
            f"{LEAKED_ANSWERS:.0%}: the reward may be earned by the prompter's answer and not by "
            "the target's.",
        )
    broken = now.broken_guards or {}
    if (total := sum(broken.values())) > BROKEN_GUARDS:
        which = ", ".join(f"{name} {value:.0%}" for name, value in broken.items())
        yield Finding(
            "broken_guards",
            f"{total:.0%} of the {who}'s rewrites break a guard ({which}), above "
            f"{BROKEN_GUARDS:.0%}: `alignpro serve` would not use them. Training with guards={{}} "
            "makes them cost reward.",
        )
    if now.common_rewrite is not None and now.common_rewrite > ONE_REWRITE:
        yield one_rewrite(now.common_rewrite, f"the {who}'s rewrites", since)
    cut = now.truncated_responses
    if cut is not None and cut > TRUNCATED:
        others = {name: one.truncated_responses for name, one in before.items()}
        known = [f"{name} {value:.0%}" for name, value in others.items() if value is not None]
        yield Finding(
            "truncated_responses",
            f"{cut:.0%} of the responses to the {who} are cut at max_new_tokens, above "
            f"{TRUNCATED:.0%}{' (' + ', '.join(known) + ')' if known else ''}: the reward judges "
            "answers that end in the middle. Raise response.max_new_tokens.",
        )
    if now.truncated_rewrites is not None:
        yield from truncated_rewrites(now.truncated_rewrites, f"the {who}'s rewrites")


def one_rewrite(common: float, whose: str, since: int | None = None) -> Finding:
    """One text for every prompt. since: the step from which on it has been so."""
    begun = "" if since is None else f" from step {since} on"
    return Finding(
        "one_rewrite",
        f"{common:.0%} of {whose} are one text{begun}, above {ONE_REWRITE:.0%}, whatever the "
        "prompt: a fixed instruction does the same without a prompter. If the best instruction "
        "depends on the prompt, a lower learning_rate or a larger kl_coef keeps the others alive.",
    )


def slow_rows(tuner: Any, learning_rate: Any) -> Iterator[Finding]:
    """Of a configuration: a learning rate for matrices, where rows are trained."""
    if tuner == "soft_prompt" and learning_rate < SLOW_ROWS:
        yield Finding(
            "slow_rows",
            f"learning_rate {learning_rate:g} is below {SLOW_ROWS:g}: the rows of a soft prompt "
            "hardly move by it; 1e-2 to 3e-2 suits them.",
        )


def reasoning_alone(count: int) -> Finding:
    """Rewrites of one step that are a block of reasoning and nothing else."""
    return Finding(
        "reasoning_alone",
        f"{count} of the rewrites of this step are reasoning alone, cut before it ended, and count "
        "as empty: the target read the prompt as it is. Raise rewrite.max_new_tokens, or turn the "
        "reasoning off (prompter.chat_template_kwargs).",
    )


def truncated_rewrites(cut: float, whose: str) -> Iterator[Finding]:
    if cut > TRUNCATED:
        yield Finding(
            "truncated_rewrites",
            f"{cut:.0%} of {whose} are cut at max_new_tokens, above {TRUNCATED:.0%}: they end in "
            "the middle. Raise rewrite.max_new_tokens.",
        )


def _component_falls(now: Measures, before: Mapping[str, Measures], who: str) -> Iterator[Finding]:
    for name, error in (now.component_errors or {}).items():
        falls = []
        for other, one in before.items():
            if name not in one.components:
                continue
            noise = math.hypot(error, (one.component_errors or {}).get(name, 0.0))
            fall = one.components[name] - now.components[name]
            if fall > COMPONENT_FALLS * noise and fall > 0:
                falls.append(f"{one.components[name]:.3f} with the {other}")
        if falls:
            yield Finding(
                "component_falls",
                f"The reward's {name} falls to {now.components[name]:.3f} with the {who}, from "
                f"{' and '.join(falls)}, by more than {COMPONENT_FALLS:g} standard errors.",
            )


def _length(
    what: str, length: float | None, others: Mapping[str, float | None], who: str
) -> Iterator[Finding]:
    drifts = []
    for other, base in others.items():
        drift = length / base - 1 if length and base else 0.0
        if abs(drift) > LENGTH_DRIFT:
            way = "longer" if drift > 0 else "shorter"
            drifts.append(f"{abs(drift):.0%} {way} than those of the {other}")
    if drifts:
        yield Finding(
            f"{what}_length",
            f"The {who}'s {what} are {' and '.join(drifts)}, past {LENGTH_DRIFT:.0%}: part of the "
            "reward may be a reward for length.",
        )


def _repeats(text: str, source: str) -> bool:
    return len(_WORD.findall(text)) >= COPIED_RUN and copied_share(source, text) >= 0.5


def _stands_in(phrase: str, text: str) -> bool:
    words, there = (" ".join(_WORD.findall(one.lower())) for one in (phrase, text))
    return f" {words} " in f" {there} "


def _without_nan(values: Sequence[_Value], scores: Sequence[float]) -> list[_Value]:
    """Those whose score is a number."""
    return [value for value, score in zip(values, scores, strict=True) if not math.isnan(score)]


def _error_by_prompt(values: Sequence[float], prompt_of: Sequence[int]) -> float:
    """Standard error of the mean of ``values`` [responses], whose unit is the prompt."""
    by_prompt: dict[int, list[float]] = {}
    for prompt, value in zip(prompt_of, values, strict=True):
        by_prompt.setdefault(prompt, []).append(value)
    means = [sum(group) / len(group) for group in by_prompt.values()]
    return math.sqrt(variance(means) / len(means))


def _share(flags: Iterator[bool]) -> float:
    listed = list(flags)
    return sum(listed) / len(listed)
