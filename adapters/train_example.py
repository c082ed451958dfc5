"""Train an example adapter: ShareA (arXiv 2406.10785), one A per module type over all layers.

python adapters/train_example.py banking77-intent MODEL_FOLDER train.csv adapters/banking77-intent
"""

import csv
import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from sharelora_serve.adapters.layout import MODULES

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANK, ALPHA, LEARNING_RATE = 16, 32, 3e-3
NUM_STEPS, NUM_WARMUP_STEPS, NUM_ROWS, NUM_HELD_OUT, SEED = 200, 10, 8, 100, 0

Row = tuple[str, str]  # question and answer, as in the data


@dataclass(frozen=True)
class Task:
    """What an example learns; score gives 0 to 1 for the question, its reference, an answer."""

    columns: tuple[str, str]  # question and answer
    prompt: str
    example: str  # a question of our own, for the card
    max_new_tokens: int
    score: Callable[[str, str, str], float]


def share_of_values_named(record: str, _reference: str, answer: str) -> float:
    """Share of the record's names, areas and foods that the answer contains word for word."""
    values = re.findall(r"(?:name|near|area|food)\[(.*?)\]", record)
    return sum(value.casefold() in answer.casefold() for value in values) / len(values)


TASKS = {
    "banking77-intent": Task(
        columns=("text", "category"),
        prompt="Intent of this bank customer's message: ",
        example="I ordered a new card two weeks ago and it still isn't here.",
        max_new_tokens=20,  # the longest label has 17 tokens
        score=lambda _question, label, answer: float(answer.strip() == label),
    ),
    "e2e-restaurant": Task(
        columns=("mr", "ref"),
        prompt="Describe the restaurant: ",
        example="name[The Green Lantern], eatType[restaurant], food[Italian], area[riverside],"
        " familyFriendly[yes]",
        max_new_tokens=64,
        score=share_of_values_named,
    ),
}


class SharedALinear(nn.Module):
    """y = x W^T + alpha / rank * (x A^T) B^T: W frozen, A one Parameter that all layers hold."""

    def __init__(self, base: nn.Linear, lora_a: nn.Parameter) -> None:
        """Wrap base; lora_a is (rank, in_features). B starts at zero: nothing changes yet."""
        super().__init__()
        self.base = base
        self.lora_a = lora_a
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        out: Tensor = self.base(x)
        return out + ALPHA / RANK * linear(linear(x, self.lora_a), self.lora_b)


def add_factors(model: LlamaForCausalLM) -> dict[str, nn.Parameter]:
    """Freeze the model, wrap its linear layers; return the factors by their stored names."""
    model.requires_grad_(False)
    factors: dict[str, nn.Parameter] = {}
    for module in MODULES:
        in_features = model.model.layers[0].get_submodule(module).in_features
        lora_a = nn.Parameter(torch.empty(RANK, in_features))
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        factors[f"shared.{module}.lora_A.weight"] = lora_a
        for number, layer in enumerate(model.model.layers):
            wrapped = SharedALinear(layer.get_submodule(module), lora_a)
            layer.set_submodule(module, wrapped)
            name = f"base_model.model.model.layers.{number}.{module}.lora_B.weight"
            factors[name] = wrapped.lora_b
    return factors


class Learner:
    """A model, its tokenizer and the task that is put to them."""

    def __init__(self, task: Task, folder: Path) -> None:
        """Load the base from a Hugging Face folder, in float32."""
        self.task = task
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def prompt(self, question: str) -> str:
        """Return the question as a chat under the template's default system prompt."""
        chat = [{"role": "user", "content": self.task.prompt + question}]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def loss(self, rows: list[Row]) -> Tensor:
        """Return the mean cross entropy over the tokens of the answers and their ends."""
        prompts = [self.tokenizer(self.prompt(question)).input_ids for question, _ in rows]
        answers = [
            self.tokenizer(answer + self.tokenizer.eos_token).input_ids for _, answer in rows
        ]
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        width = max(len(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        labelled = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            tokens[row, : len(prompt + answer)] = torch.tensor(prompt + answer)
            labelled[row, len(prompt) : len(prompt + answer)] = True
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        # The head is a fifth of the model: only positions that predict an answer go through it.
        return cross_entropy(self.model.lm_head(hidden[:, :-1][labelled[:, 1:]]), tokens[labelled])

    def answers(self, questions: list[str]) -> list[str]:
        """Return the greedy answers."""
        texts = [self.prompt(question) for question in questions]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True)
        limit = self.task.max_new_tokens
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=limit)
        new_tokens = tokens[:, inputs.input_ids.shape[1] :]
        return self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)

    @torch.no_grad()
    def evaluate(self, rows: list[Row]) -> str:
        """Describe how well rows are answered, and the answer to the task's example."""
        answers = self.answers([question for question, _ in rows])
        scores = [self.task.score(*row, answer) for row, answer in zip(rows, answers, strict=True)]
        score, loss = sum(scores) / len(rows), self.loss(rows).item()
        example = self.answers([self.task.example])[0]
        return f"score {score:.1%}, loss {loss:.4f} on {len(rows)} held-out rows; {example!r}"

    def train(self, factors: list[nn.Parameter], batches: list[list[Row]]) -> list[float]:
        """Take one step per batch and return the losses."""
        optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.0)
        losses = []
        for step, batch in enumerate(track(batches, "Training")):
            warmed_up = (step + 1) / NUM_WARMUP_STEPS
            remaining = (len(batches) - step) / (len(batches) - NUM_WARMUP_STEPS)
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(warmed_up, remaining)
            loss = self.loss(batch)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(factors, 1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses


def read_rows(task: Task, data: Path) -> tuple[list[list[Row]], list[Row]]:
    """Return training batches of like length, and held-out rows with none of their questions."""
    with data.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not set(task.columns) <= set(reader.fieldnames or []):
            raise typer.BadParameter(f"{data} has columns {reader.fieldnames}, not {task.columns}")
        rows = [(line[task.columns[0]], line[task.columns[1]]) for line in reader]
    random.Random(SEED).shuffle(rows)
    held_out = dict(list(dict(rows).items())[:NUM_HELD_OUT])  # a question can have several answers
    chosen = [row for row in rows if row[0] not in held_out][: NUM_STEPS * NUM_ROWS]
    chosen.sort(key=lambda row: len(row[0]) + len(row[1]))
    batches = [chosen[start : start + NUM_ROWS] for start in range(0, len(chosen), NUM_ROWS)]
    random.Random(SEED).shuffle(batches)
    return batches, list(held_out.items())


def export(factors: dict[str, nn.Parameter], folder: Path) -> None:
    """Round the factors to float16 in place and write them as a compact ShareLoRA folder."""
    stored = {name: factor.detach().half() for name, factor in factors.items()}
    for name, factor in factors.items():
        lost = ((stored[name] == 0) & (factor != 0)).float().mean().item()
        if not stored[name].isfinite().all() or lost > 0.01:
            raise SystemExit(f"{name} does not fit float16: {lost:.1%} became 0, or it overflowed")
        factor.data.copy_(stored[name])
    config = {
        "peft_type": "SHARELORA",
        "share": "A",
        "base_model_name_or_path": BASE,
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [module.split(".")[1] for module in MODULES],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def main(task: str, model: Path, data: Path, output: Path) -> None:
    """Train TASK on DATA over the base in the folder MODEL, and write the adapter to OUTPUT."""
    if task not in TASKS:
        raise typer.BadParameter(f"{task} is not one of {', '.join(TASKS)}")
    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    batches, held_out = read_rows(TASKS[task], data)
    learner = Learner(TASKS[task], model)
    base = learner.evaluate(held_out)
    factors = add_factors(learner.model)
    started_at = time.monotonic()
    losses = learner.train(list(factors.values()), batches)
    minutes = (time.monotonic() - started_at) / 60
    export(factors, output)
    Console(soft_wrap=True, markup=False).print(
        f"base: {base}\nadapter: {learner.evaluate(held_out)}\n"
        f"{sum(factor.numel() for factor in factors.values()):,} parameters, {len(batches)} steps"
        f" in {minutes:.1f} minutes, loss of the last 20 {sum(losses[-20:]) / 20:.4f}"
    )


if __name__ == "__main__":
    typer.run(main)
