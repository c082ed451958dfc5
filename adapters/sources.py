"""The data sets of the examples, and trainings on them by this project's own command line.

A folder DATA holds banking77/, e2e/ and gsm8k/ as their authors publish them.
"""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sharelora_serve.evaluation.tasks import TASKS

WORK = Path("build/examples")
COMMON_A = Path("docs/quality/common-a")
_MIXTURE_STEPS = 300
_ROWS_OF_EACH = 800  # in a mixture


@dataclass(frozen=True)
class Source:
    """A data set: its files, how many steps learn from it, and what a card says of it."""

    train: str
    test: str
    num_steps: int
    title: str
    licence: str


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "banking77": Source(
            train="train.csv",
            test="test.csv",
            num_steps=200,
            title="Banking77, PolyAI, arXiv 2003.04807",
            licence="CC BY 4.0",
        ),
        "e2e": Source(
            train="train.csv",
            test="test.csv",
            num_steps=100,
            title="E2E NLG challenge, development set, arXiv 1706.09254",
            licence="CC BY-SA 4.0",
        ),
        "gsm8k": Source(
            train="train.jsonl",
            test="test.jsonl",
            num_steps=100,
            title="GSM8K, OpenAI, arXiv 2110.14168",
            licence="MIT",
        ),
    }
)


def test_file(data: Path, name: str) -> Path:
    """Of a data set."""
    return data / name / SOURCES[name].test


def command(*words: str) -> int:
    """Run this project's command line; the most memory it had, in bytes.

    Raises CalledProcessError if it fails.
    """
    process = subprocess.Popen([sys.executable, "-m", "sharelora_serve.cli", *words])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), words)
    return usage.ru_maxrss * 1024


def train(data: Path, name: str, output: Path, *options: str) -> dict[str, Any]:
    """Train on a data set; what it took, and its losses as (step, mean since the one before)."""
    source, template = SOURCES[name], TASKS[name].template
    asked = ("--user", template.user, "--assistant", template.assistant)
    said = ("--data-name", source.title, "--licence", source.licence)
    file = data / name / source.train
    return _train(file, output, source.num_steps, *asked, *said, *options)


def train_common_a(data: Path) -> None:
    """COMMON_A: the A of a ShareA adapter that learns all data sets together, for others to freeze.

    Its B is the mean of all layers' B, so that the folder is small and an adapter nevertheless.
    """
    rows = [row for name in SOURCES for row in _conversations(data, name)]
    random.Random(0).shuffle(rows)
    WORK.mkdir(parents=True, exist_ok=True)
    mixed, learnt = WORK / "mixture.jsonl", WORK / "mixture"
    mixed.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    _train(mixed, learnt, _MIXTURE_STEPS, "--max-length", "600")
    config = json.loads((learnt / "adapter_config.json").read_text())
    tensors = load_file(learnt / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("shared.")}
    layers: dict[str, list[torch.Tensor]] = {}
    for name in sorted(tensors.keys() - kept.keys()):
        layers.setdefault("shared." + ".".join(name.split(".")[5:]), []).append(tensors[name])
    kept |= {name: torch.stack(each).float().mean(0).half() for name, each in layers.items()}
    COMMON_A.mkdir(parents=True)
    (COMMON_A / "adapter_config.json").write_text(json.dumps(config | {"share": "AB"}, indent=2))
    save_file(kept, COMMON_A / "adapter_model.safetensors", metadata={"format": "pt"})


def _train(data: Path, output: Path, num_steps: int, *options: str) -> dict[str, Any]:
    shutil.rmtree(output, ignore_errors=True)
    memory = command("train", str(data), str(output), "--steps", str(num_steps), *options)
    curve = re.findall(r"^\| (\d+) \| ([\d.]+) \|", (output / "README.md").read_text(), re.M)
    return {
        "training_bytes": memory,
        "curve": [(int(step), float(loss)) for step, loss in curve],
    }


def _conversations(data: Path, name: str) -> Iterator[list[dict[str, str]]]:
    """Some of a data set's questions with their answers."""
    source, template = SOURCES[name], TASKS[name].template
    with (data / name / source.train).open(newline="", encoding="utf-8") as file:
        is_csv = source.train.endswith(".csv")
        rows: list[dict[str, str]] = list(csv.DictReader(file) if is_csv else map(json.loads, file))
    for row in random.Random(0).sample(rows, _ROWS_OF_EACH):
        yield [
            {"role": "user", "content": template.user.format_map(row)},
            {"role": "assistant", "content": template.assistant.format_map(row)},
        ]
