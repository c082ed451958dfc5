"""The command chat: talk to one model of a running server, streamed."""

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from sharelora_serve.cli.connection import DEFAULT_URL, ApiKey, Url, check, connect
from sharelora_serve.cli.failure import one_message
from sharelora_serve.errors import ServeError


def chat(
    model: Annotated[
        str, typer.Option(help="Name of the base or of an adapter, such as banking77-intent.")
    ],
    message: Annotated[
        str | None,
        typer.Argument(
            help="One message to answer; without it, standard input if that is piped, else a "
            "conversation (Ctrl-D ends it, Ctrl-C cuts an answer short)."
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    system: Annotated[
        str | None,
        typer.Option(help="System message; without it the chat template's own."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="New tokens per answer at most, such as 200; without it the context."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Randomness, such as 0.7; 0 always takes the likeliest token.")
    ] = 0.0,
) -> None:
    """Talk to a model of a running server; answers are streamed."""
    request: dict[str, Any] = {"model": model, "temperature": temperature, "stream": True}
    if max_tokens is not None:
        request["max_tokens"] = max_tokens
    messages = [{"role": "system", "content": system}] if system is not None else []
    console = Console()
    with one_message(), connect(url, api_key) as client:
        if message is None and not sys.stdin.isatty():
            message = sys.stdin.read()
        if message is not None:
            messages.append({"role": "user", "content": message})
            _show(console, stream_answer(client, {**request, "messages": messages}))
            return
        while (line := _next_line(console)) is not None:
            messages.append({"role": "user", "content": line})
            answer = _show(console, stream_answer(client, {**request, "messages": messages}))
            messages.append({"role": "assistant", "content": answer})


def stream_answer(client: httpx.Client, request: dict[str, Any]) -> Iterator[str]:
    """The pieces of text of a streamed chat completion, as they arrive.

    Raises ServeError with the server's message if it refuses or fails.
    """
    with client.stream("POST", "/v1/chat/completions", json=request) as response:
        for line in check(response).iter_lines():
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            if not line.startswith("data:"):  # the blank line after each event, or a comment
                continue
            event = json.loads(data)
            if "error" in event:
                raise ServeError(event["error"]["message"])
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    yield text
    raise ServeError("the server closed the connection before the answer ended")


def _show(console: Console, pieces: Iterator[str]) -> str:
    """Print an answer as it comes and return as much of it as came before Ctrl-C."""
    shown = ""
    try:
        for piece in pieces:
            typer.echo(piece, nl=False)
            shown += piece
    except KeyboardInterrupt:
        console.print(" [cut short]", style="dim", markup=False, end="")
    console.print()
    return shown


def _next_line(console: Console) -> str | None:
    """The user's next message that is not blank; None at the end of the conversation."""
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return None
        if line:
            return line
