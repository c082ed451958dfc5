"""What several tests of adapters publish, and the caches they put it into."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sharelora_serve.adapters.adapter import Adapter
from tests.adapters.shelves import BYTES, ROOM_FOR_TWO, Shelf
from tests.adapters.store_model import read_contents, write_contents


@pytest.fixture(scope="session")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("contents")
    write_contents(folder)
    return read_contents(folder)


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """Room for everything."""
    with Shelf(tmp_path, pool_bytes=1 << 16, host_bytes=1 << 20) as shelf:
        yield shelf


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Shelf]:
    """Room for two of the four on the device."""
    with Shelf(tmp_path, pool_bytes=ROOM_FOR_TWO, host_bytes=1 << 20) as shelf:
        yield shelf


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[Shelf]:
    """Room for one on the host and two on the device."""
    with Shelf(tmp_path, pool_bytes=ROOM_FOR_TWO, host_bytes=BYTES) as shelf:
        yield shelf
