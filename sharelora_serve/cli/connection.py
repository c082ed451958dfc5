"""The running server that a command talks to: its options, its client and its answers."""

import re
from typing import Annotated, Any

import httpx
import typer

from sharelora_serve.errors import ServeError

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[
    str,
    typer.Option(
        help="Address of the running server, such as http://127.0.0.1:8000.",
        envvar="SHARELORA_URL",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        help="API key, as 'keys create' printed it, such as slk_...; without it the server must "
        "be one without keys.",
        envvar="SHARELORA_API_KEY",
    ),
]


def connect(url: str, api_key: str | None) -> httpx.Client:
    """A client of the server at url, with or without a trailing /v1; it waits for slow answers.

    Raises ServeError if url is no address, or the key not one that a header can carry.
    """
    base_url = _address(url.rstrip("/").removesuffix("/v1"))
    headers = {}
    if api_key is not None:
        # Checked here, since httpx would show the header that it refuses.
        if not re.fullmatch(r"[!-~]+", api_key):
            raise ServeError(
                "the API key is empty, or has blanks, line ends or other characters that no key "
                "has; give it as 'sharelora-serve keys create' printed it"
            )
        headers["authorization"] = f"Bearer {api_key}"
    return httpx.Client(base_url=base_url, headers=headers, timeout=httpx.Timeout(10.0, read=None))


def _address(text: str) -> httpx.URL:
    try:
        address = httpx.URL(text)
    except httpx.InvalidURL:
        address = httpx.URL()
    if address.scheme not in ("http", "https") or not address.host or (address.port or 1) > 65535:
        raise ServeError(f"{text!r} is not the address of a server; give one such as {DEFAULT_URL}")
    return address


def check(response: httpx.Response) -> httpx.Response:
    """The response, if it is not an error; else ServeError with the server's own message."""
    if response.is_error:
        response.read()
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):  # not our server, or something before it
            message = f"{response.url} answered {response.status_code}: {response.text[:200]}"
        raise ServeError(message)
    return response


def parse_answer(response: httpx.Response) -> dict[str, Any]:
    """The JSON object in an answer; else ServeError with the server's own message."""
    try:
        answer = check(response).json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ServeError(
            f"{response.url} answered with what is no JSON object: is another server running "
            "there? Give the address of this one with --url"
        )
    return answer
