"""The line in a config file that names a reward."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alignpro.rewards import TopicReward, VaderReward, WeightedSum, build_reward

ROWS = (["Bake bread"], [""], ["I love bread"])


def terms(spec):
    reward = build_reward(spec)
    assert isinstance(reward, WeightedSum)
    return {name: weight for name, (weight, _) in reward.terms.items()}


def test_a_single_name_is_that_reward():
    assert isinstance(build_reward("vader"), VaderReward)
    assert isinstance(build_reward(" 1.0 * topic "), TopicReward)
    assert isinstance(build_reward({"topic": 1}), TopicReward)


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        ("vader+0.5*topic", {"vader": 1.0, "topic": 0.5}),
        (" vader + .5 * topic ", {"vader": 1.0, "topic": 0.5}),
        ("2*vader", {"vader": 2.0}),
        ("1e+2*vader+-1e-3*topic", {"vader": 100.0, "topic": -0.001}),
        ({"vader": 1, "topic": {"weight": 0.5}}, {"vader": 1.0, "topic": 0.5}),
    ],
)
def test_weights(spec, weights):
    assert terms(spec) == weights


def test_the_sum_is_the_sum_of_its_parts():
    vader, topic = (build_reward(name)(*ROWS)[0] for name in ("vader", "topic"))
    assert topic == 0.5
    assert build_reward("vader+3*topic")(*ROWS) == [pytest.approx(vader + 1.5)]


@pytest.fixture
def beside_me(tmp_path, monkeypatch):
    (tmp_path / "rewards_beside_me.py").write_text(
        "def shout(completions, **kwargs):\n"
        "    return [float(c.isupper()) for c in completions]\n"
        "class Scaled:\n"
        "    def __init__(self, by=1.0):\n"
        "        self.by = by\n"
        "    def __call__(self, prompts, rewrites, responses, **columns):\n"
        "        return [self.by] * len(prompts)\n"
        "number = 3\n"
    )
    (tmp_path / "rewards_broken.py").write_text("import no_such_package_at_all\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("rewards_beside_me", None)


def test_a_function_in_the_current_folder(beside_me):
    path = list(sys.path)
    reward = build_reward("2*rewards_beside_me:shout")
    assert list(reward(["p", "p"], ["", ""], ["YES", "no"])) == [2.0, 0.0]
    assert sys.path == path


def test_a_class_with_and_without_options(beside_me):
    assert build_reward("rewards_beside_me:Scaled")(*ROWS) == [1.0]
    assert build_reward({"rewards_beside_me:Scaled": {"by": 4.0}})(*ROWS) == [4.0]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("vader#x", "unknown reward 'vader#x'; known: vader"),
        ("vadre", "unknown reward 'vadre'; known: vader, topic"),
        ("", "expected a name in every term; known: vader"),
        ("vader+", "expected a name in every term"),
        ("lots*vader", "expected a number as weight, got 'lots'"),
        ("vader+2*vader", "'vader' appears twice"),
        ("no_such_module_x:fn", "no module 'no_such_module_x'"),
        ("rewards_beside_me:nothing", "has no 'nothing'"),
        ("rewards_beside_me:shuot", "has no 'shuot'; did you mean 'shout'"),
        (
            "rewards_beside_me.py:shout",
            "expected the module's name, 'rewards_beside_me:shout', and",
        ),
        ("./rewards_beside_me:shout", "expected the module's name, 'rewards_beside_me:shout', and"),
        ("rewards_beside_me:number", "expected a callable, got int"),
        ("rewards_beside_me:", "expected 'module:function'"),
        ("hf:", "name or path after 'hf:'"),
        ("nan*vader", "finite weight"),
        ({}, "at least one name"),
        ({"vader": None}, "expected a number as weight, got None"),
        ({"vader": {"speed": 3}}, r"'vader' cannot take \['speed'\]"),
        ({"rewards_beside_me:shout": {"by": 3}}, r"takes no options, got \['by'\]"),
        ({"hf:x#good": {"label": "bad"}}, "label is given twice"),
        (["vader"], "expected text or a mapping, got list"),
    ],
)
def test_mistakes_get_one_clear_line(beside_me, spec, says):
    with pytest.raises(ValueError, match=says) as caught:
        build_reward(spec)
    assert "\n" not in str(caught.value)


def test_a_broken_module_shows_its_own_error(beside_me):
    said = r"reward 'rewards_broken:fn': .*no_such_package_at_all.* \(rewards_broken.py, line 1\)"
    with pytest.raises(ValueError, match=said):
        build_reward("rewards_broken:fn")


def test_importing_the_room_loads_nothing_heavy():
    code = (
        "import sys, alignpro.rewards, alignpro.data\n"
        "heavy = {'torch', 'transformers', 'vaderSentiment', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def f(completions, trainer_state): return []", "takes trainer_state"),
        ("def f(responses)\n    return []", r"SyntaxError: .*wrong_\d+\.py, line 1"),
        ("x = 1\nundefined", r"NameError: name 'undefined' .*wrong_\d+\.py, line 2\)"),
        ("def f(prompts): return []", r"takes \(prompts\)"),
        ("def f(responses, completions): return []", "both responses and completions"),
        ("def f(prompts, responses, /): return []", "positional-only"),
        ("class f:\n    def __init__(self, scale): pass", "cannot be made with no options"),
        ("f = 3", "expected a callable, got int"),
    ],
)
def test_a_signature_that_no_reward_has_is_bad_input(code, says, tmp_path, monkeypatch):
    name = f"wrong_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        build_reward(f"{name}:f")
    assert "\n" not in str(caught.value)


def test_a_defect_in_a_rewards_own_code_is_not_bad_input(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text(
        "class Broken:\n    def __init__(self):\n        len(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="has no len"):
        build_reward("broken_reward:Broken")
