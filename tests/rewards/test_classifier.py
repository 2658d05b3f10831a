"""The real loading code on a tiny classifier, against transformers called row by row."""

from __future__ import annotations

import sys

import pytest
import torch

from alignpro.rewards import ClassifierReward, build_reward, score_checked
from alignpro.types import Conversation

transformers = pytest.importorskip("transformers")

PROMPTS = ["the cat", "the dog sat here", "dog"]
RESPONSES = ["sat on the mat", "cat", "the cat sat on the mat and the dog sat here too"]
REWRITES = ["mat", "mat", "mat"]
LABELS = ["negative", "neutral", "Positive"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = ["the", "cat", "dog", "sat", "on", "mat", "here", "and", "too"]
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return transformers.BertTokenizer(str(vocabulary), model_max_length=32)


def save(folder, tokenizer, labels, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        **options,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def three_labels(tmp_path_factory, tokenizer):
    return save(tmp_path_factory.mktemp("three"), tokenizer, LABELS)


@pytest.fixture(scope="module")
def one_label(tmp_path_factory, tokenizer):
    return save(tmp_path_factory.mktemp("one"), tokenizer, ["reward"])


def logits_alone(folder, *texts, max_length=32):
    """Logits of every row, scored alone and so without padding: [rows, labels]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [
            model(
                **tokenizer(*row, return_tensors="pt", truncation=True, max_length=max_length)
            ).logits[0]
            for row in zip(*texts, strict=True)
        ]
    return torch.stack(rows)


def test_probability_of_a_label_for_pairs(three_labels):
    expected = logits_alone(three_labels, PROMPTS, RESPONSES).softmax(-1)[:, 2]
    assert expected.std() > 1e-3  # the tiny model does tell the rows apart
    for batch_size in (1, 2, 16):
        reward = ClassifierReward(three_labels, label="Positive", batch_size=batch_size)
        scores = score_checked(reward, PROMPTS, REWRITES, RESPONSES)
        assert scores == pytest.approx(expected.tolist(), abs=1e-6)


def test_logit_and_response_only(three_labels):
    expected = logits_alone(three_labels, RESPONSES)[:, 0]
    reward = ClassifierReward(three_labels, label=0, pair=False, output="logit")
    assert reward(PROMPTS, REWRITES, RESPONSES) == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_single_label_needs_no_name_and_gives_its_logit(one_label):
    expected = logits_alone(one_label, PROMPTS, RESPONSES)[:, 0]
    reward = ClassifierReward(str(one_label))
    assert reward(PROMPTS, REWRITES, RESPONSES) == pytest.approx(expected.tolist(), abs=1e-5)
    sigmoid = ClassifierReward(one_label, output="probability")
    assert sigmoid(PROMPTS, REWRITES, RESPONSES) == pytest.approx(
        expected.sigmoid().tolist(), abs=1e-6
    )


def test_multi_label_models_give_each_label_its_own_probability(tmp_path, tokenizer):
    save(tmp_path, tokenizer, LABELS, problem_type="multi_label_classification")
    expected = logits_alone(tmp_path, PROMPTS, RESPONSES)[:, 1].sigmoid()
    reward = ClassifierReward(tmp_path, label="neutral")
    assert reward(PROMPTS, REWRITES, RESPONSES) == pytest.approx(expected.tolist(), abs=1e-6)


def test_long_rows_are_truncated_to_what_the_model_takes(three_labels):
    long = ["cat " * 500]
    reward = ClassifierReward(three_labels, label=1)
    (score,) = reward(["dog"], [""], long)
    (expected,) = logits_alone(three_labels, ["dog"], long).softmax(-1)[:, 1].tolist()
    assert score == pytest.approx(expected, abs=1e-6)
    (short,) = ClassifierReward(three_labels, label=1, max_length=8)(["dog"], [""], long)
    (expected,) = logits_alone(three_labels, ["dog"], long, max_length=8).softmax(-1)[:, 1].tolist()
    assert short == pytest.approx(expected, abs=1e-6)


def test_a_conversation_is_read_as_text_without_what_is_too_old(three_labels):
    history = (("system", "the cat"), ("user", "sat here " * 20), ("assistant", "and too"))
    reward = ClassifierReward(three_labels, label=1)
    cases = {
        Conversation(history[2:], "dog"): "Assistant: and too\n\nUser: dog",
        Conversation(history[1:], "dog"): "Assistant: and too\n\nUser: dog",
        Conversation(history[:2], "dog"): "dog",
    }
    scores = score_checked(reward, [*cases, "cat"], [""] * 4, ["mat"] * 4)
    expected = logits_alone(three_labels, [*cases.values(), "cat"], ["mat"] * 4).softmax(-1)[:, 1]
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)
    assert len({round(score, 6) for score in scores}) == 3


def test_a_tokenizer_without_padding_goes_row_by_row(tmp_path, three_labels):
    reward = ClassifierReward(three_labels, label=1)
    expected = reward(PROMPTS, REWRITES, RESPONSES)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(three_labels)
    model.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(three_labels)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    unpadded = ClassifierReward(tmp_path, label=1)
    assert unpadded(PROMPTS, REWRITES, RESPONSES) == pytest.approx(expected, abs=1e-6)


def test_gradients_are_not_recorded(three_labels, monkeypatch):
    reward = ClassifierReward(three_labels, label=1)
    recorded = []
    forward = type(reward._model).forward

    def spy(self, *args, **kwargs):
        recorded.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(reward._model), "forward", spy)
    reward(PROMPTS, REWRITES, RESPONSES)
    assert recorded == [False]


def test_labels_by_name_index_and_config_line(three_labels):
    by_name = ClassifierReward(three_labels, label="positive")
    by_line = build_reward(f"hf:{three_labels}#Positive")
    by_index = build_reward({f"hf:{three_labels}#2": {"batch_size": 2}})
    expected = by_name(PROMPTS, REWRITES, RESPONSES)
    assert by_line(PROMPTS, REWRITES, RESPONSES) == expected
    assert by_index(PROMPTS, REWRITES, RESPONSES) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("label", [None, "joyful", 3, -1, "7"])
def test_a_missing_label_lists_what_there_is(three_labels, label):
    with pytest.raises(ValueError, match=r"\['negative', 'neutral', 'Positive'\]"):
        ClassifierReward(three_labels, label=label)


def test_a_model_without_a_trained_head_is_refused(tmp_path, tokenizer, three_labels):
    config = transformers.BertConfig.from_pretrained(three_labels)
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights of 'classifier.*expected a model trained for"):
        ClassifierReward(tmp_path, label=0)


def test_no_model_there(tmp_path):
    with pytest.raises(
        ValueError, match="expected a folder or hub name of a sequence class"
    ) as caught:
        ClassifierReward(tmp_path / "nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output": "odds"}, "output: expected 'logit' or 'probability', got 'odds'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"max_length": 0}, "max_length: expected at least 1, got 0"),
    ],
)
def test_bad_options(three_labels, options, says):
    with pytest.raises(ValueError, match=says):
        ClassifierReward(three_labels, label=0, **options)


def test_transformers_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'alignpro\[classifier\]'"):
        ClassifierReward("x")
