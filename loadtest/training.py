"""Tokens per second of training: this trainer and PEFT with transformers' Trainer, in turn."""

import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from loadtest.markdown import table
from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.source import base_folder
from sharelora_serve.training.batches import collate
from sharelora_serve.training.counts import compared_methods
from sharelora_serve.training.data import Row, Template, read_rows
from sharelora_serve.training.factors import add_factors
from sharelora_serve.training.settings import TrainSettings
from sharelora_serve.training.trainer import Trainer

_PEER = "LoRA, PEFT and Trainer"


def measure_training(
    data: Path,
    template: Template | None,
    *,
    model: str | None,
    settings: TrainSettings,
    num_steps: int,
    rounds: int,
) -> str:
    """A Markdown table of tokens per second, padding left out, medians of rounds in turn."""
    folder = base_folder(model)
    config = load_model_config(folder)
    rows = read_rows(data, AutoTokenizer.from_pretrained(folder), config.max_model_len, template)
    methods = compared_methods(config.layout("base").shapes)
    settings = replace(settings, num_steps=num_steps)
    found: dict[str, list[float]] = {name: [] for name in (*methods, _PEER)}
    for number in range(rounds):
        own = replace(settings, seed=number)
        for name, method in methods.items():
            found[name].append(_ours(folder, rows, replace(own, method=method)))
        found[_PEER].append(_peer(folder, rows, own, num_steps))
    lines = []
    for name, rates in found.items():
        ratios = [rate / peer for rate, peer in zip(rates, found[_PEER], strict=True)]
        lines.append(
            (
                name,
                f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            )
        )
    return table(("training", "tokens/s", "of PEFT and Trainer"), lines)


def _ours(folder: Path, rows: Sequence[Row], settings: TrainSettings) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    factors = add_factors(model, load_model_config(folder).layout("base"), settings)
    trainer = Trainer(model, factors, rows, [], settings, {})
    with tempfile.TemporaryDirectory() as checkpoints:
        trained = trainer.train(
            Path(checkpoints),
            save_every=trainer.num_steps + 1,
            evaluate_every=1,
            resume=False,
            stop=threading.Event(),
            report=lambda _: None,
        )
    return trained.tokens_per_second


class _CountingTrainer(transformers.Trainer):
    """Counts the tokens of its steps; batches that it only prepares do not count."""

    num_tokens = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Any:  # noqa: ANN401
        self.num_tokens += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *args)


def _peer(folder: Path, rows: Sequence[Row], settings: TrainSettings, num_steps: int) -> float:
    """As PEFT's and transformers' documentation has it: padded batches of rows in any order."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = [module.rpartition(".")[2] for module in MODULES]
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=names, task_type="CAUSAL_LM"
    )

    def collated(chosen: list[Row]) -> dict[str, Any]:
        batch = collate(chosen)
        lengths = torch.tensor([row.num_tokens for row in chosen])
        return {
            "input_ids": batch.tokens,
            "attention_mask": (torch.arange(batch.tokens.shape[1]) < lengths[:, None]).long(),
            "labels": batch.tokens.masked_fill(~batch.labelled, -100),
        }

    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=settings.batch_size,
            max_steps=num_steps,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = _CountingTrainer(
            model=get_peft_model(base, config),
            args=arguments,
            train_dataset=list(rows),
            data_collator=collated,
        )
        start = time.perf_counter()
        trainer.train()
        return trainer.num_tokens / (time.perf_counter() - start)
