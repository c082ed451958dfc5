"""The command evaluate: how well a served model does E2E, Banking77 or GSM8K."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from sharelora_serve.cli.connection import DEFAULT_URL, ApiKey, Url, connect, parse_answer
from sharelora_serve.cli.failure import one_message
from sharelora_serve.cli.output import progress_bar, show
from sharelora_serve.errors import ConfigurationError

_MAX_TRIES = 8  # of a question that the server has no room for


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
    concurrency: Annotated[int, typer.Option(min=1, max=100, help="Questions at once.")] = 32,
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
            from sharelora_serve.evaluation.report import as_markdown, write_report
            from sharelora_serve.evaluation.tasks import TASKS
        except ImportError as error:
            raise ConfigurationError(
                f"evaluation needs more packages ({error}); pip install 'sharelora-serve[evaluate]'"
            ) from error
        chosen = TASKS[task]
        questions = chosen.read(data)[:limit]
        with (
            connect(url, api_key) as client,
            progress_bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress,
        ):
            bar = progress.add_task(f"Asking {model}", total=len(questions))

            def ask(text: str) -> str:
                answer = _ask(client, model, text, chosen.max_tokens)
                progress.advance(bar)
                return answer

            answers = _in_parallel(ask, [question.text for question in questions], concurrency)
        scores = chosen.score(questions, answers)
        if out is not None:
            write_report(out, task.value, model, questions, answers, scores)
        show(as_markdown(task.value, model, len(questions), scores))


def _in_parallel(
    ask: Callable[[str], str], questions: Sequence[str], concurrency: int
) -> list[str]:
    """The answers in order; the first error ends it, and what was not asked yet is not asked."""
    executor = ThreadPoolExecutor(concurrency)
    try:
        return list(executor.map(ask, questions))
    finally:
        executor.shutdown(cancel_futures=True)


def _ask(client: httpx.Client, model: str, question: str, max_tokens: int) -> str:
    """A greedy answer to one user message; a server that is full is asked again."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    for attempt in range(_MAX_TRIES):
        response = client.post("/v1/chat/completions", json=body)
        if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
            break
        time.sleep(float(response.headers.get("retry-after", 2**attempt)))
    text: str = parse_answer(response)["choices"][0]["message"]["content"]
    return text.strip()
