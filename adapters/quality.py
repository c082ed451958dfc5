"""Train every form of adapter on the same rows and steps, and score each as it is served.

The A of a mixture has had steps of its own before, on rows of these tasks among others.

PYTHONPATH=. python adapters/quality.py TASK DATA docs/quality/runs.jsonl

Runs that the results have already are left out, so it can be stopped and started again at any time.
Tasks can run side by side, with OMP_NUM_THREADS=1 and GOMP_SPINCOUNT=1000 on two cores. DATA is as
in sources.py.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from adapters.sources import COMMON_A, WORK, command, test_file, train, train_common_a
from loadtest.servers import our_server

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_FIRST_RATES = (3e-3, 1e-3, 1e-2)  # then the neighbours of the best
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """How many of a test file's questions are asked, and what counts."""

    num_questions: int
    score: str


TASKS = {"banking77": Task(1000, "accuracy"), "e2e": Task(300, "BLEU")}

MARGIN = 2.0
"""Points or BLEU by which runs of two seeds easily differ."""

FORMS: dict[str, tuple[str, ...]] = {
    "LoRA": ("--share", "none"),
    "LoRA, rank 8": ("--share", "none", "--rank", "8"),  # 95 % of the bytes of ShareA of rank 16
    "ShareA": ("--share", "A"),
    "ShareB": ("--share", "B"),
    "ShareAB": ("--share", "AB"),
    "random A, frozen": ("--freeze-a",),
    "A of a mixture, frozen": ("--freeze-a-from", str(COMMON_A)),
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


def next_run(results: Results, task: str) -> Run | None:
    """The sweep of every form with the first seed; then its close rates with another, and so on."""
    for form in FORMS:
        if (rate := next_rate(results, task, form)) is not None:
            return Run(task, form, rate, SEEDS[0])
    for at, seed in enumerate(SEEDS[1:], start=1):
        for form in FORMS:
            for rate in close_rates(results, task, form, SEEDS[:at]):
                if (run := Run(task, form, rate, seed)) not in results:
                    return run
    return None


def next_rate(results: Results, task: str, form: str) -> float | None:
    """None once the best rate's neighbours in RATES were tried with the first seed."""
    known = mean_scores(results, task, form, SEEDS[:1])
    for rate in _FIRST_RATES:
        if rate not in known:
            return rate
    at = RATES.index(max(known, key=known.__getitem__))
    neighbours = RATES[max(0, at - 1) : at + 2]
    return next((rate for rate in neighbours if rate not in known), None)


def close_rates(results: Results, task: str, form: str, seeds: Sequence[int]) -> list[float]:
    """Those of which so many seeds do not say that another is better, ascending."""
    known = mean_scores(results, task, form, seeds)
    return [rate for rate, score in known.items() if score >= max(known.values()) - MARGIN]


def best_rate(results: Results, task: str, form: str) -> float:
    """The best in the mean, of the rates that have the most seeds."""
    each = (mean_scores(results, task, form, SEEDS[:number]) for number in range(len(SEEDS), 0, -1))
    known = next(scores for scores in each if scores)
    return max(known, key=known.__getitem__)


def mean_scores(results: Results, task: str, form: str, seeds: Sequence[int]) -> dict[float, float]:
    """Means over these seeds by learning rate, ascending, of the rates that have them all."""
    runs = {rate: [Run(task, form, rate, seed) for seed in seeds] for rate in RATES}
    return {
        rate: statistics.mean(results[run][TASKS[task].score] for run in of_rate)
        for rate, of_rate in runs.items()
        if all(run in results for run in of_rate)
    }


def measure(run: Run, data: Path, url: str) -> dict[str, Any]:
    """Train and evaluate; scores by name, and what the training took."""
    task = TASKS[run.task]
    name = f"{run.form} {run.rate:g} {run.seed}".replace(",", "").replace(" ", "-")
    folder, report = WORK / run.task / name, WORK / run.task / "reports" / name
    options = ("--learning-rate", str(run.rate), "--seed", str(run.seed))
    training = train(data, run.task, folder, *FORMS[run.form], *options)
    command("adapters", "add", "trained", str(folder), "--replace", "--url", url)
    command(
        "evaluate", run.task, str(test_file(data, run.task)), "--model", "trained",
        "--limit", str(task.num_questions), "--out", str(report), "--url", url,
    )  # fmt: skip
    scores = json.loads((report / "results.json").read_text())["scores"]
    found = {name: round(score["value"], 3) for name, score in scores.items()}
    return {**found, **training}


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")],
    data: Path,
    results: Path,
    minutes: Annotated[float, typer.Option(help="Begin no run after so many.")] = 1e9,
) -> None:
    """Do the runs that are missing, one line of results for each."""
    if task not in TASKS:
        raise typer.BadParameter(f"{task} is none of {', '.join(TASKS)}")
    ends_at = time.monotonic() + 60 * minutes
    results.parent.mkdir(parents=True, exist_ok=True)
    if not COMMON_A.exists():
        train_common_a(data)
    with our_server(WORK / task / "log", "--prefix-cache", "--dtype", "float16") as server:
        while time.monotonic() < ends_at and (run := next_run(read_results(results), task)):
            Console(stderr=True).rule(f"{run.task}, {run.form}, {run.rate:g}, seed {run.seed}")
            found = measure(run, data, server.url)
            with results.open("a") as file:
                file.write(json.dumps({**vars(run), **found}) + "\n")


if __name__ == "__main__":
    typer.run(main)
