"""Many more adapters than fit: who has to wait for a load, and what that costs the others."""

import asyncio
import random
import statistics
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import islice

import httpx

from loadtest.client import make_client, percentile, random_prompt
from loadtest.metrics import read_metrics
from loadtest.report import Report, milliseconds, progress
from loadtest.traffic import Question, Traffic, ask_all, power_law
from loadtest.workloads import adapter_name

_MOST_TIMES_THE_GAP = 2.0
_LOADS = {tier: f"sharelora_adapter_loads_total{{source={tier}}}" for tier in ("host", "disk")}


@dataclass(frozen=True, slots=True)
class Load:
    """The traffic: who asks for what.

    num_adapters  t000, t001, ..., as `python -m loadtest adapters` names them
    exponent      of the power law by which they are drawn
    requests      of all rounds, after as many again of another draw that fill the tiers
    """

    num_adapters: int
    exponent: float
    requests: int
    rounds: int
    streams: int
    prompt_words: int
    new_tokens: int
    seed: int

    def draw(self) -> list[Question]:
        """Twice the requests; an adapter is always asked the same, so that it has one answer."""
        generator = random.Random(self.seed)
        prompts = [random_prompt(self.prompt_words, generator) for _ in range(self.num_adapters)]
        indices = islice(power_law(self.num_adapters, self.exponent, generator), 2 * self.requests)
        return [Question(adapter_name(index), prompts[index]) for index in indices]


class _Server:
    """One server: what it answered in each round, and the loads from each tier meanwhile."""

    def __init__(self, client: httpx.AsyncClient, load: Load, on_end: Callable[[], None]) -> None:
        self.rounds: list[Traffic] = []
        self.loads = dict.fromkeys(_LOADS, 0)
        self._client = client
        self._load = load
        self._on_end = on_end

    @property
    def traffic(self) -> Traffic:
        """Of all rounds."""
        return Traffic(
            [answer for each in self.rounds for answer in each.answers],
            [failure for each in self.rounds for failure in each.failures],
        )

    async def play(self, questions: Iterable[Question], *, alone: bool = False) -> Traffic:
        """Answers to all of them, by as many streams as the load has or one after the other."""
        return await ask_all(
            self._client,
            questions,
            num_streams=1 if alone else self._load.streams,
            num_tokens=self._load.new_tokens,
            on_end=self._on_end,
        )

    async def measure(self, questions: Iterable[Question]) -> None:
        """Play a round."""
        before = await read_metrics(self._client)
        self.rounds.append(await self.play(questions))
        after = await read_metrics(self._client)
        for tier, name in _LOADS.items():
            self.loads[tier] += int(after[name] - before[name])


def measure_tiers(url: str, resident_url: str | None, load: Load) -> Report:
    """Play the load to a server; and in turn to another that has room for every adapter, if any.

    The golden answers are those that the first server gives to each question alone, afterwards.
    """
    drawn = load.draw()
    warming, asked = drawn[: load.requests], drawn[load.requests :]
    distinct = list(dict.fromkeys(asked))
    urls = [url] if resident_url is None else [url, resident_url]

    async def run(on_end: Callable[[], None]) -> tuple[list[_Server], Traffic]:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(make_client(each)) for each in urls]
            servers = [_Server(client, load, on_end) for client in clients]
            await servers[0].play(warming)
            for server in servers[1:]:
                await server.play(distinct)
            for number in range(load.rounds):
                for server in servers:
                    await server.measure(asked[number :: load.rounds])
            return servers, await servers[0].play(distinct, alone=True)

    num_questions = len(warming) + len(urls) * (len(asked) + len(distinct))
    with progress("asking", num_questions) as advance:
        servers, alone = asyncio.run(run(advance))
    return _report(servers, alone, load, num_distinct=len(distinct))


def _report(servers: list[_Server], alone: Traffic, load: Load, *, num_distinct: int) -> Report:
    server = servers[0]
    traffic = server.traffic
    report = Report(
        f"{load.requests} requests to {num_distinct} of {load.num_adapters} adapters, "
        f"power law {load.exponent:g}, {load.streams} streams"
    )
    shares = {tier: count / load.requests for tier, count in server.loads.items()}
    shares = {"device": 1 - sum(shares.values())} | shares
    report.add(
        "adapter on the device", ", ".join(f"{tier} {share:.1%}" for tier, share in shares.items())
    )
    gap = percentile(traffic.gaps, 99)
    waits = [timeline.first_token_seconds for _, timeline in traffic.answers]
    report.add(
        "first token, median and 99th percentile",
        f"{milliseconds(statistics.median(waits))}, {milliseconds(percentile(waits, 99))}",
    )
    report.add(
        "gap between tokens, median and 99th percentile",
        f"{milliseconds(statistics.median(traffic.gaps))}, {milliseconds(gap)}",
    )
    for resident in servers[1:]:
        theirs = percentile(resident.traffic.gaps, 99)
        report.add(
            "the same, all resident",
            f"{milliseconds(statistics.median(resident.traffic.gaps))}, {milliseconds(theirs)}",
        )
        report.add(
            "99th percentile, times that",
            f"{gap / theirs:.2f}",
            f"<= {_MOST_TIMES_THE_GAP:g}",
            is_met=gap <= _MOST_TIMES_THE_GAP * theirs,
        )
        ratios = [
            percentile(one.gaps, 99) / percentile(other.gaps, 99)
            for one, other in zip(server.rounds, resident.rounds, strict=True)
        ]
        report.add("of each round", ", ".join(f"{ratio:.2f}" for ratio in ratios))
    golden = alone.by_version
    everything = [each.traffic for each in servers]
    report.check(
        sum(len(each.answers) for each in everything),
        sum(each.num_wrong(golden) for each in everything),
        [*alone.failures, *(failure for each in everything for failure in each.failures)],
    )
    return report
