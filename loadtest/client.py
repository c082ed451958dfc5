"""One streamed completion, and when each of its tokens came."""

import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

from loadtest.endpoint import Endpoint, OpenAiEndpoint

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "big"),
    *("red", "dog", "run", "over", "that", "hill", "to", "get", "some", "food"),
)


@dataclass(slots=True)
class Timeline:
    """What a request was answered, by which version, and when, in seconds of perf_counter.

    status      of the HTTP answer; None if none came
    num_tokens  as the server counted them, else as many as came with a text
    error       why this is not the whole answer; None if it is
    """

    sent_at: float
    tokens_at: list[float] = field(default_factory=list)
    text: str = ""
    version: str = ""
    status: int | None = None
    num_tokens: int = 0
    error: str | None = None

    @property
    def first_token_seconds(self) -> float:
        """From sending the request to its first token."""
        return self.tokens_at[0] - self.sent_at

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [later - earlier for earlier, later in pairwise(self.tokens_at)]


def make_client(url: str, *, keeps_connections: bool = True) -> httpx.AsyncClient:
    """A client with as many connections as there are streams, or a new one for each request."""
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None if keeps_connections else 0
    )
    # A proxy would be measured too, and does not reach this machine's own servers.
    return httpx.AsyncClient(base_url=url, timeout=900, limits=limits, trust_env=False)


def random_prompt(num_words: int, generator: random.Random) -> str:
    """Words in random order, about a token each."""
    return " ".join(generator.choice(WORDS) for _ in range(num_words))


def percentile(values: Iterable[float], percent: float) -> float:
    """The least of the values that so many percent of them do not exceed; RuntimeError of none."""
    ordered = sorted(values)
    if not ordered:
        raise RuntimeError("nothing was measured: ask for more requests, or for longer answers")
    index = -int(-percent * len(ordered) // 100) - 1
    return ordered[max(0, index)]


async def ask(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    model: str,
    prompt: str,
    num_tokens: int,
    *,
    api_key: str | None = None,
    on_token: Callable[[], object] = lambda: None,
) -> Timeline:
    """Greedy, exactly num_tokens new tokens; whatever goes wrong is the timeline's error.

    Calls on_token() whenever something comes.
    """
    timeline = Timeline(time.perf_counter())
    try:
        await _stream(client, endpoint, model, prompt, num_tokens, api_key, timeline, on_token)
    except httpx.HTTPError as error:
        timeline.error = f"the connection failed: {error!r}"
    except RuntimeError as error:
        timeline.error = str(error)
    except (ValueError, KeyError, TypeError) as error:
        timeline.error = f"the answer is not understood: {error!r}"
    return timeline


async def stream(client: httpx.AsyncClient, model: str, prompt: str, num_tokens: int) -> Timeline:
    """The same of an OpenAI-compatible server.

    Raises RuntimeError when it is refused, fails or breaks off, with what the server said.
    """
    timeline = await ask(client, OpenAiEndpoint(), model, prompt, num_tokens)
    if timeline.error is not None:
        raise RuntimeError(timeline.error)
    return timeline


async def _stream(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    model: str,
    prompt: str,
    num_tokens: int,
    api_key: str | None,
    timeline: Timeline,
    on_token: Callable[[], object],
) -> None:
    body = endpoint.body(model, prompt, num_tokens)
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    is_whole = False
    async with client.stream("POST", endpoint.path, json=body, headers=headers) as response:
        timeline.status = response.status_code
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        timeline.version = response.headers.get("x-adapter-version", "")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            piece = endpoint.read(json.loads(line.removeprefix("data: ")))
            # The end comes with the last token, and by itself only if no token has a text.
            if piece.text or not timeline.tokens_at:
                timeline.tokens_at.append(time.perf_counter())
                on_token()
            timeline.text += piece.text
            timeline.num_tokens = piece.num_tokens or len(timeline.tokens_at)
            is_whole |= piece.is_end
    if not is_whole:
        raise RuntimeError(f"the answer breaks off after {len(timeline.tokens_at)} tokens")
