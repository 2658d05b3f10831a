"""A trained prompter by itself: it rewrites prompts for a target that may be anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignpro.config import (
    REWRITE,
    ModelConfig,
    Prompting,
    SftConfig,
    TrainConfig,
    config_of_run,
)
from alignpro.models.adapter import LoraWeights
from alignpro.models.native_model import NativeModel, load_model
from alignpro.pipeline import Pipeline
from alignpro.types import Conversation, Message, PromptLike, Rewrite, SamplingParams


class Prompter:
    """Rewrites prompts; no target takes part.

        prompter = alignpro.Prompter.from_run("alignpro-run")
        prompter.rewrite("How do bees find home?")  # what the target is to be asked instead

    Args:
        model: the prompter's base model, or its path or name.
        adapter: a PEFT folder or matrices; None is the base model as prompter.
        prompting: how prompts are read and rewritten, as in training.
        params: how rewrites are sampled.

    Raises as `load_model` and `load_peft`.
    """

    def __init__(
        self,
        model: NativeModel | ModelConfig | str | os.PathLike[str],
        adapter: LoraWeights | str | os.PathLike[str] | None = None,
        *,
        prompting: Prompting | None = None,
        params: SamplingParams = REWRITE,
        threads: int | None = None,
        date: str | None = None,
    ) -> None:
        if not isinstance(model, NativeModel):
            model = load_model(model, threads, date=date)
        self.model = model
        self._pipeline = Pipeline(
            model,
            None,
            None,
            prompting=prompting,
            prompter_adapter=model.make_adapter(adapter),
            rewrite_params=params,
        )

    @classmethod
    def from_run(
        cls, run: str | os.PathLike[str], *, threads: int | None = None, **options: Any
    ) -> Prompter:
        """The prompter of a run of `train`, `sft` or `quickstart`, with the model, the prompting
        and the sampling that it was trained with.

        options: fields of `ModelConfig` that are to be others here, such as ``device``.

        Raises:
            FileNotFoundError: no run, or one without an adapter yet. ValueError: a run that tuned
                the target. Otherwise as the class.
        """
        run = Path(run)
        file, adapter = run / "config.json", run / "adapter"
        if not file.is_file():
            hint = "; Prompter(model, adapter) takes a PEFT folder" * (
                (run / "adapter_config.json").is_file()
            )
            raise FileNotFoundError(
                f"{run}: expected the directory of a run, with config.json{hint}"
            )
        if not adapter.is_dir():
            raise FileNotFoundError(
                f"{adapter}: not there yet; a run that has ended writes it: "
                f"alignpro train {file} --resume"
            )
        config = config_of_run(json.loads(file.read_text("utf-8")))
        if isinstance(config, TrainConfig) and config.policy != "prompter":
            raise ValueError(f"{run}: expected the run of a prompter; this one tuned the target")
        model = load_model(config.prompter, threads, date=config.date, **options)
        params = REWRITE if isinstance(config, SftConfig) else config.rewrite
        return cls(model, adapter, prompting=config.prompting, params=params)

    def rewrite(self, prompt: PromptLike, *, seed: int | None = None) -> str | list[Message]:
        """What the target is to be asked instead: text for text, messages for messages.

        seed: the draw; None is a fresh one.

        Raises:
            ValueError: what is no prompt, or one that does not fit the model's context.
        """
        return self.rewrite_batch([prompt], seed=seed)[0]

    def rewrite_batch(
        self, prompts: Sequence[PromptLike], *, seed: int | None = None
    ) -> list[str | list[Message]]:
        """`rewrite` of many prompts at once, each with a draw of its own."""
        asked = [group[0].target_prompt for group in self.rewrites(prompts, seed=seed)]
        return [
            Conversation.of(new).messages
            if not isinstance(old, str)
            else Conversation.of(new).plain
            for old, new in zip(prompts, asked, strict=True)
        ]

    def rewrites(
        self, prompts: Sequence[PromptLike], *, num_rewrites: int = 1, seed: int | None = None
    ) -> list[list[Rewrite]]:
        """``[prompts][num_rewrites]`` with all that is known of each: text, tokens,
        log-probabilities, and ``target_prompt``, what the target is to be asked."""
        if isinstance(prompts, str):
            raise ValueError(
                "prompts: expected a list of prompts, got text; rewrite(prompt) takes it"
            )
        return self._pipeline.rewrite(prompts, num_rewrites=num_rewrites, seed=seed)
