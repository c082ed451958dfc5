"""Tables and plots of what quality.py found.

PYTHONPATH=. python adapters/quality_report.py docs/quality/runs.jsonl
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

import typer
from matplotlib.figure import Figure
from rich.console import Console

from adapters.quality import (
    FORMS,
    RATES,
    SEEDS,
    TASKS,
    Results,
    Run,
    best_rate,
    mean_scores,
    next_rate,
    read_results,
)
from loadtest.markdown import table
from sharelora_serve.config import format_bytes


def sweep_table(results: Results, task: str) -> str:
    """Scores of the first seed: forms down, learning rates across."""
    lines = []
    for form in FORMS:
        known = mean_scores(results, task, form, SEEDS[:1])
        best = max(known.values(), default=0.0)
        cells = ("" if rate not in known else mark(known[rate], best) for rate in RATES)
        lines.append((form, *cells))
    return table((f"{task}, {TASKS[task].score}", *(f"{rate:g}" for rate in RATES)), lines)


def mark(value: float, best: float) -> str:
    """One decimal, in bold where it is the best of its line."""
    return f"**{value:.1f}**" if value == best else f"{value:.1f}"


def seeds_table(results: Results, task: str) -> str:
    """Each form at its best rate with every seed, against LoRA, and the memory of training.

    Differences are of runs of one seed, whose rows come in the same order; their spread is the
    standard deviation over seeds.
    """
    score = TASKS[task].score
    of_lora: list[float] = []
    lines = []
    for form in FORMS:
        if next_rate(results, task, form) is not None:
            continue
        rate = best_rate(results, task, form)
        runs = [results[run] for seed in SEEDS if (run := Run(task, form, rate, seed)) in results]
        scores = [run[score] for run in runs]
        of_lora = of_lora or scores
        seeds = ", ".join(f"{value:.1f}" for value in scores)
        less = [own - lora for own, lora in zip(scores, of_lora, strict=False)]
        lines.append(
            (
                form,
                f"{rate:g}",
                seeds,
                with_spread(scores),
                with_spread(less, "+"),
                format_bytes(max(run["training_bytes"] for run in runs)),
            )
        )
    headings = (
        task, "learning rate", f"{score} by seed", "mean", "difference from LoRA",
        "memory of training",
    )  # fmt: skip
    return table(headings, lines)


def with_spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.1f} ± {spread:.1f}"


def plot_rates(results: Results, path: Path) -> None:
    """A panel for each task: score over learning rate, a line for each form."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for form in FORMS:
            points = mean_scores(results, task, form, SEEDS[:1]).items()
            axes.plot(*zip(*points, strict=True), marker="o", label=form)
        axes.set(xscale="log", xlabel="learning rate", ylabel=TASKS[task].score, title=task)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_losses(results: Results, path: Path) -> None:
    """A panel for each task: the losses of each form at its best rate, first seed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for form in FORMS:
            if next_rate(results, task, form) is None:
                found = results[Run(task, form, best_rate(results, task, form), SEEDS[0])]
                axes.plot(*zip(*found["curve"], strict=True), marker=".", label=form)
        axes.set(yscale="log", xlabel="step", ylabel="loss", title=task)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(results: Path) -> None:
    """Print the tables; rates.png and losses.png stand beside the results."""
    found = read_results(results)
    plot_rates(found, results.with_name("rates.png"))
    plot_losses(found, results.with_name("losses.png"))
    parts = [part(found, task) for part in (sweep_table, seeds_table) for task in TASKS]
    Console(soft_wrap=True, markup=False, highlight=False).print("\n".join(parts))


if __name__ == "__main__":
    typer.run(main)
