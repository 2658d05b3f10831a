"""Draws until one verifies, over a model that writes what it is told."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from alignpro.config import Prompting
from alignpro.extract.draw import Extraction
from alignpro.extract.schema import SchemaError
from alignpro.models.in_flight import FailedRowsError
from alignpro.models.language_model import RequestError
from alignpro.pipeline import Pipeline
from alignpro.types import SamplingParams
from fake_model import FakeModel

SCHEMA = {"fields": {"who": "text", "n": "integer"}, "checks": ["in_text(n)"]}
TEXTS = ["Ana has 3 cats.", "Ben has 4 dogs.", "Cleo has 5 birds."]
LONG = SamplingParams(max_new_tokens=64)
ANSWERS = {  # by text: what each draw writes
    "Ana": ['{"who": "Ana", "n": 3}'] * 4,
    "Ben": ["no", '{"who": "Ben", "n": 5}', '{"who": "Ben", "n": 4}'],
    "Cleo": ['{"who": "Cleo", "n": 9, "x": 1}', '{"who": "Cleo", "n": 9}', "{}", "no"],
}


@dataclass(eq=False)
class Told(FakeModel):
    """Writes the answers of the text that it reads, in order of the draws."""

    made: dict = field(default_factory=dict)

    def submit(self, tokens, params, *, adapter=None, sample=0):
        handle = super().submit(tokens, params, adapter=adapter, sample=sample)
        text = self.tokenizer.decode(tokens)
        name = next(n for n in ANSWERS if n in text)
        turn = self.made[name] = self.made.get(name, 0) + 1
        handle.text = ANSWERS[name][min(turn, len(ANSWERS[name])) - 1]
        return handle


class Silent(Told):
    """Never answers of Ana."""

    def submit(self, tokens, params, *, adapter=None, sample=0):
        handle = super().submit(tokens, params, adapter=adapter, sample=sample)
        if handle.text in ANSWERS["Ana"]:
            self.fails[handle.number] = RequestError("busy")
        return handle


def extract(model=None, **options):
    target = model or Told("target")
    pipeline = Pipeline(None, target, None, response_params=LONG, **options.pop("pipeline", {}))
    return target, pipeline.extract(TEXTS, SCHEMA, seed=1, **options)


def test_the_first_draw_that_verifies_wins_or_else_the_best():
    target, found = extract(attempts=4)
    ana, ben, cleo = found
    assert ana.verified and ana.attempts == 1 and ana.record == {"who": "Ana", "n": 3}
    assert ben.verified and ben.attempts == 3 and ben.record == {"who": "Ben", "n": 4}
    assert not cleo.verified and cleo.attempts == 4
    assert cleo.record == {"who": "Cleo", "n": 9}  # one violation, where the first draw had two
    assert [v.to_plain() for v in cleo.violations] == [
        {"field": "n", "check": "in_text(n)", "found": 9.0, "expected": "in_text(n)"}
    ]
    assert target.made == {"Ana": 1, "Ben": 3, "Cleo": 4}
    json.dumps([one.to_plain() for one in found], allow_nan=False)


def test_one_attempt_takes_what_came():
    _, found = extract(attempts=1)
    assert [one.verified for one in found] == [True, False, False]
    assert found[1].record is None and found[1].violations[0].check == "parse"


def test_the_target_reads_the_text_in_the_schemas_template():
    target, _ = extract(attempts=1)
    read = target.tokenizer.decode(target.handles[0].prompt_tokens)
    assert read.endswith("Text: Ana has 3 cats.") and "- who: text" in read
    told = Prompting(target_template="Say {prompt} as a record.")
    target, _ = extract(attempts=1, pipeline={"prompting": told})
    read = target.tokenizer.decode(target.handles[0].prompt_tokens)
    assert read == "Say Ana has 3 cats. as a record."


def test_each_draw_has_a_rewrite_of_its_own_where_there_is_a_prompter():
    prompter, target = FakeModel("prompter"), Told("target")
    pipeline = Pipeline(prompter, target, None, response_params=LONG)
    found = pipeline.extract(TEXTS, SCHEMA, attempts=4, seed=1)
    assert [one.verified for one in found] == [True, True, False]
    assert len(prompter.handles) == len(target.handles) == 8
    assert {handle.sample for handle in prompter.handles} == {0, 1, 2, 3}


def test_draws_are_keyed_by_the_number_of_a_text():
    first, _ = extract(attempts=2)
    alone = Told("target")
    Pipeline(None, alone, None, response_params=LONG).extract(
        TEXTS[1:2], SCHEMA, attempts=2, seed=1, numbers=[1]
    )
    mine = [
        h.params.seed for h in first.handles if "Ben" in first.tokenizer.decode(h.prompt_tokens)
    ]
    assert [h.params.seed for h in alone.handles] == mine


def test_an_answer_that_failed_is_a_draw_without_a_record():
    target = Told("target", fails={0: RequestError("busy")})
    _, found = extract(target, attempts=2)
    assert [one.attempts for one in found] == [2, 2, 2] and found[0].verified
    _, found = extract(Silent("target"), attempts=2, pipeline={"max_failed": 0.5})
    assert [one.answered for one in found] == [False, True, True]
    assert Extraction.of_plain(found[0].to_plain()) == found[0]
    with pytest.raises(FailedRowsError):
        extract(Told("t", fails={n: RequestError("busy") for n in range(9)}), attempts=4)


def test_what_is_asked_wrongly_is_refused():
    pipeline = Pipeline(None, Told("target"), None)
    with pytest.raises(ValueError, match="attempts: expected at least 1"):
        pipeline.extract(TEXTS, SCHEMA, attempts=0)
    with pytest.raises(SchemaError, match=r"fields\.a: unknown type"):
        pipeline.extract(TEXTS, {"fields": {"a": "x"}})
    with pytest.raises(ValueError, match="prompts: expected a list"):
        pipeline.extract("Ana", SCHEMA)
    assert pipeline.extract([], SCHEMA) == []
