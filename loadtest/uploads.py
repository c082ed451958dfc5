"""How long an upload takes, and how soon after it the adapter's first token comes."""

import asyncio
import random
import secrets
import statistics
from pathlib import Path

from loadtest.client import Timeline, make_client, percentile, random_prompt, stream
from loadtest.publishing import Example, Publication, create, remove
from loadtest.report import Report, milliseconds, progress

_UPLOAD_SECONDS = 0.5
_FIRST_TOKEN_SECONDS = 0.1


def measure_uploads(url: str, adapter: Path, rounds: int, prompt_words: int) -> Report:
    """Upload a folder's adapter under new names, each in other numbers, and ask each at once.

    What it answers then must be what it answers again later. The names are removed at the end.
    """
    prefix = f"upload-{secrets.token_hex(4)}"
    generator = random.Random()
    example = Example.read(adapter)
    publications: list[Publication] = []
    first: list[Timeline] = []
    failures: list[str] = []
    num_wrong = 0

    async def run() -> None:
        nonlocal num_wrong
        with progress("uploading", rounds) as advance:
            async with make_client(url) as client:
                for number in range(rounds):
                    name, scale = f"{prefix}-{number}", 1 + (number + 1) / 64
                    file = example.scaled(scale, 1 / scale)
                    prompt = random_prompt(prompt_words, generator)
                    try:
                        publication = await create(client, name, file)
                        timeline = await stream(client, name, prompt, 8)
                        later = await stream(client, name, prompt, 8)
                    except RuntimeError as error:
                        failures.append(str(error))
                    else:
                        publications.append(publication)
                        first.append(timeline)
                        is_right = later.text == timeline.text
                        is_right &= publication.version == timeline.version == later.version
                        num_wrong += not is_right
                    finally:
                        await remove(client, name)
                    advance()

    asyncio.run(run())
    report = Report(f"{rounds} uploads of {adapter.name}, {example.num_bytes / 1e6:.1f} MB")
    if first:
        seconds = [publication.seconds for publication in publications]
        report.add(
            "upload, longest",
            milliseconds(max(seconds)),
            f"< {milliseconds(_UPLOAD_SECONDS)}",
            is_met=max(seconds) < _UPLOAD_SECONDS,
        )
        report.add("upload, median", milliseconds(statistics.median(seconds)))
        waits = [
            timeline.tokens_at[0] - publication.ended_at
            for publication, timeline in zip(publications, first, strict=True)
        ]
        report.add(
            "first token after it, median",
            milliseconds(statistics.median(waits)),
            f"< {milliseconds(_FIRST_TOKEN_SECONDS)}",
            is_met=statistics.median(waits) < _FIRST_TOKEN_SECONDS,
        )
        report.add("first token after it, 95th percentile", milliseconds(percentile(waits, 95)))
    report.check(len(first), num_wrong, failures)
    return report
