"""Train every form of adapter on the same rows and steps, and score each as it is served.

PYTHONPATH=. python adapters/quality.py DATA docs/quality/runs.jsonl

DATA holds banking77/, e2e/ and gsm8k/ as their authors publish them. Runs that the results have
already are left out, so it can be stopped and started again at any time.
"""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loadtest.servers import our_server

STEPS, MIXTURE_STEPS = 200, 600
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
WORK = Path("build/quality")
MIXTURE = WORK / "mixture"


@dataclass(frozen=True)
class Task:
    """What is asked and answered, how many of the test's questions, and what counts."""

    user: str
    assistant: str
    num_questions: int
    score: str


TASKS = {
    "banking77": Task(
        "Intent of this bank customer's message: {text}", "{category}", 1000, "accuracy"
    ),
    "e2e": Task("Describe the restaurant: {mr}", "{ref}", 630, "BLEU"),
}

FORMS: dict[str, tuple[str, ...]] = {
    "LoRA": ("--share", "none"),
    "LoRA, rank 8": ("--share", "none", "--rank", "8"),  # 95 % of the bytes of ShareA of rank 16
    "ShareA": ("--share", "A"),
    "ShareB": ("--share", "B"),
    "ShareAB": ("--share", "AB"),
    "random A, frozen": ("--freeze-a-from", "1"),
    "A of a mixture, frozen": ("--freeze-a-from", str(MIXTURE)),
}


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    task: str
    form: str
    rate: float
    seed: int


Results = dict[Run, dict[str, Any]]


def read_results(path: Path) -> Results:
    """What was found before; nothing if there is no such file."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {Run(*(line[key] for key in ("task", "form", "rate", "seed"))): line for line in lines}


def next_run(results: Results) -> Run | None:
    """Every rate with the first seed; then each form's best rate with the other seeds."""
    for task in TASKS:
        for form in FORMS:
            for rate in RATES:
                if (run := Run(task, form, rate, SEEDS[0])) not in results:
                    return run
    for seed in SEEDS[1:]:
        for task in TASKS:
            for form in FORMS:
                if (run := Run(task, form, best_rate(results, task, form), seed)) not in results:
                    return run
    return None


def best_rate(results: Results, task: str, form: str) -> float:
    """Of the sweep with the first seed."""
    score = TASKS[task].score
    of = {rate: float(results[Run(task, form, rate, SEEDS[0])][score]) for rate in RATES}
    return max(RATES, key=of.__getitem__)


def command(*words: str) -> int:
    """Run this project's command line; the most memory it had, in bytes. Its failure is ours."""
    process = subprocess.Popen([sys.executable, "-m", "sharelora_serve.cli", *words])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


def train(data: Path, output: Path, *options: str) -> dict[str, Any]:
    """What it took, and the losses it went through, as (step, mean since the one before)."""
    shutil.rmtree(output, ignore_errors=True)
    started_at = time.monotonic()
    memory = command("train", str(data), str(output), *options)
    seconds = time.monotonic() - started_at
    curve = re.findall(r"^\| (\d+) \| ([\d.]+) \|", (output / "README.md").read_text(), re.M)
    return {
        "training_seconds": round(seconds, 1),
        "training_bytes": memory,
        "curve": [(int(step), float(loss)) for step, loss in curve],
    }


def train_mixture(data: Path) -> None:
    """A ShareA adapter of all tasks together, GSM8K too, whose A others freeze."""
    rows = list(mixed_rows(data))
    random.Random(0).shuffle(rows)
    WORK.mkdir(parents=True, exist_ok=True)
    mixed = WORK / "mixture.jsonl"
    mixed.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    train(mixed, MIXTURE, "--steps", str(MIXTURE_STEPS), "--max-length", "600")


def mixed_rows(data: Path) -> Iterator[list[dict[str, str]]]:
    """As many conversations of each task."""
    for name, task in TASKS.items():
        with (data / name / "train.csv").open(newline="", encoding="utf-8") as file:
            fields = random.Random(0).sample(list(csv.DictReader(file)), 1600)
        for each in fields:
            yield conversation(task.user.format_map(each), task.assistant.format_map(each))
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for line in random.Random(0).sample(lines, 1600):
        row = json.loads(line)
        yield conversation(row["question"], row["answer"])


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    """One question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def measure(run: Run, data: Path, url: str) -> dict[str, Any]:
    """Train and evaluate; scores by name, and what the training took."""
    task = TASKS[run.task]
    folder, report = WORK / "adapter", WORK / "report"
    training = train(
        data / run.task / "train.csv", folder,
        "--user", task.user, "--assistant", task.assistant, *FORMS[run.form],
        "--learning-rate", str(run.rate), "--steps", str(STEPS), "--seed", str(run.seed),
    )  # fmt: skip
    command("adapters", "add", "trained", str(folder), "--replace", "--url", url)
    command(
        "evaluate", run.task, str(data / run.task / "test.csv"), "--model", "trained",
        "--limit", str(task.num_questions), "--out", str(report), "--url", url,
    )  # fmt: skip
    scores = json.loads((report / "results.json").read_text())["scores"]
    found = {name: round(score["value"], 3) for name, score in scores.items()}
    return {**found, **training}


def main(
    data: Path,
    results: Path,
    minutes: Annotated[float, typer.Option(help="Begin no run after so many.")] = 1e9,
) -> None:
    """Do the runs that are missing, one line of results for each."""
    ends_at = time.monotonic() + 60 * minutes
    results.parent.mkdir(parents=True, exist_ok=True)
    if not MIXTURE.exists():
        train_mixture(data)
    with our_server(WORK / "log", "--prefix-cache") as server:
        while time.monotonic() < ends_at and (run := next_run(read_results(results))) is not None:
            Console(stderr=True).rule(f"{run.task}, {run.form}, {run.rate:g}, seed {run.seed}")
            found = measure(run, data, server.url)
            with results.open("a") as file:
                file.write(json.dumps({**vars(run), **found}) + "\n")


if __name__ == "__main__":
    typer.run(main)
