"""What thousands of registered adapters cost, under S-LoRA's workload."""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.adapters import Kind, write_adapters
from loadtest.capacity import BASE, measure_capacity, measure_whole
from loadtest.figures import Figures
from loadtest.report import Report
from loadtest.servers import Server, memory_settings, only, our_server
from loadtest.workloads import Settings, draw

_FEW = 5
_NUM_STREAMS = 32
_LEAST_ATTAINMENT = 0.99
_ROOM = 0.1
_MOST_LOSS = {"all in host memory": 0.03, f"room for {_ROOM:.0%}": 0.12}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    load  of the open loop, as a share of what the base can do in a closed one
    """

    count: int
    kind: Kind
    load: float
    rounds: int
    requests: int
    prompt_words: tuple[int, int] = (8, 64)
    new_tokens: tuple[int, int] = (8, 64)


def measure_registered(plan: Plan, folder: Path) -> Report:
    """S-LoRA's workload (a = 1, cv = 1) over 5 and over many adapters, in turn.

    Writes the adapters and the servers' logs into `folder`.
    """
    few, many = folder / f"adapters-{_FEW}", folder / f"adapters-{plan.count}"
    write_adapters(few, _FEW, plan.kind)
    write_adapters(many, plan.count, plan.kind)
    everything = (few, _FEW, 1.0), (many, plan.count, 1.0), (many, plan.count, _ROOM)
    settings = Settings(
        base=BASE,
        num_requests=plan.requests,
        num_adapters=_FEW,
        prompt_words=plan.prompt_words,
        new_tokens=plan.new_tokens,
    )
    figures: list[list[Figures]] = [[] for _ in everything]
    with ExitStack() as stack:
        servers: list[Server] = []
        for number, (adapters, _, share) in enumerate(everything):
            memory = memory_settings(adapters, _NUM_STREAMS, share=share)
            arguments = ("--model-name", BASE, "--adapters", str(adapters), *memory)
            log = folder / f"server-{number}.log"
            servers.append(stack.enter_context(our_server(log, *arguments)))
            servers[-1].hold_still()
        with only(servers[0], servers):
            measure_capacity(servers[0].url, "base", settings, _NUM_STREAMS)  # warms up
            capacity = measure_capacity(servers[0].url, "base", settings, _NUM_STREAMS)
        for number in range(plan.rounds + 1):
            for server, (_, count, _), found in zip(servers, everything, figures, strict=True):
                drawn = replace(
                    settings, num_adapters=count, rate=plan.load * capacity, seed=number
                )
                with only(server, servers):
                    measured = measure_whole(server.url, draw("slora", drawn))
                if number > 0:  # the first one warms up
                    found.append(measured)
    return _report(plan, capacity, figures)


def _report(plan: Plan, capacity: float, figures: Sequence[Sequence[Figures]]) -> Report:
    report = Report(
        f"S-LoRA's workload over {plan.count} registered adapters, and over {_FEW}, at "
        f"{plan.load:.0%} of the base's {capacity:.2f} requests/s"
    )
    few, *others = figures
    report.add(f"{_FEW} adapters", _rates(few))
    for (what, most_loss), many in zip(_MOST_LOSS.items(), others, strict=True):
        ratios = [
            theirs.tokens_per_second / ours.tokens_per_second
            for theirs, ours in zip(many, few, strict=True)
        ]
        ratio = statistics.median(ratios)
        report.add(f"{plan.count} adapters, {what}", _rates(many))
        report.add(
            "of that with few, median and rounds",
            f"{ratio:.3f}: {', '.join(f'{each:.3f}' for each in ratios)}",
            f">= {1 - most_loss:g}",
            is_met=ratio >= 1 - most_loss,
        )
        attainment = min(each.attainment for each in many)
        report.add(
            "attainment, least of the rounds",
            f"{attainment:.3f}",
            f">= {_LEAST_ATTAINMENT:g}",
            is_met=attainment >= _LEAST_ATTAINMENT,
        )
    return report


def _rates(figures: Sequence[Figures]) -> str:
    rate = statistics.median(each.tokens_per_second for each in figures)
    return f"{rate:.1f} tokens/s"
