"""One streamed completion, and when each of its tokens came."""

import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "big"),
    *("red", "dog", "run", "over", "that", "hill", "to", "get", "some", "food"),
)


@dataclass(slots=True)
class Timeline:
    """What a request was answered, by which version, and when, in seconds of perf_counter."""

    sent_at: float
    tokens_at: list[float] = field(default_factory=list)
    text: str = ""
    version: str = ""

    @property
    def first_token_seconds(self) -> float:
        """From sending the request to its first token."""
        return self.tokens_at[0] - self.sent_at

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [later - earlier for earlier, later in pairwise(self.tokens_at)]


def make_client(url: str) -> httpx.AsyncClient:
    """A client with as many connections as there are streams."""
    return httpx.AsyncClient(base_url=url, timeout=900, limits=httpx.Limits(max_connections=None))


def random_prompt(num_words: int, generator: random.Random) -> str:
    """Words in random order, about a token each."""
    return " ".join(generator.choice(WORDS) for _ in range(num_words))


def percentile(values: Iterable[float], percent: float) -> float:
    """The least of the values that so many percent of them do not exceed; not of nothing."""
    ordered = sorted(values)
    index = -int(-percent * len(ordered) // 100) - 1
    return ordered[max(0, index)]


async def stream(client: httpx.AsyncClient, model: str, prompt: str, num_tokens: int) -> Timeline:
    """Greedy, exactly num_tokens new tokens.

    Raises RuntimeError when it is refused, fails or breaks off, with what the server said.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": num_tokens,
        "min_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    timeline = Timeline(time.perf_counter())
    is_whole = False
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
            timeline.version = response.headers.get("x-adapter-version", "")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    is_whole = _note(timeline, json.loads(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        raise RuntimeError(f"the connection failed: {error!r}") from None
    if not is_whole:
        raise RuntimeError(f"the answer breaks off after {len(timeline.tokens_at)} tokens")
    return timeline


def _note(timeline: Timeline, event: dict[str, object]) -> bool:
    """Take in an event of a stream; True for the last one of an answer that is whole."""
    choices = event.get("choices")
    if not isinstance(choices, list):
        raise RuntimeError(f"the stream failed: {event}")
    (choice,) = choices
    # The end comes with the last token, and by itself only if no token has a text.
    if choice["text"] or not timeline.tokens_at:
        timeline.tokens_at.append(time.perf_counter())
    timeline.text += choice["text"]
    return bool(choice["finish_reason"] == "length")
