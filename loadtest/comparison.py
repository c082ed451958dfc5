"""What is compared with peers, and what came of it."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loadtest.figures import Figures
from loadtest.machine import describe_machine
from loadtest.markdown import figure, table
from loadtest.peers import LlamaCpp, LlamaCppBase, LlamaCppOne, VllmCpu
from sharelora_serve.kernels.cpu import multiplies_bfloat16

NUM_ADAPTERS = 32
DTYPE = "bfloat16" if multiplies_bfloat16() else "float16"  # whichever is faster here
OURS = f"ShareLoRA Serve, {DTYPE}"
OURS_HALF = "ShareLoRA Serve, float16"
MERGED = f"{OURS}, merged"
DRAFTING = f"{OURS}, guessing ahead"
PEFT = "PEFT generate, float32"


@dataclass(frozen=True, slots=True)
class Contender:
    """Who plays a case: a server by its name, and the kind of workload."""

    server: str
    workload: str = "distinct"


@dataclass(frozen=True, slots=True)
class Case:
    """What is compared.

    read        the figure
    aim         of ours, as a multiple of each contender's: at least, or at most if is_waiting
    contenders  ours first, of which the ratios are
    """

    name: str
    num_adapters: int
    streams: int
    unit: str
    read: Callable[[Figures], float | None]
    aims: Mapping[str, float]
    is_waiting: bool
    contenders: tuple[Contender, ...]


def _throughput(found: Figures) -> float | None:
    return found.tokens_per_second


def _first_token(found: Figures) -> float | None:
    return found.first_token_seconds.p50


def _contenders(*servers: str) -> tuple[Contender, ...]:
    return tuple(map(Contender, dict.fromkeys(servers)))  # OURS may be OURS_HALF


CASES = (
    Case(
        name="32 streams over 32 adapters",
        num_adapters=NUM_ADAPTERS,
        streams=32,
        unit="tokens/s",
        read=_throughput,
        aims={VllmCpu.name: 7.0, LlamaCpp.name: 6.0},
        is_waiting=False,
        contenders=_contenders(OURS, OURS_HALF, VllmCpu.name, LlamaCpp.name, PEFT),
    ),
    Case(
        name="one stream, one adapter, merged here",
        num_adapters=1,
        streams=1,
        unit="tokens/s",
        read=_throughput,
        aims={LlamaCppBase.name: 1.3, LlamaCppOne.name: 1.3},
        is_waiting=False,
        contenders=(
            Contender(MERGED),
            Contender(LlamaCppOne.name),
            Contender(LlamaCppBase.name, "base"),
        ),
    ),
    Case(
        name="one stream of questions to the base",
        num_adapters=0,
        streams=1,
        unit="tokens/s",
        read=_throughput,
        aims={LlamaCppBase.name: 1.2},
        is_waiting=False,
        contenders=(
            Contender(DRAFTING, "questions"),
            Contender(OURS, "questions"),
            Contender(LlamaCppBase.name, "questions"),
        ),
    ),
    Case(
        name="first token at the 50th percentile, 16 streams over 16 adapters",
        num_adapters=16,
        streams=16,
        unit="s",
        read=_first_token,
        aims={VllmCpu.name: 0.5, LlamaCpp.name: 0.5},
        is_waiting=True,
        contenders=_contenders(OURS, OURS_HALF, VllmCpu.name, LlamaCpp.name),
    ),
)


class Comparison:
    """What was measured: a value per case, contender and round, or why there is none."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
        self.notes: list[str] = []

    def leave_out(self, what: str, reason: RuntimeError) -> None:
        """Note why something has no value."""
        self.notes.append(f"left out: {what}: {' '.join(str(reason).split())}")

    def ratios(self, case: Case, server: str) -> list[float]:
        """Ours by theirs, of every round that has both."""
        ours = self.values[case.name, case.contenders[0].server]
        theirs = self.values[case.name, server]
        return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]

    def rows(self) -> list[tuple[str, ...]]:
        """A line for each case and contender: medians, and ours by theirs."""
        rows: list[tuple[str, ...]] = []
        for case in CASES:
            for contender in case.contenders:
                server = contender.server
                values = list(self.values[case.name, server].values())
                shown = f"{_median_and_range(values)} {case.unit}" if values else "not measured"
                is_ours = contender is case.contenders[0]
                ratios = "" if is_ours else _median_and_range(self.ratios(case, server))
                rows.append((case.name, server, shown, ratios, _aim(case, server)))
        return rows

    def markdown(self) -> str:
        """The table, the machine and what is to be said of single rounds."""
        headings = ("load", "server", "median (least to most)", "ours by this", "aim")
        return "\n".join(
            [
                describe_machine() + "\n",
                table(headings, self.rows()),
                *(f"- {note}" for note in self.notes),
            ]
        )

    def json(self) -> str:
        """Every value of every round."""
        content = {
            "machine": describe_machine(),
            "cases": [
                {
                    "load": case.name,
                    "server": contender.server,
                    "unit": case.unit,
                    "rounds": self.values[case.name, contender.server],
                    "ratios": self.ratios(case, contender.server),
                }
                for case in CASES
                for contender in case.contenders
            ],
            "notes": self.notes,
        }
        return json.dumps(content, indent=1) + "\n"


def _median_and_range(values: Sequence[float]) -> str:
    if not values:
        return ""
    summary = (statistics.median(values), min(values), max(values))
    middle, least, most = map(figure, summary)
    return f"{middle} ({least} to {most})"


def _aim(case: Case, server: str) -> str:
    aim = case.aims.get(server)
    return "" if aim is None else f"{'<=' if case.is_waiting else '>='} {aim:g}"
