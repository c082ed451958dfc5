"""Plays a workload to a server, and tells live how it goes."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.client import Timeline, ask, make_client
from loadtest.endpoint import Endpoint
from loadtest.traffic import closed_loop
from loadtest.workload import Request, Workload

TOO_MANY_REQUESTS = 429
_SHOWN_PER_SECOND = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request and what became of it."""

    request: Request
    timeline: Timeline

    @property
    def is_answered(self) -> bool:
        """In full."""
        return self.timeline.error is None

    @property
    def is_refused(self) -> bool:
        """By a server that has too much to do, which is no failure."""
        return self.timeline.status == TOO_MANY_REQUESTS


@dataclass(slots=True)
class Counts:
    """How it goes."""

    running: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    tokens: int = 0
    started_at: float = field(default_factory=time.perf_counter)

    def end(self, outcome: Outcome) -> None:
        """Count a request that is over."""
        self.running -= 1
        if outcome.is_answered:
            self.answered += 1
        elif outcome.is_refused:
            self.refused += 1
        else:
            self.failed += 1

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.started_at
        return (
            f"{self.running} running, {self.answered} answered, {self.refused} refused, "
            f"{self.failed} failed, {self.tokens / seconds:.0f} tokens/s"
        )


async def _play(
    url: str,
    endpoint: Endpoint,
    workload: Workload,
    num_streams: int | None,
    keys: Mapping[str, str],
    counts: Counts,
) -> list[Outcome]:
    async with make_client(url, keeps_connections=endpoint.keeps_connections) as client:
        player = _Player(client, endpoint, keys, counts)
        if num_streams is not None:
            return await closed_loop(workload.requests, num_streams, player.ask)
        if not workload.has_arrivals:
            raise RuntimeError(f"{workload.name} has no arrivals: give a number of streams")
        return await player.open(workload.requests)


class _Player:
    def __init__(
        self,
        client: httpx.AsyncClient,
        endpoint: Endpoint,
        keys: Mapping[str, str],
        counts: Counts,
    ) -> None:
        self._client = client
        self._endpoint = endpoint
        self._keys = keys
        self._counts = counts

    async def open(self, requests: Sequence[Request]) -> list[Outcome]:
        start = time.perf_counter()

        async def ask_in_time(request: Request) -> Outcome:
            due_at = start + (request.arrival_seconds or 0.0)
            await asyncio.sleep(due_at - time.perf_counter())
            return await self.ask(request, due_at)

        return await asyncio.gather(*map(ask_in_time, requests))

    async def ask(self, request: Request, due_at: float | None = None) -> Outcome:
        self._counts.running += 1
        timeline = await ask(
            self._client,
            self._endpoint,
            request.model,
            request.prompt,
            request.new_tokens,
            api_key=self._keys.get(request.tenant),
            on_token=self._count_token,
        )
        if due_at is not None:
            timeline.sent_at = due_at  # what the client is late by is waiting too
        outcome = Outcome(request, timeline)
        self._counts.end(outcome)
        return outcome

    def _count_token(self) -> None:
        self._counts.tokens += 1


def play_showing(
    url: str,
    endpoint: Endpoint,
    workload: Workload,
    *,
    num_streams: int | None = None,
    keys: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Every request's outcome, in the order of the workload.

    With `num_streams` it is a closed loop: each stream asks the next request once its last one is
    over. Without, it is open: a request is sent at its arrival, whatever is running, and its
    timeline begins when it was due. `keys` has the tenants' API keys. Shows live how it goes on
    standard error, if that is a terminal. RuntimeError if the workload has no arrivals for an
    open loop.
    """

    async def run() -> list[Outcome]:
        counts = Counts()
        with _display(workload, counts) as refresh:
            playing = asyncio.create_task(
                _play(url, endpoint, workload, num_streams, keys or {}, counts)
            )
            while not playing.done():
                await asyncio.wait([playing], timeout=1 / _SHOWN_PER_SECOND)
                refresh()
            return playing.result()

    return asyncio.run(run())


@contextmanager
def _display(workload: Workload, counts: Counts) -> Iterator[Callable[[], None]]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[counts]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(workload.name, total=len(workload.requests), counts="")
        yield lambda: bars.update(
            task,
            completed=counts.answered + counts.refused + counts.failed,
            counts=str(counts),
        )
