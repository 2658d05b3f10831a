"""The two-model loop over a fake LanguageModel: routing, keys, order, failures."""

from __future__ import annotations

import math

import pytest

from alignpro.config import Prompting
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.seeds import _splitmix64, derive_seed
from alignpro.pipeline import Pipeline
from alignpro.rewards.check import RewardError
from alignpro.types import SamplingParams
from fake_model import EOS, FakeModel

PROMPTS = ["How do I boil an egg?", "Why is the sky blue?", "Name a river."]
TEMPLATE = "Advise: {prompt}"


class LengthReward:
    """Records its calls; the score is a row number, so that misplaced scores show."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, rewrites, responses, **columns):
        self.calls.append((list(prompts), list(rewrites), list(responses), columns))
        return [float(i) for i in range(len(prompts))]


def make(prompter=None, target=None, reward=None, mode="append", **options):
    prompter = prompter or FakeModel("prompter")
    return Pipeline(
        prompter,
        target or FakeModel("target"),
        reward,
        prompting=Prompting(mode=mode, template=TEMPLATE, separator=" // "),
        **options,
    )


def flat(rollout):
    return [w for group in rollout.rewrites for w in group]


def test_shapes_order_and_what_each_model_read():
    pipeline = make(reward=LengthReward())
    rollout = pipeline.rollout(PROMPTS, num_rewrites=4, num_responses=3, seed=5)
    assert rollout.prompts == PROMPTS
    assert [len(group) for group in rollout.rewrites] == [4, 4, 4]
    tokenizer = pipeline.target.tokenizer
    for index, group in enumerate(rollout.rewrites):
        for rewrite in group:
            assert rewrite.prompt_index == index
            turn = TEMPLATE.replace("{prompt}", PROMPTS[index])
            assert rewrite.prompter_tokens == [0, *tokenizer.encode(turn), 1]
            expected = PROMPTS[index] + (f" // {rewrite.text}" if rewrite.text else "")
            assert rewrite.target_prompt == expected
            assert rewrite.target_tokens == [0, *tokenizer.encode(expected), 1]
            assert rewrite.text == rewrite.text.strip()
            assert len(rewrite.responses) == 3
    # Rows reach the reward in order of prompt, rewrite, response, and scores come back to them.
    rewards = [r.reward for w in flat(rollout) for r in w.responses]
    assert rewards == [float(i) for i in range(36)]
    assert rollout.rewrites[0][1].reward == pytest.approx((3 + 4 + 5) / 3)


def test_the_reward_sees_the_original_prompt_once_and_its_columns():
    reward = LengthReward()
    pipeline = make(reward=reward)
    rollout = pipeline.rollout(
        PROMPTS, num_rewrites=2, num_responses=2, seed=1, columns={"answer": ["a", "b", "c"]}
    )
    ((prompts, rewrites, responses, columns),) = reward.calls
    assert prompts == [p for p in PROMPTS for _ in range(4)]
    assert rewrites == [w.text for w in flat(rollout) for _ in range(2)]
    assert responses == [r.text for w in flat(rollout) for r in w.responses]
    assert columns == {"answer": [c for c in "abc" for _ in range(4)]}


def test_tokens_are_kept_as_written():
    # The text crosses stripped; the tokens, EOS included, are those that were sampled.
    pipeline = make()
    rewrites = [w for group in pipeline.rewrite(PROMPTS, num_rewrites=20, seed=3) for w in group]
    padded = [w for w in rewrites if w.text == "slowly"]
    assert padded
    for rewrite in padded:
        assert rewrite.tokens == [*pipeline.prompter.tokenizer.encode("  slowly "), EOS]
        assert len(rewrite.logprobs) == len(rewrite.tokens)
        assert rewrite.finish_reason == "stop"


def test_truncated_rewrites_have_no_eos():
    pipeline = make(rewrite_params=SamplingParams(max_new_tokens=3))
    rewrites = [w for group in pipeline.rewrite(PROMPTS, num_rewrites=8, seed=3) for w in group]
    cut = [w for w in rewrites if w.finish_reason == "length"]
    assert cut
    assert all(len(w.tokens) == 3 and EOS not in w.tokens for w in cut)


@pytest.mark.parametrize("mode", ["append", "rewrite"])
def test_an_empty_rewrite_leaves_the_prompt(mode):
    pipeline = make(mode=mode)
    rewrites = [w for group in pipeline.rewrite(PROMPTS, num_rewrites=40, seed=3) for w in group]
    empty = [w for w in rewrites if not w.text]
    assert empty
    assert all(w.target_prompt == PROMPTS[w.prompt_index] and w.tokens == [EOS] for w in empty)
    written = [w for w in rewrites if w.text]
    if mode == "rewrite":
        assert all(w.target_prompt == w.text for w in written)


def test_draws_do_not_depend_on_the_batch():
    together = make().rollout(PROMPTS, num_rewrites=4, num_responses=2, seed=9)
    slow = make(FakeModel("p", rows=1), FakeModel("t", rows=2))
    apart = slow.rollout(PROMPTS[:1], num_rewrites=2, num_responses=1, seed=9)
    for mine, theirs in zip(apart.rewrites[0], together.rewrites[0][:2], strict=True):
        assert (mine.tokens, mine.target_tokens) == (theirs.tokens, theirs.target_tokens)
        assert mine.responses[0].tokens == theirs.responses[0].tokens


def test_every_request_has_a_key_of_its_own():
    pipeline = make()
    pipeline.rollout(PROMPTS, num_rewrites=4, num_responses=3, seed=9)
    keys = [
        (m.name, h.params.seed, h.sample)
        for m in (pipeline.prompter, pipeline.target)
        for h in m.handles
    ]
    assert len(set(keys)) == len(keys) == 12 + 36
    seeds = {seed for name, seed, _ in keys if name == "prompter"}
    assert seeds.isdisjoint(seed for name, seed, _ in keys if name == "target")


def test_common_draws_answer_a_text_once():
    reward = LengthReward()
    pipeline = make(reward=reward)
    rollout = pipeline.rollout(PROMPTS, num_rewrites=8, num_responses=3, seed=9, common_draws=True)
    texts = {(w.prompt_index, w.text) for w in flat(rollout)}
    assert len(texts) < 24  # some of eight are the same
    assert len(pipeline.target.handles) == 3 * len(texts) == len(reward.calls[0][0])
    for w in flat(rollout):  # each draws what rewrite 0 of its prompt would
        assert len(w.responses) == 3
        alone = make(reward=LengthReward()).answer(
            [w.target_prompt], [[""]], num_responses=3, seed=9
        )
        if w.prompt_index == 0:
            assert [r.tokens for r in w.responses] == [
                r.tokens for r in alone.rewrites[0][0].responses
            ]
    for a in flat(rollout):
        for b in flat(rollout):
            if (a.prompt_index, a.text) == (b.prompt_index, b.text):
                assert a.responses == b.responses
    written = make().rollout(PROMPTS, num_rewrites=8, num_responses=3, seed=9)
    assert [w.tokens for w in flat(rollout)] == [w.tokens for w in flat(written)]
    tokens = sum(len(w.tokens) for w in flat(rollout)) + sum(
        len(h.completion().tokens) for h in pipeline.target.handles
    )
    assert rollout.generated_tokens == tokens


def test_seeds_are_pinned_and_fresh_without_one():
    assert _splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's first output from state 0
    assert derive_seed(0, 1) == 0x5E41AB087439611E
    assert derive_seed(1, 2, 3) != derive_seed(1, 3, 2)
    assert all(0 <= derive_seed(2**64 - 1, i) < 2**64 for i in range(100))
    pipeline = make()
    pipeline.rewrite(PROMPTS[:1])
    pipeline.rewrite(PROMPTS[:1])
    first, second = pipeline.prompter.handles
    assert first.params.seed != second.params.seed


def test_responses_start_before_the_last_rewrite_is_written():
    pipeline = make(FakeModel("prompter", rows=1))
    pipeline.rollout(PROMPTS, num_rewrites=3, num_responses=1, seed=2)
    # With one row at a time the prompter takes many steps; a barrier would submit all at once.
    assert len({h.submitted_at for h in pipeline.target.handles}) > 1
    assert pipeline.target.handles[0].submitted_at < pipeline.target.steps - 3


def test_neither_model_waits_for_a_slower_one():
    prompter, target = FakeModel(), FakeModel(questions=4)  # five steps to one of the target's
    rollout = Pipeline(prompter, target, None).rollout(
        ["one", "two", "three"], num_rewrites=8, seed=2
    )
    first, last = (pick(h.submitted_at for h in target.handles) for pick in (min, max))
    assert prompter.steps == 7  # what its longest rewrite takes
    assert first == 0 and last <= 1
    alone = Pipeline(FakeModel(), FakeModel(), None)
    assert (
        rollout.rewrites == alone.rollout(["one", "two", "three"], num_rewrites=8, seed=2).rewrites
    )


def test_one_model_for_both_is_stepped_once_a_round():
    shared = FakeModel("both")
    rollout = make(shared, shared, prompter_adapter="adapter").rollout(
        PROMPTS, num_rewrites=2, num_responses=2, seed=4
    )
    assert len(flat(rollout)) == 6
    assert [h.adapter for h in shared.handles[:6]] == ["adapter"] * 6
    assert {h.adapter for h in shared.handles[6:]} == {None}  # the target runs on base weights
    assert shared.steps <= 14  # at most 7 steps a request, rewrite then response


def test_with_adapter_changes_the_prompter_alone():
    pipeline = make(prompter_adapter="old")
    pipeline.with_adapter("new").rewrite(PROMPTS, seed=1)
    assert {h.adapter for h in pipeline.prompter.handles} == {"new"}
    assert pipeline.prompter_adapter == "old"
    with pytest.raises(AttributeError):  # it would not be prepared
        pipeline.prompter_adapter = "new"


def test_respond_is_the_raw_arm_under_the_same_keys():
    reward = LengthReward()
    pipeline = make(reward=reward)
    raw = pipeline.respond(PROMPTS, num_responses=3, seed=8)
    assert [[len(w.responses) for w in group] for group in raw.rewrites] == [[3], [3], [3]]
    assert [w.target_prompt for w in flat(raw)] == PROMPTS
    assert reward.calls[0][0] == [p for p in PROMPTS for _ in range(3)]
    pipeline.rollout(PROMPTS, num_rewrites=1, num_responses=3, seed=8)
    handles = pipeline.target.handles
    first = {(h.params.seed, h.sample) for h in handles[:9]}
    second = {(h.params.seed, h.sample) for h in handles[9:]}
    assert first == second


def test_without_a_reward_scores_are_nan():
    rollout = make().rollout(PROMPTS[:1], seed=0)
    assert math.isnan(rollout.rewrites[0][0].responses[0].reward)


def test_counts_of_tokens_and_progress():
    seen = []
    pipeline = make()
    rollout = pipeline.rollout(
        PROMPTS, num_rewrites=2, num_responses=2, seed=4, on_progress=seen.append
    )
    assert seen == sorted(seen) and seen[-1] == 6 + 12
    written = sum(len(w.tokens) + sum(len(r.tokens) for r in w.responses) for w in flat(rollout))
    assert rollout.generated_tokens == written


@pytest.mark.parametrize(
    ("prompts", "line"),
    [
        (["fine", ""], "prompt 1: expected text or a chat, got an empty string"),
        (["fine", " \n"], "prompt 1: expected text or a chat, got an empty string"),
        (["fine", 3], "prompt 1: expected text or a chat, got int"),
        (
            ["fine", "x" * 500],
            "prompt 1 in its template: more than 400 tokens and 12 new ones exceed",
        ),
    ],
)
def test_bad_prompts_are_named_before_anything_is_submitted(prompts, line):
    pipeline = make(FakeModel("prompter", context_length=200))
    with pytest.raises(ValueError, match="prompt 1") as caught:
        pipeline.rollout(prompts, seed=0)
    assert line in str(caught.value)
    assert pipeline.prompter.handles == []


def over_context(max_failed):
    """Prompt 1 leaves room for an empty rewrite alone."""
    pipeline = make(
        target=FakeModel("target", context_length=150),
        response_params=SamplingParams(max_new_tokens=48),
        max_failed=max_failed,
    )
    return pipeline, ["short", "x" * 100]


def test_rewrites_over_the_targets_context_are_named_and_cancel_the_rest_where_too_many():
    pipeline, prompts = over_context(max_failed=0.1)
    with pytest.raises(FailedRowsError, match=r"rewrite . of prompt 1") as caught:
        pipeline.rollout(prompts, num_rewrites=8, seed=0)
    assert "48 new ones exceed the context of target (150 tokens)" in str(caught.value)
    assert "2 of 16 responses failed, more than target.max_failed (0.1) allows" in str(caught.value)
    assert pipeline.prompter.under_way() == [] and pipeline.target.under_way() == []


def test_a_rewrite_over_the_targets_context_is_left_out_and_counted():
    pipeline, prompts = over_context(max_failed=0.6)
    rollout = pipeline.rollout(prompts, num_rewrites=8, num_responses=2, seed=0)
    short, long = rollout.rewrites
    assert [len(w.responses) for w in short] == [2] * 8
    assert {(len(w.responses), bool(w.text)) for w in long} == {(2, False), (0, True)}
    unanswered = sum(not w.responses for w in long)
    assert len(rollout.failed) == 2 * unanswered
    assert all(math.isnan(w.reward) for w in long if w.text)


def test_of_given_rewrites_those_that_do_not_fit_are_left_out():
    pipeline, prompts = over_context(max_failed=0.6)
    rollout = pipeline.answer(prompts, [["", "a long one"]] * 2, seed=0)
    assert [[len(w.responses) for w in group] for group in rollout.rewrites] == [[1, 1], [1, 0]]
    assert len(rollout.failed) == 1 and "rewrite 1 of prompt 1: 1" in rollout.failed[0]


def test_a_prompt_over_the_targets_context_is_no_row_of_chance():
    pipeline, _ = over_context(max_failed=0.6)
    with pytest.raises(ValueError, match=r"prompt 0: 2.. tokens and 48 new ones exceed"):
        pipeline.respond(["x" * 200, "short"], seed=0)


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failure_cancels_what_is_under_way(failure):
    target = FakeModel("target", fail_at_step=2, failure=failure)
    pipeline = make(target=target)
    with pytest.raises(type(failure)):
        pipeline.rollout(PROMPTS, num_rewrites=6, num_responses=2, seed=1)
    left = [h for m in (pipeline.prompter, target) for h in m.handles if not h.cancelled]
    assert all(h.finished for h in left)
    assert pipeline.prompter.under_way() == [] and target.under_way() == []


@pytest.mark.parametrize(
    ("model", "number", "what"),
    [("prompter", 3, "rewrite 1 of prompt 1"), ("target", 0, "response [01] to rewrite . of prom")],
)
def test_a_request_that_fails_is_named_and_cancels_the_rest(model, number, what):
    pipeline = make()
    failing = getattr(pipeline, model)
    failing.fails = {number: ArithmeticError("no finite softmax")}
    with pytest.raises(ArithmeticError, match=what + ".*: no finite softmax"):
        pipeline.rollout(PROMPTS, num_rewrites=2, num_responses=2, seed=1)
    assert pipeline.prompter.under_way() == [] and pipeline.target.under_way() == []


class CountedModel(FakeModel):
    """Hands out handles that count what they are asked."""

    def __init__(self, **options):
        super().__init__(**options)
        self.counted, self.looks = {}, 0

    def submit(self, *arguments, **options):
        handle = super().submit(*arguments, **options)
        model = self

        class Counted:
            def __getattr__(self, name):
                model.looks += 1
                return getattr(handle, name)

        return self.counted.setdefault(handle, Counted())

    def step(self):
        return [self.counted[handle] for handle in super().step()]


@pytest.mark.parametrize("count", [10, 100])
def test_a_rollout_asks_each_request_once(count):
    """Work of the loop beside the steps is linear in the requests, however many steps they take."""
    prompter, target = CountedModel(rows=3), CountedModel(rows=3)
    make(prompter, target).rollout([f"prompt {i}" for i in range(count)], num_rewrites=2, seed=1)
    assert prompter.steps > count
    assert prompter.looks == target.looks == 2 * count


def test_a_failing_reward_is_an_error_never_a_zero():
    def reward(prompts, rewrites, responses, **columns):
        return [float("nan")] * len(prompts)

    with pytest.raises(RewardError, match="row 0"):
        make(reward=reward).rollout(PROMPTS, seed=0)


def test_a_model_that_loses_a_request_does_not_hang_the_loop():
    model = FakeModel("lossy")
    model.step = lambda: model.handles.clear() or []
    with pytest.raises(RuntimeError, match="neither finished nor in flight in lossy"):
        make(model).rewrite(PROMPTS, seed=0)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"num_rewrites": 0}, "num_rewrites: expected at least 1, got 0"),
        ({"num_responses": 0}, "num_responses: expected at least 1, got 0"),
        ({"columns": {"a": [1]}}, "column a: expected 3 values, got 1"),
    ],
)
def test_bad_arguments(arguments, line):
    with pytest.raises(ValueError) as caught:
        make().rollout(PROMPTS, seed=0, **arguments)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("params", "line"),
    [
        (SamplingParams(seed=3), r"^response\.seed: expected unset"),
        (SamplingParams(temperature=-1.0), r"^response\.temperature: expected .* got -1"),
        (SamplingParams(min_new_tokens=65), r"^response\.min_new_tokens: expected .* got 65"),
    ],
)
def test_sampling_parameters_are_checked(params, line):
    with pytest.raises(ValueError, match=line):
        make(response_params=params)


def test_no_prompts_is_an_empty_rollout():
    assert make(reward=LengthReward()).rollout([], seed=0).rewrites == []
