"""One streamed completion, and when each of its tokens came."""

import random
import time
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "big"),
    *("red", "dog", "run", "over", "that", "hill", "to", "get", "some", "food"),
)


@dataclass(slots=True)
class Timeline:
    """When a request was sent and when each of its events came, in seconds of perf_counter."""

    sent_at: float
    tokens_at: list[float] = field(default_factory=list)

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


async def stream(client: httpx.AsyncClient, model: str, prompt: str, num_tokens: int) -> Timeline:
    """Greedy, exactly num_tokens new tokens; raises RuntimeError with the server's refusal."""
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
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                timeline.tokens_at.append(time.perf_counter())
    return timeline
