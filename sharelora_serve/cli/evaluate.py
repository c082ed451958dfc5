"""The command evaluate: how well a served model does E2E, Banking77 or GSM8K."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import httpx
import typer
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from sharelora_serve.cli.connection import DEFAULT_URL, ApiKey, Url, connect, parse_answer
from sharelora_serve.cli.failure import one_message
from sharelora_serve.cli.output import progress_bar, show
from sharelora_serve.config import EMBEDDED_MODEL_NAME
from sharelora_serve.errors import ConfigurationError

if TYPE_CHECKING:  # slow imports, which --help need not wait for
    from sharelora_serve.evaluation.tasks import Question
    from sharelora_serve.training.data import Row

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

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
        int | None, typer.Option(min=1, help="Questions, evenly over the file; without it all.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=100, help="Questions at once.")] = 32,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.json, with every answer, and report.md."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder of the served base, whose tokens the loss of GSM8K's answers is of; the "
            "embedded one by default."
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Score a served model's answers to a data set.

    Each question is one user message, each answer greedy. Of GSM8K's worked answers the loss is
    told too, in nats per token.
    """
    with one_message():
        try:
            from sharelora_serve.evaluation.report import as_markdown, write_report
            from sharelora_serve.evaluation.scores import loss_scores
            from sharelora_serve.evaluation.tasks import TASKS, read_worked_answers, spread
        except ImportError as error:
            raise ConfigurationError(
                f"evaluation needs more packages ({error}); pip install 'sharelora-serve[evaluate]'"
            ) from error
        chosen = TASKS[task]
        questions = spread(chosen.read(data), limit)
        if not questions:
            raise ConfigurationError(f"{data} has no questions; give a file with at least one")
        worked = read_worked_answers(data, base) if task is TaskName.GSM8K else []
        worked = spread(worked, limit)
        with (
            connect(url, api_key) as client,
            progress_bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress,
        ):
            if worked and base is None:
                _check_base(client, model)
            bar = progress.add_task(f"Asking {model}", total=len(questions) + len(worked))

            def ask(question: "Question") -> str:
                answer = _ask(client, model, question.text, chosen.max_tokens)
                progress.advance(bar)
                return answer

            def read(row: "Row") -> list[float]:
                logprobs = _answer_logprobs(client, model, row)
                progress.advance(bar)
                return logprobs

            answers = _in_parallel(ask, questions, concurrency)
            logprobs = _in_parallel(read, worked, concurrency)
        scores = chosen.score(questions, answers)
        if logprobs:
            scores |= loss_scores(logprobs)
        if out is not None:
            write_report(out, task.value, model, questions, answers, scores)
        show(as_markdown(task.value, model, len(questions), scores))


def _check_base(client: httpx.Client, model: str) -> None:
    """Raise ConfigurationError if a model is known to be of another base than the embedded one."""
    listed = {each["id"]: each for each in parse_answer(client.get("/v1/models"))["data"]}
    if model in listed:
        served = listed[model].get("parent") or model
        if served != EMBEDDED_MODEL_NAME:
            raise ConfigurationError(
                f"{model} is served over {served}, whose tokens the loss is of; give --base with "
                "its folder"
            )


def _in_parallel(
    ask: Callable[[Asked], Answered], asked: Sequence[Asked], concurrency: int
) -> list[Answered]:
    """The answers in order; the first error ends it, and what was not asked yet is not asked."""
    executor = ThreadPoolExecutor(concurrency)
    try:
        return list(executor.map(ask, asked))
    finally:
        executor.shutdown(cancel_futures=True)


def _ask(client: httpx.Client, model: str, question: str, max_tokens: int) -> str:
    """A greedy answer to one user message."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    text: str = _post(client, "/v1/chat/completions", body)["message"]["content"]
    return text.strip()


def _answer_logprobs(client: httpx.Client, model: str, row: "Row") -> list[float]:
    """Log probabilities of a given answer's tokens, after its prompt."""
    tokens = [*row.prompt_ids, *row.answer_ids]
    body = {"model": model, "prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 0}
    logprobs: list[float] = _post(client, "/v1/completions", body)["logprobs"]["token_logprobs"]
    return logprobs[len(row.prompt_ids) :]


def _post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The first choice of an answer; a server that is full is asked again."""
    for attempt in range(_MAX_TRIES):
        response = client.post(path, json=body)
        if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
            break
        time.sleep(float(response.headers.get("retry-after", 2**attempt)))
    choice: dict[str, Any] = parse_answer(response)["choices"][0]
    return choice
