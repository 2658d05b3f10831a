"""The reference reads another prompt: which rows, and what training then reaches."""

from __future__ import annotations

import pytest
import torch

from alignpro.config import AnchorConfig, LoraConfig, TrainConfig, from_mapping
from alignpro.data.files import DataError
from alignpro.data.load import PromptRow
from alignpro.pipeline import Pipeline
from alignpro.train.anchor import anchors_of
from alignpro.train.policy import LoraPolicy
from alignpro.train.trainer import Trainer
from alignpro.types import Conversation
from train.test_oracle import prompter_reward, settings, value_of
from train.test_trainer import PROMPTS, config, log, make
from train.toy_model import BOS, LETTERS, VOCABULARY, ToyModel, ToyTokenizer

SAFE = "h"


class Bare(ToyTokenizer):
    """Without a token behind the turn: the toy looks at the last token alone, so that the prompt's
    last letter decides."""

    def encode_chat(self, messages, *, add_generation_prompt=True, most=None):
        return [BOS, *self.encode(messages[-1]["content"])]


def row(prompt="a plan", **columns):
    return PromptRow(prompt, columns, "prompts.csv, line 2")


PLAIN = row("an ordinary one")


def test_marked_rows_have_the_safe_prompt_or_the_prefix():
    rows = [row(safe_prompt="a safe plan"), row(harmful="true"), PLAIN]
    assert anchors_of(AnchorConfig(), rows) == ["a safe plan", None, None]
    marked = AnchorConfig(where="harmful", prefix="Be safe: ")
    assert anchors_of(marked, rows) == [None, "Be safe: a plan", None]
    both = [row(harmful=True, safe_prompt="a safe plan"), row(harmful=0, safe_prompt="unused")]
    assert anchors_of(marked, both) == ["a safe plan", None]


def test_the_last_turn_alone_is_another():
    asked = Conversation((("system", "s"), ("user", "u"), ("assistant", "a")), "a plan")
    (anchor, _) = anchors_of(AnchorConfig(), [row(asked, safe_prompt="a safe plan"), PLAIN])
    assert anchor == Conversation(asked.history, "a safe plan")


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"where": "harmful"}, [row(harmful="maybe")], "line 2: expected true or false in column"),
        ({"where": "harmful"}, [row(harmful=True)], "line 2: marked by 'harmful', but column"),
        ({}, [row(safe_prompt=3)], "line 2: expected text in column 'safe_prompt', got int"),
        ({}, [row(safe_prompt=" ")], "no row is marked by column 'safe_prompt'"),
        ({}, [row(safe_prompt="\ud800")], r"line 2, column 'safe_prompt': lone surrogate U\+D800"),
        ({}, [PLAIN], "no row is marked by column 'safe_prompt'"),
        (
            {"where": "harmful", "prefix": "p"},
            [row(harmful=True), PLAIN],
            "no row has a column 'saf",
        ),
        ({"all_rows": True}, [PLAIN], "marked by 'all_rows', but column 'safe_prompt' is empty"),
        ({}, [row(safe_prompt="x")], "all 1 rows are marked; expected ordinary prompts"),
    ],
)
def test_rows_that_cannot_be_anchored(changes, rows, message):
    with pytest.raises(DataError, match=message):
        anchors_of(AnchorConfig(**changes), rows)


def test_all_rows_where_that_is_asked_for():
    assert anchors_of(AnchorConfig(all_rows=True), [row(safe_prompt="x")]) == ["x"]
    everywhere = AnchorConfig(column=None, prefix="Be safe: ", all_rows=True)
    rows = [row(safe_prompt="unused"), PLAIN]
    assert anchors_of(everywhere, rows) == ["Be safe: a plan", "Be safe: an ordinary one"]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"column": None, "prefix": "p"}, "where: expected a column that marks the rows"),
        ({"column": None, "where": "harmful"}, "prefix: expected a text, as column is null"),
        ({"all_rows": True, "where": "harmful"}, "where: expected its default None"),
    ],
)
def test_groups_that_mark_nothing_or_twice(group, message):
    with pytest.raises(ValueError, match=f"anchor.{message}"):
        from_mapping(TrainConfig, {"anchor": group})


def test_a_closed_form_has_no_anchor():
    with pytest.raises(ValueError, match="anchor"):
        from_mapping(TrainConfig, {"algorithm": "closed_form", "anchor": {}})


def test_anchors_are_one_a_prompt_that_fits(tmp_path):
    anchored = config(tmp_path, anchor=AnchorConfig())
    with pytest.raises(ValueError, match="anchors: expected one a prompt with anchor"):
        make(anchored)
    with pytest.raises(ValueError, match=f"anchors: expected {len(PROMPTS)}, got 1"):
        make(anchored, anchors=["a"])
    with pytest.raises(ValueError, match=r"anchor: prompt 1 in its template: .*exceed the context"):
        make(anchored, anchors=[None, "a" * 80, *PROMPTS[2:]])


def bare_trainer(settings):
    """Prompt "a" as it is, and "b" with the safe prompt."""
    model = ToyModel(hidden_size=VOCABULARY)  # every token's logits are its own
    model.tokenizer = Bare()
    pipeline = Pipeline(
        model,
        model,
        prompter_reward,
        prompting=settings.prompting,
        rewrite_params=settings.rewrite,
        response_params=settings.response,
    )
    policy = LoraPolicy.fresh(model, settings.lora, seed=0)
    return Trainer(settings, pipeline, policy, ["a", "b"], anchors=[None, SAFE])


def test_the_anchored_optimum_is_reached(tmp_path):
    # rho*(x'|x) = rho_ref(x'|x_s) exp(r / kl_coef) / Z_s; a prompt without an anchor keeps its own.
    lora = LoraConfig(rank=VOCABULARY, alpha=float(VOCABULARY))
    trainer = bare_trainer(settings(tmp_path, anchor=AnchorConfig(), lora=lora))
    table = trainer.policy.model.core_model.table(None, 1.0).double()
    texts = ["", "", "", *LETTERS]
    values = torch.tensor([value_of(text) for text in texts], dtype=torch.float64)
    trainer.train()
    reached = trainer.policy.model.core_model.table(trainer.policy.core_adapter(), 1.0)
    reached = reached.detach().double().exp()

    def difference(prompt, reference):
        optimum = torch.softmax(table[texts.index(reference)] + values / trainer.config.kl_coef, 0)
        return float((reached[texts.index(prompt)] - optimum).abs().sum()) / 2

    assert difference("a", "a") < 0.03 and difference("b", SAFE) < 0.03
    assert difference("a", SAFE) > 0.1 < difference("b", "b")


def test_the_kl_is_told_apart_and_kl_target_steers_by_plain_prompts(tmp_path):
    steered = config(tmp_path, steps=2, prompts_per_step=8, anchor=AnchorConfig(), kl_target=0.5)
    trainer = bare_trainer(steered)
    trainer.train()
    first, second = log(trainer)
    assert first["kl_plain"] == 0.0 < first["kl_anchored"]
    assert first["kl_per_rewrite"] == pytest.approx(first["kl_anchored"] / 2)
    assert second["kl_coef"] < first["kl_coef"]  # plain prompts are below the target
