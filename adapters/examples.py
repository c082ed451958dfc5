"""The example adapters: train those that are missing, and score them served and by Hugging Face.

PYTHONPATH=. python adapters/examples.py train DATA [NAME ...]     (make adapters DATA=...)
PYTHONPATH=. python adapters/examples.py check DATA [NAME ...]

DATA is as in sources.py; without names it is all of them.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from adapters.sources import COMMON_A, WORK, test_file, train, train_common_a
from loadtest.markdown import table
from loadtest.servers import our_server
from sharelora_serve.evaluation.scores import Scores
from sharelora_serve.evaluation.tasks import TASKS, spread
from sharelora_serve.models.source import base_folder

FOLDER = Path("adapters")
_BATCH = 16

app = typer.Typer()

_PAPERS_RANK = ("--rank", "4")  # of E2E
_FLEET = ("--freeze-a-from", str(COMMON_A), "--learning-rate", "1e-2")

EXAMPLES: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "banking77-intent": ("banking77", ("--share", "A")),
        "e2e-lora": ("e2e", ("--share", "none", *_PAPERS_RANK)),
        "e2e-share-a": ("e2e", ("--share", "A", *_PAPERS_RANK)),
        "e2e-share-b": ("e2e", ("--share", "B", *_PAPERS_RANK)),
        "e2e-share-ab": ("e2e", ("--share", "AB", *_PAPERS_RANK)),
        "gsm8k-worked": ("gsm8k", ("--share", "A", "--rank", "8")),
        "fleet-banking77": ("banking77", _FLEET),
        "fleet-e2e": ("e2e", _FLEET),
        "fleet-gsm8k": ("gsm8k", _FLEET),
    }
)
"""By name: the data set, and how it is trained; of rank 16 if nothing else is said."""


def known(names: list[str] | None) -> list[str]:
    """All examples if none are named. Raises BadParameter if one is not there."""
    for name in names or ():
        if name not in EXAMPLES:
            raise typer.BadParameter(f"{name} is none of {', '.join(EXAMPLES)}")
    return names or list(EXAMPLES)


Names = Annotated[list[str] | None, typer.Argument(help="Of examples, if not of all.")]


@app.command("train")
def train_missing(data: Path, names: Names = None) -> None:
    """Train the examples that are missing, and first the A that the fleet has in common."""
    wanted = known(names)
    if not COMMON_A.exists():
        train_common_a(data)
    for name in wanted:
        if not (FOLDER / name).exists():
            Console(stderr=True).rule(name)
            task, options = EXAMPLES[name]
            train(data, task, FOLDER / name, "--hold-out", "100", *options)


@app.command()
def check(
    data: Path,
    names: Names = None,
    limit: Annotated[int, typer.Option(help="Questions of each test file.")] = 100,
) -> None:
    """Score examples: served in float16 and float32, at once, and by Hugging Face alone."""
    names = known(names)
    served = {dtype: ask_served(names, data, limit, dtype) for dtype in ("float16", "float32")}
    alone = ask_hugging_face(names, data, limit)
    lines = []
    for name in names:
        task, _ = EXAMPLES[name]
        questions = spread(TASKS[task].read(test_file(data, task)), limit)
        scores: list[Scores] = [
            TASKS[task].score(questions, answers[name]) for answers in (*served.values(), alone)
        ]
        equal = [sum(map(str.__eq__, each[name], alone[name])) for each in served.values()]
        for what in scores[0]:
            values = (f"{each[what].value:.2f}" for each in scores)
            lines.append((name, what, *values, *(f"{count} of {limit}" for count in equal)))
    headings = (
        "adapter",
        "score",
        "float16",
        "float32",
        "Hugging Face",
        "same texts",
        "in float32",
    )
    Console(soft_wrap=True, markup=False, highlight=False).print(table(headings, lines))


Answers = dict[str, list[str]]


def ask_served(names: Sequence[str], data: Path, limit: int, dtype: str) -> Answers:
    """What one server answers while all these examples are asked at once."""
    with our_server(WORK / f"{dtype}.log", "--adapters", str(FOLDER), "--dtype", dtype) as server:
        processes = []
        for name in names:
            task, _ = EXAMPLES[name]
            words = (
                "evaluate", task, str(test_file(data, task)), "--model", name,
                "--limit", str(limit), "--concurrency", "4", "--url", server.url,
                "--out", str(WORK / dtype / name),
            )  # fmt: skip
            words = (sys.executable, "-m", "sharelora_serve.cli", *words)
            processes.append(subprocess.Popen(words, stdout=subprocess.DEVNULL))
        if any(list(map(subprocess.Popen.wait, processes))):
            raise SystemExit("an evaluation failed; what it said is above")
    return {name: read_answers(WORK / dtype / name / "results.json") for name in names}


def read_answers(path: Path) -> list[str]:
    """Of a report that evaluate wrote."""
    return [row["answer"] for row in json.loads(path.read_text())["answers"]]


@torch.inference_mode()
def ask_hugging_face(names: Sequence[str], data: Path, limit: int) -> Answers:
    """What the base answers in float32, each adapter folded into its weights in turn."""
    base = base_folder(None)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    answers: Answers = {}
    for name in names:
        task, _ = EXAMPLES[name]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        fold(model, FOLDER / name)
        questions = spread(TASKS[task].read(test_file(data, task)), limit)
        texts = [question.text for question in questions]
        answers[name] = []
        for start in track(range(0, len(texts), _BATCH), description=name):
            answers[name] += generate(
                model, tokenizer, texts[start : start + _BATCH], TASKS[task].max_tokens
            )
    return answers


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    max_tokens: int,
) -> list[str]:
    """Greedy answers to user messages, in one batch."""
    chats = [[{"role": "user", "content": text}] for text in texts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
    found = tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in found]


def fold(model: PreTrainedModel, folder: Path) -> None:
    """W += alpha / rank * B A of every adapted layer, from the adapter's files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    for number in range(model.config.num_hidden_layers):
        layer = f"model.layers.{number}."
        for module, linear in model.get_submodule(layer[:-1]).named_modules():
            if isinstance(linear, torch.nn.Linear):
                a, b = (
                    factor(tensors, f"{prefix}{layer}{module}", f"shared.{module}", side)
                    for side in "AB"
                )
                linear.weight += config["lora_alpha"] / config["r"] * b @ a


def factor(tensors: Mapping[str, Tensor], own: str, shared: str, side: str) -> Tensor:
    """A layer's own factor, or the one of all layers."""
    for name in (own, shared):
        if (tensor := tensors.get(f"{name}.lora_{side}.weight")) is not None:
            return tensor.float()
    raise SystemExit(f"neither {own} nor {shared} has a factor {side}")


if __name__ == "__main__":
    app()
