"""Hundreds of hostile uploads over HTTP, while good requests to another adapter go on."""

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    with (
        pytest.MonkeyPatch.context() as patch,
        open_shop(folder, model_folder, **{"--max-adapter-bytes": str(MAX_BYTES)}) as shop,
    ):
        patch.setenv("TMPDIR", str(temporary_folder))
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
