"""Any Hugging Face sequence classifier, reward models included, as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from alignpro.optional import import_for
from alignpro.rewards.check import CONVERSATIONS
from alignpro.types import Conversation, Texts

Output = Literal["logit", "probability"]


class ClassifierReward:
    """Logit or probability of one label of a sequence classifier, for (prompt, response) pairs.

    name_or_path: a folder or a hub name, as ``AutoModelForSequenceClassification`` takes it.
    label: a label's name or index; may be left out where the model has only one.
    pair: the classifier reads the prompt, a conversation with every turn after its role, and the
        response; False: the response alone.
    output: None means the logit of a one-label model (a reward model's score, unbounded) and
        otherwise the probability, in [0, 1]: softmax over the labels, or the sigmoid of the label's
        own logit where the model has one label or says ``multi_label_classification``.
    batch_size: rows in one forward. Padding is masked, but the float sums may differ in their last
        bits with the batch size.
    max_length: tokens a row; longer rows are truncated, longest part first, after the oldest
        messages of a conversation. None: what tokenizer and model allow, at most 4096.
    Errors: ImportError without transformers or torch; ValueError for an unknown or missing label
    (the labels are listed), or where nothing classifies under that name.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        label: str | int | None = None,
        pair: bool = True,
        output: Output | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        device: str = "cpu",
    ) -> None:
        if output not in (None, "logit", "probability"):
            raise ValueError(f"output: expected 'logit' or 'probability', got {output!r}")
        for what, value in {"batch_size": batch_size, "max_length": max_length}.items():
            if value is not None and value < 1:
                raise ValueError(f"{what}: expected at least 1, got {value}")
        self._torch = import_for("ClassifierReward", "torch", "alignpro[classifier]")
        transformers = import_for("ClassifierReward", "transformers", "alignpro[classifier]")
        self.name = f"hf:{name_or_path}" + ("" if label is None else f"#{label}")
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name_or_path)
            loaded, details = transformers.AutoModelForSequenceClassification.from_pretrained(
                name_or_path, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ValueError(
                f"reward classifier {str(name_or_path)!r}: expected a folder or hub name of a "
                f"sequence classifier with its tokenizer: {reason[0]}"
            ) from error
        missing = sorted(details["missing_keys"])
        if missing:  # a head that was never trained gives noise, which would be optimised happily
            raise ValueError(
                f"reward classifier {str(name_or_path)!r}: the weights of {missing[0]!r} are not "
                "in its files; expected a model trained for sequence classification"
            )
        self._model: Any = loaded.to(device).eval()
        self._device = device
        self._label = _find_label(str(name_or_path), self._model.config, label)
        one_label = self._model.config.num_labels == 1
        self._output: Output = output or ("logit" if one_label else "probability")
        self._pair = pair
        self._batch_size = batch_size if _can_pad(self._tokenizer, self._model) else 1
        self._max_length = max_length or _longest_input(self._tokenizer, self._model.config)

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        scores: list[float] = []
        asked = list(prompts)
        if CONVERSATIONS in columns and self._pair:
            given = zip(columns[CONVERSATIONS], responses, strict=True)
            asked = [self._shown(Conversation.of(messages), text) for messages, text in given]
        for begin in range(0, len(responses), self._batch_size):
            rows = slice(begin, begin + self._batch_size)
            scores += self._score(asked[rows], list(responses[rows]))
        return scores

    def _shown(self, conversation: Conversation, response: str) -> str:
        """As text, without the oldest messages where it would be truncated: at its end stands the
        last turn."""
        while conversation.history:
            length = len(self._tokenizer(conversation.text, response)["input_ids"])
            if length <= self._max_length:
                break
            conversation = Conversation(conversation.history[1:], conversation.last_turn)
        return conversation.text

    def _score(self, prompts: list[str], responses: list[str]) -> list[float]:
        texts = (prompts, responses) if self._pair else (responses,)
        inputs = self._tokenizer(
            *texts,
            padding=self._batch_size > 1,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        ).to(self._device)
        with self._torch.no_grad():
            logits = self._model(**inputs).logits.float()
        values = logits[:, self._label]
        if self._output == "probability":
            config = self._model.config
            if config.num_labels == 1 or config.problem_type == "multi_label_classification":
                values = values.sigmoid()
            else:
                values = logits.softmax(dim=-1)[:, self._label]
        return [float(v) for v in values.tolist()]


def _find_label(model_name: str, config: Any, label: str | int | None) -> int:
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if label is None:
        if len(names) == 1:
            return 0
        raise ValueError(
            f"reward classifier {model_name!r} has several labels, name one of {names}"
        )
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        folded = [n.casefold() for n in names]
        if folded.count(label.casefold()) == 1:
            return folded.index(label.casefold())
        if not label.isdecimal():
            raise ValueError(
                f"reward classifier {model_name!r} has no label {label!r}; it has {names}"
            )
        label = int(label)
    if not 0 <= label < len(names):
        raise ValueError(f"reward classifier {model_name!r}: no label {label} in {names}")
    return label


def _can_pad(tokenizer: Any, model: Any) -> bool:
    """Makes sure that a batch can be padded; a model without any pad or EOS token goes row by row.

    Models that read the last token as their summary find it by ``config.pad_token_id``.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            return False
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return True


def _longest_input(tokenizer: Any, config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None) or 4096
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # their position ids begin after the padding index
    # A tokenizer without a limit says 1e30.
    return int(min(tokenizer.model_max_length, positions, 4096))
