"""Changes of adapters when the disk fails after them, and when the server stops before them."""

import asyncio
import socket
import threading
from typing import Any, cast

import httpx
import uvicorn
from starlette.testclient import TestClient

from sharelora_serve.adapters.adapter import AdapterVersion
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.published import Published
from sharelora_serve.adapters.store import StoredVersion
from sharelora_serve.adapters.summary import AdapterSummary
from sharelora_serve.cli.serve import _Server
from sharelora_serve.config import ServeConfig
from sharelora_serve.errors import StorageError
from sharelora_serve.server.app import create_app
from tests.server.silent_engine import NO_ENGINE, SilentEngine, silent_context
from tests.server.tokenizers import byte_level

SUMMARY = AdapterSummary("LoRA", False, (8,), ("self_attn.q_proj",), 1, 2, 64, 64)
ACME = Published(
    AdapterName(None, "acme"), AdapterVersion("acme", "0" * 64), SUMMARY, False, False, 0
)


class FailingRegistry:
    """One adapter, whose versions can be read while `is_readable`."""

    def __init__(self) -> None:
        self.is_readable = True
        self.read_by: set[str] = set()

    def find(self, *_names: AdapterName) -> Published:
        return ACME

    def set_pinned(self, _name: AdapterName, _is_pinned: bool) -> Published:
        return ACME

    def versions(self, _name: AdapterName) -> list[StoredVersion]:
        self.read_by.add(threading.current_thread().name)
        if not self.is_readable:
            raise StorageError("the disk fails")
        return [StoredVersion(ACME.version.digest, 0)]


class SlowRegistry:
    """Removals take until `may_end`."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.begun: list[str] = []

    def remove(self, name: AdapterName, *, expected: str | None) -> None:
        assert expected is None
        self.begun.append(name.text)
        assert self.may_end.wait(30)


def test_a_change_that_was_done_is_answered_though_its_versions_cannot_be_read() -> None:
    registry = FailingRegistry()
    app = create_app(NO_ENGINE, ServeConfig())
    app.state.context = silent_context(SilentEngine(), byte_level(), registry=registry)
    client = TestClient(app)
    for path in "/v1/adapters/acme", "/v1/adapters/acme/pin":
        registry.is_readable = True
        method = "GET" if path.endswith("acme") else "POST"
        assert len(client.request(method, path).json()["versions"]) == 1
        registry.is_readable = False
        answer = client.request(method, path)
        if method == "GET":
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_failed")
        else:
            assert (answer.status_code, answer.json()["versions"]) == (200, None)
            assert answer.headers["etag"] == f'"{ACME.version.digest}"'
    # Not asyncio's workers, for which requests to generate wait.
    assert all(name.startswith("reader") for name in registry.read_by)


def test_changes_that_wait_when_a_server_stops_are_refused_and_those_begun_end() -> None:
    registry, engine = SlowRegistry(), SilentEngine()
    app = create_app(NO_ENGINE, ServeConfig(drain_seconds=0.2))
    app.state.context = silent_context(engine, byte_level(), registry=registry)
    drain, names = app.state.drain, [f"adapter-{number}" for number in range(6)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = _Server(
            uvicorn.Config(app, log_config=None, lifespan="off"),
            cast(Any, engine),
            drain,
            app.state.stop_changes,
            lambda: None,
        )

        async def change_and_stop() -> dict[str, httpx.Response]:
            serving = asyncio.create_task(server.serve([listener]))
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                changes = {
                    name: asyncio.create_task(client.delete(f"/v1/adapters/{name}"))
                    for name in names
                }
                while len(registry.begun) < 2 or drain.num_open < len(names):
                    await asyncio.sleep(0.01)
                drain.begin()
                await asyncio.wait(changes.values(), return_when=asyncio.FIRST_COMPLETED)
                registry.may_end.set()
                answers = {name: await change for name, change in changes.items()}
            await serving
            return answers

        answers = asyncio.run(change_and_stop())
    assert len(registry.begun) == 2
    for name, answer in answers.items():
        if name in registry.begun:
            assert answer.status_code == 200
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
