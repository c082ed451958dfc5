"""Servers as processes of this one: started, held still while others are measured, and ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from loadtest.machine import resident_mib

_START_SECONDS = 900.0
_END_SECONDS = 60.0
_SHOWN_OF_LOG = 2000  # characters
_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Command:
    """How a server is started.

    ready_path   answers 200 as soon as the server takes requests
    environment  in addition to this process's own
    """

    words: Sequence[str]
    port: int
    ready_path: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where it will be."""
        return f"http://127.0.0.1:{self.port}"


class Server:
    """A running server, with all processes that it started itself."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self._process = process

    @property
    def resident_mib(self) -> float:
        """Memory that its first process has in RAM."""
        return resident_mib(self._process.pid)

    def hold_still(self) -> None:
        """Let it use no processor until it is to go on, as if it were not there."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Ask it to end, and make it end if it does not."""
        self.go_on()
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._signal(signal.SIGKILL)  # also what outlives the process that started it
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@contextmanager
def running(command: Command, log: Path) -> Iterator[Server]:
    """A server that takes requests. Raises RuntimeError with the end of its log if it ends first.

    Its process leads a group of its own, so that signals reach whatever it starts. Settings of this
    project's server in the environment (SHARELORA_...) do not reach it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SHARELORA_")
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command.words),
            stdout=output,
            stderr=output,
            env=environment | dict(command.environment),
            start_new_session=True,
        )
    server = Server(command.url, process)
    try:
        _wait_until_ready(command, process, log)
        yield server
    finally:
        server.end()


@contextmanager
def only(server: Server, servers: Iterable[Server]) -> Iterator[None]:
    """Of all servers let this one run, and none of them afterwards."""
    for each in servers:
        each.hold_still()  # again: what freezes and thaws this process wakes all of them
    server.go_on()
    try:
        yield
    finally:
        server.hold_still()


@contextmanager
def our_server(log: Path, *arguments: str, drafts: bool = False) -> Iterator[Server]:
    """This project's, without a prefix cache and with a store that is forgotten, beside the log.

    Prompts are drawn from few words, and what a cache of their beginnings saves is not measured.
    Nor is what drafts save, unless they are asked for: greedy answers to such repeat themselves.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="store-", dir=log.parent) as store:
        words = (
            *(sys.executable, "-m", "sharelora_serve.cli", "serve", "--port", str(port)),
            *("--store", store, "--no-prefix-cache", "--log-level", "warning"),
            *(() if drafts else ("--speculative-tokens", "0")),
            *arguments,
        )
        with running(Command(words, port, "/ready"), log) as server:
            yield server


def memory_settings(folder: Path, in_batch: int, *, share: float = 1.0) -> tuple[str, ...]:
    """Arguments of a server that give a share of a folder's adapters room, half in each tier.

    A share of 1 is all of them in host memory, and on the device as many as a batch has; 512 MiB at
    least of each. Below 1 the two tiers mostly hold the same ones: those that were asked last.
    """
    sizes = [file.stat().st_size for file in folder.glob("t*/adapter_model.safetensors")]
    if share < 1:
        host = int(share / 2 * sum(sizes))
        device = max(host, 2 * max(sizes, default=0))  # less would serve nothing
    else:
        # Pages and blocks of files hold a little more than the bytes of a file.
        device = max(512 * _MIB, int(1.25 * in_batch * max(sizes, default=0)))
        host = max(512 * _MIB, int(1.25 * sum(sizes)))
    return ("--adapter-memory", f"{device}B", "--adapter-host-memory", f"{host}B")


def free_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(command: Command, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(command.url + command.ready_path, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.2)
    said = log.read_text(errors="replace")[-_SHOWN_OF_LOG:]
    raise RuntimeError(f"{command.words[0]} did not start; {log} ends with:\n{said}")
