"""What a training run reads off prompts that it does not train on, and what it warns of."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from alignpro.config import HeldOutConfig, ModelConfig
from alignpro.data.load import PromptRow, load_prompts
from alignpro.findings import Measured
from alignpro.report.progress import Bars, TrainBar
from alignpro.train.callbacks import TrainCallback
from alignpro.train.held_out import HeldOut, load_held_out
from train.test_trainer import config, log, make

ROWS = [PromptRow(prompt) for prompt in ("ab", "cd", "ef", "gh")]


def watched(folder, **changes):
    return config(folder, heldout=HeldOutConfig(every=4), **changes)


def looks(trainer):
    return {row["step"]: row["heldout"] for row in log(trainer) if "heldout" in row}


def test_a_look_every_so_often_and_at_the_last_step(tmp_path):
    trainer = make(watched(tmp_path), held_out=ROWS)
    trainer.train()
    seen = looks(trainer)
    assert list(seen) == [0, 4, 8, 9]
    assert set(seen[0]) == {"reward_mean", "seconds", *Measured.__dataclass_fields__}
    # The same draws each time: two looks differ by the policy alone.
    start = make(watched(tmp_path / "still", steps=2, learning_rate=1e-12), held_out=ROWS)
    start.train()
    first, second = looks(start).values()
    first.pop("seconds")
    second.pop("seconds")
    assert first == second and first["reward_mean"] == seen[0]["reward_mean"]
    assert seen[9]["reward_mean"] > seen[0]["reward_mean"]  # it is what is trained for
    # The training itself is not touched by being watched.
    alone = make(config(tmp_path / "alone"))
    alone.train()
    keys = log(alone)[0].keys() - {"warnings"}
    for mine, theirs in zip(log(trainer), log(alone), strict=True):
        assert {key: mine[key] for key in keys} == {key: theirs[key] for key in keys}


def test_a_first_look_without_what_is_measured_since_is_still_the_first(tmp_path):
    held_out = HeldOut(watched(tmp_path), ROWS)
    then = vars(Measured({"good": 0.5}, {}, 0, 4.0, 0.0)) | {"reward_mean": 0.5, "seconds": 1.0}
    del then["broken_guards"]
    held_out.restore([{"step": 0, "heldout": then}, {"step": 1}])
    assert held_out._before == Measured({"good": 0.5}, {}, 0, 4.0, 0.0)


def test_the_reward_of_a_look_by_hand(tmp_path):
    asked = []

    def reward(prompts, rewrites, responses, level):
        asked.append((list(prompts), list(level)))
        return [float(value) for value in level]

    rows = [PromptRow(row.prompt, {"level": i}) for i, row in enumerate(ROWS)]
    trainer = make(
        watched(tmp_path, steps=1), reward=reward, held_out=rows, columns={"level": [9] * 8}
    )
    trainer.train()
    assert asked[0] == (["ab", "cd", "ef", "gh"], [0, 1, 2, 3])
    assert looks(trainer)[0]["reward_mean"] == 1.5
    assert looks(trainer)[0]["components"] == {"reward": 1.5}


def empty_is_best(prompts, rewrites, responses, **columns):
    return [float(not rewrite) for rewrite in rewrites]


def test_a_resumed_run_measures_against_the_same_start(tmp_path):
    class Stop(TrainCallback):
        def on_step(self, row):
            if row["step"] == 5:
                raise KeyboardInterrupt

    def made(name, **options):
        settings = watched(tmp_path / name, kl_coef=0.0, learning_rate=0.3)
        return make(settings, reward=empty_is_best, held_out=ROWS, **options)

    whole, first = made("whole"), made("split")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        first.train([Stop()])
    second = made("split", resume=True)
    second.train()
    rows = [
        [{**row, "heldout": {**row.get("heldout", {}), "seconds": 0}} for row in log(trainer)]
        for trainer in (whole, second)
    ]
    assert rows[0] == rows[1]
    assert "shorter than those of the untuned" in rows[1][9]["warnings"]["rewrites_length"]


def test_one_rewrite_for_everything_is_warned_of(tmp_path):
    trainer = make(
        watched(tmp_path, steps=30, kl_coef=0.0, learning_rate=0.3),
        reward=empty_is_best,
        held_out=ROWS,
    )
    said = io.StringIO()
    with Bars(console=Console(file=said, width=200)) as bars:
        trainer.train([TrainBar(bars)])
    rows = log(trainer)
    assert rows[0]["common_rewrite"] < 0.9 and "one_rewrite" not in rows[0].get("warnings", {})
    assert rows[-1]["common_rewrite"] == rows[-1]["heldout"]["common_rewrite"] == 1.0
    begun = next(row for row in rows if "one_rewrite" in row.get("warnings", {}))
    assert begun["common_rewrite"] > 0.9 or begun["heldout"]["common_rewrite"] > 0.9
    text = rows[-1]["warnings"]["one_rewrite"]
    assert text.startswith("On held-out prompts: 100% of the prompter's rewrites are one text")
    shown = said.getvalue()
    assert f"warning at step {begun['step']}: " in shown
    assert shown.count("are one text") == 1  # though it stays so
    assert f"held out {rows[-1]['heldout']['reward_mean']:.3f}" in shown


def test_what_the_step_itself_shows_needs_no_held_out_prompts(tmp_path):
    trainer = make(
        config(tmp_path, steps=30, kl_coef=0.0, learning_rate=0.3),
        reward=empty_is_best,
    )
    trainer.train()
    last = log(trainer)[-1]
    assert "heldout" not in last and last["distinct_rewrites"] == 1
    assert "100% of the rewrites of this step are one text" in last["warnings"]["one_rewrite"]


def test_a_step_of_equal_rewards_and_one_without_scores(tmp_path):
    def given(score):
        return lambda prompts, rewrites, responses, **columns: [score for _ in prompts]

    trainer = make(config(tmp_path / "equal", steps=1), reward=given(0.0))
    trainer.train()
    (row,) = log(trainer)
    said = row["warnings"]["equal_rewards"]
    assert said.startswith(f"All {row['scored_responses']} rewards of a step are equal")
    assert row["unscored_responses"] == 0

    trainer = make(config(tmp_path / "none", steps=2), reward=given(None))
    before = trainer.policy.weights().matrices
    trainer.train()
    first, _ = log(trainer)
    assert first["scored_responses"] == 0 and first["reward_mean"] is None
    assert f"gave {first['unscored_responses']} responses" in first["warnings"]["unscored"]
    after = trainer.policy.weights().matrices
    assert all(
        (a == b).all() for name in before for a, b in zip(before[name], after[name], strict=True)
    )


def test_a_tuned_target_is_watched_as_well(tmp_path):
    settings = watched(
        tmp_path,
        policy="target",
        prompter=ModelConfig(),
        steps=2,
    )
    trainer = make(settings, held_out=ROWS)
    trainer.train()
    seen = looks(trainer)
    assert list(seen) == [0, 1] and seen[0]["rewrite_tokens"] is None
    assert "common_rewrite" not in log(trainer)[0]


def test_prompts_that_are_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"p{i}", "split": "train" if i % 2 else "validation"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = [PromptRow(f"p{i}") for i in (1, 3, 5)]

    def load(seed=0, **heldout):
        settings = config(tmp_path, data=str(path), heldout=heldout, seed=seed)
        return load_held_out(settings, trained, load_prompts)

    whole = load(num_prompts=None)
    assert sorted(row.prompt for row in whole) == ["p0", "p2", "p4"]
    few = [load(num_prompts=2, seed=seed) for seed in range(8)]
    assert few[0] == load(num_prompts=2) and all(row in whole for rows in few for row in rows)
    assert len({frozenset(row.prompt for row in rows) for rows in few}) > 1  # not the first two
    with pytest.raises(ValueError, match=r"heldout.num_prompts: .* has 3 rows, 15 asked for"):
        load(num_prompts=15)
    assert len(load()) == 3  # nobody asked for the 16 of the default
    with pytest.raises(ValueError, match=r"heldout: 3 of the 3 prompts .* are trained on"):
        load(data={"split": "train"}, num_prompts=2)
    with pytest.raises(ValueError, match=r"no rows in split 'x'; there are \['train', 'valid"):
        load(data={"split": "x"})
    assert load_held_out(config(tmp_path), trained, load_prompts) == []


def test_configurations_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"heldout.every: expected at least 1"):
        config(tmp_path, heldout={"every": 0})
    with pytest.raises(ValueError, match="heldout: expected its default None"):
        config(tmp_path, algorithm="closed_form", heldout={})
    with pytest.raises(ValueError, match="held_out: expected prompts with heldout, and none wit"):
        make(watched(tmp_path))
    with pytest.raises(ValueError, match="held_out: expected prompts with heldout, and none wit"):
        make(config(tmp_path), held_out=ROWS)
