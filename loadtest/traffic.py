"""Many streams at once: who asks for what, what came back, and whether it was right."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from loadtest.client import Timeline, stream

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to the base or to an adapter."""

    model: str
    prompt: str


@dataclass(slots=True)
class Traffic:
    """Every question that was answered, and why the others were not."""

    answers: list[tuple[Question, Timeline]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens, of all answers; RuntimeError if there are none."""
        if not self.answers:
            raise RuntimeError(f"no request was answered: {', '.join(self.failures[:1])}")
        return [gap for _, timeline in self.answers for gap in timeline.gaps]

    def add(self, other: "Traffic") -> None:
        """Count another's answers and failures too."""
        self.answers += other.answers
        self.failures += other.failures

    @property
    def by_version(self) -> dict[tuple[Question, str], str]:
        """(question, version) -> answer: golden ones, if each was asked alone."""
        return {(question, each.version): each.text for question, each in self.answers}

    def num_wrong(self, golden: Mapping[tuple[Question, str], str]) -> int:
        """Answers that are not, in full, the golden one of the version that they name."""
        return sum(
            golden.get((question, timeline.version)) != timeline.text
            for question, timeline in self.answers
        )


async def closed_loop(
    items: Iterable[_Item], num_streams: int, ask: Callable[[_Item], Awaitable[_Result]]
) -> list[_Result]:
    """Each stream takes the next item once its last one is over; results in the items' order."""
    waiting = enumerate(items)
    results: dict[int, _Result] = {}

    async def ask_in_turn() -> None:
        for number, item in waiting:
            results[number] = await ask(item)

    await asyncio.gather(*(ask_in_turn() for _ in range(num_streams)))
    return [results[number] for number in range(len(results))]


async def ask_all(
    client: httpx.AsyncClient,
    questions: Iterable[Question],
    *,
    num_streams: int,
    num_tokens: int,
    on_end: Callable[[], object] = lambda: None,
) -> Traffic:
    """Ask in a closed loop; calls on_end() after every question."""
    traffic = Traffic()

    async def ask(question: Question) -> None:
        try:
            timeline = await stream(client, question.model, question.prompt, num_tokens)
        except RuntimeError as error:
            traffic.failures.append(f"{question.model}: {error}")
        else:
            traffic.answers.append((question, timeline))
        on_end()

    await closed_loop(questions, num_streams, ask)
    return traffic


def power_law(count: int, exponent: float, generator: random.Random) -> Iterator[int]:
    """Indices below count, for ever: floor(count U), U of density exponent * u ** (exponent - 1).

    1 is uniform; the smaller the exponent, the more of them are near 0. S-LoRA's (arXiv
    2311.03285, 7.1).
    """
    while True:
        # 1 - random() is never 0, and its power never above 1.
        yield min(count - 1, int(count * (1 - generator.random()) ** (1 / exponent)))
