"""The command evaluate: how well a served model does E2E, Banking77 or GSM8K."""

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from sharelora_serve.cli.connection import DEFAULT_URL, ApiKey, Url, connect, parse_answer
from sharelora_serve.cli.failure import one_message
from sharelora_serve.cli.output import progress_bar, show
from sharelora_serve.errors import ConfigurationError, ServeError


class TaskName(StrEnum):
    """The data sets that are known."""

    E2E = "e2e"
    BANKING77 = "banking77"
    GSM8K = "gsm8k"


def evaluate(
    task: Annotated[TaskName, typer.Argument(help="Data set, which decides what is scored.")],
    data: Annotated[
        Path,
        typer.Argument(help="Its test file as its authors publish it, such as banking77/test.csv."),
    ],
    model: Annotated[str, typer.Option(help="Name that is served, the base's or an adapter's.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions from the file's start; without it all.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 32,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.json, with every answer, and report.md."),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Score a served model's answers to a data set.

    Each question is one user message, each answer greedy.
    """
    with one_message():
        try:
            from sharelora_serve.evaluation.client import Served, ask_all
            from sharelora_serve.evaluation.report import as_markdown, write_report
            from sharelora_serve.evaluation.tasks import TASKS
        except ImportError as error:
            raise ConfigurationError(
                f"evaluation needs more packages ({error}); pip install 'sharelora-serve[evaluate]'"
            ) from error
        chosen = TASKS[task]
        questions = chosen.read(data)[:limit]
        with connect(url, api_key) as client:
            parse_answer(client.get("/v1/models"))
        with progress_bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            bar = progress.add_task(f"Asking {model}", total=len(questions))
            served = Served(url, model, api_key, concurrency)
            prompts = [question.text for question in questions]
            try:
                answers = asyncio.run(
                    ask_all(served, prompts, chosen.max_tokens, lambda: progress.advance(bar))
                )
            except* ServeError as errors:
                raise errors.exceptions[0] from None
        scores = chosen.score(questions, answers)
        if out is not None:
            write_report(out, task.value, model, questions, answers, scores)
        show(as_markdown(task.value, model, len(questions), scores))
