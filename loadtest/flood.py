"""One tenant sends many times its share: what do the others notice?"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from loadtest.adapters import Kind, write_adapters
from loadtest.capacity import BASE, measure_capacity
from loadtest.client import percentile
from loadtest.endpoint import OpenAiEndpoint
from loadtest.figures import SLO_SECONDS, first_token_seconds, summarize
from loadtest.player import Outcome, play_showing
from loadtest.report import Report
from loadtest.servers import our_server
from loadtest.workloads import Settings, adapter_name, draw
from sharelora_serve.server.keys import create_key

_MOST_TIMES = 1.5
_NUM_STREAMS = 32
_FLOODING = adapter_name(0)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    load   of all tenants together without a flood, as a share of what the server can do
    flood  times its share that one of them sends in every other round
    """

    tenants: int
    load: float
    flood: float
    rounds: int
    requests: int
    prompt_words: int = 32
    new_tokens: int = 32


def measure_flood(plan: Plan, folder: Path) -> Report:
    """Rounds with and without the flood in turn; the other tenants send the same in both.

    Every tenant has a key and an adapter of the same name. Adapters and the server's log go into
    `folder`.
    """
    adapters = folder / f"adapters-{plan.tenants}"
    write_adapters(adapters, plan.tenants, Kind("A", (16,)))
    settings = Settings(
        base=BASE,
        num_requests=plan.requests,
        num_adapters=plan.tenants,
        prompt_words=(plan.prompt_words, plan.prompt_words),
        new_tokens=(plan.new_tokens, plan.new_tokens),
    )
    calm: list[list[Outcome]] = []
    flooded: list[list[Outcome]] = []
    with ExitStack() as stack:
        key_file = Path(stack.enter_context(TemporaryDirectory())) / "keys.jsonl"
        names = [adapter_name(index) for index in range(plan.tenants)]
        keys = {name: create_key(key_file, name, None)[1] for name in names}
        given = (
            *("--model-name", BASE, "--adapters", str(adapters), "--api-keys", str(key_file)),
            *("--max-first-token-seconds", str(SLO_SECONDS)),  # what would start later is refused
        )
        server = stack.enter_context(our_server(folder / "server.log", *given))
        for _ in range(2):  # the first one warms up
            capacity = measure_capacity(server.url, "distinct", settings, _NUM_STREAMS, keys)
        for number in range(plan.rounds):
            for flood, rounds in ((1.0, calm), (plan.flood, flooded)):
                drawn = replace(settings, rate=plan.load * capacity, flood=flood, seed=number)
                workload = draw("burst", drawn)
                rounds.append(play_showing(server.url, OpenAiEndpoint(), workload, keys=keys))
    return _report(plan, capacity, calm, flooded)


def _report(
    plan: Plan, capacity: float, calm: list[list[Outcome]], flooded: list[list[Outcome]]
) -> Report:
    report = Report(
        f"{plan.tenants} tenants at {plan.load:.0%} of {capacity:.2f} requests/s; one then sends "
        f"{plan.flood:g} times its share"
    )
    waits = [[others_wait(each) for each in rounds] for rounds in (calm, flooded)]
    for what, seconds in zip(("without", "with"), waits, strict=True):
        report.add(
            f"the others' first token, 99th percentile, {what} the flood",
            f"{statistics.median(seconds):.3f} s: {', '.join(f'{each:.3f}' for each in seconds)}",
        )
    ratios = [after / before for before, after in zip(*waits, strict=True)]
    ratio = statistics.median(ratios)
    report.add(
        "times that, median of the rounds, and each",
        f"{ratio:.2f}: {', '.join(f'{each:.2f}' for each in ratios)}",
        f"<= {_MOST_TIMES:g}",
        is_met=ratio <= _MOST_TIMES,
    )
    for what, rounds in (("without", calm), ("with", flooded)):
        refused = Counter(
            each.request.tenant == _FLOODING for one in rounds for each in one if each.is_refused
        )
        report.add(
            f"refused with 429, {what} the flood: its tenant, the others",
            f"{refused[True]}, {refused[False]}",
        )
    report.add("tokens/s with the flood", _rates(flooded))
    outcomes = [outcome for rounds in (calm, flooded) for each in rounds for outcome in each]
    failures = [
        f"{each.request.model}: {each.timeline.error}"
        for each in outcomes
        if not each.is_answered and not each.is_refused
    ]
    report.check_answered(len(outcomes), failures)
    return report


def others_wait(outcomes: Sequence[Outcome]) -> float:
    """Those without a token have waited for ever. RuntimeError if none of the others had one."""
    others = [each for each in outcomes if each.request.tenant != _FLOODING]
    waits = first_token_seconds(others)
    if not waits:
        raise RuntimeError("no tenant but the flooding one had a token: give more --requests")
    return percentile([*waits, *[math.inf] * (len(others) - len(waits))], 99)


def _rates(rounds: Sequence[list[Outcome]]) -> str:
    return ", ".join(f"{summarize(each).tokens_per_second:.1f}" for each in rounds)
