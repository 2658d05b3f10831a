"""The search for a fixed instruction: budget, halving, common draws, and no look at what is held
out."""

from __future__ import annotations

import hashlib
import json

import pytest

from alignpro.config import EvalConfig, Prompting, StaticSearch
from alignpro.data.load import PromptRow
from alignpro.evaluate.results import to_json
from alignpro.evaluate.static import SearchData, load_search, search_static
from alignpro.pipeline import Pipeline
from fake_model import WORDS, FakeModel

TRAIN = [PromptRow(f"question {i}", {"level": i}) for i in range(10)]
BOTH = ("untuned", "trained")
PROMPTING = Prompting(template="Advise: {prompt}", separator=" ")


class Scorer:
    """An instruction's number, plus noise of a known size; keeps what it saw."""

    def __init__(self, noise=0.0):
        self.noise = noise
        self.prompts = set()

    def __call__(self, prompts, rewrites, responses, **columns):
        self.prompts |= set(prompts)
        if columns:
            assert [f"question {v}" for v in columns["level"]] == list(prompts)
        rows = zip(prompts, rewrites, responses, strict=True)
        return [self.value(w) + self.noise * self.luck(*row) for row in rows for w in row[1:2]]

    def value(self, rewrite):
        return float(rewrite.split()[-1]) if rewrite.split()[-1:][0].isdigit() else -1.0

    def luck(self, *row):
        return hashlib.sha256(repr(row).encode()).digest()[0] / 127.5 - 1


def make(reward, mode="append"):
    prompting = Prompting(mode=mode, template="Advise: {prompt}", separator=" ")
    return Pipeline(FakeModel("p"), FakeModel("t"), reward, prompting=prompting)


def rounds(count, budget, rows=TRAIN):
    data = SearchData(rows, [f"style {i}" for i in range(count)])
    search = StaticSearch(num_written=0, budget=budget)
    found = search_static(make(Scorer()), search, data, {}, seed=0).search
    return [(r.candidates, r.prompts, r.responses) for r in found.rounds], found.responses


def test_a_budget_by_hand():
    # 9 candidates, 4 halvings: a quarter of 200 is 5 responses of each; a third of the 155 left is
    # 10 of each of 5; half of the 105 left is 17 of each of 3, on 10 prompts and then 7 of them
    # again; and the 54 left are 27 of each of 2.
    assert rounds(9, 200) == ([(9, 5, 5), (5, 10, 10), (3, 10, 17), (2, 10, 27)], 200)
    assert rounds(1, 200) == ([], 0)
    for candidates, prompts, budget in ((100, 7, 1000), (2, 1, 2), (65, 10, 2048)):
        done, responses = rounds(candidates, budget, TRAIN[:prompts])
        assert budget - 2 < responses <= budget
        shown = [each for _, _, each in done]
        assert shown == sorted(shown)


def test_a_budget_of_the_targets_tokens():
    pipeline = make(Scorer(noise=3.0))
    data = SearchData(TRAIN, [f"style {i}" for i in range(20)])
    search = StaticSearch(num_written=0, budget_tokens=20_000)
    seen = []
    found = search_static(
        pipeline, search, data, {}, seed=1, on_progress=lambda *row: seen.append(row)
    )
    assert found.text == "style 19" and found.search.budget == 20_000
    written = sum(len(h.completion().tokens) for h in pipeline.target.handles)
    assert found.search.tokens == written
    assert 0.95 * 20_000 < written < 1.02 * 20_000
    assert seen[-1] == ("static search", 20_000, 20_000)
    assert all(0 < done <= 20_000 for _, done, _ in seen)
    # One response to each is drawn however little there is.
    little = StaticSearch(num_written=0, budget_tokens=1)
    least = search_static(make(Scorer()), little, SearchData(TRAIN, ["a 1", "b 2"]), {}, seed=0)
    assert least.search.responses == 2 and least.text == "b 2"


class Words(Scorer):
    """Pays for each of two words: no single instruction has both."""

    def value(self, rewrite):
        return float("brief" in rewrite) + float("kind" in rewrite) - 0.001 * len(rewrite)


def test_the_best_instructions_are_joined():
    data = SearchData(TRAIN, ["Be brief.", "Shout.", "Be kind.", "Ask back.", "Be odd and long."])
    search = StaticSearch(num_written=0, budget=600, joined=2)
    found = search_static(make(Words(noise=0.3)), search, data, {}, seed=0)
    assert found.text in ("Be brief. Be kind.", "Be kind. Be brief.")
    assert found.search.source == "joined" and found.search.candidates == 5
    assert [r.candidates for r in found.search.rounds] == [5, 3, 2, 4, 2]
    assert found.search.responses <= 600
    alone = StaticSearch(num_written=0, budget=600)
    assert search_static(make(Words()), alone, data, {}, seed=0).text == "Be kind."


def test_the_best_instruction_is_found_through_noise():
    scorer = Scorer(noise=3.0)
    pipeline = make(scorer)
    data = SearchData(TRAIN, [f"style {i}" for i in range(20)])
    search = StaticSearch(num_written=0, budget=4000)
    seen = []
    found = search_static(
        pipeline, search, data, {}, seed=1, on_progress=lambda *row: seen.append(row)
    )
    assert found.text == "style 19"
    history = to_json(found.search)
    assert [r["candidates"] for r in history["rounds"]] == [20, 10, 5, 3, 2]
    assert history["responses"] <= 4000 and seen[-1][1:] == (4000, 4000)
    assert len(pipeline.target.handles) == history["responses"]
    last = history["rounds"][-1]["best"]
    assert [entry["instruction"] for entry in last] == ["style 19", "style 18"]
    # Rewards of earlier rounds are kept.
    assert last[0]["responses"] == sum(r["responses"] for r in history["rounds"])
    assert last[0]["mean_reward"] == pytest.approx(19.0, abs=1.0)
    assert scorer.prompts == {row.prompt for row in TRAIN}
    again = search_static(make(Scorer(noise=3.0)), search, data, {}, seed=1)
    assert again == found


def test_candidates_of_a_round_share_prompts_and_draws():
    pipeline = make(Scorer())
    data = SearchData(TRAIN, ["a 1", "b 2", "c 3"])
    search_static(pipeline, StaticSearch(num_written=0, budget=24), data, {}, seed=0)
    first = pipeline.target.handles[:12]  # 4 prompts by 3 candidates
    keys = [(h.params.seed, h.sample) for h in first]
    assert len(set(keys)) == 4 and all(keys.count(key) == 3 for key in keys)
    texts = [bytes(t - 3 for t in h.prompt_tokens[1:-1]).decode() for h in first]
    assert texts[:3] == ["question 0 a 1", "question 0 b 2", "question 0 c 3"]
    # The next round goes on where this one stopped: 6 prompts by the better two.
    later = [bytes(t - 3 for t in h.prompt_tokens[1:-1]).decode() for h in pipeline.target.handles]
    assert later[12:14] == ["question 4 c 3", "question 4 b 2"] and len(later) == 24


def test_what_the_prompters_write_is_among_the_candidates():
    def longest(prompts, rewrites, responses, **columns):
        return [float(len(w) or 99) for w in rewrites]  # an empty one would win, were it there

    pipeline = make(longest)
    data = SearchData(TRAIN, ["Hm.", "with care"])
    prompters = {"untuned": None, "trained": "other"}
    search = StaticSearch(num_written=10, budget=500)
    found = search_static(pipeline, search, data, prompters, seed=0)
    # Empty rewrites are no candidates, equal ones are one; "as a list" is as long, but comes later.
    written = {word.strip() for word in WORDS} - {""}
    history = to_json(found.search)
    entered = history["rounds"][0]
    assert entered["candidates"] == history["candidates"]
    best = {entry["instruction"] for entry in entered["best"]}
    assert best <= written | {"Hm."} and "" not in best
    assert 4 < history["candidates"] <= len(written | {"Hm."})
    assert (found.text, history["source"]) == ("with care", "given")
    assert {h.adapter for h in pipeline.prompter.handles} == {None, "other"}
    read = {bytes(t - 3 for t in h.prompt_tokens[1:-1]).decode() for h in pipeline.prompter.handles}
    assert read == {f"Advise: {row.prompt}" for row in TRAIN}


def test_what_the_training_found_can_be_kept_out():
    pipeline = make(Scorer())
    prompters = {"untuned": None, "trained": "other"}
    search = StaticSearch(num_written=10, budget=500, writers=("untuned",))
    search_static(pipeline, search, SearchData(TRAIN, ["Hm."]), prompters, seed=0)
    assert {h.adapter for h in pipeline.prompter.handles} == {None}


def test_in_rewrite_mode_instructions_are_appended_and_prompters_not_asked():
    pipeline = make(Scorer(), mode="rewrite")
    data = SearchData(TRAIN, ["a 1", "b 2"])
    found = search_static(
        pipeline, StaticSearch(num_written=5, budget=20), data, {"untuned": None}, seed=0
    )
    assert found.text == "b 2" and pipeline.prompter.handles == []
    tokens = pipeline.target.handles[0].prompt_tokens
    assert bytes(t - 3 for t in tokens[1:-1]).decode() == "question 0 a 1"
    assert pipeline.prompting.mode == "rewrite"  # the caller's own is left alone


def test_one_candidate_needs_no_search():
    pipeline = make(Scorer())
    found = search_static(
        pipeline, StaticSearch(num_written=0), SearchData(TRAIN, ["only 1"]), {}, seed=0
    )
    assert found.text == "only 1" and found.search.rounds == []
    assert pipeline.target.handles == []


def test_no_prompt_that_is_held_out_is_searched_on():
    config = EvalConfig()
    held_out = [PromptRow("How do I remove limescale from a kettle?")]
    with pytest.raises(ValueError, match=r"static: 1 of the 96 prompts .* held out as well"):
        load_search(StaticSearch(), config, held_out, BOTH)
    data = load_search(StaticSearch(), config, [PromptRow("another")], BOTH)
    assert len(data.rows) == 96 and len(data.instructions) == 52


def test_a_file_that_is_sorted_by_kind_is_shuffled(tmp_path):
    path = tmp_path / "sorted.jsonl"
    rows = [{"prompt": f"q{i}", "kind": i // 20, "split": "train"} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    search = StaticSearch(data=str(path))
    found = load_search(search, EvalConfig(seed=3), [PromptRow("x")], BOTH).rows
    assert len({row.columns["kind"] for row in found[:10]}) >= 4
    assert sorted(row.prompt for row in found) == sorted(row["prompt"] for row in rows)
    assert found == load_search(search, EvalConfig(seed=3), [PromptRow("x")], BOTH).rows
    assert found != load_search(search, EvalConfig(seed=4), [PromptRow("x")], BOTH).rows


def test_instructions_from_a_file_and_a_list(tmp_path):
    path = tmp_path / "mine.jsonl"
    texts = (" Be brief. ", "", "Be kind.", "Be brief.")  # "": a pair that leaves the prompt alone
    path.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in texts))
    search = StaticSearch(instructions=str(path), candidates=("Be kind.", "Be bold."))
    data = load_search(search, EvalConfig(), [PromptRow("x")], ("untuned",))
    assert data.instructions == ["Be kind.", "Be bold.", "Be brief."]


def test_bad_searches():
    config, held_out = EvalConfig(), [PromptRow("x")]
    with pytest.raises(ValueError, match=r"static.budget: expected at least 812 .*116.*7 rounds"):
        load_search(StaticSearch(budget=811), config, held_out, BOTH)
    load_search(StaticSearch(budget=812), config, held_out, BOTH)
    # Half of it goes to the four best and their pairs.
    with pytest.raises(ValueError, match=r"static.budget: expected at least 1624"):
        load_search(StaticSearch(budget=1623, joined=4), config, held_out, BOTH)
    load_search(StaticSearch(budget_tokens=1), config, held_out, BOTH)
    with pytest.raises(ValueError, match=r"budget: expected its default 2048 .*without budget_tok"):
        StaticSearch(budget=1, budget_tokens=1)
    rewriting = EvalConfig(prompting=Prompting(mode="rewrite"))
    with pytest.raises(ValueError, match="a prompter writes no instructions"):
        load_search(StaticSearch(instructions=None), rewriting, held_out, BOTH)
    with pytest.raises(ValueError, match="num_written: expected at least 0"):
        StaticSearch(num_written=-1)
    with pytest.raises(ValueError, match="candidates: expected at least one"):
        StaticSearch(instructions=None, num_written=0)
    with pytest.raises(ValueError, match="none of them empty"):
        StaticSearch(candidates=("ok", " "))
    mute = Pipeline(FakeModel("p"), FakeModel("t"), Scorer(), prompting=PROMPTING)
    mute.rewrite = None
    with pytest.raises(ValueError, match="nothing but empty rewrites"):
        search_static(
            mute, StaticSearch(num_written=0), SearchData(TRAIN, []), {"untuned": None}, seed=0
        )
