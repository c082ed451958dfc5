"""python -m loadtest COMMAND: measures a running server, or makes adapters to measure it with.

uploads, reloads, tiers and merging check answers too: they print a table, and exit with 1 if an
answer was wrong or a request failed. The others print JSON.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from loadtest.client import Timeline, make_client, random_prompt, stream
from loadtest.merging import measure_merging
from loadtest.reloads import Plan, measure_reloads
from loadtest.report import Report
from loadtest.step import measure_steps
from loadtest.tiers import Load, measure_tiers
from loadtest.uploads import measure_uploads
from sharelora_serve.errors import ConfigurationError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Url = Annotated[str, typer.Option(help="Address of the server, such as http://127.0.0.1:8000.")]
Base = Annotated[str, typer.Option(help="Name of the base.")]
AdapterFolder = Annotated[Path, typer.Option(help="A folder of PEFT's or ShareLoRA's.")]
DEFAULT_URL, DEFAULT_BASE = "http://127.0.0.1:8000", "SmolLM2-135M-Instruct"
EXAMPLE = Path("adapters/banking77-intent")


@app.command()
def adapters(
    folder: Path,
    count: int = 32,
    rank: int = 16,
    common_a: bool = False,
    expanded: bool = False,
    model: str | None = None,
) -> None:
    """Write synthetic ShareA adapters t000, t001, ... into FOLDER."""
    from loadtest.adapters import write_adapters

    write_adapters(folder, count, rank, common_a=common_a, expanded=expanded, model=model)


@app.command()
def throughput(
    url: Url = DEFAULT_URL,
    base: Base = DEFAULT_BASE,
    num_adapters: int = 0,
    streams: int = 32,
    requests: int = 64,
    prompt_words: int = 32,
    new_tokens: int = 64,
) -> None:
    """Closed loop: request i asks for adapter i modulo num-adapters, or for the base."""
    generator = random.Random(0)

    async def run() -> tuple[list[Timeline], float]:
        gate = asyncio.Semaphore(streams)
        async with make_client(url) as client:

            async def one(number: int, prompt: str) -> Timeline:
                model = f"t{number % num_adapters:03d}" if num_adapters else base
                async with gate:
                    return await stream(client, model, prompt, new_tokens)

            prompts = [random_prompt(prompt_words, generator) for _ in range(requests)]
            start = time.perf_counter()
            timelines = await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts)))
            return timelines, time.perf_counter() - start

    timelines, seconds = asyncio.run(run())
    gaps_seen = [gap for timeline in timelines for gap in timeline.gaps]
    first = sorted(timeline.first_token_seconds for timeline in timelines)
    _show(
        adapters=num_adapters,
        streams=streams,
        tokens_per_second=round(requests * new_tokens / seconds, 1),
        first_token_p50_seconds=round(statistics.median(first), 3),
        time_per_token_ms=round(1000 * statistics.fmean(gaps_seen), 2) if gaps_seen else None,
    )


@app.command()
def gaps(
    url: Url = DEFAULT_URL, base: Base = DEFAULT_BASE, streams: int = 8, prompt_words: int = 1500
) -> None:
    """Streams decode; a long prompt arrives: how long does any of them wait for its next token?"""
    generator = random.Random()

    async def run() -> tuple[list[Timeline], Timeline]:
        async with make_client(url) as client:
            prompts = [random_prompt(16, generator) for _ in range(streams)]
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
    _show(
        streams=streams,
        median_step_ms=round(1000 * median, 1),
        longest_gap_ms=round(1000 * max(during), 1),
        longest_gap_steps=round(max(during) / median, 2),
        long_first_token_seconds=round(long.first_token_seconds, 2),
    )


@app.command()
def memory(pid: int, url: Url = DEFAULT_URL, num_adapters: int = 50, requests: int = 2000) -> None:
    """Resident memory of process PID after a tenth of the requests and after all of them."""
    generator = random.Random(0)

    async def run() -> tuple[float, float]:
        gate = asyncio.Semaphore(16)
        async with make_client(url) as client:

            async def one(number: int) -> None:
                async with gate:
                    prompt = random_prompt(generator.randint(1, 60), generator)
                    model = f"t{generator.randrange(num_adapters):03d}"
                    await stream(client, model, prompt, 1 + number % 16)

            await asyncio.gather(*(one(i) for i in range(requests // 10)))
            early = _resident_mib(pid)
            await asyncio.gather(*(one(i) for i in range(requests // 10, requests)))
            return early, _resident_mib(pid)

    early, late = asyncio.run(run())
    _show(
        resident_mib_after_a_tenth=round(early, 1),
        resident_mib_after_all=round(late, 1),
        growth_percent=round(100 * (late / early - 1), 2),
    )


@app.command()
def pool(url: Url = DEFAULT_URL) -> None:
    """What the server's metrics say of the adapters' memory."""
    text = httpx.get(f"{url}/metrics").text
    wanted = ("sharelora_adapter_memory", "sharelora_adapter_dedupe", "sharelora_adapters_")
    lines = [line.split(" ") for line in text.splitlines() if line.startswith(wanted)]
    _show(**{name: float(value) for name, value in lines})


@app.command()
def uploads(
    url: Url = DEFAULT_URL,
    adapter: AdapterFolder = EXAMPLE,
    rounds: int = 20,
    prompt_words: int = 16,
) -> None:
    """How long an upload takes, and how soon after it the adapter's first token comes."""
    _tell(lambda: measure_uploads(url, adapter, rounds, prompt_words))


@app.command()
def reloads(
    url: Url = DEFAULT_URL,
    adapter: AdapterFolder = EXAMPLE,
    rounds: int = 4,
    publications: int = 100,
    roll_backs: int = 20,
    pause_seconds: float = 0.2,
    quiet_seconds: float = 15.0,
    streams: int = 16,
    prompt_words: int = 16,
    new_tokens: int = 32,
) -> None:
    """What publications and rollbacks of an adapter cost the streams to it."""
    plan = Plan(
        rounds=rounds,
        publications=publications,
        roll_backs=roll_backs,
        pause_seconds=pause_seconds,
        quiet_seconds=quiet_seconds,
        streams=streams,
        prompt_words=prompt_words,
        new_tokens=new_tokens,
    )
    _tell(lambda: measure_reloads(url, adapter, plan))


@app.command()
def tiers(
    url: Url = DEFAULT_URL,
    resident_url: Annotated[
        str | None, typer.Option(help="Of a second server, with room for every adapter.")
    ] = None,
    num_adapters: int = 2000,
    exponent: Annotated[float, typer.Option(help="Of the power law; 1 is uniform.")] = 0.3,
    requests: int = 600,
    rounds: int = 4,
    streams: int = 16,
    prompt_words: int = 8,
    new_tokens: int = 32,
    seed: int = 0,
) -> None:
    """Power-law traffic to adapters t000, t001, ..., of which few fit the device's memory."""
    load = Load(
        num_adapters=num_adapters,
        exponent=exponent,
        requests=requests,
        rounds=rounds,
        streams=streams,
        prompt_words=prompt_words,
        new_tokens=new_tokens,
        seed=seed,
    )
    _tell(lambda: measure_tiers(url, resident_url, load))


@app.command()
def merging(
    url: Url = DEFAULT_URL,
    base: Base = DEFAULT_BASE,
    adapter: Annotated[str, typer.Option(help="Name of the one to merge.")] = EXAMPLE.name,
    rounds: int = 3,
) -> None:
    """What merging by traffic gains one adapter, on a server with --merge auto."""
    _tell(lambda: measure_merging(url, base, adapter, rounds))


@app.command()
def step(
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of adapters, at least as many as streams.")
    ] = None,
    streams: Annotated[list[int], typer.Option(help="May be given several times.")] = [1, 8, 32],  # noqa: B006
    threads: int | None = None,
    num_tokens: int = 80,
    rounds: int = 3,
    output: Annotated[Path | None, typer.Option(help="File for the figures as JSON.")] = None,
) -> None:
    """Where a decode step's time goes, without HTTP; starts an engine of its own."""
    try:
        times = measure_steps(
            adapters, streams=streams, threads=threads, num_tokens=num_tokens, rounds=rounds
        )
    except (RuntimeError, ConfigurationError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    typer.echo(times.as_markdown())
    if output is not None:
        output.write_text(json.dumps(times.as_dict(), indent=2) + "\n")


def _tell(measure: Callable[[], Report]) -> None:
    """Print what was measured; exit with 1 if it failed, or could not be measured at all."""
    try:
        report = measure()
    except RuntimeError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    report.end()


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def _show(**figures: Any) -> None:  # noqa: ANN401 - figures are numbers of any kind
    typer.echo(json.dumps(figures))


if __name__ == "__main__":
    app()
