"""Whole steps of TRL's GRPOTrainer on the work of `alignpro bench step`, on the CPU in float32.

LoRA by peft on every linear layer, a KL penalty against the base model, AdamW; each completion is
answered inside the reward function, one batch of all of them. Every choice that costs TRL time or
memory without being part of the work is switched off: gradient checkpointing, logging, saving,
evaluation, dropout, old log-probabilities (one optimizer step a generation batch needs none).
TRL estimates the KL from the sampled tokens; ours is exact. The reward here is a count of letters.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import harness
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from alignpro.bench.work import WORK
from alignpro.config import Prompting
from alignpro.data.load import load_prompts

WARM_UP = 1  # steps that are run and not counted


class Responder:
    """The frozen target: one answer of an exact length to each rewrite, all in one batch."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.prompting = Prompting()
        self.tokens = 0
        self.seconds = []

    def reward(self, prompts, completions, completion_ids, request, **columns):
        """A number for each answer; refuses completions that are not of the forced length."""
        started = time.perf_counter()
        lengths = {len(ids) for ids in completion_ids}
        if lengths != {WORK.rewrite_tokens}:
            raise SystemExit(f"completions: expected {WORK.rewrite_tokens} tokens, got {lengths}")
        turns = [
            self.prompting.target_turn(prompt, completion[0]["content"].strip())
            for prompt, completion in zip(request, completions, strict=True)
        ]
        texts = self.answer(turns)
        self.seconds.append(time.perf_counter() - started)
        return [text.lower().count("e") / (1 + len(text)) for text in texts]

    def answer(self, turns):
        inputs = harness.chat_inputs(self.tokenizer, turns)
        with torch.inference_mode():
            written = self.model.generate(
                **inputs,
                do_sample=True,
                temperature=WORK.response_temperature,
                top_k=0,
                top_p=1.0,
                min_new_tokens=WORK.response_tokens,
                max_new_tokens=WORK.response_tokens,
                use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id,
            )[:, inputs["input_ids"].shape[1] :]
        if written.shape[1] != WORK.response_tokens:
            raise SystemExit(f"responses: expected {WORK.response_tokens}, got {written.shape[1]}")
        self.tokens += written.numel()
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)


class Clock(TrainerCallback):
    """Seconds from the end of a step to the end of the next."""

    def __init__(self):
        self.seconds = []
        self.last = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        print(f"trl: step {len(self.seconds)}: {self.seconds[-1]:.1f} s", file=sys.stderr)


def load(path: Path):
    """Model in float32 and tokenizer, from a GGUF file or a folder."""
    folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    # transformers has widened every tensor of a GGUF file, and refuses to train it all the same.
    wrong = {p.dtype for p in model.parameters()} - {torch.float32}
    if wrong:
        raise SystemExit(f"{path.name}: expected float32 weights, got {wrong}")
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(folder, **options)


def settings(folder, **work) -> GRPOConfig:
    """What costs TRL time or memory without being part of the work is off, on the CPU in float32;
    ``work`` is the rest."""
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_accumulation_steps=1,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **work,
    )


def main() -> None:
    request, report = harness.start("trl")
    torch.set_num_threads(request.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    steps = request.repeats
    (model, tokenizer), report["load_seconds"] = harness.timed(lambda: load(Path(request.model)))
    target, _ = load(Path(request.model))
    responder = Responder(target.eval(), tokenizer)
    prompting, rows = Prompting(), load_prompts(WORK.data, split=WORK.split)
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompting.prompter_turn(row.prompt)}],
                "request": row.prompt,
            }
            for row in rows
        ]
    )
    batch = WORK.prompts * WORK.rewrites
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=responder.reward,
            args=settings(
                folder,
                max_steps=WARM_UP + steps,
                per_device_train_batch_size=batch,
                steps_per_generation=1,
                num_generations=WORK.rewrites,
                num_iterations=1,
                max_completion_length=WORK.rewrite_tokens,
                generation_kwargs={"min_new_tokens": WORK.rewrite_tokens},
                temperature=1.0,
                beta=WORK.kl_coef,
                learning_rate=WORK.learning_rate,
                lr_scheduler_type="constant",
                eval_strategy="no",
            ),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
            peft_config=LoraConfig(
                r=WORK.lora_rank,
                lora_alpha=WORK.lora_alpha,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
    expected = (WARM_UP + steps) * batch * WORK.response_tokens
    if len(clock.seconds) != WARM_UP + steps or responder.tokens != expected:
        raise SystemExit(
            f"trl: expected {WARM_UP + steps} steps and {expected} response tokens, got "
            f"{len(clock.seconds)} and {responder.tokens}"
        )
    seconds = clock.seconds[WARM_UP:]
    report |= {
        "seconds_by_stage": {"respond": statistics.median(responder.seconds[WARM_UP:])},
        "trainable_parameters": trainable,
        "versions": {
            name: metadata.version(name)
            for name in ("torch", "transformers", "peft", "trl", "accelerate", "gguf")
        },
    }
    report["results"].append(
        {
            "all_seconds": seconds,
            "seconds": statistics.median(seconds),
            "tokens": [WORK.generated_tokens] * len(seconds),
            "logprobs": True,
        }
    )
    harness.write(report)


if __name__ == "__main__":
    main()
