"""Hundreds of hostile uploads over HTTP, while good requests to another adapter go on."""

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from sharelora_serve.models.config import load_model_config
from tests.adapters.hostile import MAX_BYTES, hostile_uploads
from tests.e2e.adapter_folders import write_adapters
from tests.e2e.tenants import Client, Shop, open_shop, zipped_folder

MAX_GROWTH_BYTES = 256 * 1024**2
"""Of the resident memory, over all uploads: less than the bombs among them hold."""

UNCHANGED = (
    "sharelora_adapters_published", "sharelora_adapters_pinned", "sharelora_adapter_factors",
    "sharelora_adapter_memory_bytes", "sharelora_adapters_resident", "sharelora_kv_blocks_used",
    "sharelora_adapter_loads_in_progress", "sharelora_adapter_load_failures",
    "sharelora_adapter_evictions", "sharelora_requests_waiting", "sharelora_requests_running",
)  # fmt: skip


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, seed: int) -> bytes:
    """The upload of an adapter that is good."""
    folder = write_adapters(tmp_path_factory.mktemp("good"), model_folder, seed)
    return zipped_folder(folder / "acme")


@pytest.fixture(scope="module")
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server makes its temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def shop(
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Path,
    temporary_folder: Path,
    content: bytes,
) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    settings = {"--max-adapter-bytes": str(MAX_BYTES)}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("TMPDIR", str(temporary_folder))
        shop = stack.enter_context(open_shop(folder, model_folder, **settings))
        assert shop.admin.create("good", content).status_code == 201
        assert shop.acme.create("mine", content).status_code == 201
        yield shop


@contextmanager
def steady_requests(shop: Shop) -> Iterator[list[list[str]]]:
    """Answers of an adapter, one after the other, for as long as the block lasts."""
    answers: list[list[str]] = []
    is_over = threading.Event()

    def ask(client: Client) -> None:
        while not is_over.is_set():
            answers.append(client.tokens("good"))

    # A client of its own: httpx' are for one thread.
    with Client(base_url=shop.server.url, headers=shop.bolt.headers, timeout=60) as client:
        thread = threading.Thread(target=ask, args=(client,))
        thread.start()
        try:
            yield answers
        finally:
            is_over.set()
            thread.join()


def figures(shop: Shop) -> dict[str, float]:
    """Those of UNCHANGED, and how many files the process has open."""
    text = shop.admin.get("/metrics").text
    found = {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        if name.startswith(UNCHANGED)
    }
    assert len(found) > len(UNCHANGED)
    return found


def wait_until_idle(shop: Shop) -> None:
    busy = ("sharelora_requests_running", "sharelora_adapter_loads_in_progress")
    deadline = time.monotonic() + 10
    while any(figures(shop)[name] for name in busy):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def num_open_files(shop: Shop) -> int:
    """Without connections: those are the clients'."""
    folder = Path(f"/proc/{shop.server.pid}/fd")
    targets = [os.readlink(path) for path in folder.iterdir() if path.is_symlink()]
    return sum(not target.startswith("socket:") for target in targets)


def resident_bytes(shop: Shop) -> int:
    pages = Path(f"/proc/{shop.server.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def registry(shop: Shop) -> list[tuple[str, str]]:
    listed = shop.admin.get("/v1/adapters").json()["data"]
    return [(adapter["name"], adapter["version"]) for adapter in listed]


def assert_refused(answer: httpx.Response, kind: str) -> None:
    assert 400 <= answer.status_code < 500, (kind, answer.status_code, answer.text[:500])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, kind
    assert error["code"] in ("adapter_invalid", "request_too_large"), (kind, error)
    assert 20 < len(error["message"]) < 8000, kind


def test_hostile_uploads_change_nothing_and_disturb_no_request(
    shop: Shop, model_folder: Path, temporary_folder: Path, seed: int
) -> None:
    layout = load_model_config(model_folder).layout("tiny")
    rng = random.Random(seed)
    alone = shop.bolt.tokens("good")
    wait_until_idle(shop)
    before, adapters = figures(shop), registry(shop)
    num_files, num_bytes = num_open_files(shop), resident_bytes(shop)
    num_refused = 0
    with steady_requests(shop) as answers:
        for kind, upload in hostile_uploads(layout, seed):
            assert_refused(shop.acme.create(f"bad-{num_refused}", upload), kind)
            if rng.random() < 0.1:
                assert_refused(shop.acme.publish("mine", upload), f"PUT {kind}")
            num_refused += 1
    assert num_refused > 800
    assert len(answers) > 50
    assert all(answer == alone for answer in answers)
    wait_until_idle(shop)
    assert figures(shop) == before
    assert registry(shop) == adapters
    assert num_open_files(shop) == num_files
    assert list((shop.keys.parent / "store" / "incoming").iterdir()) == []
    assert list(temporary_folder.rglob("*")) == []
    assert resident_bytes(shop) - num_bytes < MAX_GROWTH_BYTES
    assert "Traceback" not in shop.server.log
