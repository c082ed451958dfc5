"""The same workload on this server and on its peers in turn, over several rounds.

Every server is started once and held still while another is measured.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import typer

from loadtest.adapters import Kind, write_adapters
from loadtest.capacity import BASE, measure_whole
from loadtest.comparison import (
    CASES,
    DRAFTING,
    DTYPE,
    MERGED,
    NUM_ADAPTERS,
    OURS,
    OURS_HALF,
    PEFT,
    Case,
    Comparison,
    Contender,
)
from loadtest.endpoint import Endpoint, OpenAiEndpoint
from loadtest.peers import (
    LlamaCpp,
    LlamaCppBase,
    LlamaCppOne,
    Peer,
    VllmCpu,
    peft_tokens_per_second,
)
from loadtest.questions import QUESTIONS
from loadtest.servers import Server, only, our_server, running
from loadtest.workloads import Settings, adapter_name, draw
from sharelora_serve.models.source import base_folder

_RANK = 16
_PROMPT_WORDS = 32
_WARMING_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    peers       folder in which they are, or are set up
    requests    of a round of 32 streams; fewer streams have fewer
    new_tokens  of an answer; where first tokens are measured half as many to half as many more
    """

    peers: Path
    rounds: int
    requests: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A server that runs, and how it is asked."""

    server: Server
    endpoint: Endpoint


def compare(plan: Plan, out: Path) -> Comparison:
    """Measure everything; compare.md and compare.json in `out` are as of the last whole round.

    What cannot be set up, started or answered is left out, and the notes say why.
    """
    comparison = Comparison()
    with ExitStack() as stack:
        contest = _Contest(plan, out, comparison, stack)
        contest.play_round(None)
        for number in range(1, plan.rounds + 1):
            contest.play_round(number)
            (out / "compare.md").write_text(comparison.markdown(), encoding="utf-8")
            (out / "compare.json").write_text(comparison.json())
    return comparison


class _Contest:
    """All servers, running and held still."""

    def __init__(self, plan: Plan, out: Path, comparison: Comparison, stack: ExitStack) -> None:
        self._plan = plan
        self._out = out
        self._comparison = comparison
        self._stack = stack
        self._model_folder = base_folder(None)
        self._adapters = plan.peers / f"adapters-rank-{_RANK}"
        self._gguf = plan.peers / f"adapters-rank-{_RANK}-gguf"
        self._entries: dict[str, _Entry] = {}
        kind = Kind("A", (_RANK,), expanded=True)
        write_adapters(self._adapters, NUM_ADAPTERS, kind, gguf=self._gguf)
        peers: list[Peer] = [
            peer_type(plan.peers) for peer_type in (VllmCpu, LlamaCpp, LlamaCppOne, LlamaCppBase)
        ]
        # Before anything is started: compilers need the memory.
        peers = [peer for peer in peers if self._succeeds(self._prepare, peer)]
        for name in dict.fromkeys((OURS, OURS_HALF)):
            self._start_ours(name, "--dtype", name.rpartition(" ")[2])
        self._start_ours(MERGED, "--dtype", DTYPE, "--merge", adapter_name(0))
        self._start_ours(DRAFTING, "--dtype", DTYPE, drafts=True)
        for peer in peers:
            self._succeeds(self._start, peer)

    def play_round(self, number: int | None) -> None:
        """Measure every case with every contender; None is a short one that counts for nothing."""
        for case in CASES:
            for contender in case.contenders:
                is_there = contender.server in self._entries
                if not is_there and (contender.server != PEFT or number is None):
                    continue  # PEFT, which is no server, warms itself up
                what = f"{'warming up' if number is None else f'round {number}'}: {case.name}"
                typer.echo(f"{what}: {contender.server}", err=True)
                try:
                    value = self._measure(case, contender, number)
                except RuntimeError as error:
                    self._comparison.leave_out(f"{what}: {contender.server}", error)
                else:
                    if number is not None:
                        self._comparison.values[case.name, contender.server][number] = value

    def _measure(self, case: Case, contender: Contender, number: int | None) -> float:
        """The figure; RuntimeError if a request was not answered."""
        if contender.server == PEFT:
            return peft_tokens_per_second(
                self._model_folder, self._adapters, case.num_adapters, self._plan.new_tokens
            )
        entry = self._entries[contender.server]
        is_warming = number is None
        # A lone stream has twice its share: with less its figure would be of one or two requests.
        share = (case.streams if case.streams > 1 else 2) / 32
        new_tokens = _WARMING_TOKENS if is_warming else self._plan.new_tokens
        spread = 0
        if case.is_waiting:  # streams that keep step would only tell how long a burst waits
            share, spread = 2 * share, new_tokens // 2
        num_requests = max(1, int(self._plan.requests * share))
        if contender.workload == "questions":
            num_requests = len(QUESTIONS)
        settings = Settings(
            base=BASE,
            num_requests=case.streams if is_warming else num_requests,
            num_adapters=case.num_adapters,
            prompt_words=(_PROMPT_WORDS, _PROMPT_WORDS),
            new_tokens=(new_tokens - spread, new_tokens + spread),
            seed=number or 0,
        )
        workload = draw(contender.workload, settings)
        with only(entry.server, (each.server for each in self._entries.values())):
            found = measure_whole(
                entry.server.url, workload, endpoint=entry.endpoint, num_streams=case.streams
            )
        value = case.read(found)
        if value is None:
            raise RuntimeError("no answer had a token")
        return value

    def _succeeds(self, step: Callable[[Peer], None], peer: Peer) -> bool:
        """Take a step with a peer, which is left out if it fails."""
        try:
            step(peer)
        except RuntimeError as error:
            self._comparison.leave_out(peer.name, error)
            return False
        return True

    def _start_ours(self, name: str, *arguments: str, drafts: bool = False) -> None:
        typer.echo(f"starting {name}", err=True)
        log = self._out / f"server-{len(self._entries)}.log"
        settings = ("--model-name", BASE, "--adapters", str(self._adapters), *arguments)
        server = self._stack.enter_context(our_server(log, *settings, drafts=drafts))
        self._add(name, server, OpenAiEndpoint())

    def _prepare(self, peer: Peer) -> None:
        typer.echo(f"setting up {peer.name}, if it is not in {peer.folder}", err=True)
        peer.prepare()

    def _start(self, peer: Peer) -> None:
        typer.echo(f"starting {peer.name}", err=True)
        command = peer.command(self._model_folder, self._adapters, self._gguf)
        log = self._out / f"server-{len(self._entries)}.log"
        server = self._stack.enter_context(running(command, log))
        self._add(peer.name, server, peer.endpoint(server.url, BASE))

    def _add(self, name: str, server: Server, endpoint: Endpoint) -> None:
        self._entries[name] = _Entry(server, endpoint)
        server.hold_still()
