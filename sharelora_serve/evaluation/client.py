"""Asks a served model all questions of a data set, many at once."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from sharelora_serve.errors import ServeError

_MAX_TRIES = 8  # of a question that the server has no room for
_LONGEST_PAUSE = 20.0  # seconds between two of them, if the server names none


@dataclass(frozen=True, slots=True)
class Served:
    """A model of a server, as a client reaches it."""

    url: str
    model: str
    api_key: str | None
    concurrency: int


async def ask_all(
    served: Served, prompts: Sequence[str], max_tokens: int, report: Callable[[], None]
) -> list[str]:
    """The greedy answers to one user message each, in order; `report` is called after each.

    Raises ServeError with the server's message if one is refused, httpx.HTTPError.
    """
    headers = {} if served.api_key is None else {"authorization": f"Bearer {served.api_key}"}
    room = asyncio.Semaphore(served.concurrency)
    base_url = served.url.rstrip("/").removesuffix("/v1")
    timeout = httpx.Timeout(10.0, read=None, pool=None)
    async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=timeout) as client:

        async def ask(prompt: str) -> str:
            body = {
                "model": served.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": max_tokens,
                "temperature": 0,
            }
            async with room:
                answer = await _post(client, body)
            report()
            text: str = answer.json()["choices"][0]["message"]["content"]
            return text.strip()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(prompt)) for prompt in prompts]
        return [task.result() for task in tasks]


async def _post(client: httpx.AsyncClient, body: dict[str, object]) -> httpx.Response:
    pause = 0.5
    for attempt in range(_MAX_TRIES):
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code != httpx.codes.TOO_MANY_REQUESTS or attempt == _MAX_TRIES - 1:
            break
        await asyncio.sleep(float(response.headers.get("retry-after", pause)))
        pause = min(2 * pause, _LONGEST_PAUSE)
    if response.is_error:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"{response.url} answered {response.status_code}: {response.text[:200]}"
        raise ServeError(message)
    return response
