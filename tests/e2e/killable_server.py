"""A server that is killed and started again on the same store, many times.

Each is a process of its own with the command's own code, forked from one that has its modules
loaded: a start takes the time of reading the base.
"""

import multiprocessing
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from sharelora_serve.cli import main
from tests.e2e.server_process import START_SECONDS

_SLOW_IMPORTS = (
    __name__,
    "sharelora_serve.engine.load",
    "sharelora_serve.server.app",
    "transformers.models.llama.configuration_llama",
)


def _serve(arguments: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    for name in [name for name in os.environ if name.startswith("SHARELORA_")]:
        del os.environ[name]
    sys.argv = ["sharelora-serve", "serve", "--port", "0", *arguments]
    main()


class KillableServer:
    """Starts a server with the same arguments again and again; `url` is the running one's."""

    def __init__(self, model_folder: Path, folder: Path, *arguments: str) -> None:
        """Log and store are in `folder`."""
        settings = {
            "--model": str(model_folder),
            "--store": str(folder / "store"),
            "--dtype": "float32",
            "--kernels": "reference",  # nothing to compile
            "--kv-memory": "8MiB",
            "--adapter-memory": "32MiB",
            "--threads": "1",
        }
        self.store = folder / "store"
        self.url = ""
        self._arguments = [*(word for pair in settings.items() for word in pair), *arguments]
        self._log = folder / "log"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_SLOW_IMPORTS))

    @property
    def log(self) -> str:
        """What the last process said."""
        return self._log.read_text()

    def __enter__(self) -> "KillableServer":
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start a process; returns when it accepts requests."""
        self._log.unlink(missing_ok=True)
        self._process = self._context.Process(target=_serve, args=(self._arguments, self._log))
        self._process.start()
        deadline = time.monotonic() + START_SECONDS
        while (found := self._announcement()) is None:
            assert self._process.is_alive(), f"the server ended: {self.log}"
            assert time.monotonic() < deadline, f"the server did not start: {self.log}"
            time.sleep(0.02)
        self.url = found[1]

    def kill(self) -> None:
        """End the process at once, without a chance to put anything in order."""
        self._process.kill()
        self._process.join()

    @contextmanager
    def files_limited(self, num_bytes: int) -> Iterator[None]:
        """Every write beyond this size of a file fails, as on a full disk."""
        assert self._process.pid is not None, "there is a process"
        before = resource.prlimit(
            self._process.pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY)
        )
        yield
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, before)

    def http(self) -> httpx.Client:
        """A client that sends what it is told to; to be closed."""
        return httpx.Client(base_url=self.url, timeout=60)

    def _announcement(self) -> re.Match[str] | None:
        if not self._log.exists():
            return None
        return re.search(r"^Serving .* at (http://\S+)$", self.log, re.M)
