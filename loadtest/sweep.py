"""Cost as the work grows: throughput, waiting and memory along one axis at a time."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import typer

from loadtest.adapters import Kind, write_adapters
from loadtest.capacity import BASE, measure_whole
from loadtest.figures import Figures
from loadtest.machine import describe_machine
from loadtest.markdown import figure, table
from loadtest.results import can_plot
from loadtest.servers import Server, memory_settings, only, our_server
from loadtest.workloads import Settings, draw


@dataclass(frozen=True, slots=True)
class Point:
    """One load, and the server that it needs.

    registered    adapters in the server's folder, of `rank`
    num_adapters  that the requests ask for in turn; 0 is the base
    """

    registered: int = 32
    rank: int = 16
    num_adapters: int = 32
    streams: int = 32
    prompt_words: int = 32
    new_tokens: int = 32

    @property
    def server(self) -> tuple[int, int]:
        """Points that agree in this use the same one."""
        return self.registered, self.rank


@dataclass(frozen=True, slots=True)
class Axis:
    """What grows, over which values, and the load at each of them."""

    label: str
    values: tuple[int, ...]
    point: Callable[[int], Point]


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians of the rounds at one value of an axis, and the server's memory after the last."""

    value: int
    tokens_per_second: float
    first_token_p50_seconds: float
    time_per_token_p50_seconds: float
    memory_mib: float


AXES: Mapping[str, Axis] = MappingProxyType(
    {
        "registered": Axis(
            "adapters registered",
            (1, 5, 50, 500, 2000),
            lambda value: Point(
                registered=value, rank=8, num_adapters=value, streams=16, prompt_words=16
            ),
        ),
        "batch": Axis(
            "adapters in the batch",
            (0, 1, 2, 4, 8, 16, 32),
            lambda value: Point(num_adapters=value),
        ),
        "rank": Axis("rank", (8, 16, 32, 64), lambda value: Point(rank=value)),
        "streams": Axis("streams", (1, 2, 4, 8, 16, 32, 64), lambda value: Point(streams=value)),
        "prompt": Axis(
            "prompt words",
            (32, 128, 512, 1000, 2000),
            lambda value: Point(streams=4, num_adapters=4, prompt_words=value, new_tokens=8),
        ),
    }
)


def sweep(name: str, folder: Path, *, rounds: int, most: int, requests: int) -> str:
    """Measure one of AXES up to a value; the table, which is also in `folder` with a plot.

    All servers are started first, and each is held still while another is measured. A round has
    `requests` times as many requests as streams. RuntimeError if a request fails.
    """
    axis = AXES[name]
    points = {value: axis.point(value) for value in axis.values if value <= most}
    rounds_of: dict[int, list[Figures]] = {value: [] for value in points}
    memory: dict[int, float] = {}
    with ExitStack() as stack:
        servers: dict[tuple[int, int], Server] = {}
        for point in points.values():
            if point.server not in servers:
                servers[point.server] = stack.enter_context(_server(point, folder))
                servers[point.server].hold_still()
        for number in range(rounds + 1):
            for value, point in points.items():
                typer.echo(f"round {number} of {rounds}: {value} {axis.label}", err=True)
                server = servers[point.server]
                with only(server, servers.values()):
                    found = _measure(point, server, number, requests)
                memory[value] = server.resident_mib
                if number > 0:  # the first one warms up
                    rounds_of[value].append(found)
    measured = [_medians(value, rounds_of[value], memory[value]) for value in points]
    return _write(name, axis, measured, folder)


def _server(point: Point, folder: Path) -> AbstractContextManager[Server]:
    name = f"{point.registered}-rank-{point.rank}"
    adapters = folder / f"adapters-{name}"
    write_adapters(adapters, point.registered, Kind("A", (point.rank,)))
    memory = memory_settings(adapters, min(point.registered, 64))
    typer.echo(f"starting a server with {point.registered} adapters of rank {point.rank}", err=True)
    arguments = ("--model-name", BASE, "--adapters", str(adapters), *memory)
    return our_server(folder / f"server-{name}.log", *arguments)


def _measure(point: Point, server: Server, number: int, requests: int) -> Figures:
    settings = Settings(
        base=BASE,
        num_requests=requests * point.streams,
        num_adapters=point.num_adapters,
        prompt_words=(point.prompt_words, point.prompt_words),
        new_tokens=(point.new_tokens, point.new_tokens),
        seed=number,
    )
    # Of many adapters S-LoRA's uniform draw, so that not the same few are asked in every round.
    many = "distinct" if point.num_adapters <= point.streams else "slora"
    workload = draw(many if point.num_adapters else "base", settings)
    return measure_whole(server.url, workload, num_streams=point.streams)


def _medians(value: int, rounds: Sequence[Figures], memory: float) -> Measured:
    return Measured(
        value,
        statistics.median(each.tokens_per_second for each in rounds),
        statistics.median(each.first_token_seconds.p50 or 0.0 for each in rounds),
        statistics.median(each.time_per_token_seconds.p50 or 0.0 for each in rounds),
        memory,
    )


def _write(name: str, axis: Axis, measured: Sequence[Measured], folder: Path) -> str:
    headings = [axis.label, "output tokens/s", "first token p50, ms", "time per token p50, ms"]
    columns = [
        [
            each.tokens_per_second,
            1000 * each.first_token_p50_seconds,
            1000 * each.time_per_token_p50_seconds,
        ]
        for each in measured
    ]
    if len({axis.point(each.value).server for each in measured}) == len(measured):
        # Where values share a server, its memory says nothing of any of them.
        headings.append("memory of the server, MiB")
        for each, column in zip(measured, columns, strict=True):
            column.append(each.memory_mib)
    rows = [
        (str(each.value), *map(figure, column))
        for each, column in zip(measured, columns, strict=True)
    ]
    text = f"{describe_machine()}\n\n{table(headings, rows)}"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    content = {"machine": describe_machine(), "points": [asdict(each) for each in measured]}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    if can_plot():
        from loadtest.plots import plot_curves

        curves = {
            heading: [
                (each.value, column[number]) for each, column in zip(measured, columns, strict=True)
            ]
            for number, heading in enumerate(headings[1:])
        }
        plot_curves(folder / f"{name}.png", axis.label, curves)
    return text
