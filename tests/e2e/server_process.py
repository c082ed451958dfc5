"""A real server: its own process, on a real socket."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 600.0
SOON_SECONDS = 10.0

COMMAND = (sys.executable, "-m", "sharelora_serve.cli", "serve", "--port", "0")


class ServerProcess:
    """A running server, how to talk to it and how to end it."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.url = url
        self._process = process
        self.folder = log.parent
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def pid(self) -> int:
        return self._process.pid

    def openai(self, api_key: str = "none") -> OpenAI:
        """The official client; to be closed."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def http(self, timeout: float = 60.0) -> httpx.Client:
        """A client that sends what it is told to; to be closed."""
        return httpx.Client(base_url=self.url, timeout=timeout)

    def metrics(self) -> dict[str, float]:
        """Every figure by its name and labels, such as `sharelora_requests_total{outcome=stop}`."""
        text = httpx.get(f"{self.url}/metrics").text
        return {
            sample.name + "".join(f"{{{key}={value}}}" for key, value in sample.labels.items()): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def wait_for(self, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The figures as soon as they fulfil a condition."""
        deadline = time.monotonic() + SOON_SECONDS
        while not condition(figures := self.metrics()):
            assert time.monotonic() < deadline, f"it never came to that: {figures}"
            time.sleep(0.02)
        return figures

    def wait_until_idle(self) -> dict[str, float]:
        """The figures as soon as no request holds anything."""
        return self.wait_for(
            lambda figures: (
                not any(
                    figures[f"sharelora_{name}"]
                    for name in ("requests_running", "requests_waiting", "kv_blocks_used")
                )
            )
        )

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal, such as what an orchestrator sends first, SIGTERM."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit code, once the process has ended."""
        return self._process.wait(START_SECONDS)


@contextmanager
def running_server(
    log: Path, *arguments: str, command: Sequence[str] = COMMAND
) -> Iterator[ServerProcess]:
    """A server that accepts requests; on leaving it is ended if it still runs.

    What is published stays in the folder `store` beside the log, unless told otherwise.
    """
    if "--store" not in arguments:
        arguments = (*arguments, "--store", str(log.parent / "store"))
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, *arguments], stdout=output, stderr=output, env=_environment()
        ) as process,
    ):
        try:
            yield ServerProcess(process, _announced_url(process, log), log)
        finally:
            process.terminate()
            process.wait(START_SECONDS)


def run_to_its_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a server that cannot start."""
    with TemporaryDirectory() as store:
        return subprocess.run(
            [*COMMAND, "--store", store, *arguments],
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )


def _announced_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    announced = re.compile(r'^Serving .* at (http://\S+)$|"url": "(http://[^"]+)"', re.MULTILINE)
    while (found := announced.search(log.read_text())) is None:
        assert process.poll() is None, f"the server ended: {log.read_text()}"
        assert time.monotonic() < deadline, f"the server did not start: {log.read_text()}"
        time.sleep(0.05)
    return found[1] or found[2]


def _environment() -> dict[str, str]:
    """This process' own, without settings of a server and without a hub to ask."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHARELORA_")}
    return kept | {"HF_HUB_OFFLINE": "1"}
