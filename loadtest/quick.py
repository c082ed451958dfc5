"""Quick looks at a server that runs, each a handful of figures."""

import asyncio
import random
import statistics
from itertools import pairwise

from loadtest.client import Timeline, make_client, random_prompt, stream
from loadtest.machine import resident_mib
from loadtest.metrics import read_metrics
from loadtest.traffic import closed_loop
from loadtest.workloads import adapter_name

QuickFigures = dict[str, float]

_POOL = ("sharelora_adapter_memory", "sharelora_adapter_dedupe", "sharelora_adapters_")
_MEMORY_STREAMS = 16


def measure_gaps(url: str, base: str, num_streams: int, prompt_words: int) -> QuickFigures:
    """Streams decode; a long prompt arrives: how long does any of them wait for its next token?"""
    generator = random.Random()

    async def run() -> tuple[list[Timeline], Timeline]:
        async with make_client(url) as client:
            prompts = [random_prompt(16, generator) for _ in range(num_streams)]
            decoding = [asyncio.create_task(stream(client, base, p, 300)) for p in prompts]
            await asyncio.sleep(2.0)
            long = await stream(client, base, random_prompt(prompt_words, generator), 1)
            return await asyncio.gather(*decoding), long

    timelines, long = asyncio.run(run())
    # Before the long prompt arrives every stream is past its own.
    steady = [
        later - earlier
        for timeline in timelines
        for earlier, later in pairwise(timeline.tokens_at)
        if long.sent_at - 1.0 < earlier and later < long.sent_at
    ]
    during = [
        later - earlier
        for timeline in timelines
        for earlier, later in pairwise(timeline.tokens_at)
        if later > long.sent_at and earlier < long.tokens_at[0]
    ]
    if not steady or not during:
        raise RuntimeError("all streams ended before the long prompt came: give more --streams")
    median = statistics.median(steady)
    return {
        "streams": num_streams,
        "median_step_ms": round(1000 * median, 1),
        "longest_gap_ms": round(1000 * max(during), 1),
        "longest_gap_steps": round(max(during) / median, 2),
        "long_first_token_seconds": round(long.first_token_seconds, 2),
    }


def measure_memory(pid: int, url: str, num_adapters: int, num_requests: int) -> QuickFigures:
    """Resident memory of a process after a tenth of the requests and after all of them."""
    generator = random.Random(0)

    async def run() -> tuple[float, float]:
        async with make_client(url) as client:

            async def one(number: int) -> None:
                prompt = random_prompt(generator.randint(1, 60), generator)
                model = adapter_name(generator.randrange(num_adapters))
                await stream(client, model, prompt, 1 + number % 16)

            tenth = num_requests // 10
            await closed_loop(range(tenth), _MEMORY_STREAMS, one)
            early = resident_mib(pid)
            await closed_loop(range(tenth, num_requests), _MEMORY_STREAMS, one)
            return early, resident_mib(pid)

    early, late = asyncio.run(run())
    return {
        "resident_mib_after_a_tenth": round(early, 1),
        "resident_mib_after_all": round(late, 1),
        "growth_percent": round(100 * (late / early - 1), 2),
    }


def read_pool(url: str) -> QuickFigures:
    """What the server's metrics say of the adapters' memory."""

    async def run() -> QuickFigures:
        async with make_client(url) as client:
            return await read_metrics(client)

    return {name: value for name, value in asyncio.run(run()).items() if name.startswith(_POOL)}
