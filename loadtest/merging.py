"""Merging by traffic: what one adapter gains by it, and whether the base is as it was before."""

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from loadtest.client import make_client, random_prompt
from loadtest.metrics import read_metrics
from loadtest.report import Report, progress
from loadtest.traffic import Question, Traffic, ask_all

_LEAST_SHARE = 0.98
_NUM_PROMPTS = 6
_NUM_TOKENS = 64
_OTHER_STREAMS = 4

# Longer than nothing is merged after a restoration, and folding on a busy processor.
_CHANGE_SECONDS = 240.0


class _Merging:
    """A server with --merge auto, its base and the adapter that is to be merged."""

    def __init__(self, client: httpx.AsyncClient, base: str, adapter: str) -> None:
        self.base = base
        self.adapter = adapter
        self.traffic = Traffic()
        self.seconds_to_merge: list[float] = []
        self.seconds_to_restore: list[float] = []
        self._client = client
        generator = random.Random()
        self._prompts = [random_prompt(16, generator) for _ in range(_NUM_PROMPTS)]

    async def ask(self, models: Sequence[str], num_streams: int = 1) -> Traffic:
        """Every prompt once to each of the models."""
        questions = [Question(model, prompt) for prompt in self._prompts for model in models]
        traffic = await ask_all(
            self._client, questions, num_streams=num_streams, num_tokens=_NUM_TOKENS
        )
        self.traffic.add(traffic)
        return traffic

    async def merge(self) -> None:
        """Give the adapter all traffic until it is merged; RuntimeError if that never comes."""
        self.seconds_to_merge.append(await self._ask_until([self.adapter], 1, is_merged=True))

    async def restore(self) -> None:
        """Let others come until the base is back; RuntimeError likewise."""
        models = [self.base, self.adapter, self.base]
        seconds = await self._ask_until(models, _OTHER_STREAMS, is_merged=False)
        self.seconds_to_restore.append(seconds)

    async def base_answers(self) -> list[Any]:
        """The base's choices to every prompt: text, tokens and logprobs to the last bit."""
        choices = []
        for prompt in self._prompts:
            body = {
                "model": self.base,
                "prompt": prompt,
                "temperature": 0,
                "max_tokens": _NUM_TOKENS,
                "ignore_eos": True,
                "logprobs": 5,
            }
            response = await self._client.post("/v1/completions", json=body)
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {response.text}")
            choices.append(response.json()["choices"])
        return choices

    async def _ask_until(
        self, models: Sequence[str], num_streams: int, *, is_merged: bool
    ) -> float:
        """Ask until the adapter is merged or is not; how many seconds that took."""
        start = time.monotonic()
        label = f"sharelora_merged_adapter{{adapter={self.adapter}}}"
        while (label in await read_metrics(self._client)) != is_merged:
            if time.monotonic() - start > _CHANGE_SECONDS:
                what = "merged" if is_merged else "restored"
                raise RuntimeError(f"nothing was {what} in {_CHANGE_SECONDS:g} seconds")
            await self.ask(models, num_streams)
        return time.monotonic() - start


def measure_merging(url: str, base: str, adapter: str, rounds: int) -> Report:
    """Let one adapter have all traffic until it is merged, then let others come, in rounds.

    A round takes the single-stream rate of the base before, and the adapter's while it is merged.
    The base's answers, once it is restored, must be those from before the first round.
    """
    ratios: list[float] = []
    num_changed = 0

    async def run(advance: Callable[[], None]) -> _Merging:
        nonlocal num_changed
        async with make_client(url) as client:
            server = _Merging(client, base, adapter)
            expected = await server.base_answers()
            for _ in range(rounds):
                alone = _seconds_per_token(await server.ask([base]))
                advance()
                await server.merge()
                ratios.append(alone / _seconds_per_token(await server.ask([adapter])))
                advance()
                await server.restore()
                found = await server.base_answers()
                num_changed += sum(a != b for a, b in zip(expected, found, strict=True))
                advance()
        return server

    with progress("merging and restoring", 3 * rounds) as advance:
        server = asyncio.run(run(advance))
    return _report(server, ratios, num_changed)


def _seconds_per_token(traffic: Traffic) -> float:
    return statistics.median(traffic.gaps)


def _report(server: _Merging, ratios: list[float], num_changed: int) -> Report:
    report = Report(f"{len(ratios)} times merged, {_NUM_TOKENS} tokens an answer")
    for what, seconds in (
        ("merged after", server.seconds_to_merge),
        ("restored after", server.seconds_to_restore),
    ):
        report.add(what, ", ".join(f"{each:.1f} s" for each in seconds))
    ratio = statistics.median(ratios)
    report.add(
        "rate of the merged adapter, of the base's",
        f"{ratio:.3f}",
        f">= {_LEAST_SHARE:g}",
        is_met=ratio >= _LEAST_SHARE,
    )
    report.add("of each round", ", ".join(f"{ratio:.3f}" for ratio in ratios))
    report.add("answers while it changed", str(len(server.traffic.answers)))
    report.check(_NUM_PROMPTS * len(ratios), num_changed, server.traffic.failures)
    return report
