"""Quick looks at a server that runs, each a handful of figures."""

import asyncio
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path

import httpx

from loadtest.client import Timeline, make_client, random_prompt, stream

QuickFigures = dict[str, float | None]


def measure_throughput(
    url: str,
    base: str,
    *,
    num_adapters: int,
    num_streams: int,
    num_requests: int,
    prompt_words: int,
    new_tokens: int,
) -> QuickFigures:
    """Closed loop: request i asks for adapter i modulo num_adapters, or for the base."""
    generator = random.Random(0)

    async def run() -> tuple[list[Timeline], float]:
        gate = asyncio.Semaphore(num_streams)
        async with make_client(url) as client:

            async def one(number: int, prompt: str) -> Timeline:
                model = f"t{number % num_adapters:03d}" if num_adapters else base
                async with gate:
                    return await stream(client, model, prompt, new_tokens)

            prompts = [random_prompt(prompt_words, generator) for _ in range(num_requests)]
            start = time.perf_counter()
            timelines = await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts)))
            return timelines, time.perf_counter() - start

    timelines, seconds = asyncio.run(run())
    gaps_seen = [gap for timeline in timelines for gap in timeline.gaps]
    first = sorted(timeline.first_token_seconds for timeline in timelines)
    return {
        "adapters": num_adapters,
        "streams": num_streams,
        "tokens_per_second": round(num_requests * new_tokens / seconds, 1),
        "first_token_p50_seconds": round(statistics.median(first), 3),
        "time_per_token_ms": round(1000 * statistics.fmean(gaps_seen), 2) if gaps_seen else None,
    }


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
        gate = asyncio.Semaphore(16)
        async with make_client(url) as client:

            async def one(number: int) -> None:
                async with gate:
                    prompt = random_prompt(generator.randint(1, 60), generator)
                    model = f"t{generator.randrange(num_adapters):03d}"
                    await stream(client, model, prompt, 1 + number % 16)

            await asyncio.gather(*(one(i) for i in range(num_requests // 10)))
            early = resident_mib(pid)
            await asyncio.gather(*(one(i) for i in range(num_requests // 10, num_requests)))
            return early, resident_mib(pid)

    early, late = asyncio.run(run())
    return {
        "resident_mib_after_a_tenth": round(early, 1),
        "resident_mib_after_all": round(late, 1),
        "growth_percent": round(100 * (late / early - 1), 2),
    }


def read_pool(url: str) -> QuickFigures:
    """What the server's metrics say of the adapters' memory."""
    text = httpx.get(f"{url}/metrics").text
    wanted = ("sharelora_adapter_memory", "sharelora_adapter_dedupe", "sharelora_adapters_")
    lines = [line.split(" ") for line in text.splitlines() if line.startswith(wanted)]
    return {name: float(value) for name, value in lines}


def resident_mib(pid: int) -> float:
    """Memory that a process has in RAM."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024
