"""What publications and rollbacks of an adapter cost the requests that run meanwhile."""

import asyncio
import itertools
import random
import secrets
import statistics
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from loadtest.client import make_client, percentile, random_prompt
from loadtest.publishing import Example, create, publish, remove, roll_back
from loadtest.report import Report, milliseconds, progress
from loadtest.traffic import Question, Traffic, ask_all

_NUM_PROMPTS = 8
_MOST_TIMES_THE_GAP = 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of what: every round is some quiet seconds, then its share of the changes.

    publications   of the two versions in turn, over all rounds
    roll_backs     spread among them
    pause_seconds  after every change
    """

    rounds: int
    publications: int
    roll_backs: int
    pause_seconds: float
    quiet_seconds: float
    streams: int
    prompt_words: int
    new_tokens: int

    def changes(self, round_number: int) -> list[bool]:
        """The changes of a round, counted from 0, in their order; True is a rollback."""
        num_publications, num_roll_backs = (
            count * (round_number + 1) // self.rounds - count * round_number // self.rounds
            for count in (self.publications, self.roll_backs)
        )
        count = num_publications + num_roll_backs
        return [
            (number + 1) * num_roll_backs // count > number * num_roll_backs // count
            for number in range(count)
        ]


class _Alternation:
    """An adapter of which two versions take turns, and the traffic to it."""

    def __init__(self, client: httpx.AsyncClient, adapter: Path, plan: Plan) -> None:
        self.name = f"reload-{secrets.token_hex(4)}"
        self.golden: dict[tuple[Question, str], str] = {}  # (question, version) -> answer
        self.seconds: dict[bool, list[float]] = {False: [], True: []}  # is it a rollback?
        self.failures: list[str] = []
        example = Example.read(adapter)
        self._files = [example.scaled(1, 1), example.scaled(1, -1)]
        self._versions: list[str] = []
        self._present = 1  # index of the version that is served
        self._client = client
        self._plan = plan
        generator = random.Random()
        self._questions = [
            Question(self.name, random_prompt(plan.prompt_words, generator))
            for _ in range(_NUM_PROMPTS)
        ]

    async def prepare(self) -> None:
        """Publish both, and ask each alone; RuntimeError if they cannot be told apart."""
        for change, file in zip((create, publish), self._files, strict=True):
            version = (await change(self._client, self.name, file)).version
            self._versions.append(version)
            self.golden |= (await self._ask(self._questions, num_streams=1)).by_version
        one, other = self._versions
        if any(self.golden[q, one] == self.golden[q, other] for q in self._questions):
            raise RuntimeError("versions cannot be told apart: ask for more --new-tokens")

    async def change(self, back: bool) -> None:
        """Let the name stand for the other version, by rollback or by publication."""
        try:
            if back:
                changed = await roll_back(self._client, self.name)
            else:
                changed = await publish(self._client, self.name, self._files[1 - self._present])
        except RuntimeError as error:
            self.failures.append(str(error))
        else:
            self.seconds[back].append(changed.seconds)
            self._present = self._versions.index(changed.version)

    async def traffic_during(self, work: Awaitable[None]) -> Traffic:
        """What the streams were answered from the beginning of the work to its end."""
        working = asyncio.ensure_future(work)

        def questions() -> Iterator[Question]:
            for question in itertools.cycle(self._questions):
                if working.done():
                    return
                yield question

        traffic = await self._ask(questions(), num_streams=self._plan.streams)
        await working
        return traffic

    async def _ask(self, questions: Iterable[Question], *, num_streams: int) -> Traffic:
        return await ask_all(
            self._client, questions, num_streams=num_streams, num_tokens=self._plan.new_tokens
        )


def measure_reloads(url: str, adapter: Path, plan: Plan) -> Report:
    """Alternate two versions of an adapter under traffic; each answer must be its version's own.

    The golden answers are those that each version gives alone. Quiet rounds and rounds with
    changes take turns, so that what else the machine does meets both.
    """
    quiet, busy = Traffic(), Traffic()
    ratios: list[float] = []

    async def run(advance: Callable[[], None]) -> _Alternation:
        async with make_client(url) as client:
            served = _Alternation(client, adapter, plan)

            async def change_all(round_number: int) -> None:
                for back in plan.changes(round_number):
                    await served.change(back)
                    await asyncio.sleep(plan.pause_seconds)
                    advance()

            try:
                await served.prepare()
                for number in range(plan.rounds):
                    before = await served.traffic_during(asyncio.sleep(plan.quiet_seconds))
                    during = await served.traffic_during(change_all(number))
                    ratios.append(percentile(during.gaps, 99) / percentile(before.gaps, 99))
                    quiet.add(before)
                    busy.add(during)
            finally:
                await remove(client, served.name)
        return served

    with progress("publishing", plan.publications + plan.roll_backs) as advance:
        served = asyncio.run(run(advance))
    return _report(served, quiet, busy, ratios, plan)


def _report(
    served: _Alternation, quiet: Traffic, busy: Traffic, ratios: list[float], plan: Plan
) -> Report:
    report = Report(f"{plan.publications} publications, {plan.streams} streams")
    for what, is_roll_back in (("publications", False), ("rollbacks", True)):
        seconds = served.seconds[is_roll_back]
        if seconds:
            report.add(
                f"{len(seconds)} {what}, median and longest",
                f"{milliseconds(statistics.median(seconds))}, {milliseconds(max(seconds))}",
            )
    before, during = percentile(quiet.gaps, 99), percentile(busy.gaps, 99)
    report.add("gap between tokens, 99th percentile, without", milliseconds(before))
    report.add(
        "the same with reloads",
        f"{milliseconds(during)}, {during / before:.2f} times",
        f"<= {_MOST_TIMES_THE_GAP:g} times",
        is_met=during <= _MOST_TIMES_THE_GAP * before,
    )
    report.add("of each round", ", ".join(f"{ratio:.2f}" for ratio in ratios))
    report.add(
        "longest gap, without and with",
        f"{milliseconds(max(quiet.gaps))}, {milliseconds(max(busy.gaps))}",
    )
    versions = {timeline.version for _, timeline in busy.answers}
    report.add("answers while publishing", f"{len(busy.answers)} of {len(versions)} versions")
    num_wrong = quiet.num_wrong(served.golden) + busy.num_wrong(served.golden)
    failures = [*served.failures, *quiet.failures, *busy.failures]
    report.check(len(quiet.answers) + len(busy.answers), num_wrong, failures)
    return report
